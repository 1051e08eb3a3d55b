"""Held-out documents, and the part of its text that each of their tokens stands for.

A metric per byte or per word is comparable across tokenizers only if every byte of the text belongs to exactly one
token, so that a token which is not scored takes its bytes along.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmlab.data.texts import utf8
from lmlab.data.tokens import FlatFile

ROWS_AT_ONCE = 1000
"""The number of rows of the index of documents that are in memory while it is written, or read to name stretches."""
START = 60
"""The number of characters that are kept of the beginning of a document."""
SPACE = np.array([chr(point).isspace() for point in range(0x3002)])
"""[code points] bool: True for white space; the last entry stands for all code points above it."""
BYTES, WORDS, LINES, FLAGS, UNKNOWN = range(5)
"""The columns of spans: UTF-8 bytes of the token's text, words that begin in it, line feeds, flags, and bytes that it
does not spell."""
CONTINUES, END = 1, 2
"""The flags of a token: it continues the word of the token before it; it ends a document."""
COUNTS = ("tokens", "bytes", "words", "ends", "lines", "unknown_tokens", "unknown_bytes")
"""The counts of scored tokens: the tokens, the UTF-8 bytes and words of their text, ends of documents and of lines,
the tokens that do not spell all of their text, and the bytes that they leave unspelled."""
FEW = 20
"""The number of documents below which they are cut into stretches, as statistics over a few numbers say little."""
STRETCH = 500
"""The least number of characters of a stretch; in a long document it is higher, see `STRETCHES`."""
STRETCHES = 500
"""The greatest number of stretches of a document."""
INDEX = pa.schema(
    {
        "digest": pa.binary(32),  # SHA-256 of the text
        "start": pa.string(),
        "cuts": pa.list_(pa.int64()),  # bytes at which stretches after the first begin
        "starts": pa.list_(pa.string()),  # and their beginnings
    }
)
"""The columns of the index of documents, which has a row for each document."""
NAMED = pa.schema({"name": pa.string(), "part": pa.int64(), "start": pa.string(), "token": pa.int64()})
"""The columns of the file of stretches, which has a row for each: see `Documents`; `token` is the first one of each."""


@dataclass(frozen=True)
class Documents:
    """The documents of one split, laid end to end, and the stretches that statistics are made of.

    A stretch is a whole document, or where there are fewer than `FEW` documents a part of one that ends with a
    paragraph.
    """

    tokens: np.ndarray
    """[tokens] int32 ids."""
    spans: np.ndarray
    """[tokens, 5] int32, see `spans`."""
    edges: np.ndarray
    """[documents + 1] int64: document i has the tokens edges[i] … edges[i + 1] - 1."""
    stretches: np.ndarray
    """[stretches + 1] int64: the same for stretches."""
    names: pa.ChunkedArray
    """[stretches] the name of each one's document, made from the text alone: it does not depend on the tokenizer.

    As the two below it is a column of a file, of which Python's memory holds nothing."""
    parts: pa.ChunkedArray
    """[stretches] the number of each within its document, from 0."""
    starts: pa.ChunkedArray
    """[stretches] the beginning of the text of each."""
    hash: str
    """A hash of all texts in their order."""
    domains: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The documents of each domain, by its name: the first one and the one past its last. Empty without domains."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64: the number of tokens of each."""
        return np.diff(self.edges)

    @cached_property
    def document_of_stretch(self) -> np.ndarray:
        """[stretches] int64: the number of each one's document."""
        numbers: np.ndarray = np.cumsum(np.array(self.parts) == 0) - 1
        return numbers

    def select(self, documents: np.ndarray) -> "Documents":
        """Returns some of the documents, by their numbers [n] in ascending order."""
        rows = np.flatnonzero(np.isin(self.document_of_stretch, documents))
        tokens = np.concatenate([np.arange(*self.edges[i : i + 2]) for i in documents])
        names = self.names.take(rows)
        return Documents(
            self.tokens[tokens],
            self.spans[tokens],
            running_sums(self.lengths[documents]),
            running_sums(np.diff(self.stretches)[rows]),
            names,
            self.parts.take(rows),
            self.starts.take(rows),
            hashlib.sha256("".join(names.to_pylist()).encode()).hexdigest()[:32],
            {name: tuple(np.searchsorted(documents, ends).tolist()) for name, ends in self.domains.items()},
        )

    @property
    def by_domain(self) -> dict[str, "Documents"]:
        """The documents of each domain; without domains all of them under ""."""
        return {name: self.select(np.arange(*ends)) for name, ends in self.domains.items()} or {"": self}

    def stretches_of(self, domain: str) -> slice:
        """Returns the numbers of the stretches of a domain."""
        first, stop = np.searchsorted(self.document_of_stretch, self.domains[domain])
        return slice(int(first), int(stop))

    @property
    def domain_names(self) -> pa.ChunkedArray:
        """[stretches] the name of the domain of each; "" without domains."""
        parts = {name: self.stretches_of(name) for name in self.domains} or {"": slice(0, len(self.parts))}
        return pa.chunked_array([pa.repeat(name, part.stop - part.start) for name, part in parts.items()])

    def continues(self, start: int, end: int) -> np.ndarray:
        """Returns whether each of the tokens start … end - 1 continues the word of the token before it: [n] bool."""
        flags: np.ndarray = (self.spans[start:end, FLAGS] & CONTINUES) > 0
        return flags

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Returns whether each token is one that ends a document, by the numbers of the tokens: [n] bool."""
        flags: np.ndarray = (self.spans[tokens, FLAGS] & END) > 0
        return flags

    def stretch_of(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the number of the stretch that each token belongs to, by the numbers of the tokens: [n] int64."""
        stretches: np.ndarray = np.searchsorted(self.stretches, tokens, side="right") - 1
        return stretches

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the `COUNTS` [N, 7] int64 of tokens, by their numbers [N]."""
        spans = self.spans[tokens].astype(np.int64)
        ends = (spans[:, FLAGS] & END) // END
        columns = (np.ones(len(tokens), np.int64), spans[:, BYTES], spans[:, WORDS], ends, spans[:, LINES])
        return np.stack([*columns, spans[:, UNKNOWN] > 0, spans[:, UNKNOWN]], axis=1)


def join_domains(domains: Mapping[str, Documents]) -> Documents:
    """Lays the documents of several domains end to end; one alone that is called "" is returned as it is."""
    if {*domains} == {""}:
        return domains[""]
    parts = [*domains.values()]
    counts = running_sums(np.array([len(part) for part in parts])).tolist()
    tokens = running_sums(np.array([len(part.tokens) for part in parts]))

    def column(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for part in parts for chunk in getattr(part, name).chunks])

    stretches = [first + part.stretches[:-1] for first, part in zip(tokens, parts, strict=False)]
    named = [f"{name}:{part.hash}" for name, part in domains.items()]
    return Documents(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.spans for part in parts]),
        running_sums(np.concatenate([part.lengths for part in parts])),
        np.append(np.concatenate(stretches), tokens[-1]),
        column("names"),
        column("parts"),
        column("starts"),
        hashlib.sha256("".join(named).encode()).hexdigest()[:32],
        dict(zip(domains, pairwise(counts), strict=True)),
    )


def running_sums(counts: np.ndarray) -> np.ndarray:
    """Returns 0 and the sums of the first, the first two, … of counts [n]: [n + 1] int64."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def spans(
    text: str,
    offsets: Sequence[tuple[int, int]] | None,
    words: Sequence[int | None] | None,
    tokens: int,
    lost: int = 0,
    left: bool = False,
) -> np.ndarray:
    """Shares a text out to its tokens, so that the bytes of all tokens are the bytes of the text.

    The text between two tokens' own offsets, such as a space that the tokenizer drops, belongs to the later token, and
    what follows the last one to the last. A character that several tokens spell belongs to the first of them. White
    space apart, text within no token's own offsets is not spelled: the tokenizer has nothing for it.

        text        "The  café 你!"     你 is left out by this tokenizer; é has 2 bytes, 你 has 3
        tokens       The   caf     é       !      </s>
        offsets      0-3   5-8     8-9     11-12  0-0
        words        0     1       1       2      None
        text of it  "The" "  caf" "é"     " 你!"  ""
        BYTES        3     5       2       5      0
        WORDS        1     1       0       1      0      words begin after white space
        FLAGS        0     0       1       0      0      é `CONTINUES` the pre-token of caf
        UNKNOWN      0     0       0       3      0

    Args:
        offsets: each token's first character and the one past its last. None for a tokenizer that does not know;
            all tokens then get even shares of the text.
        words: the number of each token's pre-token; None for special tokens.
        tokens: the number of tokens.
        lost: the number of further tokens that truncation removed; their part of the text belongs to no token.
        left: True if truncation removed them from the text's beginning.

    Returns:
        [tokens, 5] int32, by the columns `BYTES`, `WORDS`, `LINES`, `FLAGS` and `UNKNOWN`.
    """
    shares = np.zeros((tokens, 5), np.int32)
    if tokens == 0:
        return shares
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    space = SPACE[np.minimum(points, len(SPACE) - 1)]
    begins = ~space & np.concatenate([[True], space[:-1]])[: len(points)]
    unspelled = np.zeros_like(size)
    start = 0
    if offsets is None or words is None:
        edges = len(points) * np.arange(tokens + lost + 1) // (tokens + lost)
        edges = edges[lost:] if left else edges[: tokens + 1]
        start, ends = edges[0], edges[1:]
    else:
        own = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * tokens).reshape(tokens, 2)
        word = numbered(words)
        of_text = np.flatnonzero(word >= 0) if (word >= 0).any() else [tokens - 1]
        if lost and left:
            start = own[of_text[0], 0]
        ends = np.maximum(start, np.maximum.accumulate(own[:, 1]))
        if left or not lost:
            ends[of_text[-1] :] = len(points)
        shares[:, FLAGS] = CONTINUES * continued(word)
        depth = np.zeros(len(points) + 1, np.int64)
        np.add.at(depth, own[:, 0], 1)
        np.add.at(depth, own[:, 1], -1)
        unspelled = size * ((np.cumsum(depth)[:-1] == 0) & ~space)
    edges = np.append(start, ends)
    for column, counts in ((BYTES, size), (WORDS, begins), (LINES, points == ord("\n")), (UNKNOWN, unspelled)):
        before = running_sums(counts)[edges]
        np.subtract(before[1:], before[:-1], out=shares[:, column], casting="same_kind")
    return shares


