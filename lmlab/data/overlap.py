"""How many held-out documents the training text contains: what a model has seen, it predicts too well.

A document is contained where all of its text is equal to a training document, or a part of one. Documents of fewer
than `WINDOW` bytes never count: that a blank line or a heading occurs again says nothing.

How it works. The UTF-8 bytes c[0], c[1], … of many documents are laid end to end, with a byte between them that no
text has. Let t be a table of 256 random numbers, and B be odd. The sums

    S[i] = t[c[0]]·B^0 + t[c[1]]·B^1 + … + t[c[i-1]]·B^(i-1)   modulo 2^64

give a hash of any part, (S[end] - S[start])·B^-start, which is the same wherever the same bytes lie (Rabin and Karp
1987). Of a held-out document are kept the hash of all of it, its length, and the hash and offset of one window in it.
The training text comes by in stretches that overlap, so that each occurrence lies whole in one. The hash of each of
their windows is looked up, first in a small table that turns nearly all away. Where it is that of a document's window,
the hash of as many bytes as the document has, around it, decides. Two texts that differ have the same hash once in
2^64 times by chance; somebody who means to could make such texts.

Neither text is held in memory: only the stretch at hand, which is twice as long as the longest held-out document
where that is more than `STRETCH`, with 8 bytes of sums for each of its own.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from lmlab.data.texts import encoded

WINDOW = 32  # bytes
CHOICE = 8  # windows of a held-out document that one is chosen from
STRETCH = 2**20  # bytes of documents that are looked at together
BLOCK = 2**16  # bytes of them whose arrays fit in a core's cache
BETWEEN = b"\xff"  # no UTF-8 text has this byte

BASE = 6364136223846793005  # the multiplier of Knuth's MMIX: 5 modulo 8, so its powers repeat only after 2^62
INVERSE = pow(BASE, -1, 2**64)
VALUES = np.random.default_rng(0).integers(2**64, size=256, dtype=np.uint64)


def powers(base: int, count: int) -> np.ndarray:
    """[count] uint64: 1, base, base², …"""
    return np.cumprod(np.array([1] + [base] * (count - 1), np.uint64), dtype=np.uint64)


POWERS, INVERSES = powers(BASE, BLOCK), powers(INVERSE, BLOCK)


def documents_in(training: Iterable[str], held_out: Iterable[str]) -> int:
    """How many held-out documents, of `WINDOW` bytes or more, are each a part of some training document.

    Of equal ones each counts. The training text is not read where there is nothing to look for.
    """
    known = Known(held_out)
    if known.longest == 0:
        return 0
    found = np.zeros(len(known.hashes), bool)
    for stretch in stretches(training, known.longest):
        text = Hashes(stretch)
        for first, windows in text.windows():
            for starts, ends in known.candidates(first, windows):
                inside = (starts >= 0) & (ends < len(text.sums))
                hashes = text.parts(starts[inside], ends[inside])
                places = np.searchsorted(known.hashes[:-1], hashes)
                found[places[known.hashes[places] == hashes]] = True
    return int(known.counts[found].sum())


class Hashes:
    """The hashes of all parts of some bytes."""

    def __init__(self, text: bytes | bytearray):
        values = np.frombuffer(text, np.uint8)
        self.sums = np.zeros(len(values) + 1, np.uint64)
        self.scales = powers(pow(INVERSE, BLOCK, 2**64), len(values) // BLOCK + 1)
        for start in range(0, len(values), BLOCK):
            terms = VALUES.take(values[start : start + BLOCK])
            terms *= POWERS[: len(terms)]
            terms *= np.uint64(pow(BASE, start, 2**64))
            terms[:1] += self.sums[start]
            np.cumsum(terms, out=self.sums[start + 1 : start + 1 + len(terms)])

    def parts(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The hash of each part, by where it begins and where the next byte is; arrays of one shape."""
        return (self.sums[ends] - self.sums[starts]) * INVERSES[starts % BLOCK] * self.scales[starts // BLOCK]

    def windows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The hashes of all windows, many at a time, each time with the start of the first."""
        for block, start in enumerate(range(0, len(self.sums) - WINDOW, BLOCK)):
            hashes = self.sums[start + WINDOW : start + WINDOW + BLOCK].copy()
            hashes -= self.sums[start : start + len(hashes)]
            hashes *= INVERSES[: len(hashes)]
            hashes *= self.scales[block]
            yield start, hashes


class Known:
    """What is kept of the held-out documents.

    Each array ends with one more element, for what a search finds that is past all others.
    """

    def __init__(self, documents: Iterable[str]):
        lengths, hashes, windows = [np.zeros(0, int)], [np.zeros(0, np.uint64)], [np.zeros((0, CHOICE), np.uint64)]
        for batch in batches(documents):
            length = np.array([len(text) for text in batch])
            start = np.cumsum(length + len(BETWEEN)) - length - len(BETWEEN)
            at = start[:, None] + offsets(length[:, None], np.arange(CHOICE))
            text = Hashes(BETWEEN.join(batch))
            lengths.append(length)
            hashes.append(text.parts(start, start + length))
            windows.append(text.parts(at, at + WINDOW))
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
        rows = np.stack([chosen, offsets(length, choice).astype(np.uint64), length.astype(np.uint64)], 1)
        rows = np.append(np.unique(rows, axis=0), np.zeros((1, 3), np.uint64), axis=0)
        self.windows, self.offsets, self.lengths = rows[:, 0].copy(), rows[:, 1].astype(int), rows[:, 2].astype(int)
        """[rows]: the hash of a window, sorted, its offset in a document, and the document's length."""
        # More than a hundred places for each row, and one bit of them set.
        bits = min(max(8 + len(rows).bit_length(), 16), 24)
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(2**bits, bool)
        self.table[(self.windows[:-1] >> self.shift).astype(int)] = True

    def candidates(self, first: int, windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where documents may start and end, by the hashes of the windows from `first` on."""
        at = np.flatnonzero(self.table.take((windows >> self.shift).view(np.int64)))
        row = np.searchsorted(self.windows[:-1], windows[at])
        while len(at):
            same = self.windows[row] == windows[at]
            at, row = at[same], row[same]
            starts = first + at - self.offsets[row]
            yield starts, starts + self.lengths[row]
            row += 1  # the next may have the same window


def offsets(length: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Where a document of a length has the window of a number: from its beginning, 0, to its end, `CHOICE` - 1."""
    return (length - WINDOW) * number // (CHOICE - 1)


def batches(documents: Iterable[str]) -> Iterator[list[bytes]]:
    """The documents that are long enough, whole ones of some `STRETCH` bytes at a time."""
    batch: list[bytes] = []
    size = 0
    for text in map(encoded, documents):
        if len(text) >= WINDOW:
            batch.append(text)
            size += len(text)
        if size >= STRETCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def stretches(documents: Iterable[str], longest: int) -> Iterator[bytearray]:
    """Documents end to end, cut such that any part of at most `longest` bytes lies whole in one stretch."""
    size = max(STRETCH, longest)
    held = bytearray()
    for text in documents:
        held += encoded(text) + BETWEEN
        while len(held) >= size + longest:
            yield held[: size + longest]
            del held[:size]
    yield held
