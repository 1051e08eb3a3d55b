"""The SLURM job that Hydra's launcher would submit, and whether it is enough for its run."""

import math
from collections.abc import Iterator
from textwrap import indent
from typing import Any

from omegaconf import DictConfig

from lmlab.config.short_run import Measurement
from lmlab.console import counted, duration
from lmlab.preview.plan import Plan

OF_LAUNCHER = ("_target_", "submitit_folder", "max_num_timeout")  # keys that are not parameters of the script
REQUEUE = "hydra.launcher.additional_parameters.requeue=true"


def script(launcher: dict[str, Any], points: int) -> str:
    """Returns what `sbatch` would be given for the `points` of a sweep, by submitit itself. Needs no SLURM.

    Raises:
        ImportError: submitit is not installed.
        TypeError: the launcher has a key that submitit does not know.
    """
    from submitit.slurm.slurm import SlurmExecutor

    class Anywhere(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # else it looks for `srun`
            return 1

    executor = Anywhere(launcher["submitit_folder"])
    asked = {key: value for key, value in launcher.items() if value is not None and key not in OF_LAUNCHER}
    executor._internal_update_parameters(**executor._convert_parameters(asked))
    if points > 1:
        executor.parameters["map_count"] = points
    return executor._make_submission_file_text(executor._submitit_command_str, "preview")


Check = tuple[bool | None, str]
"""True if a limit of a job is enough, None where that can't be known; and a text on the limit and on the need."""


def checks(launcher: dict[str, Any], cfg: DictConfig, measured: Measurement, seconds: float | None) -> Iterator[Check]:
    """Yields the checks of a job's limits against its run, which takes so many `seconds`, if that is known."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.get("num_nodes", 1)
    tasks, asked = launcher["tasks_per_node"], launcher["nodes"]
    yield (
        (tasks, asked) == (devices, nodes),
        f"tasks per node × nodes: {tasks} × {asked}, for {devices} × {nodes} devices",
    )
    if cfg.trainer.accelerator in ("gpu", "cuda", "auto"):
        gpus, others = launcher.get("gpus_per_node"), [key for key in ("gres", "gpus_per_task") if launcher.get(key)]
        text = f"GPUs: {gpus or others or 'none'} per node, for {devices}"
        yield bool(others) or (gpus or 0) >= devices, text
    yield check_time(launcher, cfg, measured, seconds)
    if measured.steps:
        ahead, step = launcher["signal_delay_s"], max(measured.steps[1:] or measured.steps)
        need = max(step, measured.validation_batch) + (measured.checkpoint or 0.0)
        text = f"signal: {ahead} s ahead of the limit, and to stop and write a checkpoint takes {duration(need)}"
        yield need <= ahead, text
    memory, need = launcher.get("mem_gb"), measured.host_memory * devices
    if memory is None:
        yield None, "memory: none asked for, so the cluster's own default holds"
    elif measured.steps:
        yield need <= memory, f"memory: {memory} GB of a node, {need:.1f} GiB measured for {counted(devices, 'task')}"
    else:
        yield None, f"memory: {memory} GB of a node, not measured"
    cpus = launcher.get("cpus_per_task") or 1
    text = f"CPUs: {cpus} per task, for {counted(cfg.num_workers, 'worker')} and the training itself"
    yield cpus >= cfg.num_workers + 1, text


def check_time(launcher: dict[str, Any], cfg: DictConfig, measured: Measurement, seconds: float | None) -> Check:
    """Returns the check of the time limit: a run that is longer than its job can end by being re-queued."""
    limit = 60 * launcher["timeout_min"]
    useful = limit - launcher["signal_delay_s"]
    text = f"time: {duration(limit)}"
    if seconds is None:
        return None, f"{text}; the run's is not measured"
    if seconds <= useful:
        return True, f"{text}, for about {duration(seconds)}"
    text += f" is less than the {duration(seconds)} that the run takes"
    useful -= measured.start
    checkpoints = next((b for b in (cfg.get("callbacks") or {}).values() if b and "max_requeues" in b), None)
    if useful <= 0:
        text += ", and the start and the signal leave none to train: raise hydra.launcher.timeout_min"
    elif checkpoints is None:
        text += ", and no callback writes checkpoints: raise hydra.launcher.timeout_min"
    elif not (launcher.get("additional_parameters") or {}).get("requeue"):
        text += f", and {REQUEUE} is not there to go on"
    else:
        times = math.ceil((seconds - measured.start) / useful) - 1
        text += f": re-queued {counted(times, 'time')}, "
        if times > checkpoints.max_requeues:
            text += f"and callbacks.checkpoints.max_requeues={checkpoints.max_requeues}"
        else:
            text += "it goes on from its last checkpoint each time"
    return False, text


def show_job(plan: Plan, measured: Measurement, seconds: float | None) -> None:
    """Prints the script of a SLURM job, and its limits against its run."""
    print("Job, as it would be submitted:\n")
    print(indent(script(plan.launcher, plan.jobs), "    "))
    print("\nIts limits:")
    for met, text in checks(plan.launcher, plan.cfg, measured, seconds):
        print(f"  {'met' if met else 'unknown' if met is None else 'NOT MET':<8} {text}")
    if plan.first is None:
        print("Without -m the command runs here, and no job is submitted.")