def numbered(words: Sequence[int | None]) -> np.ndarray:
    """Returns the number of each token's pre-token as an array [T]: -1 for None, which special tokens have."""
    return np.fromiter((-1 if word is None else word for word in words), np.int64, len(words))


def continued(word: np.ndarray) -> np.ndarray:
    """Returns whether each token continues the word of the token before it: [T] bool.

    Args:
        word: [T] the number of each token's pre-token, as of `numbered`.
    """
    before = np.concatenate([[-1], word[:-1]])[: len(word)]
    continues: np.ndarray = (word == before) & (word >= 0)
    return continues


def document_spans(
    text: str,
    ids: Sequence[int],
    encoding: Any,
    *,
    ending: Sequence[int],
    ends: Collection[int | None],
    unknown: Mapping[int, str],
    lost: int,
    left: bool,
) -> np.ndarray:
    """Shares the text of a document out to its tokens and the end-of-text token after them, as `spans` does.

    A token for unknown text spells nothing of its text, unless that is the token's own name. Where the tokenizer has no
    token at all for a text, the end-of-text token stands for it, and spells nothing of it.

    Args:
        encoding: the `tokenizers.Encoding` of the ids; None for a tokenizer that is not a fast one.
        ending: the end-of-text token after the document, or nothing.
        ends: the tokens that end a document where they are its last.
        unknown: the names of the tokens for unknown text, by their ids.
    """
    offsets, words = (None, None) if encoding is None else (encoding.offsets, encoding.word_ids)
    own = spans(text, offsets, words, len(ids), lost, left)
    for i in np.flatnonzero(np.isin(ids, [*unknown])).tolist() if unknown else ():
        start, stop = (0, 0) if offsets is None else offsets[i]
        if offsets is None or (start < stop and text[start:stop] != unknown[ids[i]]):
            own[i, UNKNOWN] = own[i, BYTES]
    if ids:
        end = np.zeros((len(ending), 5), np.int32)
    else:
        end = spans(text, None, None, len(ending))
        end[:, UNKNOWN] = end[:, BYTES]
    shares = np.concatenate([own, end])
    if {*ids[-1:], *ending} & {*ends} and (not ids or shares[-1, BYTES] == 0):
        shares[-1, FLAGS] |= END
        shares[-1, LINES] += not text.endswith("\n")  # it stands for the end of the last line
    return shares


