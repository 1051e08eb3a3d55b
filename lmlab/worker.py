"""`python -m lmlab.worker VERB RUN_DIR [STATE]`: one rank of a run or an evaluation.

It reads the composed config of the run directory and never sees the command line.
"""

import os
import sys
from pathlib import Path

from lmlab.config.compose import read_config
from lmlab.errors import Stopped, plainly
from lmlab.evaluate import measure
from lmlab.runs import secrets
from lmlab.runs.directory import RunDirectory
from lmlab.runs.log import kept_log
from lmlab.runs.stopping import SIGNALS
from lmlab.train import train
from lmlab.training import launch


def main() -> None:
    launch.end_with_parent()
    share(*sys.argv[1:])


def follow(verb: str) -> None:
    """A rank that torchrun or srun started: what rank 0 tells, is done."""
    word = launch.hear()
    if not word:
        return  # rank 0 says why, and its exit code is the run's
    run = RunDirectory(word[0])
    log = run.rank_log(int(os.environ["RANK"]))
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
    try:
        share(verb, *word)
    except Stopped:
        sys.exit(0)  # with another code SLURM would kill rank 0, which has W&B to end


def share(verb: str, run_dir: str, state: str | None = None) -> None:
    """This rank's share of a verb."""
    import torch.distributed as dist

    cfg = read_config(Path(run_dir))
    run, leads = RunDirectory(run_dir), os.environ["RANK"] == "0"
    try:
        with SIGNALS.heeded(), run.staying():
            if verb == "evaluate":
                measure(cfg)
            else:
                with kept_log(run.log if leads else run.rank_log(int(os.environ["RANK"]))):
                    train(cfg, Path(state) if state else None)
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


if __name__ == "__main__":
    main()
