"""The prepared data of a run: the results of all steps (preprocess.py), which are kept in a cache.

The tokens of a split lie in one flat int32 file; a document is a length, a block a pair of bounds in it. Blocks are cut
when they are asked for, so every block size shares one file. Held-out documents also keep which text each token stands
for (documents.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmlab.data.decontaminate import count_duplicates, key_of_dropped, mark_duplicates, training_texts
from lmlab.data.documents import UNKNOWN, Documents, open_index, read_documents, read_lengths, reorder
from lmlab.data.options import Preprocessing
from lmlab.data.overlap import count_contained
from lmlab.data.preprocess import group_texts, join_texts, split, tokenize
from lmlab.data.sources import Corpus, fingerprint
from lmlab.data.texts import flatten, sort_by_file, utf8
from lmlab.data.tokenizers import content_hash
from lmlab.errors import UserError
from lmlab.io import write_once

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

FORMAT = 4
"""The version of the prepared data, a part of each cache key; it is raised when the steps change their output."""
DOUBTFUL = 0.01
"""The share of records without a text, or of held-out documents in the training text, that is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The counts of one split: where every record, document, byte and token of it went."""

    records: int
    records_without_text: int
    """The number of records whose text is null or missing, or whose list of texts is empty; an empty text is a text."""
    documents: int
    documents_in_training: int | None = None
    """The number of held-out documents of 32 bytes or more that are equal to a training document or a part of one
    (overlap.py). None for the training split itself, and if the training text is not read."""
    documents_equal_to_held_out: int | None = None
    """The number of training documents that are equal to a held-out one (duplicates.py). This and the next six are None
    where `preprocess.decontaminate` does not ask for them; under `drop` they are in no other count."""
    documents_near_held_out: int | None = None
    """The number of those that are near-duplicates of a held-out one."""
    documents_with_test_items: int | None = None
    """The number of those others that contain an item of a benchmark."""
    documents_repeated: int | None = None
    """The number of those others that are equal to an earlier training document."""
    documents_nearly_repeated: int | None = None
    """The number of those others that are near-duplicates of an earlier one."""
    duplicate_bytes: int | None = None
    """The number of UTF-8 bytes of these five kinds together."""
    duplicate_tokens: int | None = None
    """The number of their tokens."""
    bytes: int
    """The number of UTF-8 bytes of the documents."""
    tokens: int
    """The number of tokens of the documents before any is dropped, with special and end-of-text tokens."""
    blocks: int
    tokens_dropped: int
    """The number of tokens that fill no block, see `group_texts`."""
    tokens_truncated: int
    unknown_tokens: int
    """The number of tokens that do not spell all of the text that they stand for."""
    unknown_bytes: int
    """The number of UTF-8 bytes that they do not spell."""

    def doubts(self, split: str) -> Iterator[str]:
        """Yields the reasons to doubt a metric on this split, a line each."""
        if self.records_without_text > DOUBTFUL * self.records:
            yield (
                f"{self.records_without_text:,} of the {self.records:,} {split} records have no text at data.text: "
                "it is null or missing, or an empty list."
            )
        if (self.documents_in_training or 0) > DOUBTFUL * self.documents:
            yield (
                f"{self.documents_in_training:,} of the {self.documents:,} {split} documents occur whole in the "
                "training text, which flatters the metric. Leave them out of one of the two."
            )


class Blocks(TorchDataset[np.ndarray]):
    """The blocks of one split: item i is an int32 array [T], T being at most the block size.

    They are slices of one file of token ids, which each process maps into its memory.

    Args:
        path: the file of raw int32 ids.
        bounds: [blocks, 2] int64: the first token of each block and the one past its last.
    """

    def __init__(self, path: Path, bounds: np.ndarray):
        self.path, self.bounds = path, bounds
        self.tokens = np.asarray(np.memmap(path, np.int32, "r"))  # a plain array: slices of a memmap take twice as long

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the file again; pickling the map would copy the corpus.
        return Blocks, (self.path, self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self.bounds[index]
        return self.tokens[start:end]

    @cached_property
    def continued(self) -> np.ndarray | None:
        """[tokens] bool: whether each continues the word of the token before it; None if they were prepared without."""
        file = self.path.with_suffix(".continued")
        return np.asarray(np.memmap(file, bool, "r")) if file.is_file() else None

    def continues(self, index: int) -> np.ndarray | None:
        """Returns `continued` of the tokens of a block."""
        start, end = self.bounds[index]
        return None if self.continued is None else self.continued[start:end]


@dataclass(frozen=True)
class Prepared:
    """The data that training and evaluation need, tokenized."""

    tokenizer: PreTrainedTokenizerBase
    train: Blocks | None
    """The training blocks; None if only the held-out part was asked for."""
    validation: Documents
    bounds: np.ndarray
    """[blocks, 2] int64: the blocks of the validation documents, as `group_texts` gives them."""
    ledger: dict[str, Ledger]
    """The counts of each split, by its name."""
    data_fingerprint: str
    tokenizer_hash: str

    @property
    def identity(self) -> dict[str, str]:
        """The hashes by which a run's manifest names its data."""
        return {"data_fingerprint": self.data_fingerprint, "tokenizer_hash": self.tokenizer_hash}


