"""The part of one rank in a command: it reads the composed config of the run directory, never a command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmlab import secrets
from lmlab.config.compose import read_config
from lmlab.distributed import launch, ranks
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Stopped, plainly
from lmlab.runs.directory import RunDirectory


def follow(work: Callable[..., Any]) -> None:
    """Do the part of a rank that torchrun or srun started, once rank 0 has said what it is.

    Args:
        work: called with the composed config and the arguments that rank 0 gives.
    """
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
    """Call `work` with the config of a run directory; report its error to the process that started this one."""
    import torch.distributed as dist

    cfg, leads = read_config(Path(run_dir)), os.environ["RANK"] == "0"
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
    finally:
        # Lightning leaves gloo's threads running, and a process that ends over them may abort.
        if dist.is_initialized():
            dist.destroy_process_group()
