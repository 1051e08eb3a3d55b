"""Ranks that are started here or by others, ranks that die, and runs that are told to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lmlab.distributed import launch
from lmlab.distributed.signals import SIGNALS

from ..conftest import TINY, losses, metrics
from ..processes import begin, finish, heeding, wait_for
from ..training.test_kill import content as all_of
from ..training.test_kill import same

ROOT = Path(__file__).parents[2]
LONG = [*TINY, "trainer.max_steps=24", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu"]
SLOW = {"lmlab.training.module.LMModule.training_step": ["slow", 0.1]}
SLOW_TO_MEASURE = {"lmlab.evaluation.scoring.Scorer.validation_step": ["slow", 0.02]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    assert finish("train", *LONG, f"hydra.run.dir={place / 'run'}", out=place / "out") == 0
    return place / "run"


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether a run has logged so many steps."""
    return lambda: (run / "metrics.jsonl").is_file() and any(line["step"] >= step for line in metrics(run))


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_stops_a_run_that_can_go_on(name: str, whole: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", *LONG, f"hydra.run.dir={run}"]
    process = begin(*command, out=out, faults=SLOW)
    wait_for(reached(run, 3))
    assert process.pid is not None
    os.kill(process.pid, signal.Signals[name])
    process.join(60)
    assert process.exitcode == 128 + signal.Signals[name], out.read_text()
    shown = out.read_text()
    (state,) = (run / "checkpoints").glob("step-*.ckpt")
    step = int(state.stem.removeprefix("step-"))
    assert 3 <= step < 8
    assert f"Stopped by {name}. Kept: the checkpoint of step {step}." in shown
    assert f"python -m lmlab.resume {run}" in shown
    assert "Traceback" not in shown
    assert finish(*command, out=out) == 0
    assert same(all_of(run), all_of(whole))


@pytest.mark.long
def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or behind a shell's &, while libraries put handlers of their own over it."""
    run, out = tmp_path / "run", tmp_path / "out"
    ignored = {"SIGHUP": ["ignored"], "SIGTERM": ["ignored"]}
    process = begin("train", *LONG, f"hydra.run.dir={run}", out=out, faults=SLOW | ignored)
    wait_for(reached(run, 3))
    assert process.pid is not None
    for name in ignored:
        os.kill(process.pid, signal.Signals[name])
    wait_for(reached(run, 6))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT, out.read_text()


def test_a_signal_that_was_ignored_is_not_passed_on() -> None:
    class Rank:
        got: ClassVar[list[int]] = []
        send_signal = got.append

        def poll(self) -> int | None:
            return 128 + self.got[-1] if self.got else None

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with SIGNALS.heeded(), SIGNALS.noted():
            for number in before:
                os.kill(os.getpid(), number)
            assert launch.wait([Rank()]) == 0  # type: ignore[list-item]
        assert Rank.got == [signal.SIGUSR1]
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN, signal.SIG_DFL]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_during_a_validation(whole: Path, tmp_path: Path) -> None:
    """It is not waited for; the one who goes on measures first."""
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", *LONG, f"hydra.run.dir={run}"]
    process = begin(*command, out=out, faults=SLOW_TO_MEASURE)
    wait_for(reached(run, 8))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, out.read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-8.ckpt"]
    assert not [line for line in metrics(run) if line["step"] == 8 and "val/loss" in line]
    assert finish(*command, out=out) == 0
    assert same(all_of(run), all_of(whole))


def test_the_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    # A step that goes on for ever, as far as the one who waits for it can tell.
    process = begin("train", *LONG, f"hydra.run.dir={run}", out=out, faults={"torch.optim.AdamW.step": ["slow", 3.0]})
    wait_for(lambda: (run / "metrics.jsonl").is_file())
    assert process.pid is not None
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.exitcode is None
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT, out.read_text()
    assert time.monotonic() - began < 10
    assert "No checkpoint yet." in out.read_text()


