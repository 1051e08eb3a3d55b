"""The order of training samples: a pure function of (seed, step) that nothing remembers (promise 1).

A run is one endless row of samples: epoch after epoch, each epoch a permutation of the blocks that is drawn from (seed,
epoch). Step t takes the samples t·B … (t+1)·B - 1 of that row, B being the global batch, or as many after those of the
steps before it as `BatchSizes` says; ranks and accumulated micro batches are slices of it. Starting at step t therefore
costs no more than starting at 0.

    blocks 0 … 4, global batch 4      epoch 0     epoch 1
    row of samples                    3 0 4 1 2 | 2 4 0 3 1 …
    step                              └─ 0 ─┘ └── 1 ──┘
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from lmlab.data.warmup import BatchSizes
from lmlab.errors import UserError

EVALUATION = 2**63
"""The epoch that keys the masks of an evaluation: no training run reaches it."""
LISTED = 2**20
"""The greatest number of blocks whose order is made as a list, see `blocks_at`."""
ROUNDS = 12
"""The rounds of the Feistel network that gives the order of more."""


class Draw(NamedTuple):
    """One sample of a batch."""

    block: int
    """The index of the block."""
    epoch: int
    """The epoch; it decides the sample's mask, together with the seed and the index."""
    number: int = 0
    """The number of samples before this one in the whole run."""


def blocks_at(seed: int, epoch: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Returns the blocks at some positions of the order of an epoch, out of `size` blocks: [N] int64.

    Of up to `LISTED` blocks the order is a list, numpy's permutation, which earlier versions took for any number: runs
    and held-out documents stay what they were. Of more blocks it is a function that is evaluated at the positions
    alone, see `permute`: a list of 10⁹ blocks would take 8 GB and two minutes.

    Args:
        positions: [N] numbers below `size`.
    """
    if size <= LISTED:
        listed: np.ndarray = epoch_order(seed, epoch, size)[positions]
        return listed
    return permute(positions, size, order_keys(seed, epoch))


def stream(seed: int, epoch: int) -> np.random.Philox:
    """Returns the random numbers that the order of an epoch is drawn from."""
    # The counter keeps this stream apart from the masks', which count samples in its last word.
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 1, 0])


@lru_cache(maxsize=32)
def order_keys(seed: int, epoch: int) -> np.ndarray:
    """Returns the keys [`ROUNDS`] of the permutation of one epoch, of more than `LISTED` blocks."""
    keys: np.ndarray = stream(seed, epoch).random_raw(ROUNDS)
    return keys


@lru_cache(maxsize=32)  # A batch may lie across the edge of two epochs, of each of several sources.
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the permutation [size] of one epoch, of `LISTED` blocks at most."""
    return np.random.Generator(stream(seed, epoch)).permutation(size)


def permute(values: np.ndarray, size: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Returns where a random permutation of the numbers below `size` takes each of some of them: [N] int64.

    A Feistel network permutes the numbers of as many bits as `size` has: it xors one half of the bits with a hash of
    the other half and a key, in turns. What it takes to `size` or beyond goes through it again until it is below, so
    that the numbers below `size` are permuted among themselves (cycle walking: Black and Rogaway 2002).

    Args:
        values: [N] numbers below `size`.
        size: that of all values, or of each: [N].
        keys: [rounds] uint64, or [rounds, N] for each value; each gives another permutation.
    """
    found = np.array(values, np.uint64)
    sizes = np.broadcast_to(np.asarray(size, np.uint64), found.shape)
    bits = np.maximum(2, np.frexp((sizes - np.uint64(1)).astype(float))[1])  # the exponent is the number of bits
    low = (bits // 2).astype(np.uint64)
    masks = [(np.uint64(1) << half.astype(np.uint64)) - np.uint64(1) for half in (bits // 2, bits - bits // 2)]
    keys = np.broadcast_to(keys.reshape(len(keys), -1), (len(keys), len(found)))
    outside = np.arange(len(found))
    while len(outside):
        shift, (right_mask, left_mask) = low[outside], (mask[outside] for mask in masks)
        right, left = found[outside] & right_mask, found[outside] >> shift
        for number, key in enumerate(keys[:, outside]):
            if number % 2:
                right ^= mixed(left ^ key) & right_mask
            else:
                left ^= mixed(right ^ key) & left_mask
        found[outside] = left << shift | right
        outside = outside[found[outside] >= sizes[outside]]
    return found.astype(np.int64)


def mixed(values: np.ndarray) -> np.ndarray:
    """Returns a hash of each of some uint64, by the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def draw_subset(seed: int, count: int, size: int) -> np.ndarray:
    """Returns `count` of the numbers below `size` in ascending order, always the same ones for a seed."""
    return np.sort(blocks_at(seed, EVALUATION, np.arange(min(count, size)), size))


class Order(Protocol):
    """The order of the samples of a run that draws from several sources, see `lmlab.data.mixture.MixedOrder`."""

    def draws(self, seed: int, first: int, count: int) -> list[Draw]: ...


def draws(seed: int, first: int, count: int, size: int | Order) -> list[Draw]:
    """Returns the samples `first` … `first + count - 1` of a run, from a corpus of `size` blocks, or in an order."""
    if not isinstance(size, int):
        return size.draws(seed, first, count)
    drawn: list[Draw] = []
    while len(drawn) < count:
        number = first + len(drawn)
        epoch, position = divmod(number, size)
        positions = np.arange(position, min(position + count - len(drawn), size))
        blocks = blocks_at(seed, epoch, positions, size).tolist()
        drawn += [Draw(block, epoch, number + i) for i, block in enumerate(blocks)]
    return drawn


def micro_batch_size(batch_size: int, world_size: int, accumulate: int, key: str = "batch_size") -> int:
    """Returns the number of samples in a micro batch of one rank, at `batch_size` samples per optimizer step.

    Args:
        key: that of the config which gives the batch size.

    Raises:
        UserError: the global batch does not divide over ranks and accumulated batches.
    """
    shares = world_size * accumulate
    if batch_size % shares:
        raise UserError(
            f"{key}={batch_size} does not divide over {world_size} devices × "
            f"{accumulate} accumulated batches: it must be a multiple of {shares}."
        )
    return batch_size // shares


@dataclass(eq=False)
class TrainSampler:
    """Yields the micro batches of one rank, `accumulate` of them per optimizer step.

    Each item is (number, draws): the number of micro batches of the rank before it in the whole run, and its samples.
    """

    size: int | Order
    """The number of blocks of the corpus; or the order of several sources."""
    sizes: BatchSizes
    """The number of samples of each optimizer step, over all ranks and accumulated micro batches."""
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
        micro_batch_size(self.sizes.initial, self.world_size, self.accumulate)  # of which all others are multiples

    def __len__(self) -> int:
        # Of the whole run, wherever it starts: Lightning counts from the first batch of the epoch.
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, list[Draw]]]:
        for number in range(self.start, len(self)):
            step, part = divmod(number, self.accumulate)
            micro_batch = self.sizes.of(step) // (self.world_size * self.accumulate)
            first = self.sizes.before(step) + (part * self.world_size + self.rank) * micro_batch
            yield number, draws(self.seed, first, micro_batch, self.size)


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
