"""The schedules of the learning rate, and the arguments that all optimizers of lmlab share."""

import logging
import math
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lmlab.errors import UserError, nearest
from lmlab.optim.groups import check_settings, describe_groups, freeze, make_groups

LOG = logging.getLogger(__name__)
Schedule = Callable[[float, float], float]
"""Maps the share of the steps after warm-up that is done, 0 to 1, and `decay_ratio` to a factor, 1 to 0."""


def linear(done: float, decay_ratio: float) -> float:
    """Decays in a straight line."""
    return 1.0 - done


def cosine(done: float, decay_ratio: float) -> float:
    """Decays along half a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def constant(done: float, decay_ratio: float) -> float:
    """Stays at the full rate to the end."""
    return 1.0


def warmup_stable_decay(done: float, decay_ratio: float) -> float:
    """Stays at the full rate, then decays in a straight line over the last `decay_ratio` (Hu et al. 2024)."""
    return min(1.0, (1.0 - done) / decay_ratio) if decay_ratio > 0 else 1.0


def one_minus_sqrt(done: float, decay_ratio: float) -> float:
    """Stays at the full rate, then decays as 1 - √share over the last `decay_ratio` (Hägele et al. 2024)."""
    return 1.0 - math.sqrt(1.0 - warmup_stable_decay(done, decay_ratio))


SCHEDULES: dict[str, Schedule] = {
    f.__name__: f for f in (linear, cosine, constant, warmup_stable_decay, one_minus_sqrt)
}


@dataclass(config={"strict": True})
class Scheduled:
    """Holds the arguments that all optimizers of lmlab share, and makes their schedule: warm-up, then the full rate.

    An instance is called with a model, after `freeze`, and the number of steps. It returns the optimizer and its
    schedule, which is stepped once per optimizer step.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    """The learning rate after warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """The coefficient of the decoupled weight decay; norms and biases have none."""
    warmup_steps: Annotated[int, Ge(0)] | None = None
    """The number of steps from 0 up to lr; null leaves it to warmup_ratio."""
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """The share of all steps that go from 0 up to lr, where warmup_steps is null."""
    groups: dict[str, Any] | None = None
    """The lr, weight_decay or freeze of the parameters whose names match a pattern (`*.wte.*`), by the patterns."""

    def __post_init__(self) -> None:
        check_settings(self.groups or {})

    @abstractmethod
    def make(self, model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
        """Returns the optimizer of a model.

        Args:
            groups: the trained parameters of the model, see `make_groups`.
        """

    def __call__(self, model: nn.Module, steps: int) -> tuple[Optimizer, LambdaLR]:
        if self.warmup(steps) >= steps:
            LOG.warning("the warm-up is as long as the run, %d steps: lr is not reached (optim.warmup_steps).", steps)
        groups = make_groups(model, self.lr, self.weight_decay, self.groups or {}, self.factors(model))
        optimizer = self.make(model, groups)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def freeze(self, model: nn.Module) -> None:
        """Takes the parameters that `groups` freezes out of training.

        Raises:
            UserError: as of `lmlab.optim.groups.freeze`.
        """
        freeze(model, self.groups or {})

    def factors(self, model: nn.Module) -> dict[str, float]:
        """Returns the factors of the rates of some parameters of a model, by their names."""
        return {}

    def describe_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Returns what holds for the parameters of each pattern of `groups`, and for all others; none if all are alike.

        Those whose rate goes by the width of the model have a row of their own.
        """
        groups, factors = self.groups or {}, self.factors(model)
        if not groups and not factors:
            return []
        return describe_groups(model, self.lr, self.weight_decay, groups, factors)

    def warmup(self, steps: int) -> int:
        """Returns the number of steps from 0 up to lr, of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * steps)

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor of the learning rate at `step` of `steps`."""
        warmup = self.warmup(steps)
        if step < warmup:
            return step / warmup
        after = max(1, steps - warmup)
        done = min(1.0, (step - warmup) / after)
        return self.factor_after_warmup(done, after)

    def factor_after_warmup(self, done: float, steps: int) -> float:
        """Returns the factor of the learning rate when the share `done` of the `steps` after warm-up is done."""
        return 1.0


@dataclass(config={"strict": True})
class Decayed(Scheduled):
    """Adds the arguments of a schedule by which the learning rate decays after warm-up."""

    schedule: str | Callable[[float, float], float] = "linear"
    """linear, cosine, constant, warmup_stable_decay, one_minus_sqrt, or a function of (done, decay_ratio) or its import
    path."""
    final_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    """The share of lr that the schedule decays to."""
    decay_ratio: Annotated[float, Ge(0), Le(1)] = 0.2
    """The share of the steps after warm-up over which warmup_stable_decay and one_minus_sqrt decay."""
    decay_steps: Annotated[int, Ge(1)] | None = None
    """The number of steps of that decay; null leaves it to decay_ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def factor_after_warmup(self, done: float, steps: int) -> float:
        """Returns the factor of the learning rate when the share `done` of the `steps` after warm-up is done."""
        decay_ratio = self.decay_ratio if self.decay_steps is None else min(1.0, self.decay_steps / steps)
        return self.final_ratio + (1.0 - self.final_ratio) * self.shape(done, decay_ratio)
