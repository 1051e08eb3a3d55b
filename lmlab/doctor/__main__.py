"""`python -m lmlab.doctor`: try out whether this machine can do what lmlab promises.

Takes ordinary arguments; `--help` lists them. Two minutes at most.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from omegaconf import OmegaConf

import lmlab
from lmlab.config.files import CONF
from lmlab.distributed.signals import SIGNALS
from lmlab.doctor import checks
from lmlab.errors import Arguments, UserError, first_line, shown_plainly, stopped_with

LIMIT = 110  # seconds, for all checks


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():  # stopped by a signal, it still ends what it started
        parser = Arguments(
            "python -m lmlab.doctor",
            description="Try out whether this machine can do what lmlab promises: one line for each check, "
            "and how to repair it where it fails.",
            epilog="pass: it works. fail: it does not; exit code 1. skip: not there, which is no fault.",
        )
        parser.add_argument("--into", type=Path, metavar="DIR", default="outputs", help="where runs will go (outputs)")
        parser.add_argument(
            "--cache-dir", type=Path, metavar="DIR", help="of prepared data (LMLAB_CACHE, or ~/.cache/lmlab)"
        )
        arguments = parser.parse_args()
        with stopped_with("Nothing of what was tried out stays."):
            failed = examine(arguments)
        sys.exit(failed)


def table_of(arguments: argparse.Namespace) -> dict[str, Callable[[], str]]:
    """Returns the checks by their names, those that take longest last."""
    deadline = time.monotonic() + LIMIT
    cache = arguments.cache_dir or Path(OmegaConf.load(CONF / "train.yaml").cache_dir)
    huggingface = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return {
        "runs": lambda: checks.check_folder(arguments.into, "hydra.run.dir=DIR"),
        "data cache": lambda: checks.check_folder(cache, "cache_dir=DIR, or LMLAB_CACHE=DIR"),
        "hub cache": lambda: checks.check_folder(huggingface, "HF_HOME=DIR"),
        "compiler": checks.check_compiler,
        "SLURM": checks.check_slurm,
        "hub": checks.check_hub,
        "W&B": checks.check_wandb,
        "devices": checks.check_devices,
        "bf16": checks.check_bf16,
        "collectives": checks.check_collectives,
        "resume": lambda: checks.check_resume(deadline - time.monotonic()),
    }


def examine(arguments: argparse.Namespace) -> bool:
    """Makes all checks and prints each result as it comes; returns whether one failed."""
    print(f"lmlab {lmlab.__version__}, Python {platform.python_version()}, {platform.platform()}", flush=True)
    began = time.monotonic()
    counts = {"pass": 0, "fail": 0, "skip": 0}
    for name, check in table_of(arguments).items():
        if sys.stdout.isatty():
            print(f"…     {name}", end="\r", flush=True)
        fix = ""
        try:
            verdict, found = "pass", check()
        except checks.Skip as reason:
            verdict, found = "skip", str(reason)
        except UserError as error:
            verdict, (found, fix) = "fail", str(error).split("\n", 1)
        except Exception as error:  # the other checks may say why
            verdict, found, fix = "fail", f"{type(error).__name__}: {first_line(error)}", checks.REINSTALL
        counts[verdict] += 1
        print_wrapped(f"{verdict}  {name:<11}  {found}")
        if fix:
            print_wrapped(f"{'':19}fix: {fix}")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), end="")
    print(f", in {time.monotonic() - began:.0f} s")
    return counts["fail"] > 0


def print_wrapped(text: str) -> None:
    """Prints a row of the table, wrapped to a terminal of 100 columns; words that can be copied stay whole."""
    print(fill(text, 100, subsequent_indent=" " * 19, break_long_words=False, break_on_hyphens=False), flush=True)


if __name__ == "__main__":
    main()
