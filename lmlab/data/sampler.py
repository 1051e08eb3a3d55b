"""The order of training samples: a pure function of (seed, step) that nothing remembers (promise 1).

A run is one endless row of samples: epoch after epoch, each epoch a permutation of the blocks that is drawn from
(seed, epoch). Step t takes the samples t·B … (t+1)·B - 1 of that row, B being the global batch; ranks and accumulated
micro batches are slices of it. Starting at step t therefore costs no more than starting at 0.

    blocks 0 … 4, global batch 4      epoch 0     epoch 1
    row of samples                    3 0 4 1 2 | 2 4 0 3 1 …
    step                              └─ 0 ─┘ └── 1 ──┘
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lmlab.errors import UserError

EVALUATION = 2**63
"""The epoch that keys the masks of an evaluation: no training run reaches it."""


class Draw(NamedTuple):
    """One sample of a batch."""

    block: int
    """The index of the block."""
    epoch: int
    """The epoch; it decides the sample's mask, together with the seed and the index."""
    number: int = 0
    """The number of samples before this one in the whole run."""


@lru_cache(maxsize=2)  # A batch may lie across the edge of two epochs.
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the permutation [size] of one epoch."""
    # The counter keeps this stream apart from the masks', which count samples in its last word.
    stream = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 1, 0])
    return np.random.Generator(stream).permutation(size)


def draw_subset(seed: int, count: int, size: int) -> np.ndarray:
    """Returns `count` of the numbers below `size` in ascending order, always the same ones for a seed."""
    return np.sort(epoch_order(seed, EVALUATION, size)[:count])


def draws(seed: int, first: int, count: int, size: int) -> list[Draw]:
    """Returns the samples `first` … `first + count - 1` of a run, from a corpus of `size` blocks."""
    drawn = []
    for number in range(first, first + count):
        epoch, position = divmod(number, size)
        drawn.append(Draw(int(epoch_order(seed, epoch, size)[position]), epoch, number))
    return drawn


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Returns the number of samples in a micro batch of one rank, at `batch_size` samples per optimizer step.

    Raises:
        UserError: the global batch does not divide over ranks and accumulated batches.
    """
    shares = world_size * accumulate
    if batch_size % shares:
        raise UserError(
            f"batch_size={batch_size} does not divide over {world_size} devices × "
            f"{accumulate} accumulated batches: it must be a multiple of {shares}."
        )
    return batch_size // shares


@dataclass(eq=False)
class TrainSampler:
    """Yields the micro batches of one rank, `accumulate` of them per optimizer step.

    Each item is (number, draws): the number of micro batches of the rank before it in the whole run, and its samples.
    """

    size: int
    """The number of blocks of the corpus."""
    batch_size: int
    """The number of samples of an optimizer step, over all ranks and accumulated micro batches."""
    steps: int
    """The number of optimizer steps of the whole run."""
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    """The number of micro batches of an optimizer step."""
    start: int = 0
    """The number of the first micro batch."""

    def __post_init__(self) -> None:
        self.micro_batch_size = micro_batch_size(self.batch_size, self.world_size, self.accumulate)

    def __len__(self) -> int:
        # Of the whole run, wherever it starts: Lightning counts from the first batch of the epoch.
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, list[Draw]]]:
        for number in range(self.start, len(self)):
            step, part = divmod(number, self.accumulate)
            first = step * self.batch_size + (part * self.world_size + self.rank) * self.micro_batch_size
            yield number, draws(self.seed, first, self.micro_batch_size, self.size)


@dataclass(eq=False)
class EvaluationSampler:
    """Yields the row indices of each batch of one rank; over all ranks every row comes once (promise 2).

    All ranks get the same number of batches, so that they take part in the same collectives. A rank without rows left
    gets an empty batch, not a duplicate.
    """

    size: int
    """The number of all rows."""
    batch_size: int
    """The number of rows of a batch of one rank."""
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.size)))
