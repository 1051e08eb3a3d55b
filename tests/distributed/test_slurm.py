"""What SLURM is asked for, and what a person is told, without one. With one: tests/slurm."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf
from submitit.slurm.slurm import _make_sbatch_string

from lmlab.config.files import CONF, SWEEPS
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Stopped
from tests.conftest import TINY

SBATCH = SWEEPS / "train.sbatch"


def asked_for(*overrides: str) -> dict:
    """What `hydra/launcher=slurm` asks for."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", ["hydra/launcher=slurm", *overrides], return_hydra_config=True)
    launcher = OmegaConf.masked_copy(cfg.hydra.launcher, [*set(cfg.hydra.launcher) - {"submitit_folder"}])
    launcher._set_parent(cfg.hydra)
    return OmegaConf.to_container(launcher, resolve=True)


def test_devices_and_nodes_are_the_trainers() -> None:
    keys = ("nodes", "tasks_per_node", "gpus_per_node")
    wide = asked_for("trainer=ddp", "trainer.devices=8", "trainer.num_nodes=4")
    assert [wide[key] for key in keys] == [4, 8, 8]
    assert [asked_for()[key] for key in keys] == [1, 1, None]
    assert [asked_for("trainer=ddp", "trainer.accelerator=cpu")[key] for key in keys] == [1, 2, None]
    assert asked_for("hydra.launcher.gpus_per_node=3")["gpus_per_node"] == 3


def test_submitted_script() -> None:
    """The keys are those that submitit knows; jobs may be re-queued, and a failed rank ends the others."""
    asked = asked_for()
    renamed = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    values = {renamed.get(name, name): value for name, value in asked.items() if name not in ("_target_", "mem_gb")}
    del values["max_num_timeout"]
    script = _make_sbatch_string("true", "folder", **values)
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --signal=USR2@300\n" in script
    assert script.index("SLURM_KILL_BAD_EXIT=1") < script.index("\nsrun ")


def without(place: Path, *words: str, path: str | None = None) -> subprocess.CompletedProcess:
    """`lmlab.train -m` with the launcher, and `place` before all other packages."""
    env = os.environ | {"PYTHONPATH": f"{place}:{CONF.parent}"} | ({"PATH": path} if path else {})
    command = [sys.executable, "-m", "lmlab.train", "-m", "hydra/launcher=slurm", *TINY, *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def test_missing_plugin_is_named(tmp_path: Path) -> None:
    hidden = tmp_path / "hydra_plugins" / "hydra_submitit_launcher"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    done = without(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: submitting jobs to SLURM takes a plugin of Hydra's that is not installed:",
        "pip install 'lmlab[slurm]'",
    ]


def test_no_slurm_is_said_plainly(tmp_path: Path) -> None:
    done = without(tmp_path, path=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no SLURM here, as there is no srun")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("Unable to contact slurm controller\n", "Unable to contact slurm controller"),
        # What root is shown.
        (
            "Slurmctld(primary) at head is DOWN\n*****\n** RESTORE SLURMCTLD DAEMON TO SERVICE **\n*****\n",
            "Slurmctld(primary) at head is DOWN",
        ),
    ],
)
def test_a_controller_that_does_not_answer(output: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    done = without(tmp_path / "here", path=f"{fake_slurm(tmp_path, output)}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: SLURM does not answer: {why}",
        "No job was submitted. `scontrol ping` names the controller, SLURM_CONF the configuration.",
    ]
    assert not list((tmp_path / "here").iterdir())


def fake_slurm(folder: Path, error: str = "") -> Path:
    """A folder with commands of a SLURM that has no nodes; `scontrol` prints an error and fails, if there is one."""
    (folder / "srun").touch(0o755)
    (folder / "scontrol").write_text(f"#!/bin/sh\nprintf '{error}'\nexit {int(bool(error))}\n")
    (folder / "scontrol").chmod(0o755)
    return folder


def test_a_wrong_point_is_refused_before_any_is_submitted(tmp_path: Path) -> None:
    """Whatever devices its nodes have and this machine has not."""
    (tmp_path / "here").mkdir()
    words = ["trainer=gpu", "trainer.devices=8", "trainer.num_nodes=4", "batch_size=32,0"]
    done = without(tmp_path / "here", *words, path=f"{fake_slurm(tmp_path)}:{os.environ['PATH']}")
    assert done.returncode == 1
    said = "error: the point batch_size=0 is refused: batch_size=0: it has to be a whole number, 1 or more.\n"
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 2
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("array", [False, True])
def test_sbatch_runs_the_same_directory_again(tmp_path: Path, array: bool) -> None:
    """The command that a job gives is the same after a re-queue; each job of an array has its seed."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    env = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SBATCH), "optim.lr=1"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "--kill-on-bad-exit=1 --cpus-per-task=2 python -u -m lmlab.train trainer.devices=4 trainer.num_nodes=2 "
        f"hydra.run.dir=outputs/slurm-{'5_3 seed=3' if array else 7} optim.lr=1\n"
    )


def test_signals_are_the_processes_own() -> None:
    """A pickled job, brought to another process, heeds the signals that training there looks at."""
    assert pickle.loads(pickle.dumps(SIGNALS)) is SIGNALS


def test_signals_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ahead of a limit waits for training to begin; one that comes again is no hurry."""

    def send(number: int) -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(Stopped), SIGNALS.heeded():
        send(signal.SIGUSR2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with SIGNALS.heeded():
        send(signal.SIGUSR2)
        assert SIGNALS.received == signal.SIGUSR2
    with pytest.raises(Stopped), SIGNALS.heeded():
        send(signal.SIGTERM)
    with SIGNALS.heeded():
        SIGNALS.patient = True
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert SIGNALS.received == signal.SIGTERM
