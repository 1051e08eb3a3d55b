"""Stateless order: which sample each position of the run holds (promise 1).

The run is one endless row of samples: epoch after epoch, each epoch a permutation drawn
from (seed, epoch). Step t takes samples t·B … (t+1)·B - 1 of that row, B the global
batch; accumulation and ranks only slice it. Nothing here remembers anything, so starting
at step t costs no more than starting at 0.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lmlab.errors import UserError

# The epoch of evaluation's masks: one no training run reaches.
EVALUATION = 2**63


class Draw(NamedTuple):
    """One sample of a batch."""

    block: int
    """Its index."""
    epoch: int
    """With the seed and the index, decides the mask."""


@lru_cache(maxsize=2)  # A batch may lie across the edge of two epochs.
def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation [size] of one epoch."""
    # The counter keeps this stream apart from the masks', which count samples in its last word.
    stream = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 1, 0])
    return np.random.Generator(stream).permutation(size)


def some(seed: int, count: int, size: int) -> np.ndarray:
    """`count` of the numbers below `size`, ascending: always the same ones for a seed."""
    stream = np.random.Philox(key=np.array([seed, EVALUATION], np.uint64), counter=[0, 0, 1, 0])
    return np.sort(np.random.Generator(stream).permutation(size)[:count])


def draws(seed: int, first: int, count: int, size: int) -> list[Draw]:
    """`count` samples of the run from position `first` on, of a corpus of `size` blocks."""
    return [
        Draw(int(order(seed, place // size, size)[place % size]), place // size)
        for place in range(first, first + count)
    ]


def share_of(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples of one batch of one rank, of `batch_size` per optimizer step.

    Raises:
        UserError: they do not divide.
    """
    shares = world_size * accumulate
    if batch_size % shares:
        raise UserError(
            f"batch_size={batch_size} does not divide over {world_size} devices × "
            f"{accumulate} accumulated batches: it must be a multiple of {shares}."
        )
    return batch_size // shares


class TrainSampler:
    """Yields the batches one rank takes, from `start` on: `accumulate` of them per step.

    Each item is (number, draws): the count of batches before it in the whole run, and
    the samples of this rank.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start: int = 0,
    ):
        """`size` blocks in all; `batch_size` samples per step over everything; `start` counts batches."""
        self.share = share_of(batch_size, world_size, accumulate)
        self.size, self.batch_size, self.steps, self.seed = size, batch_size, steps, seed
        self.rank, self.world_size, self.accumulate, self.start = rank, world_size, accumulate, start

    def __len__(self) -> int:
        # Of the whole run, wherever it starts: Lightning counts from the first batch of the epoch.
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, list[Draw]]]:
        for number in range(self.start, self.steps * self.accumulate):
            step, part = divmod(number, self.accumulate)
            first = step * self.batch_size + (part * self.world_size + self.rank) * self.share
            yield number, draws(self.seed, first, self.share, self.size)


class EvaluationSampler:
    """Yields the indices of every row once over all ranks; each rank gets as many batches.

    A rank that would run dry gets an empty batch instead (which is made of unscored rows),
    so that all take part in the same collectives and nothing is counted twice (promise 2).
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        """`size` rows in all; `batch_size` of them per rank and batch."""
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.size)))
