"""README.md and docs/: every command composes, parses or runs, every code block runs, and every path exists."""

import json
import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from lmlab import compare as compare_verb
from lmlab import dashboard, evaluate, export, predict, push, report, resume, scale, sweep, train
from lmlab.config import changes, compose, evaluated, files, schema
from lmlab.evaluation import records
from lmlab.preview.plan import plan_command
from lmlab.runs.directory import RunDirectory

from .conftest import TINY, run_verb

VERBS = (
    "train",
    "prepare",
    "preview",
    "resume",
    "evaluate",
    "compare",
    "scale",
    "predict",
    "doctor",
    "sweep",
    "report",
    "dashboard",
    "export",
    "push",
)
ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
SHELL = "\n".join(block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
LINES = dict.fromkeys(line for line in SHELL.replace("\\\n", " ").splitlines() if line.strip())
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def of_extensions(words: list[str]) -> bool:
    """Whether a command of docs/extend.md uses the files that the page writes."""
    return bool({"mine", "outputs/mine"} & {*words}) or "my_lab" in " ".join(words)


def verb(name: str, extensions: bool = False) -> list[list[str]]:
    """The arguments of each command that runs `python -m lmlab.<name>`."""
    prefix = ["python", "-m", f"lmlab.{name}"]
    return [words[3:] for words in COMMANDS if words[:3] == prefix and of_extensions(words) == extensions]


def one_point(arguments: list[str]) -> list[str]:
    """A command without its sweep, but for the first value of each key."""
    words = (word for word in arguments if word not in ("-m", "--cfg", "job"))
    words = (re.sub(r"=[a-z]+\(.*?(\d[\d.e-]*),.*", r"=\1", word) for word in words)  # interval, range
    words = (re.sub(r"=(\{[^{}]*\}),\{.*", r"=\1", word) for word in words)  # blocks
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
    assert len(verb("export")) >= 3


@pytest.mark.parametrize("arguments", verb("train"), ids=" ".join)
def test_train_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--help" in arguments:
        monkeypatch.setattr("sys.argv", ["lmlab.train", *arguments])
        train.main()
        assert "objective: clm, diffusion, electra, fim, hybrid, mlm, prefix, span" in capsys.readouterr().out
        return
    if "-sc" in arguments:
        pytest.skip("prints a script for a shell; tests/test_completion.py has such shells")
    words = one_point(arguments)
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
    cfg.series = False
    if cfg.get("suite") in ("minimal_pairs", "lm_eval"):  # which bring their text
        cfg.pop("data")
    if not cfg.objective:
        hides = cfg.score in ("pseudo", "elbo")
        cfg.objective = {"_target_": f"lmlab.objectives.{'mlm.MaskedLM' if hides else 'clm.CausalLM'}"}
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


@pytest.mark.parametrize("module", [sweep, report, scale, dashboard, export, push], ids=lambda module: module.__name__)
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
    changes.check(changed, cfg, RunDirectory("/elsewhere"))


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with hydra.initialize_config_dir(str(files.CONF), version_base="1.3"):
        return hydra.compose(name, [*overrides, "run_dir=/nowhere"])


@pytest.mark.parametrize("arguments", verb("prepare"), ids=" ".join)
def test_prepare_command(arguments: list[str]) -> None:
    schema.check_keys(compose.freeze(composed(*arguments, name="prepare")), "prepare")


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] in ("torchrun", "sbatch")], ids=" ".join)
def test_command_of_another_launcher(words: list[str]) -> None:
    overrides = [word for word in words[1:] if re.match(r"[a-z]", word) and "=" in word]
    name = "prepare" if "sweeps/prepare.sbatch" in words else "train"
    schema.check_keys(compose.freeze(composed(*overrides, name=name)), name)
    assert {"lmlab.train", "sweeps/train.sbatch", "sweeps/prepare.sbatch"} & set(words)


def test_every_command_is_known() -> None:
    for words in COMMANDS:
        if words[0] in ("torchrun", "sbatch"):
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[:2] == ["python", "-m"]:
            assert words[2].removeprefix("lmlab.") in VERBS, words
        elif words[0] == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert {*re.findall(r"\w+", words[-1])} <= extras.keys(), words
        else:
            assert words[0] in ("wandb", "tensorboard", "mlflow", "trackio", "hf", "eval"), words


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name: str) -> None:
    for path in re.findall(r"`((?:conf|lmlab|sweeps|tests|benchmarks|docs)/[\w./-]*)`", PAGES[name]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGES[name]):
        assert (ROOT / name).parent.joinpath(path).exists(), path


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_python_page(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/python.md runs as it is printed, and certifies what `lmlab.evaluate` does."""
    monkeypatch.chdir(tmp_path)
    train(*TINY, run_dir=Path("outputs/first"))
    _, code = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL)  # the first is the notebook's
    variables: dict = {}
    exec(compile(code, "docs/python.md", "exec"), variables)
    texts = [json.dumps({"text": text}) for text in variables["texts"]]
    Path("texts.jsonl").write_text("\n".join(texts))
    alike = ["data=files", "data.validation=texts.jsonl", "context=document", "preprocess.block_size=128"]
    run_verb("evaluate", variables["name"], *alike, "hydra.run.dir=command")
    certificates = [records.read(Path(place)).certificate for place in ("evaluations/texts", "command")]
    for part in ("totals", "figures"):
        assert certificates[0][part] == pytest.approx(certificates[1][part], rel=1e-6)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of docs/extend.md, and what its commands take for the reader's own."""
    folder = tmp_path_factory.mktemp("extend")
    files = defaultdict(str)
    for path, content in re.findall(r'```\w+ title="(.*?)"\n(.*?)```', PAGES["docs/extend.md"], re.DOTALL):
        files[path] += content
    assert len(files) >= 9
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    (folder / "poems.txt").write_text("".join(f"poem {number}, of a few words\n" for number in range(50)))
    return folder


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, words) for name in ("train", "resume", "evaluate", "predict") for words in verb(name, extensions=True)],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_extension(
    name: str,
    arguments: list[str],
    extensions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands of docs/extend.md run, one after the other, with the files that the page shows."""
    monkeypatch.chdir(extensions)
    monkeypatch.syspath_prepend(str(extensions))
    if "data=dialogues" in arguments:  # a data set of the hub
        monkeypatch.setattr("sys.argv", ["lmlab.train", *arguments, "run_dir=/nowhere", "--cfg", "job"])
        train.main()
        schema.check_keys(compose.freeze(OmegaConf.create(capsys.readouterr().out)), "train")
        return
    few = {
        "train": [override for override in TINY if not override.startswith("model.")],
        "resume": ["trainer.max_steps=6"],
        "evaluate": [],
        "predict": [],
    }
    if name in ("train", "evaluate") and not any(word.startswith("hydra.run.dir=") for word in arguments):
        arguments = [*arguments, f"hydra.run.dir=outputs/{uuid4().hex}"]  # two begin in one second
    pretrained = "model=pretrained" in arguments  # with its own tokenizer
    run_verb(name, *arguments, *(word for word in few[name] if not (pretrained and word.startswith("tokenizer."))))
