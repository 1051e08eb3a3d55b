"""Loggers beside W&B: what each library has stored of a run that was killed and resumed, and services that are away."""

import csv
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lmlab.config import changes, compose
from lmlab.runs.directory import RunDirectory
from lmlab.training.loggers import MetricsFile, rows
from lmlab.training.loggers.closing import close
from lmlab.training.loggers.mlflow import mlflow
from lmlab.training.loggers.rows import Row, RowLogger
from tests.conftest import TINY, Refused, metrics, run_verb, stop_after
from tests.mlflow_server import serving

ROOT = Path(__file__).parents[2]
TRACKIO = Path(os.environ["HF_HOME"], "trackio")  # where trackio keeps its databases

SHORT = [*(override for override in TINY if override != "logger=file"), "trainer.max_steps=8"]
SHORT += ["trainer.log_every_n_steps=1", "trainer.val_check_interval=4", "callbacks.checkpoints.every_steps=3"]
ALL = "logger=[tensorboard,mlflow,trackio,csv]"
Points = dict[tuple[str, int], float]


def run_id(run: Path) -> str:
    return json.loads((run / "manifest.json").read_text())["run_id"]


def points_of(steps: Sequence[dict[str, Any]]) -> Points:
    """The points of rows with a step each; a point that is there twice has to have one value."""
    points: Points = {}
    for row in steps:
        for name, value in row.items():
            if name not in ("step", "time", "timestamp"):
                assert points.setdefault((name, int(row["step"])), float(value)) == float(value)
    return points


def in_event_files(run: Path) -> Points:
    """Each event of the scalars is read by itself: nothing hides one that is there twice."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: Points = {}
    for file in (run / "tensorboard").iterdir():
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert (value.tag, event.step) not in points
                    points[value.tag, event.step] = value.simple_value
    return points


def in_mlflow(database: Path, identity: str) -> Points:
    with sqlite3.connect(database) as connection:
        run = "select run_uuid from tags where key = 'lmlab.run_id' and value = ?"
        ((uuid,),) = connection.execute(run, [identity]).fetchall()
        found = connection.execute("select key, step, value from metrics where run_uuid = ?", [uuid]).fetchall()
    points = {(name, step): value for name, step, value in found}
    assert len(points) == len(found)
    return points


def in_trackio(folder: Path, identity: str) -> list[dict[str, Any]]:
    with sqlite3.connect(folder / "lmlab.db") as connection:
        query = "select step, metrics from metrics where run_id = ? order by id"
        return [{"step": step, **json.loads(row)} for step, row in connection.execute(query, [identity])]


def in_csv(run: Path) -> list[dict[str, Any]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def check_stored(run: Path, database: Path, trackio: Path = TRACKIO) -> None:
    """Each library has the points of metrics.jsonl, and those that are files of rows each row once.

    A speed is the first that was measured, where a store had its step before the kill.
    """
    lines = metrics(run)
    expected = points_of(lines)
    assert [row["step"] for row in in_trackio(trackio, run_id(run))] == [line["step"] for line in lines]
    assert [int(row["step"]) for row in in_csv(run)] == [line["step"] for line in lines]
    stored = {
        "tensorboard": (in_event_files(run), 1e-6),  # float32
        "mlflow": (in_mlflow(database, run_id(run)), 1e-12),
        "trackio": (points_of(in_trackio(trackio, run_id(run))), 1e-12),
        "csv": (points_of(in_csv(run)), 1e-12),
    }
    for name, (points, rel) in stored.items():
        assert points.keys() == expected.keys(), name
        same = [key for key in expected if not key[0].startswith("perf/")]
        assert [points[key] for key in same] == pytest.approx([expected[key] for key in same], rel=rel), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all loggers; MLflow's database lies beside it."""
    place = tmp_path_factory.mktemp("loggers")
    run_verb(
        "train", *SHORT, ALL, f"hydra.run.dir={place}/run", f"logger.mlflow.tracking_uri=sqlite:///{place}/mlflow.db"
    )
    return place / "run"


