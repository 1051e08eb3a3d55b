"""Flat files of token ids, or of other numbers for each token, that are read as one array without being copied."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

STRIDE = 1024
"""The number of documents of which `DocumentEdges` keeps one edge in memory."""


class FlatFile(NamedTuple):
    """A file of numbers without structure."""

    path: Path
    dtype: str = "int32"
    """The type of each number, by its name in numpy."""
    offset: int = 0
    """The number of bytes before the first one."""

    def read(self) -> np.ndarray:
        """Maps the numbers into memory: [N]."""
        if self.path.stat().st_size == self.offset:  # nothing can't be mapped
            return np.zeros(0, self.dtype)
        # A plain array: slices of a memmap take twice as long.
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset))


class FlatFiles:
    """The numbers of several files, end to end, of which parts are read.

    Each process maps the files into its own memory: pickling copies their paths.
    """

    def __init__(self, *files: FlatFile):
        self.files = files
        self.arrays = [file.read() for file in files]
        self.edges = np.cumsum([0, *map(len, self.arrays)], dtype=np.int64)
        """[files + 1]: file i has the numbers edges[i] … edges[i + 1] - 1."""

    def __reduce__(self) -> tuple[type, Sequence[FlatFile]]:
        return FlatFiles, self.files

    def __len__(self) -> int:
        return int(self.edges[-1])

    def part(self, start: int, end: int) -> np.ndarray:
        """Returns the numbers `start` … `end - 1`, in a copy where they lie in several files."""
        first, last = np.searchsorted(self.edges, [start, end - 1], side="right") - 1
        if first >= last:
            part: np.ndarray = self.arrays[first][start - self.edges[first] : end - self.edges[first]]
            return part
        whole = self.arrays[first + 1 : last]
        return np.concatenate(
            [self.arrays[first][start - self.edges[first] :], *whole, self.arrays[last][: end - self.edges[last]]]
        )


class DocumentEdges:
    """The edges of documents that lie end to end, of which a few are kept in memory and the others read when needed.

    Edges of all documents would take eight bytes each, in every process that makes batches.
    """

    def __init__(self, lengths: FlatFiles):
        """Adds up the lengths.

        Args:
            lengths: the number of tokens of each document.
        """
        self.lengths = lengths
        at_once = 1024 * STRIDE
        parts = (lengths.part(i, min(i + at_once, len(lengths))) for i in range(0, len(lengths), at_once))
        sums = [np.add.reduceat(part, np.arange(0, len(part), STRIDE)) for part in parts]
        self.edges = np.cumsum(np.concatenate([np.zeros(1, np.int64), *sums]))
        """The first token of the documents 0, STRIDE, 2 · STRIDE …, and the number of all tokens."""

    def within(self, start: int, end: int) -> np.ndarray:
        """Returns how many of the tokens `start` … `end - 1` each document has that has any: [documents] int64."""
        number = int(np.searchsorted(self.edges, start, side="right")) - 1
        edges = self.edges[number : number + 1]
        while edges[-1] < end:
            first = number * STRIDE + len(edges) - 1
            lengths = self.lengths.part(first, min(first + STRIDE, len(self.lengths)))
            edges = np.concatenate([edges, edges[-1] + np.cumsum(lengths)])
        lengths = np.diff(edges.clip(start, end))
        return lengths[lengths > 0]
