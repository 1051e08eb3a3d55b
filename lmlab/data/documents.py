"""Held-out documents, and which part of its text each of their tokens stands for.

A metric per byte or per word is comparable across tokenizers only if every byte of the
text belongs to exactly one token, so that a token which is not scored takes its bytes
along.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmlab.data.texts import encoded

ROWS_AT_ONCE = 1000  # of the file of documents
START = 60  # characters of a document that are kept to know it by
SPACE = np.array([chr(point).isspace() for point in range(0x3002)])  # the last stands for all above
# Columns of spans.
BYTES, WORDS, LINES, FLAGS, UNKNOWN = range(5)
# Flags of a token: it goes on with the word before it, or is the end of a document.
CONTINUES, END = 1, 2
UNITS = ("tokens", "bytes", "words", "ends", "lines", "unknown_tokens", "unknown_bytes")
"""What is counted of scored tokens: the tokens, the UTF-8 bytes and words of their text, ends of documents and of
lines, the tokens that do not spell all of their text, and how many bytes they leave unspelled."""
FEW = 20
"""Documents below which they are cut into stretches: statistics over a few numbers say little."""
STRETCH = 500
"""Characters of a stretch, at least; more in a long document, so that it has no more than `STRETCHES`."""
STRETCHES = 500


@dataclass(frozen=True)
class Documents:
    """The documents of one split, laid end to end, and the stretches that statistics are made of.

    A stretch is a whole document, or where there are fewer than `FEW` documents a part of one that
    ends with a paragraph.
    """

    tokens: np.ndarray
    """[tokens] int32 ids."""
    spans: np.ndarray
    """[tokens, 5] int32, see `spans`."""
    edges: np.ndarray
    """[documents + 1] int64: document i has the tokens edges[i] … edges[i + 1] - 1."""
    stretches: np.ndarray
    """[stretches + 1] int64: the same of stretches."""
    names: list[str]
    """[stretches] the name of its document: from the text alone, so that it is the same whatever the tokenizer."""
    parts: list[int]
    """[stretches] which stretch of its document it is, from 0."""
    starts: list[str]
    """[stretches] the beginning of its text."""
    hash: str
    """Of all texts in their order."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each."""
        return np.diff(self.edges)

    def chosen(self, documents: np.ndarray) -> "Documents":
        """Some of the documents, by their numbers [n] in ascending order."""
        of_stretch = np.cumsum(np.array(self.parts) == 0) - 1
        rows = np.flatnonzero(np.isin(of_stretch, documents))
        tokens = np.concatenate([np.arange(*self.edges[i : i + 2]) for i in documents])
        names, starts = ([column[row] for row in rows] for column in (self.names, self.starts))
        lengths = np.diff(self.stretches)[rows]
        return Documents(
            self.tokens[tokens],
            self.spans[tokens],
            np.concatenate([[0], np.cumsum(self.lengths[documents])]),
            np.concatenate([[0], np.cumsum(lengths)]),
            names,
            [self.parts[row] for row in rows],
            starts,
            hashlib.sha256("".join(names).encode()).hexdigest()[:32],
        )

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """Count `UNITS` of tokens [N]: [N, 7] int64."""
        found = self.spans[tokens].astype(np.int64)
        ends = (found[:, FLAGS] & END) // END
        columns = (np.ones(len(tokens), np.int64), found[:, BYTES], found[:, WORDS], ends, found[:, LINES])
        return np.stack([*columns, found[:, UNKNOWN] > 0, found[:, UNKNOWN]], axis=1)


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
    spell to the first of them: the bytes of all tokens are the bytes of the text. What lies in no
    token's own span and is no white space, as the tokenizer has nothing for it, is not spelled.

    Args:
        offsets: of each token its first character and the one past its last. None for a
            tokenizer that does not say; all tokens then get even shares of the text.
        words: of each token the number of its pre-token; None for special tokens.
        tokens: how many there are.
        lost: tokens that truncation took; their part of the text is no token's.
        left: whether it took them from the text's beginning.

    Returns:
        [tokens, 5] int32: UTF-8 bytes, words (between white space) that begin in it, line feeds, flags
        (`CONTINUES` where it goes on with the pre-token of the token before), and bytes that are not spelled.
    """
    found = np.zeros((tokens, 5), np.int32)
    if tokens == 0:
        return found
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    space = SPACE[np.minimum(points, len(SPACE) - 1)]
    begins = ~space & np.concatenate([[True], space[:-1]])[: len(points)]
    unspelled = np.zeros_like(size)
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
        found[1:, FLAGS] = CONTINUES * ((number[1:] == number[:-1]) & (number[1:] >= 0))
        edges = np.zeros(len(points) + 1, np.int64)
        np.add.at(edges, spanned[:, 0], 1)
        np.add.at(edges, spanned[:, 1], -1)
        unspelled = size * ((np.cumsum(edges)[:-1] == 0) & ~space)
    for column, counts in ((BYTES, size), (WORDS, begins), (LINES, points == ord("\n")), (UNKNOWN, unspelled)):
        total = np.concatenate([[0], np.cumsum(counts)])
        found[:, column] = np.diff(total[ends], prepend=total[start])
    return found


def stretches(text: str) -> Iterator[int]:
    """The characters at which the stretches of a text after its first begin.

    Each has `STRETCH` characters or more, and ends with a paragraph; where none ends within three
    times as many more, with a line, and else with a word.
    """
    least = max(STRETCH, len(text) // STRETCHES)
    start = 0
    while len(text) - start >= 2 * least:
        window = text[start + least : start + 4 * least]
        ends = (re.search(sign, window) for sign in (r"\n\s*\n", r"\n", r"\s"))
        start += least + next((end.end() for end in ends if end), len(window))
        if start < len(text):
            yield start


class Names:
    """Writes the hashes and beginnings of documents into a file as they come by, and where their stretches begin."""

    SCHEMA = pa.schema(
        {
            "digest": pa.binary(32),  # of the text
            "start": pa.string(),
            "cuts": pa.list_(pa.int64()),  # bytes at which stretches after the first begin
            "starts": pa.list_(pa.string()),  # and their beginnings
        }
    )

    def __init__(self, path: Path) -> None:
        self.writer = pq.ParquetWriter(path, self.SCHEMA)
        self.rows: list[dict[str, Any]] = []
        self.count = 0

    def add(self, text: str, whole: bool = True) -> None:
        """Add a document; one that is not `whole`, as truncation cut it, is a single stretch."""
        # Kept only where there turn out to be few documents.
        cuts = [*stretches(text)] if whole and self.count < FEW else []
        self.rows.append(
            {
                "digest": hashlib.sha256(encoded(text)).digest(),
                "start": start_of(text),
                "cuts": [len(encoded(text[:at])) for at in cuts],
                "starts": [start_of(text[at:]) for at in cuts],
            }
        )
        self.count += 1
        if len(self.rows) == ROWS_AT_ONCE:
            self.write()

    def write(self) -> None:
        if self.count >= FEW:
            self.rows = [row | {"cuts": [], "starts": []} for row in self.rows]
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.SCHEMA))
        self.rows = []

    def __enter__(self) -> "Names":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.write()
        self.writer.close()


def put_in_order(path: Path, wanted: np.ndarray) -> None:
    """Write a file of `Names` anew, document wanted[i] as the i-th."""
    with pq.ParquetFile(path) as file:
        table = file.read()
    pq.write_table(table.take(wanted), path)


def start_of(text: str) -> str:
    """The beginning of a text, in one line."""
    return " ".join(text[: 2 * START].split())[:START].encode("utf-8", "replace").decode()


def read_documents(folder: Path, name: str, lengths: np.ndarray) -> Documents:
    """The documents that `write_split` (preprocess.py) left in a folder."""
    with pq.ParquetFile(folder / f"{name}.documents.parquet") as file:  # read_table would import pandas, half a second
        table = file.read()
    digests, starts, cuts, later = (table[column].to_pylist() for column in Names.SCHEMA.names)
    tokens = np.memmap(folder / f"{name}.tokens", np.int32, "r")
    found = np.memmap(folder / f"{name}.spans", np.int32, "r").reshape(-1, 5)
    edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    names, hashed = named(digests), hashlib.sha256(b"".join(digests)).hexdigest()[:32]
    if not any(cuts):
        return Documents(tokens, found, edges, edges, names, [0] * len(names), starts, hashed)
    bounds, names_of, parts, starts_of = list[int](), list[str](), list[int](), list[str]()
    for document, at in enumerate(cuts):
        first, last = edges[document : document + 2]
        begins = np.cumsum(found[first:last, BYTES]) - found[first:last, BYTES]
        # A token that stands for text on both sides of a cut belongs to the first.
        bounds += [first, *(first + np.searchsorted(begins, at))]
        names_of += [names[document]] * (len(at) + 1)
        parts += range(len(at) + 1)
        starts_of += [starts[document], *later[document]]
    bounds.append(edges[-1])
    return Documents(tokens, found, edges, np.array(bounds), names_of, parts, starts_of, hashed)


def named(digests: Sequence[bytes]) -> list[str]:
    """A name for each document by its text; the second of two equal ones is another."""
    seen: Counter[str] = Counter()
    names = []
    for digest in digests:
        name = digest.hex()[:16]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names
