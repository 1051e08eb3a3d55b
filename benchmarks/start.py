"""Start-up: how long `--help` takes, and how long the default run takes to its first optimizer step.

  python -m benchmarks.start                 seconds from command to first step, data prepared by a run before
  python -m benchmarks.start what=help       seconds of `python -m lmlab.train --help`

Keys, with their defaults:

  what=step             step, help
  runs=5
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import Arguments
from benchmarks.pairs import ROOT, spread, workplace
from benchmarks.results import verb
from lmlab.errors import UserError


@dataclass
class Settings(Arguments):
    what: Literal["step", "help"] = "step"
    runs: int = 5


def compare(settings: Settings) -> dict[str, Any]:
    with workplace() as folder:
        if settings.what == "step":
            first_step(folder, "warm")  # fills the cache
        once = first_step if settings.what == "step" else help_shown
        seconds = [once(folder, str(number)) for number in range(settings.runs)]
    found = spread(seconds)
    return {"unit": "s", "sides": {"lmlab": found["median"]}, "result": found, "void": None, "seconds": seconds}


def help_shown(folder: Path, name: str) -> float:
    began = time.perf_counter()
    run(folder, "--help")
    return time.perf_counter() - began


def first_step(folder: Path, name: str) -> float:
    """Returns the seconds to the first step of the default run, but that it logs each step and ends after two."""
    began = time.time()  # as the log counts
    place = folder / name
    run(folder, f"hydra.run.dir={place}", "trainer.max_steps=2", "trainer.log_every_n_steps=1")
    rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return next(row["time"] for row in rows if row["step"] == 1 and "train/loss" in row) - began


def run(folder: Path, *arguments: str) -> None:
    """Runs `python -m lmlab.train`, with a cache of its own and W&B offline, as where nobody has logged in."""
    caches = {"LMLAB_CACHE": f"{folder}/lmlab", "HF_HOME": f"{folder}/hf", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "lmlab.train", *arguments],
        cwd=ROOT,
        env=os.environ | caches,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"python -m lmlab.train {' '.join(arguments)} failed:\n{done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    verb("start", __doc__, Settings, compare)
