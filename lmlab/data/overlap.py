"""The number of held-out documents that the training text contains: what a model has seen, it predicts too well.

A document is contained where all of its text is equal to a training document, or a part of one. Documents of fewer
than `WINDOW` bytes never count: that a blank line or a heading occurs again says nothing.

How it works. The UTF-8 bytes c[0], c[1], … of many documents are laid end to end, with a byte between them that no
text has. Let t be a table of 256 random numbers, and B be odd. The sums

    S[i] = t[c[0]]·B^0 + t[c[1]]·B^1 + … + t[c[i-1]]·B^(i-1)   modulo 2^64

give a hash of any part, (S[end] - S[start])·B^-start, which is the same wherever the same bytes lie (Rabin and Karp
1987). Of a held-out document are kept the hash of all of it, its length, and the hash and offset of one window in it.
The training text comes by in chunks that overlap, so that each occurrence lies whole in one. The hash of each of
their windows is looked up, first in a small table that turns nearly all away. Where it is that of a document's window,
the hash of as many bytes as the document has, around it, decides. Two texts that differ have the same hash once in
2^64 times by chance; somebody who means to could make such texts.

Neither text is held in memory: only the chunk at hand, which is twice as long as the longest held-out document
where that is more than `CHUNK`, with 8 bytes of sums for each of its own.
"""

import sys
from collections.abc import Iterable, Iterator

import numpy as np

from lmlab.data.texts import batches, utf8

WINDOW = 32  # bytes
CHOICE = 8  # windows of a held-out document that one is chosen from
CHUNK = 2**20  # bytes of documents that are hashed together
SLICE = 2**16  # bytes of them whose arrays fit in a core's cache
BETWEEN = b"\xff"  # no UTF-8 text has this byte

BASE = 6364136223846793005  # the multiplier of Knuth's MMIX: 5 modulo 8, so its powers repeat only after 2^62
INVERSE = pow(BASE, -1, 2**64)
VALUES = np.random.default_rng(0).integers(2**64, size=256, dtype=np.uint64)


def powers(base: int, count: int) -> np.ndarray:
    """Returns 1, base, base², … modulo 2^64: [count] uint64."""
    result: np.ndarray = np.cumprod(np.array([1] + [base] * (count - 1), np.uint64), dtype=np.uint64)
    return result


POWERS, INVERSES = powers(BASE, SLICE), powers(INVERSE, SLICE)


def count_contained(training: Iterable[str], held_out: Iterable[str]) -> int:
    """Counts the held-out documents of `WINDOW` bytes or more that are each a part of some training document.

    Of equal ones each counts. The training text is not read where there is nothing to look for.
    """
    return int(KnownDocuments(held_out).contained(training)[:, 1].sum())