def prepare(
    corpus: Corpus,
    choices: Preprocessing,
    make_tokenizer: Callable[[Iterable[str]], PreTrainedTokenizerBase],
    tokenizer_key: Any,
    cache: Path,
    words: bool = False,
) -> Prepared:
    """Takes all the steps, each kept in the cache under a key of everything that went into it.

    If all is there, no record is read.

    Args:
        make_tokenizer: a function that makes a tokenizer from the training texts.
        tokenizer_key: the tokenizer's own settings, as plain values; None if it does not depend on the texts, and
            is not kept.
        cache: the directory for the prepared data of all runs.
        words: True to keep which tokens of the training text continue a word, see `Blocks.continues`.
    """
    parts = once(lambda: split(corpus, choices))
    marks = mark_duplicates(parts, corpus, choices, cache)

    def write_tokenizer(folder: Path) -> None:
        texts = training_texts(parts()["train"], corpus, choices, marks)
        make_tokenizer(chain.from_iterable(texts)).save_pretrained(folder)

    if tokenizer_key is None:
        tokenizer = make_tokenizer([])
    else:
        held_out = [choices.test_size, choices.split_seed, choices.max_records]
        key = fingerprint(
            FORMAT, corpus.fingerprint, corpus.text, held_out, tokenizer_key, *key_of_dropped(marks, choices)
        )
        tokenizer = AutoTokenizer.from_pretrained(write_once(cache / f"tokenizer-{key}", write_tokenizer))
    return prepare_splits(("train", "validation"), parts, corpus, choices, tokenizer, cache, words, marks)


