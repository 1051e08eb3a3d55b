"""`python -m lmlab.doctor`: try out whether this machine can do what lmlab promises.

Takes ordinary arguments; `--help` lists them. Two minutes at most.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill

from omegaconf import OmegaConf

import lmlab
from lmlab.config.files import CONF
from lmlab.distributed.signals import SIGNALS
from lmlab.doctor import environment, services, trials
from lmlab.errors import Arguments, UserError, first_line, shown_plainly, stopped_with

LIMIT = 110  # seconds, for all checks


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():  # stopped by a signal, it still ends what it started
        parser = Arguments(
            "python -m lmlab.doctor",
            description="Try out whether this machine can do what lmlab promises: one line for each check, "
            "and how to mend it where it fails.",
            epilog="pass: it works. fail: it does not; exit code 1. skip: not there, which is no fault.",
        )
        parser.add_argument("--into", type=Path, metavar="DIR", default="outputs", help="where runs will go (outputs)")
        parser.add_argument(
            "--cache-dir", type=Path, metavar="DIR", help="of prepared data (LMLAB_CACHE, or ~/.cache/lmlab)"
        )
        given = parser.parse_args()
        with stopped_with("Nothing of what was tried out stays."):
            failed = examine(given)
        sys.exit(failed)


def examine(given: argparse.Namespace) -> bool:
    """Make all checks, and show each when it is through; whether one failed."""
    print(f"lmlab {lmlab.__version__}, Python {platform.python_version()}, {platform.platform()}", flush=True)
    began = time.monotonic()
    cache = given.cache_dir or Path(OmegaConf.load(CONF / "train.yaml").cache_dir)
    huggingface = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    # What takes longest comes last.
    checks: dict[str, Callable[[], str]] = {
        "runs": partial(environment.writing, given.into, "choose another: hydra.run.dir=DIR"),
        "data cache": partial(
            environment.writing, cache.expanduser(), "choose another: cache_dir=DIR, or LMLAB_CACHE=DIR"
        ),
        "hub cache": partial(environment.writing, huggingface.expanduser(), "choose another: HF_HOME=DIR"),
        "compiler": environment.compiling,
        "SLURM": services.slurm,
        "hub": services.hub,
        "W&B": services.wandb,
        "devices": environment.devices,
        "bf16": environment.bf16,
        "collectives": trials.collectives,
        "resume": lambda: trials.resuming(LIMIT - (time.monotonic() - began)),
    }
    counts = {"pass": 0, "fail": 0, "skip": 0}
    for name, check in checks.items():
        if sys.stdout.isatty():
            print(f"…     {name}", end="\r", flush=True)
        fix = ""
        try:
            verdict, found = "pass", check()
        except environment.NotThere as missing:
            verdict, found = "skip", str(missing)
        except UserError as error:
            verdict, (found, fix) = "fail", str(error).split("\n", 1)
        except Exception as error:  # the other checks may say why
            verdict, found, fix = "fail", f"{type(error).__name__}: {first_line(error)}", environment.REINSTALL
        counts[verdict] += 1
        print(line(f"{verdict}  {name:<11}", found), flush=True)
        if fix:
            print(line("", f"fix: {fix}"), flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), end="")
    print(f", in {time.monotonic() - began:.0f} s")
    return counts["fail"] > 0


def line(head: str, text: str) -> str:
    """A line of a table, wrapped to a terminal of 100 columns; what can be copied stays whole."""
    return fill(
        text,
        100,
        initial_indent=f"{head:<17}  ",
        subsequent_indent=" " * 19,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    main()
