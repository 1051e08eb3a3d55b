"""What a run takes in all, from what some of its steps took."""

import math
from statistics import median
from typing import Any, NamedTuple

from omegaconf import DictConfig

from lmlab.config import schema
from lmlab.data.sampler import EvaluationSampler, micro_batch_size


class Term(NamedTuple):
    """A part of a run's time."""

    name: str
    times: int
    each: float
    """Seconds."""

    @property
    def seconds(self) -> float:
        return self.times * self.each


def terms(cfg: DictConfig, found: dict[str, Any], steps: int, interval: int, rows: int, last: int) -> list[Term]:
    """What a run's time is made of.

    Args:
        found: by `measure`.
        interval: steps between two validations.
        rows: held-out blocks that a validation looks at.
        last: those that are scored once more when training is over.
    """
    world = schema.world(cfg.trainer)
    share = micro_batch_size(cfg.batch_size, world, cfg.trainer.accumulate_grad_batches)
    after = math.ceil(steps / interval)  # validations behind the one before training
    first, *later = found["steps"]

    def batches(count: int) -> int:
        return len(EvaluationSampler(count, share, 0, world))

    batch = sum(found["validation"]) / len(found["validation"])
    made = [
        Term("start: imports, data, model", 1, found["start"]),
        Term("first step", 1, first),
        Term("steps", steps - 1, median(later) if later else first),
        Term("validation batches", (1 + after) * batches(rows) + batches(last), batch),
    ]
    return [*made, Term("states written", after, found["state"])] if "state" in found else made


def lasting(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