def prepare_validation(
    corpus: Corpus, choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Prepared:
    """Prepares only the held-out part, for a given tokenizer."""

    def parts() -> "Mapping[str, Dataset]":
        alone = corpus.train is None and corpus.validation is not None
        return {"validation": corpus.validation} if alone else split(corpus, choices)

    return prepare_splits(("validation",), parts, corpus, choices, tokenizer, cache)


def prepare_splits(
    names: Sequence[str],
    parts: "Callable[[], Mapping[str, Dataset]]",
    corpus: Corpus,
    choices: Preprocessing,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    words: bool = False,
    marks: Path | None = None,
) -> Prepared:
    """Tokenizes the splits of these names, unless the cache has them, and cuts them into blocks."""
    tokenizer_hash = content_hash(tokenizer)
    # The files do not depend on how documents are cut into blocks.
    decisive = asdict(replace(choices, block_size=2, drop_remainder_every=None))
    for name in ("decontaminate", "similarity", "benchmarks"):  # the marks stand for them
        del decisive[name]
    folders, bounds, ledger = {}, {}, {}
    for name in names:
        # Without a fast tokenizer no token's word is known, and the objective refuses to be made.
        more = ["words"] if words and name == "train" and tokenizer.is_fast else []
        if name == "train":
            more += key_of_dropped(marks, choices)
        key = fingerprint(FORMAT, name, corpus.fingerprint, corpus.text, decisive, tokenizer_hash, *more)

        def write(folder: Path, name: str = name, words: bool = "words" in more) -> None:
            if name == "train":
                texts, order = training_texts(parts()[name], corpus, choices, marks), None
            else:
                records, order = sort_by_file(parts()[name])
                texts = flatten(records, corpus.text)
            write_split(folder, name, texts, tokenizer, choices, order, words)

        folders[name] = write_once(cache / f"tokens-{key}", write)
        bounds[name], ledger[name] = cut_blocks(folders[name], name, choices)
    if "train" in names:
        contained = count_in_training(parts, corpus, choices, cache, marks)
        ledger["validation"] = replace(ledger["validation"], documents_in_training=contained)
        if marks is not None:
            found = count_duplicates(marks, parts, corpus, choices, tokenizer, tokenizer_hash, cache)
            ledger["train"] = replace(ledger["train"], **found)
    return Prepared(
        tokenizer,
        Blocks(folders["train"] / "train.tokens", bounds["train"]) if "train" in names else None,
        read_documents(folders["validation"], "validation"),
        bounds["validation"],
        ledger,
        corpus.fingerprint,
        tokenizer_hash,
    )


def count_in_training(
    parts: "Callable[[], Mapping[str, Dataset]]",
    corpus: Corpus,
    choices: Preprocessing,
    cache: Path,
    marks: Path | None,
) -> int:
    """Counts the held-out documents that occur whole in the training text, unless the cache has their number."""

    def write(folder: Path) -> None:
        training = training_texts(parts()["train"], corpus, choices, marks)
        texts = training, flatten(parts()["validation"], corpus.text)
        (folder / "documents").write_text(str(count_contained(*(join_texts(each, choices.join) for each in texts))))

    decisive = [choices.join, choices.test_size, choices.split_seed, choices.max_records]
    key = fingerprint(FORMAT, corpus.fingerprint, corpus.text, decisive, *key_of_dropped(marks, choices))
    return int((write_once(cache / f"overlap-{key}", write) / "documents").read_text())


def write_split(
    folder: Path,
    name: str,
    records: Iterable[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    choices: Preprocessing,
    order: np.ndarray | None = None,
    words: bool = False,
) -> None:
    """Writes the tokens, lengths and counts of one split as files; of the held-out one also its documents' spans.

    Args:
        order: [records] the number of each record in the split; None if they come in the order of the split.
        words: True to write also which tokens continue a word.

    Raises:
        UserError: there is no text, or no token in any.
    """
    held_out = name == "validation"
    names = ("records", "records_without_text", "documents", "bytes", "tokens", "tokens_truncated")
    counts = dict.fromkeys((*names, "unknown_tokens", "unknown_bytes"), 0)
    documents_of_record: list[int] = []

    def count_records() -> Iterator[list[str]]:
        for texts in records:
            counts["records"] += 1
            counts["records_without_text"] += not texts
            if order is not None:
                documents_of_record.append(len(texts) if choices.join is None else 1)
            yield texts

    with ExitStack() as files:
        kinds = ["tokens", "lengths"] + ["spans"] * held_out + ["continued"] * words
        streams = {kind: files.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in kinds}
        if held_out:
            add_to_index = files.enter_context(open_index(folder / f"{name}.documents.parquet"))
        for document in tokenize(count_records(), tokenizer, choices, held_out, words):
            streams["tokens"].write(document.ids.tobytes())
            streams["lengths"].write(np.int64(len(document.ids)).tobytes())
            if document.continues is not None:
                streams["continued"].write(document.continues.tobytes())
            counts["documents"] += 1
            counts["bytes"] += len(utf8(document.text))
            counts["tokens"] += len(document.ids) + document.lost
            counts["tokens_truncated"] += document.lost
            if document.spans is not None:
                counts["unknown_tokens"] += int((document.spans[:, UNKNOWN] > 0).sum())
                counts["unknown_bytes"] += int(document.spans[:, UNKNOWN].sum())
                if held_out:
                    streams["spans"].write(document.spans.tobytes())
                    add_to_index(document.text, document.lost == 0)
    if counts["records_without_text"] == counts["records"]:
        raise UserError(
            f"none of the {counts['records']:,} {name} records has a text: it is null or missing, or an empty list.\n"
            "Name where the text is by data.text=…"
        )
    if counts["tokens"] == counts["tokens_truncated"]:
        texts = counts["documents"]
        raise UserError(f"the {name} split gives no token: its {texts} texts are empty (check data.text).")
    if order is not None:
        reorder(folder, name, np.argsort(np.repeat(order, documents_of_record), kind="stable"))
    (folder / f"{name}.counts.json").write_text(json.dumps(counts))


def cut_blocks(folder: Path, name: str, choices: Preprocessing) -> tuple[np.ndarray, Ledger]:
    """Returns the bounds [blocks, 2] of a split's blocks, and its ledger."""
    lengths = read_lengths(folder, name)
    bounds = group_texts(lengths, choices.block_size, choices.drop_remainder_every)
    if len(bounds) == 0:
        raise UserError(
            f"the {name} split gives no block: {lengths.sum()} tokens, none fills "
            f"preprocess.block_size={choices.block_size}.\n"
            "Lower the block size, or set preprocess.drop_remainder_every=null to keep short blocks."
        )
    dropped = int(lengths.sum() - np.diff(bounds).sum())
    counts = json.loads((folder / f"{name}.counts.json").read_text())
    return bounds, Ledger(blocks=len(bounds), tokens_dropped=dropped, **counts)
