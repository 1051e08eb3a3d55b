"""Averages of the weights over the steps of training, which are validated beside the weights themselves."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt, Lt
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lmlab.errors import UserError
from lmlab.evaluation.scoring import DocumentSums
from lmlab.training.module import LMModule
from lmlab.training.validation import of_average


class Averages(Callback):
    """Keeps averages of the weights over the steps of training, and has each validation score them too.

    `val/ema_loss` is the loss of the exponential moving average, and `val/last_loss` that of the mean of the last
    weights; the other metrics of a validation are named in the same way. What a run exports is the weights or the
    average with the best metric in any validation. The trained weights are bit for bit those of a run without averages.
    """

    def __init__(
        self,
        ema: Annotated[float, Gt(0), Lt(1)] | None = None,
        last: Annotated[int, Ge(2)] | None = None,
        every_steps: Annotated[int, Ge(1)] | None = None,
    ):
        """Takes the averages that are kept.

        Args:
            ema: the decay of an exponential moving average. At step t it is at most (1 + t) / (10 + t), so that the
                weights that a run began with are soon forgotten. None keeps no such average.
            last: the number of weights whose mean is taken (Kaddour 2022), each of which is held in memory. None takes
                no such mean.
            every_steps: the number of steps between those; None takes the weights that are validated.
        """
        if every_steps is not None and last is None:
            raise UserError("callbacks.averages.every_steps is for callbacks.averages.last: set that too.")
        self.ema, self.last, self.every_steps = ema, last, every_steps
        self.metrics: list[str] = []
        """The names of the metrics that are logged."""
        self.averages: list[Average] = []
        self.loaded: dict[str, Any] = {}
        """The states of the averages that the run goes on with, by name."""

    def setup(self, trainer: L.Trainer, module: LMModule, stage: str) -> None:  # type: ignore[override]
        kinds = [("ema", self.ema), ("last", self.last)]
        names = [name for name, chosen in kinds if chosen is not None]
        self.metrics = [of_average(metric, name) for name in names for metric in module.metric_names]

    def state_dict(self) -> dict[str, Any]:
        return {average.name: average.state() for average in self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def on_fit_start(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        if not self.metrics:
            return
        if module.device_mesh is not None:
            raise UserError(
                "callbacks.averages keeps whole weights, which a sharded model has not.\n"
                "Use trainer.strategy=ddp, or leave the averages out.",
                "bad config",
            )
        weights = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
        if self.ema is not None:
            self.averages.append(EMA(weights, self.ema))
        if self.last is not None:
            self.averages.append(Last(weights, self.last, self.every_steps or module.val_interval, module.steps))
        for average in self.averages:
            average.sums = trainer.datamodule.held_out.sums().to(module.device)  # type: ignore[attr-defined]
            if average.name in self.loaded:
                average.load(self.loaded[average.name])
        module.averages = self.averages

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        self.step = trainer.global_step
        if self.averages and hasattr(trainer.optimizers[0], "eval"):
            raise UserError(
                "the optimizer averages the weights itself: leave callbacks.averages out, or use another one.",
                "bad config",
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step > self.step:  # and not only accumulated a batch
            self.step = trainer.global_step
            for average in self.averages:
                average.update(self.step)


class Average(ABC):
    """An average of the weights of several steps, which validations score."""

    name: str
    sums: DocumentSums
    average: list[Tensor]
    """The average of each of the weights."""
    result: Any
    """The sums of the last validation, as of `Scorer.result`."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        """Takes the weights that are trained."""
        self.weights: list[Tensor] = list(weights)

    @abstractmethod
    def update(self, step: int) -> None:
        """Adds the weights after a step to the average."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns what a certificate says of the average."""

    @abstractmethod
    def state(self) -> Any:
        """Returns what a checkpoint keeps of it."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Restores what a checkpoint kept."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in place of the weights, and the weights back, bit for bit."""
        with torch.no_grad():
            own = [weight.clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.weights, own)


class EMA(Average):
    """The exponential moving average of the weights."""

    name = "ema"

    def __init__(self, weights: Sequence[nn.Parameter], decay: float):
        super().__init__(weights)
        self.decay = decay
        self.average = [weight.detach().float().clone() for weight in weights]
        self.updates = 0

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [weight.float() for weight in self.weights], 1 - decay)
        self.updates += 1

    def facts(self) -> dict[str, Any]:
        return {"kind": self.name, "decay": self.decay}

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        torch._foreach_copy_(self.average, state["average"])


class Last(Average):
    """The mean of the weights of the last steps whose number is a multiple of `every_steps`, and of the last of all."""

    name = "last"

    def __init__(self, weights: Sequence[nn.Parameter], count: int, every_steps: int, steps: int):
        """Takes the weights, and which of them the mean is of.

        Args:
            count: the number of steps whose weights are in the mean.
            every_steps: the number of steps from one of these to the next.
            steps: those of the whole run, whose last weights are in the mean too.
        """
        super().__init__(weights)
        self.count, self.every_steps, self.steps = count, every_steps, steps
        self.kept: list[list[Tensor]] = []
        self.average = self.weights  # until there is one

    def update(self, step: int) -> None:
        if step % self.every_steps == 0 or step == self.steps:
            self.take_mean([*self.kept, [weight.detach().clone() for weight in self.weights]][-self.count :])

    def take_mean(self, kept: list[list[Tensor]]) -> None:
        """Keeps the weights of some steps, and their mean."""
        self.kept = kept
        self.average = [torch.stack(list(of_one)).mean(0) for of_one in zip(*kept, strict=True)]

    def facts(self) -> dict[str, Any]:
        return {"kind": self.name, "weights": len(self.kept), "every_steps": self.every_steps}

    def state(self) -> list[list[Tensor]]:
        return self.kept

    def load(self, state: list[list[Tensor]]) -> None:
        if state:
            self.take_mean([[kept.to(self.weights[0].device) for kept in of_one] for of_one in state])
