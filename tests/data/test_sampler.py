"""Order has no state: a pure function of (seed, step), the same for any number of ranks (promise 1)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmlab.data import sampler
from lmlab.data.sampler import Draw, EvaluationSampler, TrainSampler, blocks_at, draw_subset, draws, permute
from lmlab.data.warmup import BatchSizes
from lmlab.errors import UserError

SIZE, BATCH, STEPS, SEED = 37, 8, 20, 5


def rows(**options: int) -> list[tuple[int, list[Draw]]]:
    return list(TrainSampler(SIZE, BatchSizes(BATCH), STEPS, SEED, **options))


def test_every_epoch_holds_every_block_once() -> None:
    run = [draw for _, batch in rows() for draw in batch]
    for epoch in range(4):
        assert sorted(d.block for d in run[epoch * SIZE : (epoch + 1) * SIZE]) == list(range(SIZE))
        assert {d.epoch for d in run[epoch * SIZE : (epoch + 1) * SIZE]} == {epoch}
    assert run[:SIZE] != [d._replace(epoch=0) for d in run[SIZE : 2 * SIZE]]
    assert [d.block for d in run] != [d.block for d in draws(SEED + 1, 0, BATCH * STEPS, SIZE)]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_ranks_and_accumulation_slice_the_global_batch(world_size: int, accumulate: int) -> None:
    whole = [batch for _, batch in rows()]
    ranks = [rows(rank=r, world_size=world_size, accumulate=accumulate) for r in range(world_size)]
    for step in range(STEPS):
        parts = [ranks[r][step * accumulate + k][1] for k in range(accumulate) for r in range(world_size)]
        assert list(itertools.chain(*parts)) == whole[step]
    assert [number for number, _ in ranks[0]] == list(range(STEPS * accumulate))


def test_starting_later_gives_the_rest() -> None:
    for start in (0, 1, 7, 39, 40):
        sampler = TrainSampler(SIZE, BatchSizes(BATCH), STEPS, SEED, accumulate=2, start=start)
        assert list(sampler) == rows(accumulate=2)[start:]
        assert len(sampler) == 40  # of the whole run: Lightning counts so


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        TrainSampler(SIZE, BatchSizes(BATCH), STEPS, SEED, world_size=3, accumulate=2)


def test_a_corpus_smaller_than_a_batch() -> None:
    run = [draw for _, batch in TrainSampler(3, BatchSizes(8), 6, SEED) for draw in batch]
    assert all(sorted(d.block for d in run[i : i + 3]) == [0, 1, 2] for i in range(0, 48, 3))


# --- Orders that are not listed ---


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12))
def test_a_keyed_order_is_a_permutation_of_any_size(size: int, keys: list[int]) -> None:
    assert sorted(permute(np.arange(size), size, np.array(keys, np.uint64)).tolist()) == list(range(size))


def test_keyed_orders_are_uniform() -> None:
    """Where blocks come, and where two come together, is like chance would have it (chi-square, fixed seeds)."""
    size, orders, bins = 37, 20_000, 37
    keys = np.array([sampler.stream(seed, 3).random_raw(sampler.ROUNDS) for seed in range(orders)])
    found = permute(np.tile(np.arange(size), orders), size, np.repeat(keys, size, axis=0).T).reshape(orders, size)
    for one, expected in ((found[:, 0], orders / size), (found[:, -1], orders / size)):
        counts = np.bincount(one, minlength=bins)
        assert ((counts - expected) ** 2 / expected).sum() < 68  # 36 degrees of freedom: once in 1000
    pairs = np.bincount(found[:, 5] * size + found[:, 6], minlength=size**2).reshape(size, size)
    assert not pairs.diagonal().any()
    expected = orders / (size * (size - 1))
    chi = ((pairs - expected) ** 2 / expected).sum() - size * expected
    assert abs(chi - 1331) < 3.3 * (2 * 1331) ** 0.5
    # In one order of many blocks the steps from block to block are as even as the blocks.
    size = 2**21 + 1
    order = blocks_at(0, 0, np.arange(2**17), size)
    for values in (order, np.diff(order) % size, (order - np.arange(2**17)) % size):
        counts = np.bincount(values * 100 // size, minlength=100)
        assert ((counts - len(values) / 100) ** 2 / (len(values) / 100)).sum() < 149  # 99 degrees: once in 1000


def test_a_large_corpus_has_an_order_that_nothing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block comes once an epoch, of any size; and up to a size the order is the one that it always was."""
    monkeypatch.setattr(sampler, "LISTED", 36)
    run = [draw for _, batch in rows() for draw in batch]
    for epoch in range(4):
        assert sorted(d.block for d in run[epoch * SIZE : (epoch + 1) * SIZE]) == list(range(SIZE))
    assert len({tuple(d.block for d in run[epoch * SIZE : (epoch + 1) * SIZE]) for epoch in range(4)}) == 4
    assert draws(SEED, 30, 20, SIZE) == run[30:50]
    assert len({*draw_subset(SEED, 10, SIZE).tolist()}) == 10
    monkeypatch.undo()
    assert [d.block for d in draws(5, 0, 8, 37)] == [2, 12, 31, 26, 18, 35, 3, 1]
    assert len(draws(0, 10**12, 8, 10**9)) == 8


@pytest.mark.parametrize("size", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_row_once_and_ranks_keep_step(size: int, world_size: int) -> None:
    samplers = [EvaluationSampler(size, 4, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(b) for b in batches}) == 1
    assert len(batches[0]) == len(samplers[0])
    # In order: step by step, and rank by rank within one.
    assert [row for step in zip(*batches, strict=True) for batch in step for row in batch] == list(range(size))
    assert all(len(batch) <= 4 for rank in batches for batch in rank)
    # A rank that ran dry has an empty batch, and at its last step alone.
    assert all(batch for rank in batches for batch in rank[:-1])
