"""The floor plan of ARCHITECTURE.md: imports go one way, and there is no circle."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lmlab

ROOT = Path(lmlab.__file__).parent
PLAN = (ROOT.parent / "ARCHITECTURE.md").read_text()
FLOORS = re.findall(r"^\| (\w+) \| ((?:`\w+` ?)+) \|$", PLAN, re.MULTILINE)
FLOOR = {room: -number for number, (_, rooms) in enumerate(FLOORS) for room in re.findall(r"\w+", rooms)}
"""The floor of each room, by its name: the commands are on 0, what they use below."""


def modules() -> dict[str, Path]:
    """The files of lmlab by the names of their modules, without the leading `lmlab.`."""
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")}
    return {name: path for name, path in names.items() if not name.endswith("__init__")}


def imported(path: Path) -> Iterator[str]:
    """The modules of lmlab that a file imports, anywhere in it but for types alone."""
    known, tree = modules(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmlab":
            for alias in node.names:
                names = [f"{node.module}.{alias.name}", node.module]
                yield from [name for name in (n.removeprefix("lmlab.") for n in names) if name in known][:1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lmlab.") for alias in node.names if alias.name.startswith("lmlab."))


def test_no_room_imports_one_above_it() -> None:
    """The plan as drawn, with every room in it."""
    assert len(FLOORS) == 6
    assert {name.split(".")[0] for name in modules()} == FLOOR.keys()
    seen = 0
    for module, path in modules().items():
        for name in imported(path):
            seen += 1
            assert FLOOR[name.split(".")[0]] <= FLOOR[module.split(".")[0]], f"{module} imports {name}"
    assert seen > 300


def test_no_circle() -> None:
    graph = {module: {name for name in imported(path) if name != module} for module, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # raises a CycleError that names one


def test_each_file_has_its_line_in_the_plan() -> None:
    listed = re.findall(r"^\| `([\w/]+\.py)` \| \S.*\. \|$", PLAN, re.MULTILINE)
    files = {f"{name.replace('.', '/')}.py" for name in modules()} | {"objectives/__init__.py"}
    assert sorted(listed) == sorted(files)


FRAGMENT = re.compile(
    r"(What|Of|By|As|How|Where|Whether|When|Who|Whose|In|On|At|From|Not|To|For|With|If|Else|So|That|Those|Some|Because)\b"
)


def test_docstrings_begin_with_a_sentence() -> None:
    """A first line says what a thing is or does, and does not begin like half of a sentence."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                first = text.partition("\n\n")[0]
                assert not FRAGMENT.match(first), f"{module}: {first}"
                assert first.endswith((".", ":")), f"{module}: {first}"


def test_only_commands_config_and_sweeps_know_hydra() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        knows = "hydra" in {name.split(".")[0] for name in [*froms, *plain]}
        assert not knows or FLOOR[module.split(".")[0]] == 0 or module.split(".")[0] in ("config", "sweeps"), module


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
        f"from lmlab.{verb}{'.__main__' if verb == 'doctor' else ''} import main\n"
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
    ("train", "optim.lr=x", 'optim.lr="x": it has to be a number'),
    ("train", "trainer.max_epochs=x", 'trainer.max_epochs="x"'),
    ("train", "+callbacks.progress.every=1", "every_seconds"),
    ("train", "batch_size=0", "batch_size=0: it has to be a whole number, 1 or more"),
    ("train", "preprocess.block_size=1", "a whole number, 2 or more"),
    ("train", "preprocess.test_size=2", "more than 0, less than 1"),
    ("train", "preprocess=guide preprocess.packing=best_fit", "preprocess.drop_remainder_every=1000 is there to drop"),
    ("train", "trainer.precision=bf16-mixd", 'Did you mean "bf16-mixed"?'),
    ("train", "trainer.accelerator=gpuu", 'Did you mean "gpu"?'),
    ("train", "trainer.accumulate_grad_batches=3", "does not divide"),
    ("train", "callbacks.series=lgo", 'Did you mean "log"?'),
    ("train", "callbacks.series=0", "a whole number, 1 or more"),
    ("train", "callbacks.serie=log", 'Did you mean "callbacks.series"?'),
    ("train", "data=files", "data.train has to be given"),
    ("train", "-m seed=1,x", "the point seed=x is refused"),
    ("train", "-m hydra/sweeper=optuna batch_size=0,8", "the point batch_size=0 is refused"),
    ("preview", "optim.lr=x", 'optim.lr="x"'),
    ("evaluate", "data=sample", "model has to be given"),
    ("evaluate", "model=gpt2 score=psuedo data=sample", 'Did you mean "pseudo"?'),
    ("evaluate", "model=gpt2 context=documents data=sample", 'Did you mean "document"?'),
    ("evaluate", "model=gpt2 stride=0 data=sample", "stride=0: it has to be a whole number"),
    ("evaluate", "model=gpt2 contxt=document data=sample", 'Did you mean "context"?'),
    ("evaluate", "model=gpt2 series=1", "true or false, or a list of which each is a whole number"),
    ("evaluate", "model=gpt2 series=true", "gpt2 holds no series of models"),
    ("evaluate", "model=outputs/2000/run data=sample", "no such directory"),
    ("predict", "outputs/2000/run a", "no such directory"),
    ("predict", "conf a", "neither a run"),
    ("export", "outputs/2000/run onnx", "no such directory"),
    ("export", "conf gguf", "is no run"),
    ("export", "none.gguf onnx", "no such file"),
    ("compare", "nowhere", "nowhere"),
    ("scale", "nowhere", "no directory"),
    ("scale", "conf", "holds no finished run"),
    ("scale", "conf --predict flops=x", "--predict flops=x: it has to be flops=1e13"),
    ("report", "nowhere", "no directory"),
    ("report", "conf", "holds no run"),
    ("push", "nowhere me/tiny", "needs a licence"),
    ("push", "nowhere tiny --license mit", "OWNER/NAME"),
    ("resume", "nowhere", "is no run"),
    ("sweep", "status nowhere", "holds no sweep"),
]
"""A command, and what is said of it."""


@pytest.mark.long
def test_what_needs_no_torch_is_refused_without(tmp_path: Path) -> None:
    """In less than a second each; and nothing stays of any."""
    (tmp_path / "conf").mkdir()
    code = (
        "import contextlib, importlib, io, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lightning', 'wandb', 'pandas', 'altair'}\n"
        f"for verb, words, says in {REFUSED}:\n"
        "    sys.argv, shown = [verb, *words.split()], io.StringIO()\n"
        "    with contextlib.redirect_stderr(shown), contextlib.suppress(SystemExit):\n"
        "        module = f'lmlab.{verb}.__main__' if verb == 'preview' else f'lmlab.{verb}'\n"
        "        importlib.import_module(module).main()\n"
        "    found = heavy & sys.modules.keys()\n"
        "    if found or says not in shown.getvalue(): sys.exit(f'{verb} {words}: {found}\\n{shown.getvalue()}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["conf"]