def test_a_run_that_was_killed_and_resumed_is_one_curve(whole: Path, tmp_path: Path) -> None:
    """The kill comes when the stores have more steps than the checkpoint, which are made again."""
    database = whole.parent / "mlflow.db"
    check_stored(whole, database)
    run = tmp_path / "run"
    stop_after(whole, 6, run)
    run_verb("resume", run)
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == list(range(1, 9))
    check_stored(run, database)
    with sqlite3.connect(database) as connection:
        (found,) = connection.execute("select name, status from runs").fetchall()
        parameters = dict(connection.execute("select key, value from params"))
    assert found == (f"{whole.parent.name}/run", "FINISHED")
    assert parameters["model.config.n_embd"] == "32"


def test_what_was_not_sent_is_sent_when_a_finished_run_is_resumed(whole: Path) -> None:
    RunDirectory(whole).unsent.touch()
    with serving() as server:
        run_verb("resume", whole, f"logger.mlflow.tracking_uri={server.url}")
        points = {(point["key"], point["step"]): point["value"] for point in server.run["metrics"]}
    assert not RunDirectory(whole).unsent.exists()
    assert points == points_of(metrics(whole))
    check_stored(whole, whole.parent / "mlflow.db")


@pytest.mark.longest
def test_killed_while_something_is_stored(tmp_path: Path) -> None:
    """By `kill -9`, in a process of its own, once before each database keeps rows."""
    database = tmp_path / "mlflow.db"
    run, out = tmp_path / "run", tmp_path / "out"
    words = [*SHORT, "trainer.max_steps=40", ALL, f"logger.mlflow.tracking_uri=sqlite:///{database}"]
    command = ["train", [*words, f"hydra.run.dir={run}"]]
    loggers = "lmlab.training.loggers"
    half_a_database = {"alembic.command.upgrade": 1}
    writes = [{f"{loggers}.mlflow.MLflowRun.write": 1}, {f"{loggers}.trackio.TrackioRun.write": 2}]
    for fault in (half_a_database, *writes, {}):
        faults = {name: ["die", call] for name, call in fault.items()}
        code = (
            f"from pathlib import Path, PosixPath; from tests.processes import work; work(*{(*command, out, faults)})"
        )
        env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
        ended = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path).returncode
        assert ended == (-signal.SIGKILL if fault else 0), out.read_text()
    assert "does not have all" not in out.read_text()
    check_stored(run, database, tmp_path / "trackio")


class Fake:
    """A store in memory. It keeps a row, and fails before or after that, as often as it is told to."""

    label, whole_rows = "The store", False

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.before, self.after = 0, 0
        self.open = threading.Event()
        self.open.set()
        self.ended: str | None = None

    def connect(self) -> dict[str, int]:
        return {name: row.step for row in self.rows for name in row.metrics}

    def write(self, rows: Sequence[Row]) -> None:
        self.open.wait()
        for row in rows:
            if self.before:
                self.before -= 1
                raise OSError("no room")
            self.rows.append(row)
            if self.after:
                self.after -= 1
                raise TimeoutError("no answer")

    def finish(self, outcome: str) -> None:
        self.ended = outcome


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(rows, "RETRY", 0.01)
    return tmp_path


def log(run: Path, logger: RowLogger, steps: Sequence[int]) -> None:
    """As training does: the file first."""
    file = MetricsFile(str(run))
    for step in steps:
        for one in (file, logger):
            one.log_metrics({"train/loss": 1 / step, "data/tokens_seen": 10 * step}, step)


