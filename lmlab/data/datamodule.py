"""From blocks to batches (guide, `DataCollatorForLanguageModeling`).

Shapes: B samples, T positions, N scored positions of the whole batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lmlab.data.preprocess import Blocks
from lmlab.data.sampler import Draw, EvaluationSampler, TrainSampler

# An objective: ids [T] and key (seed, epoch, sample) to (inputs [T], scored positions [n], targets [n]).
Objective = Callable[[np.ndarray, tuple[int, int, int]], tuple[np.ndarray, np.ndarray, np.ndarray]]


class Batch(NamedTuple):
    """What one rank scores at once."""

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
    """Label the drawn blocks, and only then pad them to the longest on the right."""
    rows = [blocks[draw.block] for draw in draws]
    length = max(map(len, rows))
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    positions, targets = [], []
    for row, (ids, draw) in enumerate(zip(rows, draws, strict=True)):
        inputs, scored, wanted = objective(ids, (seed, draw.epoch, draw.block))
        input_ids[row, : len(ids)] = inputs
        attention_mask[row, : len(ids)] = 1
        if draw.scored:
            positions.append(row * length + scored)
            targets.append(wanted)
    tokens = int(attention_mask.sum()) if draws[0].scored else 0
    flat = np.concatenate([*positions, np.zeros(0, np.int64)])
    return Batch(
        torch.from_numpy(input_ids),
        None if attention_mask.all() else torch.from_numpy(attention_mask),
        torch.from_numpy(flat.astype(np.int64)),
        torch.from_numpy(np.concatenate([*targets, np.zeros(0, np.int64)]).astype(np.int64)),
        tokens,
        number,
    )


class BlocksDataModule(L.LightningDataModule):
    """The loaders of a run; knows its rank from the trainer it is attached to."""

    def __init__(
        self,
        train: Blocks,
        validation: Blocks,
        objective: Objective,
        pad_id: int,
        batch_size: int,
        steps: int,
        seed: int,
        accumulate: int = 1,
        num_workers: int = 0,
    ):
        """`batch_size` counts the samples of an optimizer step, over ranks and accumulation."""
        super().__init__()
        self.train, self.validation = train, validation
        self.make = partial(Batches, objective=objective, pad_id=pad_id)
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.accumulate, self.num_workers = accumulate, num_workers

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
        )
        return self.loader(self.make(self.train, seed=self.seed), sampler)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        world_size = self.trainer.world_size
        share = max(1, self.batch_size // (world_size * self.accumulate))
        sampler = EvaluationSampler(len(self.validation), share, self.trainer.global_rank, world_size)
        # Masks in evaluation do not follow the run's seed: runs of several seeds are
        # scored on the same positions.
        return self.loader(self.make(self.validation, seed=0), sampler)

    def loader(self, batches: Batches, sampler: TrainSampler | EvaluationSampler) -> DataLoader:
        return DataLoader(
            batches,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
