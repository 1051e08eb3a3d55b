"""Batches and blocks that grow over the first steps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from lmlab.data.datamodule import collate
from lmlab.data.sampler import Draw, TrainSampler
from lmlab.data.warmup import BatchSizes, BlockLengths
from lmlab.models.flops import Flops
from lmlab.objectives.clm import CausalLM
from tests.conftest import TINY, losses, run_verb, stop_after

Train = Callable[..., Path]
GROWING = ["batch_warmup={initial: 2, steps: 3}", "block_warmup={initial: 8, steps: 3}"]


@pytest.mark.parametrize(("batch_size", "initial", "steps"), [(8, 2, 6), (8, None, 0), (12, 3, 100), (6, 6, 4)])
def test_sizes_add_up(batch_size: int, initial: int | None, steps: int) -> None:
    sizes = BatchSizes(batch_size, initial, steps)
    each = [sizes.of(step) for step in range(steps + 5)]
    assert each[0] == (initial or batch_size)
    assert each[steps:] == [batch_size] * 5
    assert each == sorted(each)
    assert not any(size % (initial or batch_size) for size in each)
    assert [sizes.before(step) for step in range(steps + 5)] == [sum(each[:step]) for step in range(steps + 5)]
    for samples in range(1, sum(each)):
        steps_for = sizes.steps_for(samples)
        assert sizes.before(steps_for - 1) < samples <= sizes.before(steps_for)


def test_samples_follow_one_another_at_any_width() -> None:
    sizes, size = BatchSizes(8, 4, 6), 50
    whole = [draw for _, batch in TrainSampler(size, sizes, 9, 0) for draw in batch]
    assert [draw.number for draw in whole] == list(range(sizes.before(9)))
    for world, accumulate in ((2, 1), (2, 2), (1, 4)):
        ranks = [[*TrainSampler(size, sizes, 9, 0, rank, world, accumulate)] for rank in range(world)]
        assert [draw for batches in zip(*ranks, strict=True) for _, batch in batches for draw in batch] == whole
    late = TrainSampler(size, sizes, 9, 0, start=5)
    assert [draw for _, batch in late for draw in batch] == whole[sizes.before(5) :]


def test_rows_of_a_block_are_its_tokens_in_order() -> None:
    lengths = BlockLengths(32, 8, 6)
    assert [lengths.of(step) for step in range(8)] == [8, 8, 8, 16, 16, 16, 32, 32]
    blocks = [np.arange(1, 33, dtype=np.int32), np.arange(50, 63, dtype=np.int32)]
    batch = collate(blocks, [Draw(0, 0), Draw(1, 0)], CausalLM(), 0, 0, length=8)
    assert batch.input_ids.shape == (6, 8)
    assert batch.input_ids.flatten().tolist() == [*range(1, 33), *range(50, 63), 0, 0, 0]
    assert batch.tokens == 45
    assert len(batch.targets) == 45 - 6  # the first token of each row is no target


def test_a_growing_run(train: Train) -> None:
    run = train(*TINY, *GROWING, "trainer.max_steps=5", "trainer.log_every_n_steps=1")
    summary = json.loads((run / "summary.json").read_text())
    tokens, lengths = [32 * blocks for blocks in (2, 4, 6, 8, 8)], [8, 8, 16, 32, 32]
    assert summary["tokens"] == sum(tokens)
    flops = Flops.from_model(AutoModelForCausalLM.from_pretrained(run / "model"))
    assert flops is not None
    steps = zip(tokens, lengths, strict=True)
    expected = sum(flops.step(count, count - count // length, length) for count, length in steps)
    assert summary["flops"] == pytest.approx(expected)


@pytest.mark.long
def test_a_growing_run_goes_on_bit_for_bit(train: Train, tmp_path: Path) -> None:
    words = [*TINY, *GROWING, "trainer.max_steps=5", "trainer.val_check_interval=2"]
    run = train(*words)
    stop_after(run, 2, tmp_path / "stopped")
    run_verb("resume", tmp_path / "stopped")
    assert losses(run) == losses(tmp_path / "stopped")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("batch_warmup.initial=3 batch_warmup.steps=2", "batch_warmup.initial=3 does not divide batch_size=8"),
        ("batch_warmup.initial=2", "a warm-up has both. Set batch_warmup.steps too"),
        ("batch_warmup.start=2", 'there is no key "batch_warmup.start"'),
        ("block_warmup.initial=5 block_warmup.steps=2", "Use one of 16, 8, 4, 2."),
        ("block_warmup.initial=1 block_warmup.steps=2", "block_warmup.initial=1 leaves nothing to predict"),
        ("block_warmup.initial=64 block_warmup.steps=2", "block_warmup.initial=64 does not become"),
        (
            "batch_warmup.initial=1 batch_warmup.steps=2 trainer.devices=2",
            "batch_warmup.initial=1 does not divide over 2",
        ),
        ("block_warmup={initial:8,steps:2} budget.flops=1e9 trainer.max_steps=-1", "budget.flops is for blocks of one"),
    ],
)
def test_what_is_no_warmup(words: str, said: str, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(*TINY, *words.split())
    assert said in capsys.readouterr().err