def start(
    *words: object, torchrun: bool = False, options: Sequence[str] = (), cwd: Path = ROOT
) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run"] if torchrun else []
    # A port of their own, as tests run side by side; what comes later in a line counts.
    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launcher += [*alone, *(options or ["--nproc-per-node=2"])] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "lmlab.train", *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=heeding,
    )


def on_two_nodes(*words: object, ranks: int, folders: Sequence[Path] = (ROOT, ROOT)) -> None:
    """Train with so many ranks on each of two nodes, which are two agents of torchrun here, each in a folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", f"--nproc-per-node={ranks}", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
    nodes = [start(*words, torchrun=True, options=options, cwd=folder) for folder in folders]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors


def ranks_of(run: Path) -> list[int]:
    """The processes of a run's ranks, by their rank."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"lmlab.worker" in words and str(run).encode() in words:
                variables = dict(v.split(b"=", 1) for v in (place / "environ").read_bytes().split(b"\0") if b"=" in v)
                found[int(variables[b"RANK"])] = int(place.name)
        except OSError:  # it has ended meanwhile
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.long
def test_two_ranks_stop_together_and_go_on(train: Callable[..., Path], tmp_path: Path) -> None:
    """TERM to the command: both ranks keep the state of one step; then kill -9 to one rank, and to the command."""
    slow = ["model._target_=tests.broken_model.from_scratch_and_slow", "trainer.max_steps=16"]
    whole = train(*LONG, *TWO, *slow, run_dir=tmp_path / "whole")
    run = tmp_path / "run"
    command = start(*LONG, *TWO, *slow, f"hydra.run.dir={run}")
    wait_for(reached(run, 3))
    command.send_signal(signal.SIGTERM)
    shown, errors = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGTERM, errors
    assert "Stopped by SIGTERM" in shown
    assert ranks_of(run) == []
    states = list((run / "checkpoints").glob("step-*.ckpt"))
    assert len(states) == 1

    # A rank dies: the others end within seconds, and the command says which it was.
    command = start(*LONG, *TWO, *slow, f"hydra.run.dir={run}")
    wait_for(reached(run, 9))
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    began = time.monotonic()
    shown, errors = command.communicate(timeout=60)
    assert time.monotonic() - began < 8
    assert command.returncode == 1
    assert "error: rank 1 was killed by SIGKILL, and the other ranks were stopped." in errors
    assert f"python -m lmlab.resume {run}" in errors
    assert ranks_of(run) == []

    # The command dies: its ranks do not go on without it, nor keep the next from the directory.
    command = start(*LONG, *TWO, *slow, f"hydra.run.dir={run}")
    wait_for(reached(run, 13))
    command.kill()
    command.communicate()
    wait_for(lambda: ranks_of(run) == [], 5)
    last = start(*LONG, *TWO, *slow, f"hydra.run.dir={run}")
    shown, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert losses(run) == losses(whole)
    assert "step 16/16" in (run / "train.log").read_text()
    assert (run / "logs" / "rank1.log").is_file()


@pytest.mark.longest
def test_the_second_signal_does_not_wait_for_a_rank_that_stands_still(tmp_path: Path) -> None:
    slow = "model._target_=tests.broken_model.from_scratch_and_slow"
    command = start(*LONG, *TWO, slow, f"hydra.run.dir={tmp_path}")
    wait_for(reached(tmp_path, 3))
    os.kill(ranks_of(tmp_path)[1], signal.SIGSTOP)
    for _ in range(2):
        command.send_signal(signal.SIGINT)
        time.sleep(0.5)
    command.communicate(timeout=30)
    assert command.returncode == 128 + signal.SIGINT
    assert ranks_of(tmp_path) == []


@pytest.mark.long
def test_the_error_of_a_rank_is_shown(train: Callable[..., Path], tmp_path: Path) -> None:
    """A defect in rank 1 alone: its traceback, once, and not that of the rank that lost its peer."""
    model = "model._target_=tests.broken_model.from_scratch_and_raises"
    broken = start(*LONG, *TWO, model, f"hydra.run.dir={tmp_path}")
    _, errors = broken.communicate(timeout=120)
    assert broken.returncode == 1
    assert errors.count("Traceback") == 1
    assert "ZeroDivisionError: only rank 1" in errors
    assert "error: rank 1 ended with exit code 1" in errors
    assert "ZeroDivisionError" in (tmp_path / "logs" / "rank1.log").read_text()


