"""The guide's steps from records to blocks: split, flatten, tokenize, group_texts (guide, "Preprocess").

By default they lose nothing: no truncation, an end-of-text token after each document, blocks that run on across
documents, and a short last block. The ledger proves it (blocks.py).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmlab.data.documents import continued, document_spans, numbered, running_sums
from lmlab.data.options import Preprocessing
from lmlab.data.sources import Corpus
from lmlab.data.texts import batches, flatten, utf8
from lmlab.data.tokenizers import encode, end_of_text_id, unknown_tokens
from lmlab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

DOCUMENTS_PER_CALL = 1000
"""The number of documents that the tokenizer gets at once, which its threads share.

It is limited, as `CHARACTERS_PER_CALL` is, so that the memory does not grow with the corpus.
"""
CHARACTERS_PER_CALL = 2**20


class Parts(NamedTuple):
    """The records of a corpus, split."""

    train: "Dataset | None"
    """The training records; None if only held-out ones were asked for."""
    validation: "Mapping[str, Dataset]"
    """The held-out records of each domain, by its name; the only one of a corpus without domains is called ""."""
    unused: int = 0
    """The number of records that are left out of both, see `Preprocessing.max_test_bytes`."""
    drawn: np.ndarray | None = None
    """The numbers of the records that were held out by hash; None if none were."""


class Source(NamedTuple):
    """A corpus that is prepared, with what has been found out of it so far."""

    corpus: Corpus
    parts: Callable[[], Parts]
    """A function that returns its records, split; it reads them when it is called first."""
    marks: Path | None = None
    """The folder with the marks of training documents that are duplicates; None if they were not looked for."""


def held_out_by(choices: Preprocessing) -> list[Any]:
    """Returns the choices that decide which records are trained on."""
    by_hash = [choices.split_by] if choices.split_by != "shuffle" else []
    return [choices.test_size, choices.split_seed, choices.max_records, *by_hash]


def split(corpus: Corpus, choices: Preprocessing, drawn: np.ndarray | None = None) -> Parts:
    """Holds out validation records, unless the source brought some (guide, `train_test_split`).

    Args:
        drawn: the numbers of the records that are held out by hash, if they have been drawn before.

    Raises:
        UserError: there is nothing to train on, or nothing to hold out.
    """
    train, validation = corpus.train, corpus.validation
    if train is None:
        raise UserError("data.train has to be given: add data.train=… to the command.")
    if choices.max_records is not None:
        train = train.select(range(min(choices.max_records, len(train))))
    if len(train) == 0:
        raise UserError("the data set is empty: no record to train on (check data.train and data.filter).")
    records, unused = len(train), 0
    if validation is None and records >= 2 and round(records * choices.test_size) >= 1:
        if choices.split_by == "hash":
            if drawn is None:
                drawn = draw_by_hash(flatten(train, corpus.text), choices)
            train, test = train.select(np.delete(np.arange(records), drawn)), train.select(drawn)
        else:
            # As `train_test_split` counts, but never all of them.
            held_out = min(math.ceil(records * choices.test_size), records - 1)
            halves = train.train_test_split(test_size=held_out, seed=choices.split_seed)
            train, test = halves["train"], halves["test"]
        scored = first_bytes(test, corpus.text, choices.max_test_bytes)
        validation, unused = {"": scored}, len(test) - len(scored)
    if not validation or not all(map(len, validation.values())):
        if validation and any(validation):
            empty = next(name for name, part in validation.items() if not len(part))
            raise UserError(f"the validation split is empty: there is no record in data.validation.{empty}.")
        next(flatten(train, corpus.text))  # a wrong data.text is refused first
        cut = "cut the text into more documents (data.document=paragraph or line), " if corpus.plain else ""
        if records == 1:
            raise UserError(
                "the validation split is empty: there is one record only, which can't be split.\n"
                f"To hold some out, {cut}give more records, or name data.validation."
            )
        raise UserError(
            f"the validation split is empty: {records} records at preprocess.test_size={choices.test_size}.\n"
            f"To hold some out, {cut}raise preprocess.test_size, or name data.validation."
        )
    return Parts(train, validation, unused, drawn)


def draw_by_hash(records: Iterable[list[str]], choices: Preprocessing) -> np.ndarray:
    """Returns the numbers of the records to hold out, by the hash of each record's own texts and of `split_seed`.

    A record is drawn if its hash, as a number in [0, 1), is below `test_size`; at least one is, and never all. Those of
    the least hashes come first.
    """
    hashes = bytearray()
    for texts in records:
        digest = hashlib.blake2b(digest_size=8, key=choices.split_seed.to_bytes(8, "little", signed=True))
        for text in texts:
            digest.update(utf8(text) + b"\xff")  # no UTF-8 text has this byte
        hashes += digest.digest()
    values = np.frombuffer(hashes, ">u8")
    order = np.argsort(values, kind="stable")
    count = int(np.searchsorted(values[order] / 2.0**64, choices.test_size))
    return order[: min(max(count, 1), len(order) - 1)]


def first_bytes(records: "Dataset", text: str, most: int | None) -> "Dataset":
    """Returns as many of the first records as have `most` UTF-8 bytes of text together, but at least one."""
    if most is None:
        return records
    sizes = (sum(len(utf8(text)) for text in texts) for texts in flatten(records, text))
    count = sum(1 for _ in takewhile(lambda total: total <= most, accumulate(sizes)))
    return records.select(range(max(1, count)))


def join_texts(records: Iterable[list[str]], join: str | None) -> Iterator[str]:
    """Yields the documents of records: each text, or where `join` is given all texts of a record joined by it."""
    return chain.from_iterable(records) if join is None else (join.join(texts) for texts in records)


class Tokens(NamedTuple):
    """One document, tokenized."""

    text: str
    ids: np.ndarray
    """[T] int32."""
    spans: np.ndarray | None
    """[T, 5] int32, see documents.py; None in training text whose tokens all spell their part of it."""
    lost: int
    """The number of tokens that truncation removed."""
    continues: np.ndarray | None
    """[T] bool: whether each continues the word of the token before it; None if it was not asked for."""


def tokenize(
    records: Iterable[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    choices: Preprocessing,
    held_out: bool = False,
    words: bool = False,
) -> Iterator[Tokens]:
    """Joins the texts of each record, and turns each document into ids (guide, `preprocess_function`).

    Args:
        held_out: True to find which text each token stands for, also where no token is unknown.
        words: True to find which tokens continue a word, which only a fast tokenizer knows.
    """
    end = [end_of_text_id(tokenizer)] if choices.end_of_text else []
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    unknown = unknown_tokens(tokenizer)
    for batch in batches(join_texts(records, choices.join), DOCUMENTS_PER_CALL, CHARACTERS_PER_CALL):
        encoded = encode(batch, tokenizer, choices.special_tokens, located=held_out or words)
        for text, (ids, encoding) in zip(batch, encoded, strict=True):
            lost, spans = 0, None
            if choices.truncation and len(ids) > tokenizer.model_max_length:
                full = len(ids)
                ((ids, encoding),) = encode([text], tokenizer, choices.special_tokens, truncation=True)
                lost = full - len(ids)
            ending = end if ids or text.strip() else []  # an empty document has nothing to end
            if held_out or (ending and not ids) or not unknown.keys().isdisjoint(ids):
                if not held_out and not lost:
                    ((ids, encoding),) = encode([text], tokenizer, choices.special_tokens, located=True)
                left = tokenizer.truncation_side == "left"
                spans = document_spans(
                    text, ids, encoding, ending=ending, ends=ends, unknown=unknown, lost=lost, left=left
                )
            continues = None
            if words:
                continues = np.concatenate([continued(numbered(encoding.word_ids)), np.zeros(len(ending), bool)])
            yield Tokens(text, np.array([*ids, *ending], np.int32), spans, lost, continues)


@dataclass(frozen=True)
class Slices:
    """The bounds of blocks that follow on one another: item i is (i·block_size, (i + 1)·block_size), the last is cut.

    `np.asarray` makes them the array that other blocks have.
    """

    tokens: int
    """The number of tokens of all blocks."""
    block_size: int

    def __len__(self) -> int:
        return -(-self.tokens // self.block_size)

    def __getitem__(self, index: int) -> tuple[int, int]:
        start = range(0, self.tokens, self.block_size)[index]
        return start, min(start + self.block_size, self.tokens)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        starts = np.arange(0, self.tokens, self.block_size, dtype=np.int64)
        return np.stack([starts, np.minimum(starts + self.block_size, self.tokens)], axis=1).astype(dtype or np.int64)


Bounds = Slices | np.ndarray
"""The first token of each block and the one past its last: an array [blocks, 2] int64, or arithmetic."""


def lengths_of(bounds: Bounds) -> np.ndarray:
    """Returns the lengths that blocks have, each once, in ascending order."""
    ends = [bounds[0], bounds[len(bounds) - 1]] if isinstance(bounds, Slices) else bounds
    return np.unique(np.diff(ends))


def group_texts(lengths: np.ndarray, block_size: int, drop_remainder_every: int | None = None) -> Bounds:
    """Cuts the documents, laid end to end, into blocks (guide, `group_texts`).

    Documents of 3, 4 and 2 tokens at `block_size=4`:

        documents    a a a b b b b c c
        token        0 1 2 3 4 5 6 7 8
        blocks       └─────┘ └─────┘ └      [[0, 4], [4, 8], [8, 9]]

    and with `drop_remainder_every=2`, which drops the tokens from 4 on:

        groups       a a a b b b b | c c
        blocks       └─────┘                [[0, 4]]

    Args:
        lengths: [documents] tokens of each.
        block_size: the number of tokens of a block.
        drop_remainder_every: the number of documents of a group; tokens at its end that do not fill a block are
            dropped. None makes one group of all and keeps a short last block.

    Returns:
        the first token of each block and the one past its last; without an array where no token is dropped.
    """
    if drop_remainder_every is None:
        return Slices(int(lengths.sum()), block_size)
    edges = running_sums(lengths)
    groups = pairwise([*edges[:-1:drop_remainder_every], edges[-1]])
    full = [np.arange(first, last - block_size + 1, block_size, dtype=np.int64) for first, last in groups]
    starts = np.concatenate([edges[:0], *full])
    return np.stack([starts, starts + block_size], axis=1)
