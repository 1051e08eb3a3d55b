"""SLURM: the ranks that `srun` started, the launchers that submit jobs, and jobs that go back in the queue."""

import os
import shutil
import subprocess

from lmlab.errors import UserError
from lmlab.processes import last_line, run

SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
"""The package of Hydra's launchers that submit each run of a sweep as a job."""
SLURM = f"{SUBMITIT}.submitit_launcher.SlurmLauncher"
"""The target of the launcher that submits jobs to SLURM."""


def submits(launcher: str) -> bool:
    """Returns whether a launcher, by its dotted name, submits the runs as jobs, which outlive this process."""
    return launcher.startswith(SUBMITIT)


def in_job() -> bool:
    """Returns whether this process belongs to a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


def array_task() -> tuple[int, int]:
    """Returns the number of this task of a job array, from 0, and how many tasks it has; 0 and 1 outside of one."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" not in env:
        return 0, 1
    beyond = int(env["SLURM_ARRAY_TASK_ID"]) - int(env["SLURM_ARRAY_TASK_MIN"])
    return beyond // int(env.get("SLURM_ARRAY_TASK_STEP", 1)), int(env["SLURM_ARRAY_TASK_COUNT"])


def set_rank_variables() -> None:
    """Sets the variables of torchrun (`RANK`, `MASTER_ADDR`, …) from those of srun, where it started several ranks."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    tasks, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(tasks)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(tasks // nodes)
    env["GROUP_RANK"] = env["SLURM_NODEID"]
    env["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(env["SLURM_STEP_NODELIST"])
    # Two steps, which may share a node, hardly get the same port.
    env["MASTER_PORT"] = str(12000 + (31 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 20000)


def check_reachable() -> None:
    """Refuses to submit jobs where no controller of SLURM answers.

    Raises:
        UserError: says why.
    """
    for name in ("srun", "scontrol"):
        if not shutil.which(name):
            raise UserError(
                f"there is no SLURM here, as there is no {name}: give the command where jobs are submitted."
            )
    code, output = run(["scontrol", "ping"], 60)
    if code:
        # Root is shown a banner below the line of a controller.
        why = next((line for line in output.splitlines() if line.endswith(" is DOWN")), last_line(output))
        raise UserError(
            f"SLURM does not answer: {why}\n"
            "No job was submitted. `scontrol ping` names the controller, SLURM_CONF the configuration."
        )


def requeue(limit: int) -> str:
    """Puts the job of this process back in the queue, unless that was done `limit` times already.

    Returns:
        a sentence for the log that says whether the job is re-queued.
    """
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    times = int(env.get("SLURM_RESTART_COUNT", 0))
    if times >= limit:
        return f"Job {job} is not re-queued: it was {times} times already (callbacks.checkpoints.max_requeues)."
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Job {job} could not be re-queued: {error}."
    if done.returncode:
        return f"Job {job} could not be re-queued: {done.stderr.strip()}"
    return f"Job {job} is re-queued."
