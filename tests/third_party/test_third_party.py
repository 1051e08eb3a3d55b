"""A package from outside the repository: all commands use its objective, model and source as lmlab's own."""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmlab.config import build, models
from lmlab.config.compose import read_config
from lmlab.data.sampler import draws
from lmlab.evaluation import records

from ..conftest import HOME, TINY, Refused, blocks_of, metrics, run_verb

HERE = Path(__file__).parent
FEW = [word for word in TINY if not word.startswith(("model.", "callbacks."))]
FEW += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "callbacks.samples.count=1"]


@pytest.fixture(scope="module")
def theirs() -> Iterator[list[str]]:
    """The words that choose their objective, model and source, whose module can be imported meanwhile."""
    poems = Path(HOME) / "poems.txt"
    words = ["The cell", "a river", "of light", "is never", "quite still", "and then", "it drifts", "at night"]
    random = np.random.default_rng(0)
    poems.write_text("".join(" ".join(random.choice(words, 12)) + "\n" for _ in range(120)))
    sys.path.insert(0, str(HERE))
    yield ["--config-dir", str(HERE / "mine"), "objective=kept", "model=lstm", "data=poems", f"data.file={poems}", *FEW]
    sys.path.remove(str(HERE))
    del sys.modules["poem_lab"]


@pytest.fixture(scope="module")
def whole(theirs: list[str]) -> Path:
    """A finished run; not to be written to."""
    run = Path(HOME) / "third_party" / "run"
    run_verb("train", *theirs, f"hydra.run.dir={run}")
    return run


@pytest.fixture(scope="module")
def longer(whole: Path) -> Path:
    """The same run, made longer."""
    run = whole.parent / "longer"
    shutil.copytree(whole, run)
    run_verb("resume", run, "trust=poem_lab", "trainer.max_steps=6")
    return run


def own_model(width: int = 16) -> Any:
    """Their model, made without lmlab."""
    import poem_lab

    return poem_lab.LSTM(range(300), width)


def nll(model: Any, example: Any) -> torch.Tensor:
    """The nll of each target of an example [N], in float64."""
    logits = model(torch.from_numpy(example.inputs.astype("int64"))[None])[0].double()
    return -logits.log_softmax(-1)[example.positions, example.targets.astype("int64")]


@torch.no_grad()
def test_the_metric_is_the_mean_over_the_targets_of_held_out_text(whole: Path) -> None:
    import poem_lab

    objective, model = poem_lab.Kept(0.5), own_model()
    model.load_state_dict(load_file(whole / "model" / "model.safetensors"))
    blocks = blocks_of(build.prepare_data(read_config(whole)), "validation")
    losses = torch.cat([nll(model, objective(ids, (0, 2**63, i))) for i, ids in enumerate(blocks)])
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val/kept_ppl"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert records.read(whole).certificate["totals"]["tokens"] == len(losses)
    assert [json.loads(line)["step"] for line in (whole / "samples.jsonl").open()] == [0, 2, 4]


@torch.no_grad()
def test_the_training_loss_has_its_weights_and_its_divisor(whole: Path) -> None:
    cfg = read_config(whole)
    data = build.prepare_data(cfg)
    objective, model = models.build_model(cfg, data.tokenizer)  # as before training
    assert data.train is not None
    weighted, divisor = 0.0, 0
    for draw in draws(cfg.seed, 0, cfg.batch_size, len(data.train)):
        example = objective(data.train[draw.block], (cfg.seed, draw.epoch, draw.block))
        losses = nll(lambda ids: model(input_ids=ids).logits, example)
        weighted += float((losses * torch.from_numpy(example.weights)).sum())
        divisor += len(example.inputs)
    first = next(line for line in metrics(whole) if "train/loss" in line)
    assert (first["step"], first["train/loss"]) == (1, pytest.approx(weighted / divisor, rel=1e-5))


def test_a_longer_run_is_that_run_gone_on(whole: Path, longer: Path, refused: Refused) -> None:
    assert "trust=poem_lab" in refused("resume", whole, "trainer.max_steps=6")
    steps = [(line["step"], line["val/kept_ppl"]) for line in metrics(longer) if "val/kept_ppl" in line]
    assert [step for step, _ in steps] == [0, 2, 4, 6]
    assert steps[:3] == [(line["step"], line["val/kept_ppl"]) for line in metrics(whole) if "val/kept_ppl" in line]


@pytest.mark.long
def test_it_is_evaluated_compared_and_reported(
    whole: Path, longer: Path, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "trust=poem_lab" in refused("evaluate", whole)
    for words in (["trust=poem_lab"], ["--config-dir", HERE / "mine", "context=document"]):
        place = tmp_path / str(len(words))
        run_verb("evaluate", whole, *words, f"hydra.run.dir={place}")
        assert records.read(place).certificate["figure"] == "kept_ppl"
    again, trained = (records.read(path).certificate["totals"] for path in (tmp_path / "1", whole))
    assert (again["nll"], again["tokens"]) == (pytest.approx(trained["nll"], rel=1e-6), trained["tokens"])

    capsys.readouterr()
    run_verb("compare", whole, longer)
    assert "kept ppl bits per byte" in capsys.readouterr().out.replace("_", " ")

    run_verb("report", longer, tmp_path / "1", "--out", tmp_path / "report")
    assert "Kept 1 done" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    page = (tmp_path / "report" / "report.html").read_text()
    summary = json.loads((longer / "summary.json").read_text())
    for text in ("kept ppl", "kept ppl bits per byte", "nats per scored token", f"{summary['val/kept_ppl']:,.5g}"):
        assert text in page
    for fault in ("Not read", "damaged", "not as lmlab writes it"):
        assert fault not in page


def test_it_writes(whole: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trust poem_lab" in refused("predict", whole, "The cell")
    run_verb("predict", whole, "The cell", "--trust", "poem_lab", "--greedy", "--max-new-tokens", 4)
    assert capsys.readouterr().out.startswith("The cell")


def test_preview_shows_its_weights(theirs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_verb("preview", *theirs, "trainer.accelerator=gpu")  # without one, no process is started to measure steps
    said = " ".join(capsys.readouterr().out.split())
    assert "[input:" in said
    assert "weight of each target: 0." in said
    assert "each times its weight, in sum, divided by 256" in said


@pytest.mark.parametrize(
    ("target", "field"),
    [("Lopsided", "weights"), ("LopsidedInTraining", "weights"), ("Longer", "inputs"), ("Lists", "positions")],
)
@pytest.mark.parametrize("verb", ["train", "preview"])
def test_wrong_shapes_are_refused_before_training(
    verb: str, target: str, field: str, theirs: list[str], refused: Refused, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = refused(verb, *theirs, f"objective._target_=poem_lab.{target}", f"hydra.run.dir={run}")
    given, expected = {"weights": (32, r"\d\d?"), "inputs": (33, 32), "positions": (31, 31)}[field]
    kind = "as list " if field == "positions" else ""
    shapes = rf"of shape \[{given}\], and an array of \[{expected}\] was expected:"
    assert re.match(f"error: {target} returns {field} {kind}{shapes}", said)
    assert not run.exists()