def stretches(text: str) -> Iterator[int]:
    """Yields the characters at which the stretches of a text after its first begin.

    Each has `STRETCH` characters or more, and ends with a paragraph; where none ends within three times as many more,
    with a line, and else with a word.
    """
    least = max(STRETCH, len(text) // STRETCHES)
    start = 0
    while len(text) - start >= 2 * least:
        window = text[start + least : start + 4 * least]
        ends = (re.search(sign, window) for sign in (r"\n\s*\n", r"\n", r"\s"))
        start += least + next((end.end() for end in ends if end), len(window))
        if start < len(text):
            yield start


def start_of(text: str) -> str:
    """Returns the beginning of a text, in one line."""
    return " ".join(text[: 2 * START].split())[:START].encode("utf-8", "replace").decode()


@contextmanager
def open_index(path: Path) -> Iterator[Callable[[str, bool], None]]:
    """Opens the index of documents for writing, a parquet file with the columns `INDEX`.

    Yields a function that adds a document. It takes the text, and True if that is whole: a text that truncation cut is
    a single stretch.
    """
    rows: list[dict[str, Any]] = []
    count = 0
    with pq.ParquetWriter(path, INDEX) as writer:

        def add(text: str, whole: bool) -> None:
            nonlocal count
            cuts = [*stretches(text)] if whole and count < FEW else []
            rows.append(
                {
                    "digest": hashlib.sha256(utf8(text)).digest(),
                    "start": start_of(text),
                    "cuts": [len(utf8(text[:at])) for at in cuts],
                    "starts": [start_of(text[at:]) for at in cuts],
                }
            )
            count += 1
            if len(rows) == ROWS_AT_ONCE:
                write()

        def write() -> None:
            if count >= FEW:
                rows[:] = [row | {"cuts": [], "starts": []} for row in rows]
            writer.write_table(pa.Table.from_pylist(rows, INDEX))
            rows.clear()

        yield add
        write()


def read_index(folder: Path, name: str) -> pa.Table:
    """Returns the index of the documents of a split."""
    with pq.ParquetFile(folder / f"{name}.documents.parquet") as file:  # read_table would import pandas, half a second
        return file.read()


def read_lengths(folder: Path, name: str) -> np.ndarray:
    """Returns [documents] int64: the number of tokens of each document of a split."""
    return FlatFile(folder / f"{name}.lengths", "int64").read()


def reorder(folder: Path, name: str, order: np.ndarray) -> None:
    """Rewrites the files of a held-out split with document order[i] as the i-th."""
    pq.write_table(read_index(folder, name).take(order), folder / f"{name}.documents.parquet")
    lengths = read_lengths(folder, name)
    edges = running_sums(lengths)
    for kind, width in (("tokens", 1), ("spans", 5)):
        path = folder / f"{name}.{kind}"
        rows = np.memmap(path, np.int32, "r").reshape(-1, width)
        with path.with_suffix(".ordered").open("wb") as stream:
            for document in order:
                stream.write(rows[edges[document] : edges[document + 1]].tobytes())
        path.with_suffix(".ordered").replace(path)
    lengths[order].tofile(folder / f"{name}.lengths")


def write_stretches(folder: Path, name: str) -> None:
    """Writes the file of stretches of a split, by its index of documents."""
    edges = running_sums(read_lengths(folder, name))
    spans = read_spans(folder, name)
    digest = hashlib.sha256()
    with (
        pq.ParquetFile(folder / f"{name}.documents.parquet") as index,
        pa.OSFile(str(folder / f"{name}.stretches.arrow"), "wb") as stream,
    ):
        copies = copies_before(index)
        with pa.ipc.new_file(stream, NAMED) as file:
            first_document = 0
            for batch in index.iter_batches(ROWS_AT_ONCE):
                rows: list[dict[str, Any]] = []
                for number, row in enumerate(batch.to_pylist(), first_document):
                    digest.update(row["digest"])
                    named = row["digest"].hex()[:16]
                    if copies[number]:  # the text occurs again
                        named += f"-{copies[number] + 1}"
                    first, last = edges[number : number + 2]
                    tokens = [first]
                    if row["cuts"]:
                        before = np.cumsum(spans[first:last, BYTES]) - spans[first:last, BYTES]
                        # A token that stands for text on both sides of a cut belongs to the first.
                        tokens += [*(first + np.searchsorted(before, row["cuts"]))]
                    for part, start in enumerate([row["start"], *row["starts"]]):
                        rows.append({"name": named, "part": part, "start": start, "token": tokens[part]})
                file.write_batch(pa.RecordBatch.from_pylist(rows, NAMED))
                first_document += len(batch)
    (folder / f"{name}.hash").write_text(digest.hexdigest()[:32])


def copies_before(index: pq.ParquetFile) -> np.ndarray:
    """Returns how many of the documents before each one have its text: [documents] int64."""
    digests = [np.zeros(0, np.uint64)]
    for batch in index.iter_batches(columns=["digest"]):
        whole = np.frombuffer(b"".join(batch["digest"].to_pylist()), np.uint64)
        digests.append(whole[::4].copy())  # their names are made of the first 8 bytes
    keys = np.concatenate(digests)
    order = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    copies = np.empty(len(keys), np.int64)
    copies[order] = np.arange(len(keys)) - np.repeat(changes, np.diff(changes, append=len(keys)))
    return copies


def read_spans(folder: Path, name: str) -> np.ndarray:
    """Returns [tokens, 5] int32: the spans of the tokens of a split."""
    return FlatFile(folder / f"{name}.spans").read().reshape(-1, 5)


def read_documents(folder: Path, name: str) -> Documents:
    """Maps the documents of a split that `write_split` (blocks.py) wrote into a folder."""
    with pa.memory_map(str(folder / f"{name}.stretches.arrow")) as file:
        stretches = pa.ipc.open_file(file).read_all()
    edges = running_sums(read_lengths(folder, name))
    whole = len(stretches) == len(edges) - 1  # each stretch is a document, so that they share an array
    return Documents(
        FlatFile(folder / f"{name}.tokens").read(),
        read_spans(folder, name),
        edges,
        edges if whole else np.append(stretches["token"].to_numpy(), edges[-1]),
        stretches["name"],
        stretches["part"],
        stretches["start"],
        (folder / f"{name}.hash").read_text(),
    )
