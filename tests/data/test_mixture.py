"""Sources come in their shares, each without repetition, and which one gives a sample follows from its number alone."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from lmlab.data.blocks import Blocks, Ledger
from lmlab.data.mixture import MixedBlocks, MixedOrder, Mixture, mix, with_draws
from lmlab.data.options import Share
from lmlab.data.sampler import LISTED, TrainSampler
from lmlab.data.warmup import BatchSizes
from lmlab.errors import UserError

from ..conftest import TINY, Refused, metrics

LEDGER = Ledger(
    records=1,
    records_without_text=0,
    documents=1,
    bytes=1,
    tokens=1,
    blocks=1,
    tokens_dropped=0,
    tokens_truncated=0,
    unknown_tokens=0,
    unknown_bytes=0,
)


class Source(Blocks):
    """As many blocks as a source has, of which nothing but the number and the tokens is asked."""

    def __init__(self, blocks: int, block_size: int = 64) -> None:
        bounds = np.arange(blocks)[:, None] * block_size + [0, block_size]
        object.__setattr__(self, "bounds", bounds)


def blocks_of(
    sources: dict[str, Source], anneal: float = 1.0, temperature: float = 1.0, **shares: Share
) -> MixedBlocks:
    return MixedBlocks(sources, Mixture({}, shares or dict.fromkeys(sources, Share()), temperature, anneal))


@given(some.data())
@settings(max_examples=60, deadline=None)
def test_order(data: some.DataObject) -> None:
    """Any piece of the row of samples is that of the whole row, and at any time each source has given its due."""
    sources, stages = data.draw(some.integers(1, 6)), data.draw(some.integers(1, 4))
    weights = some.lists(some.sampled_from([0, 0.001, 0.3, 1, 7]), min_size=sources, max_size=sources).filter(any)
    rates = np.array([data.draw(weights) for _ in range(stages)], float)
    rates /= rates.sum(1, keepdims=True)
    starts = np.sort([0, *data.draw(some.lists(some.integers(0, 150), min_size=stages - 1, max_size=stages - 1))])
    order = MixedOrder([5] * sources, starts.astype(float), rates)
    source, number = order.sources(0, 200)
    for first, count in data.draw(some.lists(some.tuples(some.integers(0, 160), some.integers(1, 40)), min_size=3)):
        piece = order.sources(first, count)
        assert (source[first : first + count].tolist(), number[first : first + count].tolist()) == (
            piece[0].tolist(),
            piece[1].tolist(),
        )
        assert order.counts(first).tolist() == np.bincount(source[:first], minlength=sources).tolist()
    due = np.zeros(sources)
    given = np.zeros(sources)
    for n in range(200):
        due += rates[np.searchsorted(starts, n, side="right") - 1]
        given[source[n]] += 1
        assert number[n] == given[source[n]] - 1
        assert np.abs(given - due).max() <= sources


@pytest.mark.parametrize("sizes", [(7, 3), (LISTED + 5, 2), (LISTED + 5, LISTED + 5)])
def test_sources_have_epochs_of_their_own(sizes: tuple[int, int]) -> None:
    """Each block of a source comes once before any comes again, and sources of one size differ in their order."""
    order = blocks_of(dict(zip("ab", map(Source, sizes), strict=True)), a=Share(1), b=Share(1)).order(10**6)
    drawn = order.draws(0, 0, 60)
    own = [[draw.block for draw in drawn if draw.block < sizes[0]], []]
    own[1] = [draw.block - sizes[0] for draw in drawn if draw.block >= sizes[0]]
    assert list(map(len, own)) == [30, 30]
    assert own[0] != own[1]
    for blocks, size in zip(own, sizes, strict=True):
        for first in range(0, 30, size):
            epoch = blocks[first : first + size]
            assert len({*epoch}) == len(epoch)
            assert all(0 <= block < size for block in epoch)
    assert {draw.epoch for draw in drawn if draw.block >= sizes[0]} == {*range(-(-30 // sizes[1]))}


def test_any_width() -> None:
    """The samples of a step are the same for any number of ranks and micro batches, and wherever the run begins."""
    order = blocks_of({"a": Source(50), "b": Source(9)}, a=Share(3, 1), b=Share(1)).order(160)

    def steps(world: int, accumulate: int, start: int = 0) -> list[list[int]]:
        batches: dict[int, list[int]] = {}
        for rank in range(world):
            sampler = TrainSampler(order, BatchSizes(8), 20, 0, rank, world, accumulate, start * accumulate)
            for number, draws in sampler:
                batches.setdefault(number // accumulate, []).extend(draw.block for draw in draws)
        return [sorted(batches[step]) for step in sorted(batches)]

    assert steps(1, 1) == steps(2, 1) == steps(2, 4)
    assert steps(1, 1)[13:] == steps(4, 2, start=13)


def test_shares() -> None:
    """Weights are of tokens, whatever the length of blocks; sizes and epochs follow from the text."""
    sources = {"a": Source(100), "b": Source(300), "c": Source(200, 32)}

    def share(samples: int = 4000, **more: object) -> list[float]:
        blocks = blocks_of(sources, **more)  # type: ignore[arg-type]
        ledger = dict.fromkeys([f"train/{name}" for name in sources], LEDGER)
        return [counts.share_of_tokens for counts in with_draws(ledger, blocks, samples).values()]

    assert share(a=Share(2), b=Share(1), c=Share(1)) == pytest.approx([0.5, 0.25, 0.25], abs=2e-3)
    assert share() == pytest.approx([0.2, 0.6, 0.2], abs=2e-3)
    root = np.sqrt([100, 300, 100])
    assert share(temperature=2.0) == pytest.approx((root / root.sum()).tolist(), abs=2e-3)
    twice = blocks_of(sources, a=Share(epochs=2), b=Share(epochs=1), c=Share(epochs=0.5))
    assert twice.epoch == 600
    assert twice.order(600).counts(600) == pytest.approx([200, 300, 100], abs=1)
    # From 1 : 0 to 0 : 1 over the last half: three quarters of all.
    assert share(anneal=0.5, a=Share(1, 0), b=Share(0, 1), c=Share(0)) == pytest.approx([0.75, 0.25, 0], abs=2e-3)


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        ({}, {}, "names no source"),
        ({"a": {"weight": 0}, "b": {"weight": 0}}, {}, "the sources have the weight 0 together"),
        ({"a": {"weight": 1, "final_weight": 0}}, {}, "the sources have the final_weight 0 together"),
        ({"a": {"weight": 1}, "b": {}}, {}, "data.sources.b has no weight, and a has"),
        ({"a": {"weight": 1, "epochs": 1}}, {}, "Leave out one of them"),
        ({"a": {"epochs": 1}}, {"temperature": 2.0}, "data.temperature is for sources without epochs"),
        ({"a": {"final_weight": 1}}, {}, "needs data.sources.a.weight"),
        ({"a": {"epochs": math.inf}}, {}, "data.sources.a.epochs=inf is no number to mix by"),
    ],
)
def test_shares_that_do_not_fit(sources: dict, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        mix(sources, {}, **options)


def test_an_error_names_the_source(refused: Refused, tmp_path: Path) -> None:
    """Where it is about the keys of one, also if it is found only when the text is read."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("some words\n" * 20)
    bad.write_text("\n" * 20)

    def said(b: str, *words: str) -> str:
        return refused(
            "train", "data=mixture", f"data.sources={{a: {{train: {good}, document: line}}, b: {{{b}}}}}", *words
        )

    own = f"train: {bad}, document: line"
    assert "data.sources.b.train=none.txt: no such file" in said("train: none.txt")
    assert 'Did you mean "data.sources.b.weight"?' in said(f"{own}, weigth: 3")
    assert "gives no token: its 19 texts are empty (check data.sources.b.text)" in said(own, "tokenizer.vocab_size=300")


