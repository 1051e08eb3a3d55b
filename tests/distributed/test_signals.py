"""Ctrl-C before anything was begun: one line, and nothing is left; in whatever verb, and wherever it stands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import TINY, run_verb
from ..processes import finish, heeding

NOTHING = "Stopped by SIGINT. Nothing was begun.\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that have come to their end."""
    place = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        run_verb("train", *TINY, f"seed={seed}", f"hydra.run.dir={place / str(seed)}")
    return place


STOPS = [
    ("train", [*TINY, "hydra.run.dir=OUT"], "lmlab.config.compose.read_command"),
    ("train", [*TINY, "hydra.run.dir=OUT"], "lmlab.config.schema.check_run"),
    ("train", [*TINY, "hydra.run.dir=OUT"], "lmlab.data.prepared.prepare"),
    ("train", [*TINY, "hydra.run.dir=OUT"], "lmlab.config.models.build_model"),
    ("train", ["-m", *TINY, "seed=1,2", "hydra.sweep.dir=OUT"], "lmlab.config.schema.check_run"),
    ("preview", TINY, "lmlab.preview.plan.plan_command"),
    ("preview", TINY, "lmlab.data.prepared.prepare"),
    ("resume", ["RUNS/1", "--fresh", "--into", "OUT"], "lmlab.config.build.prepare_data"),
    ("resume", ["RUNS/1", "--fresh", "--into", "OUT"], "lmlab.config.models.build_model"),
    ("evaluate", ["model=RUNS/1", "hydra.run.dir=OUT"], "lmlab.config.schema.check_choices"),
    ("evaluate", ["model=RUNS/1", "hydra.run.dir=OUT"], "lmlab.config.evaluated.completed"),
    ("predict", ["RUNS/1", "a"], "lmlab.models.generation.load"),
    ("compare", ["RUNS", "--out", "OUT"], "lmlab.compare.read_evaluations"),
    ("report", ["RUNS", "--out", "OUT"], "lmlab.reporting.load.load_runs"),
    ("dashboard", ["me/lmlab"], "lmlab.dashboard.check_reachable"),
    ("sweep", ["status", "RUNS"], "lmlab.sweeps.points.read_points"),
]
"""A command, and the function in which Ctrl-C is pressed."""


@pytest.mark.parametrize(("verb", "words", "where"), STOPS, ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_was_begun(verb: str, words: list[str], where: str, runs: Path, tmp_path: Path) -> None:
    place, said = tmp_path / "place", tmp_path / "said"
    place.mkdir()
    words = [word.replace("OUT", str(place / "new" / "out")).replace("RUNS", str(runs)) for word in words]
    assert finish(verb, *words, out=said, faults={where: ["interrupted"]}) == 128 + signal.SIGINT
    *before, last = said.read_text().splitlines(keepends=True)
    assert last == NOTHING
    # Two say something before they begin.
    assert not before if verb not in ("preview", "resume") else "Traceback" not in "".join(before)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("what", "words", "where"),
    [
        ("evaluation", ["model=RUNS/1", "hydra.run.dir=OUT"], "lmlab.evaluation.scoring.Scorer.validation_step"),
        ("report", ["RUNS", "--out", "OUT"], "lmlab.reporting.page.html"),
    ],
    ids=["evaluate", "report"],
)
def test_nothing_is_kept(what: str, words: list[str], where: str, runs: Path, tmp_path: Path) -> None:
    place, said = tmp_path / "place", tmp_path / "said"
    place.mkdir()
    words = [word.replace("OUT", str(place / "new" / "out")).replace("RUNS", str(runs)) for word in words]
    verb = "evaluate" if what == "evaluation" else what
    assert finish(verb, *words, out=said, faults={where: ["interrupted"]}) == 128 + signal.SIGINT
    assert said.read_text() == f"Stopped by SIGINT. Nothing of the {what} is kept.\n"
    assert not list(place.iterdir())


@pytest.mark.parametrize("command", [["lmlab.train"], ["lmlab.predict", "run", "a"]], ids=lambda words: words[0])
def test_while_it_imports(command: list[str], tmp_path: Path) -> None:
    """Before the verb is there to heed it."""
    for name in ("hydra", "argparse"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, preexec_fn=heeding)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", NOTHING)


def test_what_a_finalizer_drops_is_sent_again() -> None:
    code = (
        "import os, signal, time\n"
        "from lmlab.errors import shown_plainly\n"
        "from lmlab.distributed.signals import SIGNALS\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "with shown_plainly(), SIGNALS.heeded():\n"
        "    Dropped()\n"
        "    time.sleep(10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=heeding)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, NOTHING)


def test_after_the_command() -> None:
    """A Ctrl-C while Python shuts down ends the process, and says no more than the first one did."""
    code = (
        "import atexit, os, signal, time\n"
        "from lmlab import early\n"
        "early.heed()\n"
        "from lmlab.errors import shown_plainly\n"
        "from lmlab.distributed.signals import SIGNALS\n"
        "@atexit.register\n"
        "def end():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(10)\n"
        "with shown_plainly(), SIGNALS.heeded():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=heeding)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, NOTHING)
