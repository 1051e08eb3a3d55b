"""Imports go one way: verbs → config → {training, evaluation, data, runs, machine} → {objectives, models} → errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmlab

ROOT = Path(lmlab.__file__).parent
FLOORS = {"errors": 0, "shell": 0, "objectives": 1, "models": 1, "config": 3, "previewing": 3, "reporting": 3}
FLOORS |= {"training": 2, "evaluation": 2, "data": 2, "runs": 2, "machine": 2}
VERB = 4


def floor(module: str) -> int:
    return FLOORS.get(module.split(".")[0], VERB)


def imported(path: Path) -> list[str]:
    """The modules of lmlab a file imports, anywhere in it, without the leading `lmlab.`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "lmlab" else [f"lmlab.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix("lmlab.") for name in names if name.startswith("lmlab.")]


def test_no_room_imports_one_above_it() -> None:
    seen = 0
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if module == "__init__":
            continue
        for name in imported(path):
            seen += 1
            assert floor(name) <= floor(module), f"{module} imports {name}"
    assert seen > 30


def test_only_config_and_verbs_know_hydra() -> None:
    for path in ROOT.rglob("*.py"):
        knows = "hydra" in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not knows or path.parent in (ROOT, ROOT / "config"), path


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("train", ["--help"], "objective"),
        ("train", ["--cfg", "job"], "objective"),
        ("evaluate", ["--help"], "objective"),
        ("evaluate", ["model=outputs/run", "objective=mlm", "--cfg", "job"], "objective"),
        ("doctor", ["--help"], "--cache-dir"),
    ],
)
def test_composing_does_not_import_torch(verb: str, arguments: list[str], says: str) -> None:
    """`--help` and `--cfg job` answer at once; a timing would be noise, what they import is not."""
    code = (
        f"import sys; sys.argv = ['{verb}', *{arguments}]\n"
        f"from lmlab.{verb} import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lightning', 'wandb', 'pyarrow', 'numpy', 'pandas'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert says in out
    assert out.splitlines()[-1] == "heavy: []"