def test_a_run(train: Callable[..., Path], evaluate: Callable[..., Path], refused: Refused, tmp_path: Path) -> None:
    """Each source holds out a domain of its name, scored as it is scored alone; the ledger says what was drawn."""
    for name, word in (("web", "net"), ("books", "page")):
        lines = (f"{word} {i} of the {name}, and {i * i} more" for i in range(300))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    each = (
        f"{name}: {{train: {tmp_path}/{name}.txt, document: line, weight: {w}}}"
        for name, w in (("web", 3), ("books", 1))
    )
    sources = f"{{{', '.join(each)}}}"
    run = train(*TINY, "data=mixture", f"data.sources={sources}")
    ledger = json.loads((run / "ledger.json").read_text())
    assert [ledger[f"train/{name}"]["samples_drawn"] for name in ("web", "books")] == [24, 8]
    assert Counter(key.partition("/")[0] for key in ledger) == {"train": 2, "validation": 2}
    last = metrics(run)[-1]
    certificate = json.loads((run / "certificate.json").read_text())
    tokens = {name: own["totals"]["tokens"] for name, own in certificate["domains"].items()}
    assert sum(tokens.values()) == certificate["totals"]["tokens"]
    mean = sum(last[f"val/{name}/loss"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert last["val/loss"] == pytest.approx(mean, rel=1e-12)
    for name in ("web", "books"):
        assert certificate["domains"][name]["figures"]["perplexity"] == pytest.approx(last[f"val/{name}/perplexity"])
        alone = evaluate(run, "data=files", f"data.train={tmp_path}/{name}.txt", "data.document=line")
        found = json.loads((alone / "certificate.json").read_text())
        assert found["totals"]["nll"] == pytest.approx(certificate["domains"][name]["totals"]["nll"], rel=1e-6)
    again = json.loads((evaluate(run) / "certificate.json").read_text())
    assert again["domains"] == certificate["domains"]
    said = refused("resume", run, "trainer.max_steps=6", "data.sources.web.weight=2")
    assert "data.sources.web.weight=2 (it was 3)" in said
