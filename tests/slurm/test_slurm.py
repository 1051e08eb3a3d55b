"""Real jobs on a real SLURM: `make test-slurm` brings the cluster up.

Two jobs that reach their time limit twice are begun first, and looked at last. A run that nothing
disturbs, of the same seed and number of ranks, is what they have to equal.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmlab.data.shards import load_prepared
from lmlab.runs.status import read_status
from lmlab.sweeps.points import read_points
from tests.conftest import TINY, metrics, run_verb

ROOT = Path(__file__).parents[2]
RUN = [
    *(word for word in TINY if not word.startswith("trainer.max_steps")),
    "trainer.max_steps=200",
    "trainer.val_check_interval=50",
    "trainer.log_every_n_steps=1",
]
SLOW = ["+callbacks.slow._target_=tests.slurm.slow.Slow"]
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=2", "hydra.launcher.cpus_per_task=1"]
SBATCH = ["--parsable", "--mem=2G", "--cpus-per-task=1"]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu"]
LIMIT = 2  # minutes; SLURM knows no shorter unit, and looks each 30 seconds
AHEAD = 30  # seconds: the signal comes when 60 to 90 have gone by


def cluster() -> bool:
    """Whether the cluster of `cluster.sh` is what SLURM's commands talk to; no other is to get these jobs."""
    try:
        done = subprocess.run(["scontrol", "show", "nodes", "-o"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.startswith("NodeName=slocal1 ")


pytestmark = [
    pytest.mark.skipif(not cluster(), reason="the cluster of tests/slurm/cluster.sh is not up: make test-slurm"),
    pytest.mark.timeout(330),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands are given: no checkout."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def start(place: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a command there; `lmlab.train -m hydra/launcher=slurm` waits for its jobs."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    begun: list[subprocess.Popen] = []

    def run(*command: str) -> subprocess.Popen:
        begun.append(
            subprocess.Popen(command, cwd=place, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def train(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """Start `lmlab.train -m` with the launcher of SLURM."""
    return lambda *words: start("python", "-m", "lmlab.train", "-m", *LAUNCHER, *words)


@pytest.fixture(scope="module")
def sbatch(start: Callable[..., subprocess.Popen]) -> Callable[..., str]:
    """Submit a file of `sweeps/` with options of sbatch and overrides; returns the job's id."""

    def submit(options: list[str], *words: str, script: str = "train.sbatch") -> str:
        process = start("sbatch", *SBATCH, *options, str(ROOT / "sweeps" / script), *words)
        said = process.communicate(timeout=30)[0]
        assert process.returncode == 0, said
        return said.strip()

    return submit


def until(what: Callable[[], object], seconds: float) -> None:
    """Wait for a thing to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def states(job: str) -> list[str]:
    """The states of each of a job's starts, the last one last."""
    table = subprocess.run(
        ["sacct", "--duplicates", "-XPn", "-j", job, "-o", "State"], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[0] for line in table.splitlines()]


def ended(job: str, seconds: float = 120) -> str:
    """Wait until a job has ended, and its ranks; returns its state."""
    going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
    until(lambda: states(job) and states(job)[-1] not in going and not processes(job), seconds)
    return states(job)[-1]


def training(run: Path) -> None:
    """Wait until some steps are made."""
    until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 5, 90)


def processes(job: str) -> dict[int, int]:
    """The process of each of a job's ranks."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                word.split("=", 1) for word in (place / "environ").read_text().split("\0") if "=" in word
            )
            command = (place / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if environment.get("SLURM_JOB_ID") == job and "lmlab.train" in command and "srun" not in command:
            found[int(environment["SLURM_PROCID"])] = int(place.name)
    return found


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def losses(run: Path) -> dict[tuple[int, str], float]:
    """The losses of a run; each figure is there once for a step."""
    rows = [(line["step"], frozenset(line) - {"time", "step"}) for line in metrics(run)]
    assert len(rows) == len(set(rows))
    return {
        (line["step"], name): line[name] for line in metrics(run) for name in ("train/loss", "val/loss") if name in line
    }


@pytest.fixture(scope="module", autouse=True)
def limited(train: Callable[..., subprocess.Popen], sbatch: Callable[..., str], place: Path) -> dict:
    """Two jobs that reach their time limit: one of sbatch, and one of the launcher's on two nodes."""
    job = sbatch([f"--time={LIMIT}", f"--signal=USR2@{AHEAD}"], *RUN, *SLOW, "logger=default", "seed=1")
    launcher = train(
        *RUN,
        *SLOW,
        *RANKS,
        "trainer.devices=1",
        "trainer.num_nodes=2",
        f"hydra.launcher.timeout_min={LIMIT}",
        f"hydra.launcher.signal_delay_s={AHEAD}",
        "hydra.sweep.dir=limited",
        "seed=1",
    )
    training(place / "outputs" / f"slurm-{job}")
    training(place / "limited" / "0")
    return {"job": job, "launcher": launcher}


@pytest.fixture(scope="module", autouse=True)
def killed(train: Callable[..., subprocess.Popen], place: Path, limited: dict) -> subprocess.Popen:
    """The launcher of an array of two, the first of which was killed: submitit hears of that within a minute."""
    launcher = train(*RUN, *SLOW, "hydra.sweep.dir=killed", "seed=1,2")
    training(place / "killed" / "0")
    os.kill(int((place / "killed" / "0" / ".lock").read_text().split()[1]), signal.SIGKILL)  # nodes are of this machine
    return launcher


@pytest.fixture(scope="module")
def array(train: Callable[..., subprocess.Popen], place: Path, limited: dict) -> Path:
    """Three jobs that nothing disturbs."""
    launcher = train(*RUN, "hydra.sweep.dir=array", "seed=1,2,3")
    said = launcher.communicate(timeout=150)[0]
    assert launcher.returncode == 0, said
    return place / "array"


@pytest.fixture(scope="module")
def ranks(sbatch: Callable[..., str], place: Path, limited: dict) -> Callable[[int, int], Path]:
    """A run on so many nodes with so many ranks each, that nothing disturbs."""

    def run(nodes: int, each: int) -> Path:
        job = sbatch([f"--nodes={nodes}", f"--ntasks-per-node={each}"], *RUN, *RANKS, "seed=1")
        assert ended(job) == "COMPLETED", (place / f"slurm-{job}.out").read_text()
        return place / "outputs" / f"slurm-{job}"

    return run


def test_array_of_three(array: Path) -> None:
    """Each job of a sweep is a run of its own."""
    runs = [array / str(number) for number in range(3)]
    assert [json.loads((run / "manifest.json").read_text())["seeds"]["run"] for run in runs] == [1, 2, 3]
    assert len({weights(run) for run in runs}) == 3
    jobs = {folder.name.rpartition("_")[0] for folder in (array / ".submitit").glob("[0-9]*_*")}
    (job,) = jobs
    until(lambda: states(job) == ["COMPLETED"] * 3, 20)  # the launcher has its answers before SLURM knows


def test_tasks_of_an_array_prepare_what_one_process_does(sbatch: Callable[..., str], place: Path) -> None:
    """Each makes its share of the shards, and the last one the index."""
    words = ["tokenizer.vocab_size=300", "shards=4"]
    job = sbatch(["--array=0-1"], *words, "output=by-tasks", script="prepare.sbatch")
    run_verb("prepare", *words, f"output={place}/by-one")
    until(lambda: states(job) == ["COMPLETED"] * 2, 60)
    one, other = (load_prepared(str(place / name)).index for name in ("by-one", "by-tasks"))
    assert len(one["train"]) == 4
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == {"command"}
    said = [(place / f"slurm-{job}_{task}.out").read_text() for task in (0, 1)]
    assert [text.count("-of-00004: ") for text in said] == [4, 4]
    assert sum("To train: python -m lmlab.train" in text for text in said) >= 1


def test_two_nodes_of_two_ranks(ranks: Callable[[int, int], Path], array: Path) -> None:
    """Four ranks train as one does, but for rounding."""
    four = ranks(2, 2)
    assert sorted(path.name for path in (four / "logs").iterdir()) == ["rank1.log", "rank2.log", "rank3.log"]
    alone, together = losses(array / "0"), losses(four)
    assert alone.keys() == together.keys()
    assert together[200, "val/loss"] == pytest.approx(alone[200, "val/loss"], rel=1e-3)


def test_cancelled_job_can_be_gone_on_with(
    sbatch: Callable[..., str], start: Callable[..., subprocess.Popen], place: Path, array: Path
) -> None:
    job = sbatch([], *RUN, *SLOW, "seed=1")
    run = place / "outputs" / f"slurm-{job}"
    training(run)
    subprocess.run(["scancel", job], check=True)
    assert ended(job, 30) == "CANCELLED"
    kept = list(run.glob("checkpoints/step-*.ckpt"))
    assert kept
    assert "Stopped by SIGTERM. Kept: the checkpoint of step" in (run / "train.log").read_text()
    resume = start("python", "-m", "lmlab.resume", str(run), "trust=tests")
    said = resume.communicate(timeout=120)[0]
    assert resume.returncode == 0, said
    assert weights(run) == weights(array / "0")
    assert losses(run) == losses(array / "0")


def test_killed_rank_ends_the_job(sbatch: Callable[..., str], place: Path) -> None:
    job = sbatch(["--nodes=2"], *RUN, *SLOW, *RANKS)
    training(place / "outputs" / f"slurm-{job}")
    both = processes(job)
    assert both.keys() == {0, 1}
    os.kill(both[1], signal.SIGKILL)
    assert ended(job, 15) == "FAILED"


def test_failed_job_says_why_and_a_wrong_key_is_no_job(train: Callable[..., subprocess.Popen], place: Path) -> None:
    failing = train(*RUN, *RANKS, "hydra.sweep.dir=failing", "data=files", "data.train=none.txt", "seed=1")
    refused = train(*RUN, "hydra.sweep.dir=refused", "optim.lear=1")
    said = refused.communicate(timeout=60)[0]
    assert refused.returncode == 1
    assert said == 'error: there is no key "optim.lear". Did you mean "optim.lr"?\n'
    assert not (place / "refused").exists()
    said = failing.communicate(timeout=90)[0]
    assert failing.returncode == 1
    assert "0: data.train=none.txt: no such file" in said
    assert said.splitlines()[-1].startswith("error: 1 of 1 runs failed.")
    assert "Traceback" not in said


def test_killed_job_does_not_hide_the_others(
    killed: subprocess.Popen, start: Callable[..., subprocess.Popen], place: Path, array: Path
) -> None:
    """The launcher waits for the whole array, says which job was killed, and runs that alone when told to go on."""
    folder = place / "killed"
    said = killed.communicate(timeout=180)[0]
    assert killed.returncode == 1, said
    assert [read_status(point.run).name for point in read_points(folder)] == ["failed", "done"]
    assert read_status(read_points(folder)[0].run).cause == "killed"
    there = (folder / "1" / "summary.json").stat().st_mtime_ns
    resume = start("python", "-m", "lmlab.sweep", "resume", "killed", "hydra/launcher=basic")
    said = resume.communicate(timeout=120)[0]
    assert resume.returncode == 0, said
    assert [weights(folder / name) for name in "01"] == [weights(array / name) for name in "01"]
    assert (folder / "1" / "summary.json").stat().st_mtime_ns == there


def test_time_limit(limited: dict, array: Path, place: Path) -> None:
    """A run that was re-queued twice is, to the last bit, the run that was not; W&B sees one run."""
    assert ended(limited["job"], 240) == "COMPLETED"
    assert states(limited["job"]) == ["REQUEUED", "REQUEUED", "COMPLETED"]
    run = place / "outputs" / f"slurm-{limited['job']}"
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["went_on"]) == 2
    assert weights(run) == weights(array / "0")
    assert losses(run) == losses(array / "0")
    assert (run / "train.log").read_text().count("Stopped by SIGUSR2.") == 2
    assert "Traceback" not in (place / f"slurm-{limited['job']}.out").read_text()
    (upload,) = run.glob("wandb/offline-run-*")  # the last has all rows
    earlier = list(run.glob("wandb/earlier-offline-run-*"))
    assert len(earlier) == 2
    assert all(path.name.endswith(manifest["run_id"]) for path in (upload, *earlier))


def test_time_limit_of_the_launchers_ranks(limited: dict, ranks: Callable[[int, int], Path], place: Path) -> None:
    undisturbed = ranks(1, 2)
    said = limited["launcher"].communicate(timeout=240)[0]
    assert limited["launcher"].returncode == 0, said
    run = place / "limited" / "0"
    job = next((place / "limited" / ".submitit").glob("[0-9]*")).name
    until(lambda: states(job) == ["REQUEUED", "REQUEUED", "COMPLETED"], 20)
    assert len(json.loads((run / "manifest.json").read_text())["went_on"]) == 2
    assert weights(run) == weights(undisturbed)
    assert losses(run) == losses(undisturbed)
