"""Work of suites that is not scoring of held-out rows, shared out over the ranks of a trainer."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel


class OnEachRank(L.LightningModule):
    """Calls a function once on each rank, with the model on its device and in the trainer's precision."""

    def __init__(self, model: PreTrainedModel, work: Callable[[PreTrainedModel], Any]):
        super().__init__()
        self.model, self.work = model, work

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.result = self.work(self.model)


def on_each_rank(trainer: L.Trainer, model: PreTrainedModel, work: Callable[[PreTrainedModel], Any]) -> Any:
    """Returns what a function makes of a model; every rank calls it, and gets its own result."""
    module = OnEachRank(model, work)
    trainer.validate(module, DataLoader(TensorDataset(torch.zeros(1))), verbose=False)
    return module.result


def shared_out(items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """Returns the results of a function for each item, of which each rank makes its share.

    Args:
        work: returns the results of some items, in their order.
    """
    if not dist.is_initialized():
        return work(items)
    rank, count = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [None] * count
    dist.all_gather_object(parts, work(items[rank::count]))
    return [parts[number % count][number // count] for number in range(len(items))]