def test_a_store_that_fails_gets_each_row_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also a row that it kept before it failed to say so."""
    store = Fake()
    logger = RowLogger(store, str(run), patience=20)
    store.before, store.after = 3, 2
    log(run, logger, range(1, 100))
    while len(store.rows) < 99:
        time.sleep(0.01)
    log(run, logger, range(100, 200))
    close([logger])
    assert [row.step for row in store.rows] == list(range(1, 200))
    assert store.ended == "finished"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("The store takes no metrics: no room\nTraining goes on")


def test_a_slow_store_holds_nothing_up(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Fake()
    store.open.clear()
    logger = RowLogger(store, str(run), patience=0.2)
    began = time.monotonic()
    log(run, logger, range(1, 50))
    close([logger])
    assert time.monotonic() - began < 5
    (message,) = caplog.messages
    assert message.startswith("The store does not have all metrics: not done in 0.2 seconds\nTo send the rest: ")
    store.open.set()


def test_metrics_of_a_step_that_a_store_has_are_left_out(run: Path) -> None:
    """The tokens seen are in the row of a training step and in that of the validation after it."""
    store = Fake()
    logger = RowLogger(store, str(run), patience=20)
    log(run, logger, [1])
    MetricsFile(str(run)).log_metrics({"val/loss": 2.0, "data/tokens_seen": 10}, 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 1.0, "tra')  # being written
    close([logger], exit_code=1)
    assert [row.metrics for row in store.rows] == [{"train/loss": 1.0, "data/tokens_seen": 10}, {"val/loss": 2.0}]
    assert store.ended == "failed"


def test_a_tracking_server_that_is_away_or_full(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it could not take is sent once it can, by MLflow's own client; and by the next attempt after the end."""
    with serving() as server:
        server.fault = 507, "database or disk is full"
        logger = mlflow(str(run), "abc", {"optim": {"lr": 0.1}}, tracking_uri=server.url)
        log(run, logger, range(1, 30))
        while not caplog.messages:
            time.sleep(0.01)
        assert "database or disk is full" in caplog.messages[0]
        server.fault = None
        log(run, logger, range(30, 40))
        close([logger], exit_code=1, will_go_on=True)
        assert len(caplog.messages) == 1
        assert server.points("train/loss") == [(step, 1 / step) for step in range(1, 40)]
        assert server.run["status"] == "KILLED"
        assert server.run["params"]["optim.lr"] == "0.1"
        url = server.url
        kept = server.run
    away = mlflow(str(run), "abc", {}, tracking_uri=url)
    log(run, away, range(40, 50))
    close([away])
    assert "Connection refused\nTo send the rest: python -m lmlab.resume " in caplog.messages[-1]
    assert RunDirectory(run).unsent.exists()
    with serving() as server:
        server.run = kept
        close([mlflow(str(run), "abc", {}, tracking_uri=server.url)])
        assert server.points("train/loss") == [(step, 1 / step) for step in range(1, 50)]
        assert server.run["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["logger=[tensorboard,csv]", "+logger.more._target_=lmlab.training.loggers.csv.csv"],
            "logger.csv and logger.more",
        ),
        (["logger=mlflow", "logger.mlflow.tracking_uri=htp://x"], "logger.mlflow.tracking_uri=htp://x"),
        (["logger=trackio", "logger.trackio.project=registry-a"], "logger.trackio.project=registry-a"),
        (["logger=[wandb,tensorbord]"], 'Did you mean "tensorboard"?'),
    ],
)
def test_what_is_refused(words: list[str], says: str, refused: Refused, tmp_path: Path) -> None:
    assert says in refused("train", *SHORT, *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["tensorboard", "mlflow", "trackio"])
def test_a_library_that_is_not_installed(
    library: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("lmlab.errors.find_spec", lambda name: None if name == library else found(name))
    said = refused("train", *SHORT, f"logger=[{library},csv]", f"hydra.run.dir={tmp_path / 'run'}")
    assert f"logger.{library} takes {library}, which is not installed:\npip install 'lmlab[{library}]'" in said


def test_a_run_that_goes_on_may_get_other_loggers(tmp_path: Path) -> None:
    """A config of an older version names the file in its block, and keeps it."""
    old = {"logger": {"metrics_file": {"_target_": "lmlab.training.loggers.MetricsFile"}}, "run_dir": str(tmp_path)}
    cfg = OmegaConf.create(old | {"trainer": {}, "model": {}, "tokenizer": {}})
    chosen = changes.apply_overrides(cfg, tmp_path, ["logger=[wandb,csv]"]).logger
    assert [name for name in chosen if not name.startswith("push")] == ["wandb", "csv"]
    assert compose.without_secrets(cfg).logger == cfg.logger
