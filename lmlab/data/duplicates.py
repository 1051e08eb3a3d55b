"""The training documents that occur a second time: in the held-out text, in the training text, or in a benchmark.

Two documents are equal if their bytes are. They are near-duplicates if the sets A and B of their shingles, which are
runs of five words, have a Jaccard similarity |A ∩ B| / |A ∪ B| of `similarity` or more. MinHash estimates it (Broder
1997): under a random order of all shingles, A and B have the same first one with just that probability, so it is the
share of `HASHES` orders under which they have. Only documents with equal minima in one of several bands are compared,
which finds 99 of 100 pairs at the threshold or more. Near-duplicates of near-duplicates make one group, of which the
first document is kept; held-out documents come first. So do Lee et al. (2022, "Deduplicating Training Data Makes
Language Models Better"), who compare by edit distance at last, and Penedo et al. (2024, "The FineWeb Datasets").

A document contains an item of a benchmark if they have 13 words in a row in common, or all the words of an item of 8 to
12. Shorter items never count. So do Brown et al. (2020, appendix C), who though cut 200 characters around the words out
of the document, and let words pass that occur in more than ten documents.

Words are compared in lower case and without punctuation; a Chinese or Japanese character is a word. Documents of fewer
than 32 bytes (`WINDOW` of overlap.py) never count. Memory is that of one chunk of text, and about 140 bytes a document.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path

import numpy as np

from lmlab.data.overlap import BETWEEN, CHUNK, WINDOW, PartHashes
from lmlab.data.texts import batches, utf8

HASHES = 120
"""The number of orders: the estimate of a similarity of 0.8 has a standard deviation of 0.037."""
SHINGLE, RUN, SHORTEST = 5, 13, 8
"""The words of a shingle, of a run that a document and a test item have in common, and of the shortest item."""
FOUND = 0.99
"""The share of the pairs at the threshold that the bands are to find."""
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(f"[{CJK}]|[^\\W{CJK}]+")
FACTORS = np.random.default_rng(0).integers(2**63, size=HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
PAIRS = 2**16  # that are compared at once
SIGNED = ("hashes", "signatures", "items")
"""The files of `sign_documents`."""

KEPT, EQUAL_HELD_OUT, NEAR_HELD_OUT, TEST_ITEM, REPEATED, NEARLY_REPEATED = range(6)
"""The mark of a training document; of several that apply, the first."""


class Words:
    """The words of several documents, each given by where it starts and ends in their text."""

    def __init__(self, texts: list[str]):
        text = BETWEEN.join(utf8(" ".join(WORD.findall(text.lower()))) for text in texts)
        values = np.frombuffer(b" " + text + b" ", np.uint8)
        between = values == BETWEEN[0]
        gap = between | (values == ord(" "))
        self.starts = np.flatnonzero(gap[:-1] & ~gap[1:])
        self.ends = np.flatnonzero(~gap[:-1] & gap[1:])
        self.documents: np.ndarray = np.cumsum(between)[self.starts]
        """[words] int64: the number of the document of each."""
        self.text = PartHashes(text)

    def runs(self, length: int, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns the document and the hash of each run of so many words, by document.

        Args:
            whole: True to take a shorter document as one run.
        """
        first = np.arange(len(self.starts))
        last = first + length - 1
        past = np.searchsorted(self.documents, self.documents, side="right")
        fits = last < past
        if whole:
            begins = np.diff(self.documents, prepend=-1) > 0
            fits |= begins
            last = np.minimum(last, past - 1)
        return self.documents[fits], mixed(self.text.parts(self.starts[first[fits]], self.ends[last[fits]]))


def mixed(hashes: np.ndarray) -> np.ndarray:
    """Returns hashes whose every bit depends on every bit: the low ones of `PartHashes` depend on few."""
    for shift in (32, 29):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * MIX
    hashes ^= hashes >> np.uint64(32)
    return hashes


def signatures(words: Words, documents: int) -> np.ndarray:
    """Returns the minima of the shingles of each document: [documents, HASHES] uint32, 0 for one without a word."""
    owners, shingles = words.runs(SHINGLE, whole=True)
    minima = np.zeros((documents, HASHES), np.uint32)
    if len(owners):
        numbers, starts = np.unique(owners, return_index=True)
        for order, factor in enumerate(FACTORS):
            minima[numbers, order] = np.minimum.reduceat(shingles * factor, starts) >> np.uint64(32)
    return minima


class Benchmark:
    """The runs of words by which the items of a benchmark are found."""

    def __init__(self, items: Iterable[str]):
        found: dict[int, list[np.ndarray]] = {}
        for batch in batches(items, sys.maxsize, CHUNK):
            words = Words(batch)
            count = np.bincount(words.documents, minlength=len(batch))
            for length in range(SHORTEST, RUN + 1):
                of, hashes = words.runs(length)
                found.setdefault(length, []).append(hashes[(count[of] == length) | (length == RUN)])
        self.runs = {length: np.unique(np.concatenate(hashes)) for length, hashes in found.items()}
        """The hashes of the runs of each length, sorted."""

    def is_in(self, words: Words, documents: int) -> np.ndarray:
        """Returns whether each of some documents contains an item: [documents] bool."""
        contain = np.zeros(documents, bool)
        for length, known in self.runs.items():
            if len(known):
                of, hashes = words.runs(length)
                row = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                contain[of[known[row] == hashes]] = True
        return contain


