"""The SLURM job that Hydra's launcher would submit, and whether it is enough for its run."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig

from lmlab.preview.cost import lasting

OWN = ("_target_", "submitit_folder", "max_num_timeout")  # of the launcher, and not the script's


def script(launcher: dict[str, Any], points: int) -> str:
    """What `sbatch` would be given, by submitit itself, for the `points` of a sweep. Needs no SLURM.

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
    asked = {key: value for key, value in launcher.items() if value is not None and key not in OWN}
    executor._internal_update_parameters(**executor._convert_parameters(asked))
    if points > 1:
        executor.parameters["map_count"] = points
    return executor._make_submission_file_text(executor._submitit_command_str, "preview")


class Check(NamedTuple):
    """One of a job's limits against what the run needs."""

    met: bool | None
    """None where it can't be known."""
    says: str


def checks(launcher: dict[str, Any], cfg: DictConfig, found: dict[str, Any], seconds: float | None) -> Iterator[Check]:
    """A job's limits, each against its run.

    Args:
        found: by `measure`.
        seconds: that the run takes, if that is known.
    """
    devices, nodes = cfg.trainer.devices, cfg.trainer.get("num_nodes", 1)
    tasks, asked = launcher["tasks_per_node"], launcher["nodes"]
    says = f"tasks: {tasks} per node × {asked} nodes, for {devices} devices × {nodes} nodes"
    yield Check((tasks, asked) == (devices, nodes), says)
    gpus = launcher.get("gpus_per_node")
    if cfg.trainer.accelerator in ("gpu", "cuda", "auto"):
        others = [key for key in ("gres", "gpus_per_task") if launcher.get(key)]
        yield Check(bool(others) or (gpus or 0) >= devices, f"GPUs: {gpus or others or 'none'} per node, for {devices}")
    yield from of_time(launcher, cfg, found, seconds)
    need = found["host"] * devices if "host" in found else None
    memory = launcher.get("mem_gb")
    if memory is None:
        yield Check(None, "memory: none asked for, so the cluster's own default holds")
    else:
        needed = "not measured" if need is None else f"{need:.1f} GiB measured for {devices} tasks"
        yield Check(None if need is None else need <= memory, f"memory: {memory} GB of a node, {needed}")
    cpus = launcher.get("cpus_per_task") or 1
    says = f"CPUs: {cpus} per task, for {cfg.num_workers} workers and the training itself"
    yield Check(cpus >= cfg.num_workers + 1, says)


def of_time(launcher: dict[str, Any], cfg: DictConfig, found: dict[str, Any], seconds: float | None) -> Iterator[Check]:
    """The time limit, and the signal ahead of it."""
    limit, ahead = 60 * launcher["timeout_min"], launcher["signal_delay_s"]
    own = f"time: {lasting(limit)}"
    if seconds is None:
        yield Check(None, f"{own}; the run's is not measured")
    elif seconds <= limit - ahead:
        yield Check(True, f"{own}, for some {lasting(seconds)}")
    else:
        yield Check(*in_parts(launcher, cfg, found, seconds, own))
    if "steps" in found:
        need = max([*found["steps"][1:], *found["validation"]], default=found["steps"][0]) + found.get("state", 0.0)
        says = f"signal: {ahead} s ahead of the limit, and to stop and keep the state takes {lasting(need)}"
        yield Check(need <= ahead, says)


def in_parts(
    launcher: dict[str, Any], cfg: DictConfig, found: dict[str, Any], seconds: float, own: str
) -> tuple[bool, str]:
    """Whether a run that is longer than its job comes to its end by being re-queued."""
    long = f"{own} is less than the {lasting(seconds)} that the run takes"
    useful = 60 * launcher["timeout_min"] - launcher["signal_delay_s"] - found["start"]
    if useful <= 0:
        return False, f"{long}, and the start and the signal leave none to train: raise hydra.launcher.timeout_min"
    kept = next((b for b in (cfg.get("callbacks") or {}).values() if b and "max_requeues" in b), None)
    if kept is None:
        return False, f"{long}, and no callback keeps its state: raise hydra.launcher.timeout_min"
    if not (launcher.get("additional_parameters") or {}).get("requeue"):
        return False, f"{long}, and hydra.launcher.additional_parameters.requeue=true is not there to go on"
    times = math.ceil((seconds - found["start"]) / useful) - 1
    if times > kept.max_requeues:
        return False, f"{long}: re-queued {times} times, and callbacks.checkpoints.max_requeues={kept.max_requeues}"
    return False, f"{long}: it will be re-queued {times} time{'s' * (times > 1)}, and goes on from its state each time"
