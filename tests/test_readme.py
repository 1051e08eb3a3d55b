"""Every command of the README composes, or parses; its Make targets and paths exist."""

import re
import shlex
from pathlib import Path
from types import ModuleType

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from lmlab import compare as compare_verb
from lmlab import dashboard, evaluate, predict, report, resume, sweep, train
from lmlab.config import changes, compose, evaluated, files, schema
from lmlab.preview.plan import plan_command

VERBS = ("train", "preview", "resume", "evaluate", "compare", "predict", "doctor", "sweep", "report", "dashboard")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [
    shlex.split(line, comments=True) for line in SHELL.splitlines() if line.strip() and not line.startswith("#")
]


def verb(name: str) -> list[list[str]]:
    """The arguments of each command that runs `python -m lmlab.<name>`."""
    prefix = ["python", "-m", f"lmlab.{name}"]
    return [words[3:] for words in COMMANDS if words[:3] == prefix]


def one_point(arguments: list[str]) -> list[str]:
    """A command without its sweep, but for the first value of each key."""
    words = (word for word in arguments if word not in ("-m", "--cfg", "job"))
    words = (re.sub(r"=[a-z]+\(.*?(\d[\d.e-]*),.*", r"=\1", word) for word in words)  # interval, range
    return [re.sub(r"=([^\[{']*?),.*", r"=\1", word) for word in words]


def test_there_are_commands() -> None:
    assert len(verb("train")) >= 12
    assert len(verb("predict")) >= 4
    assert len(verb("evaluate")) >= 6
    assert len(verb("compare")) >= 2
    assert len(verb("resume")) >= 4
    assert len(verb("preview")) >= 4
    assert len(verb("sweep")) >= 2
    assert len(verb("report")) >= 2
    assert len(verb("dashboard")) >= 2


@pytest.mark.parametrize("arguments", verb("train"), ids=" ".join)
def test_train_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--help" in arguments:
        monkeypatch.setattr("sys.argv", ["lmlab.train", *arguments])
        train.main()
        assert "objective: clm, mlm" in capsys.readouterr().out
        return
    if "-sc" in arguments:
        pytest.skip("prints a script for a shell; tests/test_completion.py has such shells")
    words = one_point(arguments)
    # `--config-dir mine` is a folder of the reader's.
    if "mine/" in words:
        pytest.skip("names a folder of the reader's own; tests/test_train.py has such a folder")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lmlab.train", *words, "run_dir=/nowhere", "--cfg", "job"])
    train.main()
    cfg = compose.freeze(OmegaConf.create(capsys.readouterr().out))
    schema.check_keys(cfg, "train")


@pytest.mark.parametrize("arguments", verb("evaluate"), ids=" ".join)
def test_evaluate_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--help" in arguments:
        monkeypatch.setattr("sys.argv", ["lmlab.evaluate", *arguments])
        evaluate.main()
        assert "score=labels|pseudo" in capsys.readouterr().out
        return
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lmlab.evaluate", *one_point(arguments), "run_dir=/nowhere", "--cfg", "job"])
    evaluate.main()
    cfg = OmegaConf.create(capsys.readouterr().out)
    # What stands in for the run that the command names, which the reader has.
    cfg = OmegaConf.merge({"data": {"_target_": "lmlab.data.sources.load_sample"}, "objective": {}}, cfg)
    if not cfg.objective:
        cfg.objective = {"_target_": f"lmlab.objectives.{'mlm.MaskedLM' if cfg.score == 'pseudo' else 'clm.CausalLM'}"}
    monkeypatch.setattr(evaluated, "check_directory", lambda *_: None)
    cfg = evaluated.completed(cfg, arguments)
    schema.check_evaluation(compose.freeze(cfg))


@pytest.mark.parametrize("arguments", verb("predict"), ids=" ".join)
def test_predict_command(arguments: list[str]) -> None:
    words = arguments[: arguments.index("<")] if "<" in arguments else arguments
    predict.generate_options(predict.parser().parse_args(words))


@pytest.mark.parametrize("arguments", verb("preview"), ids=" ".join)
def test_preview_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lmlab.preview", *arguments])
    plan = plan_command(compose.read_command())
    schema.check_keys(plan.cfg, "train")
    assert plan.points == (6 if "seed=1,2,3" in arguments else 2 if "seed=1,2" in arguments else 1)


@pytest.mark.parametrize("module", [sweep, report, dashboard], ids=lambda module: module.__name__)
def test_command_of_plain_arguments(module: ModuleType) -> None:
    for arguments in verb(module.__name__.rpartition(".")[2]):
        module.parser().parse_intermixed_args(arguments)


@pytest.mark.parametrize("arguments", verb("compare"), ids=" ".join)
def test_compare_command(arguments: list[str]) -> None:
    compare_verb.parser().parse_args(arguments)


@pytest.mark.parametrize("arguments", verb("resume"), ids=" ".join)
def test_resume_command(arguments: list[str]) -> None:
    given = resume.parser().parse_intermixed_args(arguments)
    cfg = compose.freeze(composed())
    changed = changes.apply_overrides(cfg, Path("/elsewhere"), given.overrides)
    changes.check(changed, cfg)
    schema.check_keys(changed, "train")


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(files.CONF), version_base="1.3"):
        return hydra.compose("train", [*overrides, "run_dir=/nowhere"])


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] in ("torchrun", "sbatch")], ids=" ".join)
def test_command_of_another_launcher(words: list[str]) -> None:
    overrides = [word for word in words[1:] if re.match(r"[a-z]", word) and "=" in word]
    schema.check_keys(compose.freeze(composed(*overrides)), "train")
    assert {"lmlab.train", "sweeps/train.sbatch"} & set(words)


def test_every_command_is_known() -> None:
    for words in COMMANDS:
        if words[0] in ("torchrun", "sbatch"):
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[:2] == ["python", "-m"]:
            assert words[2].removeprefix("lmlab.") in VERBS, words
        else:
            assert words[0] in ("wandb", "git", "cd", "eval"), words


def test_paths_exist() -> None:
    for path in re.findall(r"`((?:conf|lmlab|sweeps|tests)/[\w./-]*)`", README):
        if path.endswith("/x.yaml"):  # one that the reader would add
            path = path.removesuffix("x.yaml")
        assert (ROOT / path).exists(), path
