"""Imports go one way: verbs → config → {training, evaluation, data, runs, machine} → {objectives, models} → errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmlab

ROOT = Path(lmlab.__file__).parent
FLOORS = {
    "errors": 0,
    "shell": 0,
    "early": 0,
    "objectives": 1,
    "models": 1,
    "config": 3,
    "previewing": 3,
    "reporting": 3,
}
FLOORS |= {"runs.secrets": 0, "training": 2, "evaluation": 2, "data": 2, "runs": 2, "machine": 2}
VERB = 4


def floor(module: str) -> int:
    return FLOORS.get(module, FLOORS.get(module.split(".")[0], VERB))


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


REFUSED = [
    ("train", "optim.lrr=1", 'no key "optim.lrr"'),
    ("train", "+optim.foo=1", 'no key "optim.foo"'),
    ("train", "optim.lr=x", "optim.lr=x"),
    ("train", "trainer.max_epochs=x", "trainer.max_epochs=x"),
    ("train", "+callbacks.progress.every=1", "every_seconds"),
    ("train", "batch_size=0", "batch_size is a whole number"),
    ("train", "preprocess.block_size=1", "must be at least 2"),
    ("train", "preprocess.test_size=2", "is a share"),
    ("train", "trainer.precision=bf16-mixd", 'Did you mean "bf16-mixed"?'),
    ("train", "trainer.accelerator=gpuu", 'Did you mean "gpu"?'),
    ("train", "trainer.accumulate_grad_batches=3", "does not divide"),
    ("train", "data=files", "data.train has to be given"),
    ("train", "-m seed=1,x", "the point seed=x is refused"),
    ("train", "-m hydra/sweeper=optuna batch_size=0,8", "the point batch_size=0 is refused"),
    ("preview", "optim.lr=x", "optim.lr=x"),
    ("evaluate", "data=sample", "model has to be given"),
    ("evaluate", "model=gpt2 score=psuedo data=sample", 'Did you mean "pseudo"?'),
    ("evaluate", "model=gpt2 context=documents data=sample", 'Did you mean "document"?'),
    ("evaluate", "model=gpt2 stride=0 data=sample", "stride is a number"),
    ("evaluate", "model=gpt2 contxt=document data=sample", 'Did you mean "context"?'),
    ("evaluate", "model=outputs/2000/run data=sample", "no such directory"),
    ("predict", "outputs/2000/run a", "no such directory"),
    ("predict", "conf a", "neither a run"),
    ("compare", "nowhere", "nowhere"),
    ("report", "nowhere", "no directory"),
    ("report", "conf", "holds no run"),
    ("resume", "nowhere", "is no run"),
    ("sweep", "status nowhere", "holds no sweep"),
]
"""A command, and what is said of it."""


def test_what_needs_no_torch_is_refused_without(tmp_path: Path) -> None:
    """In less than a second each; and nothing stays of any."""
    (tmp_path / "conf").mkdir()
    code = (
        "import contextlib, importlib, io, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lightning', 'wandb', 'pandas', 'altair'}\n"
        f"for verb, words, says in {REFUSED}:\n"
        "    sys.argv, shown = [verb, *words.split()], io.StringIO()\n"
        "    with contextlib.redirect_stderr(shown), contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(f'lmlab.{verb}').main()\n"
        "    found = heavy & sys.modules.keys()\n"
        "    if found or says not in shown.getvalue(): sys.exit(f'{verb} {words}: {found}\\n{shown.getvalue()}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["conf"]
