"""The one perplexity of lmlab: exp(Σ nll / Σ targets), exact over batches and ranks (promise 2)."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanNLL(Metric):
    """Mean negative log-likelihood per target token, in nats.

    Both sums are kept apart and exact: nll in float64, targets as integers. Neither the
    batch size nor the number of devices moves the figure. Its exponential is the
    perplexity (Jelinek et al. 1977).
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        """`nll` [N] of the scored positions; N may be 0."""
        # Not in place: a validation under inference mode may have made the state.
        self.nll = self.nll + nll.detach().double().sum()
        self.targets = self.targets + nll.numel()

    def compute(self) -> Tensor:
        """float64 scalar; nan where nothing was scored."""
        return self.nll / self.targets
