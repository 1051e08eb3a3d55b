"""The optimizer and the schedules of its learning rate."""

import logging
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lmlab.errors import UserError, nearest

LOG = logging.getLogger(__name__)
Schedule = Callable[[float, float], float]
"""Maps the share of the steps after warm-up that is done, 0 to 1, and `decay_ratio` to a factor of lr."""


def linear(done: float, decay_ratio: float) -> float:
    """Decays in a straight line to 0."""
    return 1.0 - done


def cosine(done: float, decay_ratio: float) -> float:
    """Decays along half a cosine to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def constant(done: float, decay_ratio: float) -> float:
    """Stays at the full rate to the end."""
    return 1.0


def warmup_stable_decay(done: float, decay_ratio: float) -> float:
    """Stays at the full rate, then decays in a straight line to 0 over the last `decay_ratio` (Hu et al. 2024)."""
    return min(1.0, (1.0 - done) / decay_ratio) if decay_ratio > 0 else 1.0


SCHEDULES: dict[str, Schedule] = {f.__name__: f for f in (linear, cosine, constant, warmup_stable_decay)}


@dataclass(config={"strict": True})
class AdamW:
    """Builds AdamW (Loshchilov and Hutter 2019) for a model, without weight decay on norms and biases.

    An instance is called with a model and the number of steps, and returns the optimizer and its schedule, which is
    stepped once per optimizer step.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    """The learning rate after warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """The coefficient of the decoupled weight decay; norms and biases have none."""
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    """The decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """The term added to the denominator of the update, for numerical stability."""
    schedule: str | Callable[[float, float], float] = "linear"
    """linear, cosine, constant, warmup_stable_decay, or a function of (done, decay_ratio) or its import path."""
    warmup_steps: Annotated[int, Ge(0)] | None = None
    """The number of steps from 0 up to lr; null leaves it to warmup_ratio."""
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """The share of all steps that go from 0 up to lr, where warmup_steps is null."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 0.2
    """The share of the steps after warm-up over which warmup_stable_decay decays."""

    def __post_init__(self) -> None:
        if callable(self.schedule):
            self.shape = self.schedule
        elif self.schedule in SCHEDULES:
            self.shape = SCHEDULES[self.schedule]
        else:
            try:
                self.shape = pkgutil.resolve_name(self.schedule)
                if not callable(self.shape):
                    raise ValueError("not a function")
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(
                    f'optim.schedule is one of {", ".join(SCHEDULES)}, or importable, not "{self.schedule}".'
                    f"{nearest(self.schedule, SCHEDULES)}"
                ) from error

    def __call__(self, model: nn.Module, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        if self.warmup(steps) >= steps:
            LOG.warning("the warm-up is as long as the run, %d steps: lr is not reached (optim.warmup_steps).", steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Norms and biases are the vectors; matrices and embeddings decay.
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused
        )
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def warmup(self, steps: int) -> int:
        """Returns the number of steps from 0 up to lr, of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * steps)

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor of lr at `step` of `steps`."""
        warmup = self.warmup(steps)
        if step < warmup:
            return step / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.shape(done, self.decay_ratio)
