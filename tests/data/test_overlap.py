"""The documents that the training text contains are those that Python finds in it."""

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmlab.data import overlap
from lmlab.data.overlap import WINDOW, count_contained
from lmlab.data.sources import load_sample
from lmlab.data.texts import flatten


def found_by_python(training: list[str], held_out: list[str], least: int = WINDOW) -> int:
    whole = [text.encode("utf-8", "surrogatepass") for text in training]
    asked = [text.encode("utf-8", "surrogatepass") for text in held_out]
    return sum(len(text) >= least and any(text in other for other in whole) for text in asked)


# Few characters, so that parts occur again; of one to four bytes, and one that is half a pair.
TEXTS = st.lists(st.text(st.sampled_from("aab é你👍\ud800"), max_size=40), max_size=12)


CUTS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 40), st.integers(4, 40)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(training=TEXTS, held_out=TEXTS, cuts=CUTS)
def test_any_texts(training: list[str], held_out: list[str], cuts: list[tuple[int, int, int]]) -> None:
    """Also parts cut from the training text, and such that go on from one document to the next."""
    cut = [training[i][start : start + n] for i, start, n in cuts if i < len(training)]
    across = ["".join(training)[start : start + n] for _, start, n in cuts]
    held_out = held_out + cut + across
    # So short that a few words fill several.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", 4), ("CHUNK", 32), ("SLICE", 8)):
            patch.setattr(overlap, name, value)
        assert count_contained(training, held_out) == found_by_python(training, held_out, 4)


def test_real_text() -> None:
    """Whole and equal, at the beginning, inside, at the end; not over an edge, not but for a letter, nor too short."""
    sample = load_sample()
    answers = [text for texts in flatten(sample.train, sample.text) for text in texts]
    training, held_out = answers[:250], answers[250:]
    assert found_by_python(training, held_out) == 0
    first = training[7]
    assert len(first.encode()) > 200
    inside = [first, first[:100], first[50:150], first[-WINDOW:], first]
    outside = [first[:-1] + "~", first[-100:] + training[8][:100], "~" + first, first[: WINDOW - 1], "", " \n"]
    assert count_contained(training, held_out + inside + outside) == 5
    # The order and the number of documents that lie together change nothing.
    random.Random(0).shuffle(training)
    assert count_contained(iter(training * 20), iter(outside + inside + held_out)) == 5


def test_a_document_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    long = "".join(draw.choice("abcdefgh ") for _ in range(50_000))
    monkeypatch.setattr(overlap, "CHUNK", 2**12)
    monkeypatch.setattr(overlap, "SLICE", 2**10)
    held_out = [long, long[1000:30_000], long[:-1] + "~", long + "~", long[20_000:20_100]]
    assert count_contained(["before", "x" * 3000 + long + "after", "last"], held_out) == 3


def test_documents_that_begin_alike() -> None:
    """A head that all share, as of a licence or a letter, makes no more work: its windows are not looked for."""
    head = "Copyright by all who wrote it, and without any warranty at all. " * 4
    held_out = [f"{head}number {i}, and {i * i} lines to tell it from the others by." for i in range(300)]
    known = overlap.KnownDocuments(held_out)
    compared = sum(
        len(starts)
        for first, windows in overlap.PartHashes(b"\xff".join(text.encode() for text in held_out)).windows()
        for starts, _ in known.candidates(first, windows)
    )
    assert compared < 3 * len(held_out)
    assert count_contained([*held_out[::2], head], held_out) == 150


def test_training_text_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the text takes no more memory; and none is read for nothing."""
    monkeypatch.setattr(overlap, "CHUNK", 2**12)
    monkeypatch.setattr(overlap, "SLICE", 2**10)
    held_out = ["a held-out document that is long enough to be looked for"]

    def peak(documents: int) -> int:
        tracemalloc.start()
        assert count_contained((f"{i} " + "some words " * 100 for i in range(documents)), held_out) == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(400) < 1.3 * peak(50)

    def never() -> Iterator[str]:
        raise AssertionError("read")
        yield

    assert count_contained(never(), ["too short", ""]) == count_contained(never(), []) == 0