@pytest.mark.long
def test_under_torchrun(whole: Path, tmp_path: Path) -> None:
    """Its ranks are taken; one directory, one config, one log; and the run can go on without it."""
    run = tmp_path / "runs" / "run"
    alone = {line["step"]: line["train/loss"] for line in metrics(whole) if "train/loss" in line}
    torchrun = start(*LONG, f"hydra.run.dir={run}", "trainer.max_steps=2", torchrun=True)
    shown, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, errors
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    config = json.loads(json.dumps(read(run)))
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (2, 1)
    assert shown.count("step 0/2") == 1
    assert (run / "train.log").read_text().count("step 2/2  val/loss") == 1
    assert (run / "logs" / "rank1.log").is_file()
    assert metrics(run)[1]["train/loss"] == pytest.approx(alone[1], rel=1e-2)  # dropout is each rank's own
    # What can't be is said once, and all ranks end.
    for words, said in (
        (["trainer=ddp", "trainer.devices=3"], "2 × 1 ranks were started"),
        (["optim.lr=1"], "can't go on with optim.lr=1"),
        (["-m", "seed=1"], "-m under torchrun"),
    ):
        refused = start(*words, *LONG, f"hydra.run.dir={run}", torchrun=True)
        shown, errors = refused.communicate(timeout=120)
        assert refused.returncode == 1
        assert errors.count(said) == 1
        assert "lmlab/train.py" not in errors  # torchrun has a traceback of its own


@pytest.mark.longest
def test_torchrun_starts_all_ranks_again(whole: Path, tmp_path: Path) -> None:
    """A defect of one rank: the next attempt goes on in the same directory, from the newest checkpoint."""
    run_dir = f"hydra.run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"
    model = "model._target_=tests.broken_model.from_scratch_and_fails_at_first"
    words = [*LONG, model, run_dir, "trainer.max_steps=6", "callbacks.checkpoints.every_steps=1"]
    torchrun = start(*words, torchrun=True, options=["--nproc-per-node=2", "--max-restarts=1"])
    _, errors = torchrun.communicate(timeout=180)
    assert torchrun.returncode == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    manifest = json.loads((run / "manifest.json").read_text())
    assert [attempt["step"] for attempt in manifest["went_on"]] == [3]


@pytest.mark.long
def test_a_rank_with_other_data_is_named(tmp_path: Path) -> None:
    source = ["data._target_=tests.broken_source.other_on_rank_1", "trainer.max_steps=2"]
    two = start(*LONG, *TWO, *source, f"hydra.run.dir={tmp_path / 'run'}")
    _, errors = two.communicate(timeout=120)
    assert two.returncode == 1
    assert "error: rank 1 on " in errors
    assert "has another data than rank 0" in errors
    assert "All nodes need the same files" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.long
def test_nodes_with_caches_of_their_own_prepare_at_once(tmp_path: Path) -> None:
    """The same path of `cache_dir` is another disk on each node: here, another folder of each agent."""
    nodes, reading = [tmp_path / "node0", tmp_path / "node1"], tmp_path / "reading"
    for folder in (*nodes, reading):
        folder.mkdir()
    source = ["data._target_=tests.broken_source.read_by_both_ranks_at_once", f"+data.folder={reading}"]
    words = [*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    words += ["cache_dir=cache", "trainer.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    on_two_nodes(*words, *source, ranks=1, folders=nodes)
    caches = [{path.name for path in (node / "cache").glob("*-*") if path.is_dir()} for node in nodes]
    assert caches[0] == caches[1]
    assert len([name for name in caches[0] if name.startswith("tokens-")]) == 2
    assert metrics(tmp_path / "run")[-1]["step"] == 1


def read(run: Path) -> Any:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())
