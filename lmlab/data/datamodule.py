"""From blocks to batches (guide, `DataCollatorForLanguageModeling`).

Shapes: B samples, T positions, N scored positions of the whole batch.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lmlab.data.preprocess import Blocks
from lmlab.data.sampler import Draw, EvaluationSampler, TrainSampler, share_of
from lmlab.distributed.signals import signals_blocked
from lmlab.objectives import Objective


class Batch(NamedTuple):
    """What one rank trains on at once."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor | None
    """[B, T] int64, 0 on padding; None where no row is padded."""
    positions: Tensor
    """[N] int64, into the B·T positions: those that are scored."""
    targets: Tensor
    """[N] int64: the token to predict there."""
    tokens: int
    """Tokens in the batch, padding not counted."""
    number: int
    """Batches before this one in the whole run."""


class Batches(Dataset):
    """Batch by batch: an item is made whole in the worker that draws it."""

    def __init__(self, blocks: Blocks, objective: Objective, seed: int, pad_id: int):
        self.blocks, self.objective, self.seed, self.pad_id = blocks, objective, seed, pad_id

    def __getitem__(self, item: tuple[int, list[Draw]]) -> Batch:
        number, draws = item
        return collate(self.blocks, draws, self.objective, self.seed, self.pad_id, number)


def collate(blocks: Blocks, draws: list[Draw], objective: Objective, seed: int, pad_id: int, number: int = 0) -> Batch:
    """Label the drawn blocks, and only then pad them."""
    rows = [objective(blocks[draw.block], (seed, draw.epoch, draw.block)) for draw in draws]
    input_ids, attention_mask, positions = padded([(inputs, scored) for inputs, scored, _ in rows], pad_id)
    targets = np.concatenate([wanted for _, _, wanted in rows]).astype(np.int64)
    tokens = sum(len(inputs) for inputs, _, _ in rows)
    return Batch(input_ids, attention_mask, positions, torch.from_numpy(targets), tokens, number)


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pad rows of (inputs, scored positions) on the right, to the longest of them.

    Returns:
        input_ids [B, T], attention_mask [B, T] or None, positions [N] into the B·T.
    """
    length = max(len(inputs) for inputs, _ in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    for row, (inputs, _) in enumerate(rows):
        input_ids[row, : len(inputs)] = inputs
        attention_mask[row, : len(inputs)] = 1
    positions = np.concatenate([row * length + scored for row, (_, scored) in enumerate(rows)]).astype(np.int64)
    mask = None if attention_mask.all() else torch.from_numpy(attention_mask)
    return torch.from_numpy(input_ids), mask, torch.from_numpy(positions)


class Rows(Protocol):
    """What is evaluated: a data set whose item is a batch, by the indices of its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> NamedTuple: ...


class TimedLoader(DataLoader):
    """Counts the seconds that its reader waits for batches."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with signals_blocked():
            batches = super().__iter__()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class HeldOutData(L.LightningDataModule):
    """The loader of an evaluation; knows its rank from the trainer it is attached to."""

    def __init__(self, held_out: Rows, batch_size: int, num_workers: int = 0):
        """`batch_size` rows at once on each rank."""
        super().__init__()
        self.held_out, self.rows_at_once, self.num_workers = held_out, batch_size, num_workers

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return self.loader(
            self.held_out,
            EvaluationSampler(len(self.held_out), self.rows_at_once, self.trainer.global_rank, self.trainer.world_size),
        )

    def loader(self, batches: Dataset | Rows, sampler: TrainSampler | EvaluationSampler) -> TimedLoader:
        return TimedLoader(
            batches,  # type: ignore[arg-type]
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            # Where batches go to a GPU; a run on the CPU of a machine that has one needs none.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )


class BlocksDataModule(HeldOutData):
    """The loaders of a run."""

    def __init__(
        self,
        train: Blocks,
        held_out: Rows,
        objective: Objective,
        pad_id: int,
        batch_size: int,
        steps: int,
        seed: int,
        accumulate: int = 1,
        num_workers: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        whole: Rows | None = None,
    ):
        """`batch_size` counts the samples of an optimizer step, over ranks and accumulation.

        The `tokenizer` is for callbacks that read text or let the model speak. `whole` is what
        `held_out` is a part of, if it is one: it is scored once, when training is over.
        """
        super().__init__(held_out, batch_size, num_workers)
        self.train, self.tokenizer, self.whole = train, tokenizer, whole
        self.batches = Batches(train, objective, seed, pad_id)
        self.batch_size, self.steps, self.seed, self.accumulate = batch_size, steps, seed, accumulate

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        # As many rows at once as in training.
        self.rows_at_once = share_of(self.batch_size, self.trainer.world_size, self.accumulate)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        sampler = TrainSampler(
            len(self.train),
            self.batch_size,
            self.steps,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.accumulate,
            self.trainer.global_step * self.accumulate,
        )
        self.training_loader = self.loader(self.batches, sampler)
        return self.training_loader

    @property
    def waited(self) -> float:
        """Seconds that training has waited for batches."""
        return self.training_loader.waited