def mark_documents(
    training: Sequence[Iterable[str]], held_out: Iterable[str], items: Iterable[str], similarity: float, folder: Path
) -> list[np.ndarray]:
    """Returns the mark of each training document of each source: [documents] uint8 each.

    Args:
        training: the documents of each source, of which those of an earlier one are kept.
        items: the texts of benchmarks.
        similarity: the Jaccard similarity from which on two documents are near-duplicates.
        folder: a directory for the signatures, 480 bytes a document, until the marks are made.
    """
    benchmark, nothing = Benchmark(items), Benchmark([])
    held = sign_documents(folder, held_out, nothing)
    return mark_signed(folder, held, [sign_documents(folder, texts, benchmark) for texts in training], similarity)


def sign_documents(folder: Path, documents: Iterable[str], benchmark: Benchmark) -> int:
    """Appends to files what the marks of documents follow from, and returns the number of documents.

    Of each document this is its `content_hash`, its signature, and whether it contains an item of the benchmark.
    """
    count = 0
    with ExitStack() as files:
        hashes, minima, contain = (files.enter_context((folder / kind).open("ab")) for kind in SIGNED)
        for batch in batches(documents, sys.maxsize, CHUNK):
            words = Words(batch)
            hashes.write(np.array([content_hash(text) for text in batch], np.uint64).tobytes())
            minima.write(signatures(words, len(batch)).tobytes())
            contain.write(benchmark.is_in(words, len(batch)).tobytes())
            count += len(batch)
    return count


def mark_signed(folder: Path, held: int, counts: Sequence[int], similarity: float) -> list[np.ndarray]:
    """Returns the marks of documents that `sign_documents` signed, and removes its files.

    Args:
        held: the number of held-out documents, which come first.
        counts: the number of training documents of each source.
    """
    hashes, minima, contain = (folder / kind for kind in SIGNED)
    first, groups = (each[held:] for each in group_documents(np.fromfile(hashes, np.uint64), minima, similarity))
    documents = held + np.arange(len(first))
    marks = np.select(
        [first < held, groups < held, np.fromfile(contain, bool)[held:], first < documents, groups < documents],
        [EQUAL_HELD_OUT, NEAR_HELD_OUT, TEST_ITEM, REPEATED, NEARLY_REPEATED],
        KEPT,
    )
    for file in (hashes, minima, contain):
        file.unlink()
    return np.split(marks.astype(np.uint8), np.cumsum(counts[:-1], dtype=int))


def content_hash(text: str) -> int:
    """Returns a hash of the bytes of a text; 0 for one that is too short to count."""
    content = utf8(text)
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") if len(content) >= WINDOW else 0


def group_documents(hashes: np.ndarray, file: Path, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first of the documents that are equal to each, and the first of its group: [documents] int64 both.

    Args:
        hashes: [documents] uint64: the `content_hash` of each.
        file: their signatures.
    """
    first = np.arange(len(hashes))
    counted = np.flatnonzero(hashes)
    _, index, inverse = np.unique(hashes[counted], return_index=True, return_inverse=True)
    first[counted] = counted[index[inverse]]
    different = np.unique(first[counted])
    parents = first.copy()
    if len(different):
        minima = np.memmap(file, np.uint32, "r").reshape(-1, HASHES)
        different = different[minima[different, :2].any(axis=1)]  # those that have a word
        for one, other in near_pairs(minima, different, similarity):
            one, other = root_of(parents, one), root_of(parents, other)
            parents[max(one, other)] = min(one, other)
    while (parents != parents[parents]).any():
        parents = parents[parents]
    return first, parents


def root_of(parents: np.ndarray, document: int) -> int:
    """Returns the first document of the group of one, and shortens the way to it."""
    while parents[document] != document:
        parents[document] = parents[parents[document]]
        document = int(parents[document])
    return document


def near_pairs(minima: np.ndarray, documents: np.ndarray, similarity: float) -> Iterator[tuple[int, int]]:
    """Yields pairs of near-duplicates: of the documents that agree in a band, each with the first and the one before.

    Args:
        minima: [all documents, HASHES] uint32.
        documents: [documents] int64: which to compare.
    """
    rows = rows_of_band(similarity)
    for band in range(0, HASHES, rows):
        keys = np.zeros(len(documents), np.uint64)
        for column in minima[documents, band : band + rows].T:
            keys = mixed(keys + column)
        order = np.argsort(keys, kind="stable")
        keys, sorted_documents = keys[order], documents[order]
        same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        heads = starts[np.searchsorted(starts, same, side="right") - 1]
        for others in (same - 1, heads):
            for start in range(0, len(same), PAIRS):
                one = sorted_documents[same[start : start + PAIRS]]
                other = sorted_documents[others[start : start + PAIRS]]
                near = (minima[one] == minima[other]).mean(axis=1) >= similarity
                yield from zip(one[near].tolist(), other[near].tolist(), strict=True)


def rows_of_band(similarity: float) -> int:
    """Returns how many minima make a band: the most by which pairs at the threshold are found, see `FOUND`."""
    sizes = [size for size in range(1, HASHES + 1) if HASHES % size == 0]
    return max(size for size in sizes if size == 1 or 1 - (1 - similarity**size) ** (HASHES // size) >= FOUND)


def left_out(records: Iterable[list[str]], marks: np.ndarray, join: str | None) -> Iterator[list[str]]:
    """Yields the records of training text without the documents that have a mark, and none of which all have one.

    Args:
        join: `preprocess.join`, by which a record is one document.
    """
    place = 0
    for texts in records:
        documents = len(texts) if join is None else 1
        kept = marks[place : place + documents] == KEPT
        place += documents
        if join is not None and kept[0]:
            yield texts
        elif join is None and (kept.any() or not texts):
            yield [text for text, keep in zip(texts, kept, strict=True) if keep]
