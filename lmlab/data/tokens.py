"""Flat files of token ids, or of other numbers for each token, that are read as one array without being copied."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


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
