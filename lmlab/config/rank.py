"""The work of a command on several ranks: processes that read the composed config of its run directory."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lmlab import secrets
from lmlab.config.compose import handed_over, read_config
from lmlab.config.schema import world
from lmlab.distributed import launch, ranks
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Stopped, plainly
from lmlab.runs.directory import RunDirectory


def on_rank_zero(others: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that calls a function on rank 0 alone, where torchrun or srun started several ranks.

    Args:
        others: the work of the other ranks, called with the composed config and arguments that rank 0 gives by
            `on_all_ranks`. They end when rank 0 fails, and return None.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def on_this_rank(*arguments: Any, **options: Any) -> Any:
            if ranks.rank():
                return follow(others)
            with ranks.leading():
                return function(*arguments, **options)

        return on_this_rank

    return decorate


def on_all_ranks(
    name: str, work: Callable[..., Any], cfg: DictConfig, *arguments: str, apart: bool = False, advice: str = ""
) -> None:
    """Calls `work` with a config on each of its ranks: in this process, in new ones, or in those that were started.

    Args:
        name: of the command, by which `lmlab.worker` finds the work.
        arguments: more arguments of the work.
        apart: start a new process for a single rank too.
        advice: what to do after a rank was killed or crashed, added to the message.
    """
    run = RunDirectory(cfg.run_dir)
    words = [str(run.path), *arguments]
    with run.staying():
        if world(cfg.trainer) == 1 and not apart:
            work(cfg, *arguments)
        elif ranks.rank() is None:
            launch.launch([name, *words], cfg.trainer.devices, run.rank_log, handed_over(cfg), advice)
        else:
            ranks.send_arguments(words, handed_over(cfg))
            with ranks.groups_ended():
                work(cfg, *arguments)


def follow(work: Callable[..., Any]) -> None:
    """Does the work of a rank that torchrun or srun started, once rank 0 has given its arguments."""
    arguments = ranks.receive_arguments()
    if not arguments:
        return  # rank 0 says why, and its exit code is the run's
    run_dir, *rest = arguments
    log = RunDirectory(run_dir).rank_log(int(os.environ["RANK"]))
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
    try:
        run_rank(work, run_dir, *rest)
    except Stopped:
        sys.exit(0)  # with another code SLURM would kill rank 0, which has W&B to end


def run_rank(work: Callable[..., Any], run_dir: str, *arguments: str) -> None:
    """Calls `work` with the config of a run directory; reports its error to the process that started this one."""
    cfg, leads = read_config(Path(run_dir)), os.environ["RANK"] == "0"
    with ranks.groups_ended():
        try:
            with SIGNALS.heeded(), RunDirectory(run_dir).staying():
                work(cfg, *arguments)
        except Exception as error:
            message = None if cfg.debug else plainly(error)
            message = message and secrets.redacted_text(message)
            shown = f"error: {message}" if message else secrets.redacted_text(launch.traced(error))
            # Rank 0 shares the terminal with the process that will show it.
            if not launch.report(message or shown, error, message is not None) or not leads:
                print(shown, file=sys.stderr)
            sys.exit(1)
