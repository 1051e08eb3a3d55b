"""Schedule-free AdamW (Defazio et al. 2024), by the package `schedulefree`."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Len, Lt
from pydantic.dataclasses import dataclass
from torch import nn

from lmlab.errors import check_installed
from lmlab.optim.schedule import Scheduled


@dataclass(config={"strict": True})
class ScheduleFree(Scheduled):
    """Builds schedule-free AdamW for a model, whose learning rate stays as it is after warm-up.

    What is evaluated and exported is a running mean of the weights; gradients are taken between that and the weights.
    Neither depends on the length of the run, so that a run is as good at each of its steps as one that ends there.
    """

    betas: Annotated[Sequence[Annotated[float, Gt(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    """The share of the mean where gradients are taken, and the decay rate of the running mean of their squares."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """The term added to the denominator of the update, for numerical stability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_installed("optim=schedule_free", "schedule-free", "schedulefree")

    def make(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Returns the optimizer, ready for training; its `eval` and `train` exchange the two kinds of weights."""
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps)
        optimizer.train()
        return optimizer