class PartHashes:
    """The hashes of all parts of some bytes."""

    def __init__(self, text: bytes | bytearray):
        values = np.frombuffer(text, np.uint8)
        self.sums = np.zeros(len(values) + 1, np.uint64)
        self.scales = powers(pow(INVERSE, SLICE, 2**64), len(values) // SLICE + 1)
        for start in range(0, len(values), SLICE):
            terms = VALUES.take(values[start : start + SLICE])
            terms *= POWERS[: len(terms)]
            terms *= np.uint64(pow(BASE, start, 2**64))
            terms[:1] += self.sums[start]
            np.cumsum(terms, out=self.sums[start + 1 : start + 1 + len(terms)])

    def parts(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the hash of each part, by its first byte and the one past its last; arrays of one shape."""
        hashes: np.ndarray = self.sums[ends] - self.sums[starts]
        hashes *= INVERSES[starts % SLICE]
        hashes *= self.scales[starts // SLICE]
        return hashes

    def windows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the hashes of all windows, a slice of them at a time, each with the start of its first window."""
        for number, start in enumerate(range(0, len(self.sums) - WINDOW, SLICE)):
            hashes = self.sums[start + WINDOW : start + WINDOW + SLICE].copy()
            hashes -= self.sums[start : start + len(hashes)]
            hashes *= INVERSES[: len(hashes)]
            hashes *= self.scales[number]
            yield start, hashes


class KnownDocuments:
    """The hashes that are kept of the held-out documents.

    Each array ends with one more element, for a search that ends beyond all others.
    """

    def __init__(self, documents: Iterable[str]):
        lengths, hashes, windows = [np.zeros(0, int)], [np.zeros(0, np.uint64)], [np.zeros((0, CHOICE), np.uint64)]
        long_enough = (text for text in map(utf8, documents) if len(text) >= WINDOW)
        for batch in batches(long_enough, sys.maxsize, CHUNK):
            length = np.array([len(text) for text in batch])
            start = np.cumsum(length + len(BETWEEN)) - length - len(BETWEEN)
            window = start[:, None] + window_offsets(length[:, None], np.arange(CHOICE))
            text = PartHashes(BETWEEN.join(batch))
            lengths.append(length)
            hashes.append(text.parts(start, start + length))
            windows.append(text.parts(window, window + WINDOW))
        different, first, counts = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
        self.hashes, self.counts = np.append(different, np.uint64(0)), np.append(counts, 0)
        """[documents]: the hash of each different one, sorted, and how many there are of it."""
        length, window = np.concatenate(lengths)[first], np.concatenate(windows)[first]
        self.longest = int(length.max(initial=0))
        # The window that the fewest documents share: those of one form begin alike, and all of them
        # would be compared wherever another one of that form begins.
        _, which, shared = np.unique(window, return_inverse=True, return_counts=True)
        choice = shared[which.reshape(window.shape)].argmin(1)
        chosen = window[np.arange(len(window)), choice]
        rows = np.stack([chosen, window_offsets(length, choice).astype(np.uint64), length.astype(np.uint64)], 1)
        rows = np.append(np.unique(rows, axis=0), np.zeros((1, 3), np.uint64), axis=0)
        self.windows, self.offsets, self.lengths = rows[:, 0].copy(), rows[:, 1].astype(int), rows[:, 2].astype(int)
        """[rows]: the hash of a window, sorted, its offset in a document, and the document's length."""
        # More than a hundred bits for each row, and one of them set.
        bits = min(max(8 + len(rows).bit_length(), 16), 24)
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(2**bits, bool)
        self.table[(self.windows[:-1] >> self.shift).astype(int)] = True

    def contained(self, training: Iterable[str]) -> np.ndarray:
        """Returns those that are each a part of some training document.

        Returns:
            [N, 2] uint64: the hash of each different one, in ascending order, and how many are equal to it.
        """
        found = np.zeros(len(self.counts), bool)
        for chunk in chunks(training, self.longest) if self.longest else ():
            text = PartHashes(chunk)
            for first, windows in text.windows():
                for starts, ends in self.candidates(first, windows):
                    inside = (starts >= 0) & (ends < len(text.sums))
                    hashes = text.parts(starts[inside], ends[inside])
                    rows = np.searchsorted(self.hashes[:-1], hashes)
                    found[rows[self.hashes[rows] == hashes]] = True
        return np.stack([self.hashes[found], self.counts[found].astype(np.uint64)], axis=1)

    def candidates(self, first: int, windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields where documents may start and end, by the hashes of the windows from byte `first` on."""
        at = np.flatnonzero(self.table.take((windows >> self.shift).view(np.int64)))
        row = np.searchsorted(self.windows[:-1], windows[at])
        while len(at):
            same = self.windows[row] == windows[at]
            at, row = at[same], row[same]
            starts = first + at - self.offsets[row]
            yield starts, starts + self.lengths[row]
            row += 1  # the next may have the same window


def window_offsets(length: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Returns where documents of a length have their window 0, at their beginning, to `CHOICE` - 1, at their end."""
    offsets: np.ndarray = (length - WINDOW) * number // (CHOICE - 1)
    return offsets


def chunks(documents: Iterable[str], longest: int) -> Iterator[bytearray]:
    """Yields documents end to end, cut such that any part of at most `longest` bytes lies whole in one chunk."""
    size = max(CHUNK, longest)
    held = bytearray()
    for text in documents:
        held += utf8(text) + BETWEEN
        while len(held) >= size + longest:
            yield held[: size + longest]
            del held[:size]
    yield held
