"""Order has no state: a pure function of (seed, step), the same for any number of ranks (promise 1)."""

import itertools

import pytest

from lmlab.data.sampler import Draw, EvaluationSampler, TrainSampler, draws
from lmlab.errors import UserError

SIZE, BATCH, STEPS, SEED = 37, 8, 20, 5


def rows(**options: int) -> list[tuple[int, list[Draw]]]:
    return list(TrainSampler(SIZE, BATCH, STEPS, SEED, **options))


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
        sampler = TrainSampler(SIZE, BATCH, STEPS, SEED, accumulate=2, start=start)
        assert list(sampler) == rows(accumulate=2)[start:]
        assert len(sampler) == 40  # of the whole run: Lightning counts so


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 6"):
        TrainSampler(SIZE, BATCH, STEPS, SEED, world_size=3, accumulate=2)


def test_a_corpus_smaller_than_a_batch() -> None:
    run = [draw for _, batch in TrainSampler(3, 8, 6, SEED) for draw in batch]
    assert all(sorted(d.block for d in run[i : i + 3]) == [0, 1, 2] for i in range(0, 48, 3))


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
