"""One way in: `lmlab COMMAND …` is `python -m lmlab.COMMAND …`."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lmlab
from lmlab import __main__ as entry
from lmlab.evaluate import with_model

ROOT = Path(lmlab.__file__).parent
FILES = [*ROOT.glob("*.py"), *ROOT.glob("*/__main__.py")]
COMMANDS = {
    path.parent.name if path.stem == "__main__" else path.stem
    for path in FILES
    if "\ndef main() -> None:" in path.read_text()
} - {"lmlab", "worker"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_commands_are_listed(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["lmlab", *words])
    entry.main()
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {name for name, _ in listed} == COMMANDS
    assert all(len(does) > 10 for _, does in listed)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["lmlab", "--version"])
    entry.main()
    assert capsys.readouterr().out == f"lmlab {lmlab.__version__}\n"


def test_the_console_script_is_the_same() -> None:
    scripts = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["lmlab"].partition(":")
    assert getattr(importlib.import_module(module), function) is entry.main


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("prediction", "predict"), ("eval", "evaluate")])
def test_an_unknown_command_names_the_nearest(word: str, meant: str) -> None:
    done = run("-m", "lmlab", word)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: there is no command "{word}". Did you mean "{meant}"? Commands: train, ')
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [["train", "--help"], ["train", "optim.lr=2", "--cfg", "job"], ["compare", "--help"], ["predict"]],
    ids=" ".join,
)
def test_a_command_is_its_module(words: list[str]) -> None:
    one, other = run("-m", "lmlab", *words), run("-m", f"lmlab.{words[0]}", *words[1:])
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert one.stdout + one.stderr


def test_the_way_in_is_light() -> None:
    code = "import sys; before = set(sys.modules); import lmlab.__main__; print(*sorted(set(sys.modules) - before))"
    found = run("-c", code).stdout.split()
    assert {name.partition(".")[0] for name in found} <= {*sys.stdlib_module_names, "lmlab"}
    assert {name for name in found if name.startswith("lmlab")} == {"lmlab", "lmlab.__main__", "lmlab.early"}


def test_the_model_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first word that is no override, or `model=`: a place is taken as it is typed, a hub id too."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "a run (1), it's", 'quo"ted\\'):
        (tmp_path / name).mkdir()

    def named(*words: str) -> list[str]:
        return [word.removeprefix("model.name=") for word in with_model([*words]) if word.startswith("model.name=")]

    for typed, meant in (
        ("run", '"run"'),
        ("./run", '"./run"'),
        ("a run (1), it's", '"a run (1), it\'s"'),
        ('quo"ted\\', r'"quo\"ted\\"'),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("run,openai-community/gpt2", '"run",openai-community/gpt2'),
        ("", '""'),
    ):
        assert named(f"model={typed}") == [meant]
        if typed:
            for before in ([], ["-m"], ["--cfg", "job"], ["--config-dir", "conf"]):
                assert named(*before, typed, "context=sliding") == [meant]
                assert with_model([*before, typed, "seed=1"]) == [*before, *with_model([f"model={typed}"]), "seed=1"]
    for words in ([], ["context=sliding"], ["+data.x=1", "run"], ["~data"], ["--help"], ["seed=1", "run"]):
        assert with_model(words) == words
