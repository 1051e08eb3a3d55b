"""Measures two sides in turn, pair by pair: processes of which only one works at a time."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.arguments import Arguments
from lmlab.errors import UserError

ROOT = Path(__file__).parent.parent


@contextmanager
def workplace() -> Iterator[Path]:
    """Yields a folder for one comparison's files and caches, and removes it at the end."""
    with tempfile.TemporaryDirectory(prefix="lmlab-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Side:
    """The process of one side, as the comparison sees it."""

    def __init__(self, verb: str, name: str, settings: Arguments, folder: Path):
        self.name, self.folder = name, folder
        self.command = [sys.executable, "-m", "benchmarks.side", verb, name, json.dumps(asdict(settings)), str(folder)]

    def __enter__(self) -> "Side":
        caches = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "LMLAB_CACHE": "lmlab"}
        self.folder.mkdir(exist_ok=True)
        self.log = (self.folder / f"{self.name}.log").open("w+")
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            # With more GPUs than one the Trainer would take them all.
            env={"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "CUDA_VISIBLE_DEVICES": "0", **os.environ}
            | {key: str(self.folder / place) for key, place in caches.items()}
            | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Returns what the side runs on: its first reply, when everything is imported."""
        return self.reply()

    def turn(self, **order: Any) -> dict[str, Any]:
        """Lets the side work, and waits for its reply."""
        assert self.facts
        self.send(order)
        return self.reply()

    def end(self) -> dict[str, Any]:
        """Ends the process, and returns its peak memory."""
        return self.turn(end=True)

    def send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # reply() says why
            print(json.dumps(order), file=self.process.stdin, flush=True)

    def reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            first = max((i for i, text in enumerate(said) if text.startswith("error:")), default=len(said) - 3)
            lines = [f"the side {self.name} ended before its work was done:", *said[max(first, 0) :]]
            raise UserError("\n".join(lines))
        return json.loads(line)


def take_turns(sides: tuple[Side, Side], pairs: int, work: tuple[float, float], **order: Any) -> list[dict[str, Any]]:
    """Returns pairs of turns with one order; `work` is the number of tokens that each side processes in a turn."""
    by_name = {side.name: (side, tokens) for side, tokens in zip(sides, work, strict=True)}

    def turn(name: str) -> dict[str, Any]:
        side, tokens = by_name[name]
        done = side.turn(**order)
        return {"seconds": done["seconds"], "tokens_per_s": tokens / done["seconds"], "last_loss": done["losses"][-1]}

    return in_pairs(tuple(by_name), pairs, turn)


def in_pairs(names: tuple[str, ...], pairs: int, turn: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Lets the sides take turns as A B, B A, A B, …: only one side works at any instant."""
    made = []
    for number in range(pairs):
        done = {name: turn(name) for name in (names if number % 2 == 0 else names[::-1])}
        ours, theirs = (done[name]["tokens_per_s"] for name in names)
        made.append({"first": next(iter(done)), **done, "ratio": ours / theirs})
    return made


def agreement(losses: dict[str, list[float]], tolerance: float) -> dict[str, Any]:
    """Compares the losses of both sides step by step; if they are not the same, their speeds do not compare."""
    apart = [abs(a - b) / abs(b) for a, b in zip(*losses.values(), strict=True)]
    # Not by the largest: a loss that is no number agrees with nothing.
    agree = all(difference <= tolerance for difference in apart)
    return {
        "void": None if agree else f"the losses differ by {max(apart):.1e}, more than {tolerance:.0e}",
        "losses": losses,
        "agreement": {"largest_relative_difference": max(apart), "tolerance": tolerance, "agree": agree},
    }


def outcome(pairs: list[dict[str, Any]], agreed: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratio of tokens per second, pair by pair, unless the sides did different things."""
    return {
        "unit": "tokens/s",
        "sides": {name: statistics.median(pair[name]["tokens_per_s"] for pair in pairs) for name in memory},
        "result": None if agreed["void"] else spread([pair["ratio"] for pair in pairs]),
        **agreed,
        "pairs": pairs,
        "memory": memory,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
