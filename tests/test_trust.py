"""A run directory that came from elsewhere: what it names is not called unless it is lmlab's own, or trusted."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lmlab.config import trust
from lmlab.config.compose import SHARDED, read_config
from tests.conftest import TINY, Refused, run_verb

OURS = """
import os
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lmlab.data import sources

Path(__file__).with_name("imported").touch()

class Silent(Callback):
    pass

def load(text):
    return sources.load_sample(text)

def flat(done, decay_ratio):
    return 1.0
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trusted") / "run"
    run_verb("train", *TINY, f"hydra.run.dir={run}")
    return run


@pytest.fixture
def received(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run whose config somebody has changed."""

    def make(**changes: object) -> Path:
        place = tmp_path / "received"
        shutil.copytree(whole, place)
        cfg = OmegaConf.load(place / "config.yaml")
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        OmegaConf.save(cfg, place / "config.yaml")
        return place

    return make


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's; the path is there once it was imported."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text(OURS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("ours", None)
    importlib.invalidate_caches()
    return tmp_path / "ours" / "imported"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks.more", {"_target_": "os.system", "command": "touch SEEN"}),
        ("data", {"_target_": "os.system", "command": "touch SEEN"}),
        ("data._target_", "lmlab.processes.run"),
        ("callbacks.samples.inner", {"_target_": "os.system", "command": "touch SEEN"}),
        ("callbacks.samples.list", [1, {"_target_": "os.system", "command": "touch SEEN"}]),
        ("callbacks.more", {"_target_": "lmlab.data.sources.load_sample"}),
        ("callbacks.more", {"_target_": "lmlab.distributed.launch.os.system", "command": "touch SEEN"}),
        ("model._target_", "torch.hub.load"),
        ("tokenizer._target_", "transformers.AutoTokenizer.from_pretrained"),
        ("objective._target_", "lmlab.objectives.mlm.uniform"),
        ("trainer.strategy", {"_target_": "lightning.pytorch.strategies.model_parallel.ModelParallelStrategy"}),
        ("trainer._target_", "subprocess.Popen"),
        ("logger.more", {"_target_": "lmlab.training.loggers.wandb.partial"}),
        ("preprocess._target_", "lmlab.data.sources.load_sample"),
        ("optim.schedule", "os.system"),
        ("optim.schedule", "lmlab.processes.run"),
        ("data._target_", "${oc.env:HOME}"),
        ("callbacks.more", "${oc.decode:'{_target_: os.system, command: touch SEEN}'}"),
        ("data.text", "${oc.env:HOME}"),
    ],
)
def test_resume_refuses_what_is_not_used_there(
    key: str, value: object, received: Callable[..., Path], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = received(**{key: value})
    monkeypatch.chdir(run.parent)
    before = (run / "config.yaml").read_bytes()
    for words in (["trainer.max_steps=6"], ["--fresh", "--into", run.parent / "fresh"]):
        said = refused("resume", run, *words)
        assert f"{key}" in said
        assert "SEEN" not in said or "interpolation" in said
        if "interpolation" not in said:
            assert "add trust=" in said
    assert not (run.parent / "SEEN").exists()
    assert not (run.parent / "fresh").exists()
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("key", ["data", "objective"])
def test_evaluate_refuses_it_too(key: str, received: Callable[..., Path], refused: Refused, tmp_path: Path) -> None:
    run = received(**{key: {"_target_": "os.system", "command": f"touch {tmp_path}/SEEN"}})
    said = refused("evaluate", f"model={run}", f"hydra.run.dir={tmp_path}/evaluation")
    assert f"{key}._target_=os.system" in said
    assert "trust=os" in said
    assert not (tmp_path / "SEEN").exists()
    assert not (tmp_path / "evaluation" / "manifest.json").exists()


def test_a_package_is_allowed_by_its_name(
    received: Callable[..., Path], ours: Path, refused: Refused, tmp_path: Path
) -> None:
    """By `trust`, and where the command, or a file of its --config-dir, names what is wanted of it."""
    named = {"data._target_": "ours.load", "callbacks.ours": {"_target_": "ours.Silent"}, "optim.schedule": "ours.flat"}
    run = received(**named)
    assert "trust=ours" in refused("resume", run, "trainer.max_steps=6")
    assert "trust=ours" in refused("resume", run, "trainer.max_steps=6", "trust=[other,ours.flat]")
    assert "trust=[1]" in refused("resume", run, "trust=[1]")
    evaluation = f"hydra.run.dir={tmp_path}/evaluation"
    assert "trust=ours" in refused("evaluate", f"model={run}", evaluation)
    assert not ours.exists()
    assert "data._target_=ours.load" in refused("resume", run, "trainer.max_steps=6", "optim.schedule=ours.flat")
    given = ["callbacks.ours._target_=ours.Silent", "data._target_=ours.load", "optim.schedule=ours.flat"]
    run_verb("resume", run, "trainer.max_steps=6", *given)
    run_verb("resume", run, "trainer.max_steps=8", "trust=ours")
    run_verb("resume", run, "--fresh", "--into", tmp_path / "fresh", "trust=[ours]")
    assert "trust" not in OmegaConf.load(run / "config.yaml")
    assert "trust" not in (tmp_path / "fresh" / "overrides.yaml").read_text()
    run_verb("evaluate", f"model={run}", "trust=ours", evaluation)
    assert "trust" not in OmegaConf.load(tmp_path / "evaluation" / "config.yaml")
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "ours.yaml").write_text("_target_: ours.load\ntext: answers.text\n")
    more = ["--config-dir", tmp_path / "mine", f"model={run}"]
    run_verb("evaluate", *more, f"hydra.run.dir={tmp_path}/second")
    assert trust.named_by_command(["a"], tmp_path / "mine") == ["ours.load"]


def test_what_older_versions_named_for_sharding_is_lmlabs_own(tmp_path: Path) -> None:
    OmegaConf.save({"trainer": {"strategy": {"_target_": SHARDED}}}, tmp_path / "config.yaml")
    cfg = read_config(tmp_path)
    trust.check_trusted(cfg, ())
    assert cfg.trainer.strategy == "fsdp"


def test_a_package_is_not_what_it_imports(received: Callable[..., Path], ours: Path, refused: Refused) -> None:
    run = received(**{"callbacks.more": {"_target_": "ours.os.system", "command": "touch SEEN"}})
    assert "add trust=ours.os.system" in refused("resume", run, "trainer.max_steps=6", "trust=ours")


def test_what_the_command_says_needs_no_trust(ours: Path, train: Callable[..., Path], refused: Refused) -> None:
    words = [*TINY, "+callbacks.ours._target_=ours.Silent"]
    run = train(*words)
    train(*words, "trainer.max_steps=6")
    assert "trust=ours" in refused("resume", run, "trainer.max_steps=8")
    run_verb("resume", run, "trainer.max_steps=8", "~callbacks.ours")
