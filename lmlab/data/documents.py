"""Held-out documents, and which part of its text each of their tokens stands for.

A figure per byte or per word is comparable across tokenizers only if every byte of the
text belongs to exactly one token, so that a token which is not scored takes its bytes
along.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_AT_ONCE = 1000  # of the file of documents
START = 60  # characters of a document that are kept to know it by
SPACE = np.array([chr(point).isspace() for point in range(0x3002)])  # the last stands for all above


@dataclass(frozen=True)
class Documents:
    """The documents of one split, laid end to end."""

    tokens: np.ndarray
    """[tokens] int32 ids."""
    spans: np.ndarray
    """[tokens, 3] int32, see `spans`."""
    edges: np.ndarray
    """[documents + 1] int64: document i has the tokens edges[i] … edges[i + 1] - 1."""
    ids: list[str]
    """A document's name: from its text alone, so that it is the same whatever the tokenizer."""
    starts: list[str]
    """The beginning of its text."""
    hash: str
    """Of all texts in their order."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each."""
        return np.diff(self.edges)


def spans(
    text: str,
    offsets: Sequence[tuple[int, int]] | None,
    words: Sequence[int | None] | None,
    tokens: int,
    lost: int = 0,
    left: bool = False,
) -> np.ndarray:
    """What each token of a text stands for.

    The text between two tokens' own spans (a space that the tokenizer drops) belongs to the
    later one, what follows the last to the last, and a character that several tokens
    spell to the first of them: the bytes of all tokens are the bytes of the text.

    Args:
        offsets: of each token its first character and the one past its last. None for a
            tokenizer that does not say; all tokens then get even shares of the text.
        words: of each token the number of its pre-token; None for special tokens.
        tokens: how many there are.
        lost: tokens that truncation took; their part of the text is no token's.
        left: whether it took them from the text's beginning.

    Returns:
        [tokens, 3] int32: UTF-8 bytes, words (between white space) that begin in it, and
        whether it goes on with the pre-token of the token before.
    """
    found = np.zeros((tokens, 3), np.int32)
    if tokens == 0:
        return found
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    space = SPACE[np.minimum(points, len(SPACE) - 1)]
    begins = ~space & np.concatenate([[True], space[:-1]])[: len(points)]
    start = 0
    if offsets is None or words is None:
        edges = len(points) * np.arange(tokens + lost + 1) // (tokens + lost)
        kept = edges[lost:] if left else edges[: tokens + 1]
        start, ends = kept[0], kept[1:]
    else:
        spanned = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * tokens).reshape(tokens, 2)
        number = np.fromiter((-1 if word is None else word for word in words), np.int64, tokens)
        own = np.flatnonzero(number >= 0) if (number >= 0).any() else [tokens - 1]
        if lost and left:
            start = spanned[own[0], 0]
        ends = np.maximum(start, np.maximum.accumulate(spanned[:, 1]))
        if left or not lost:
            ends[own[-1] :] = len(points)
        found[1:, 2] = (number[1:] == number[:-1]) & (number[1:] >= 0)
    for column, counts in enumerate((size, begins)):
        total = np.concatenate([[0], np.cumsum(counts)])
        found[:, column] = np.diff(total[ends], prepend=total[start])
    return found


class Names:
    """Writes the names, beginnings and hash of documents as they come by."""

    def __init__(self, place: Path) -> None:
        self.writer = pq.ParquetWriter(place, pa.schema([("id", pa.string()), ("start", pa.string())]))
        self.rows: list[dict[str, str]] = []
        self.seen: Counter[str] = Counter()
        self.all = hashlib.sha256()

    def add(self, text: str) -> None:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
        self.all.update(digest.digest())
        name = digest.hexdigest()[:16]
        self.seen[name] += 1
        # The second of two equal documents is another one.
        unique = name if self.seen[name] == 1 else f"{name}-{self.seen[name]}"
        start = " ".join(text[: 2 * START].split())[:START].encode("utf-8", "replace").decode()
        self.rows.append({"id": unique, "start": start})
        if len(self.rows) == ROWS_AT_ONCE:
            self.write()

    def write(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.writer.schema))
        self.rows = []

    def __enter__(self) -> "Names":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.write()
            self.writer.add_key_value_metadata({"hash": self.all.hexdigest()[:32]})
        self.writer.close()


def read_documents(folder: Path, name: str, lengths: np.ndarray) -> Documents:
    """The documents that `write_split` (preprocess.py) left in a folder."""
    place = folder / f"{name}.documents.parquet"
    with pq.ParquetFile(place) as file:  # read_table would import pandas, half a second of a start
        names, about = file.read(), file.metadata.metadata
    return Documents(
        np.memmap(folder / f"{name}.tokens", np.int32, "r"),
        np.memmap(folder / f"{name}.spans", np.int32, "r").reshape(-1, 3),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        names["id"].to_pylist(),
        names["start"].to_pylist(),
        about[b"hash"].decode(),
    )
