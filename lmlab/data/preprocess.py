"""The guide's steps: split, flatten, tokenize, group_texts (guide, "Preprocess").

By default they lose nothing: no truncation, an end-of-text token after each document,
blocks that run on across documents, and a short last block. The ledger proves it.

The tokens of a split lie in one flat int32 file; a document is a length, a block a pair
of bounds in it. Blocks are cut when they are asked for, so every block size shares one
file. Held-out documents also keep which text each token stands for (documents.py).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmlab.data.documents import (
    BYTES,
    END,
    FLAGS,
    LINES,
    UNKNOWN,
    Documents,
    Names,
    put_in_order,
    read_documents,
    spans,
)
from lmlab.data.options import Preprocessing
from lmlab.data.overlap import documents_in
from lmlab.data.sources import Corpus, fingerprint
from lmlab.data.texts import encoded, flatten, in_file_order
from lmlab.data.tokenizers import content_hash, encode
from lmlab.errors import UserError
from lmlab.io import locked, replaced

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

FORMAT = 4  # Goes into every cache key: raised when the steps below change their output.
# What the tokenizer gets at once: enough for its threads to share (they are all the workers that
# tokenizing needs), and no more of either, so that memory stays flat in the corpus.
DOCUMENTS_PER_CALL = 1000
CHARACTERS_PER_CALL = 2**20
DOUBTFUL = 0.01  # share of the records without a text, or of the held-out documents in the training text


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where every record, document, byte and token of one split went."""

    records: int
    records_without_text: int
    """Records whose text is null or missing, or whose list of texts is empty; an empty text is one."""
    documents: int
    documents_in_training: int | None = None
    """Held-out documents of 32 bytes or more that are a part of a training document, or equal to one (overlap.py).
    None for the training split itself, and where the training text is not read."""
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """All tokens of the documents, special and end-of-text ones included, before any is lost."""
    blocks: int
    tokens_dropped: int
    tokens_truncated: int
    unknown_tokens: int
    """Tokens that do not spell all of the text that they stand for."""
    unknown_bytes: int
    """UTF-8 bytes that they do not spell."""

    def doubts(self, split: str) -> Iterator[str]:
        """What its reader should know before a metric is trusted, a line each."""
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


class Blocks(TorchDataset):
    """The blocks of one split: slices of one flat buffer of token ids.

    Item i is an int32 array [T], T at most the block size.
    """

    def __init__(self, path: Path, bounds: np.ndarray):
        """`path` of the raw int32 ids, `bounds` [blocks, 2] int64: first and past-the-last token."""
        self.path, self.bounds = path, bounds
        self.tokens = np.asarray(np.memmap(path, np.int32, "r"))  # a plain array: slices of a memmap take twice as long

    def __reduce__(self) -> tuple:
        # A worker maps the file again; pickling the map would copy the corpus.
        return Blocks, (self.path, self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self.bounds[index]
        return self.tokens[start:end]


@dataclass(frozen=True)
class Prepared:
    """All that training and evaluation need of the data."""

    tokenizer: PreTrainedTokenizerBase
    train: Blocks | None
    """None where only the held-out part was asked for."""
    validation: Documents
    bounds: np.ndarray
    """[blocks, 2] int64: the blocks of the validation documents, as `group_texts` gives them."""
    ledger: dict[str, Ledger]
    data_fingerprint: str
    tokenizer_hash: str

    @property
    def identity(self) -> dict[str, str]:
        """What a run's manifest says of its data."""
        return {"data_fingerprint": self.data_fingerprint, "tokenizer_hash": self.tokenizer_hash}


def split(corpus: Corpus, choices: Preprocessing) -> "dict[str, Dataset]":
    """Hold out validation records, unless the source brought some (guide, `train_test_split`)."""
    train = corpus.train
    if train is None:
        raise UserError("data.train has to be given: add data.train=… to the command.")
    if choices.max_records is not None:
        train = train.select(range(min(choices.max_records, len(train))))
    if len(train) == 0:
        raise UserError("the data set is empty: no record to train on (check data.train and data.filter).")
    if corpus.validation is not None:
        parts = {"train": train, "validation": corpus.validation}
    elif round(len(train) * choices.test_size) >= 1 and len(train) >= 2:
        # As `train_test_split` counts, but never all of them.
        held_out = min(math.ceil(len(train) * choices.test_size), len(train) - 1)
        halves = train.train_test_split(test_size=held_out, seed=choices.split_seed)
        parts = {"train": halves["train"], "validation": halves["test"]}
    else:
        parts = {"train": train, "validation": train.select([])}
    if len(parts["validation"]) == 0 and len(train) == 1:
        raise UserError(
            "the validation split is empty: there is one record only, which can't be split.\n"
            "Cut a text file into documents by data.document=paragraph (or line), or name data.validation."
        )
    if len(parts["validation"]) == 0:
        raise UserError(
            f"the validation split is empty: {len(train)} records at preprocess.test_size={choices.test_size}.\n"
            "Raise preprocess.test_size, name data.validation, "
            "or cut the text into more records (data.document=line or paragraph)."
        )
    return parts


def documents_of(records: Iterable[list[str]], join: str | None) -> Iterator[str]:
    """The documents of records: their texts, or one of each record's texts joined."""
    return (text for texts in records for text in (texts if join is None else [join.join(texts)]))


class Tokens(NamedTuple):
    """One document, tokenized."""

    text: str
    ids: np.ndarray
    """[T] int32."""
    spans: np.ndarray | None
    """[T, 5] int32, see documents.py; None where they were not asked for."""
    lost: int
    """Tokens that truncation cost."""
    unknown: tuple[int, int]
    """Tokens that do not spell all of their text, and the bytes that they leave unspelled."""


def tokenize(
    records: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, choices: Preprocessing, held_out: bool = False
) -> Iterator[Tokens]:
    """Join the texts of a record, and turn each document into ids (guide, `preprocess_function`).

    Args:
        held_out: also say which text each token stands for.
    """
    end = [end_of_text_id(tokenizer)] if choices.end_of_text else []
    ends = {token for token in (*end, tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None}
    unknown = unknown_ids(tokenizer)
    left = tokenizer.truncation_side == "left"
    for batch in batches(documents_of(records, choices.join)):
        for text, (ids, encoding) in zip(
            batch, encode(batch, tokenizer, choices.special_tokens, located=held_out), strict=True
        ):
            full = len(ids)
            if choices.truncation and full > tokenizer.model_max_length:
                ((ids, encoding),) = encode([text], tokenizer, choices.special_tokens, held_out, truncation=True)
            lost = full - len(ids)
            nothing = not ids and bool(text.strip())  # the tokenizer has no token for any of it
            whole = np.array(ids + (end if ids or nothing else []), np.int32)
            found, without = None, (0, 0)
            if held_out or nothing or not unknown.keys().isdisjoint(ids):
                if not held_out:  # what an unknown token stands for was not asked for
                    ((ids, encoding),) = encode([text], tokenizer, choices.special_tokens, True, truncation=lost > 0)
                # Only a fast tokenizer knows where in the text its tokens lie.
                offsets, words = (encoding.offsets, encoding.word_ids) if encoding is not None else (None, None)
                found = spans(text, offsets, words, len(ids), lost, left)
                for i in np.flatnonzero(np.isin(ids, [*unknown])):
                    start, stop = (0, 0) if offsets is None else offsets[i]
                    # A text may spell the token out.
                    if offsets is None or (start < stop and text[start:stop] != unknown[ids[i]]):
                        found[i, UNKNOWN] = found[i, BYTES]
                found = np.concatenate([found, np.zeros((len(whole) - len(ids), 5), np.int32)])
                if nothing and len(whole):
                    found[-1] = spans(text, None, None, 1)
                    found[-1, UNKNOWN] = found[-1, BYTES]
                if len(whole) and whole[-1] in ends and (nothing or found[-1, BYTES] == 0):
                    found[-1, FLAGS] |= END
                    found[-1, LINES] += not text.endswith("\n")  # it stands for the end of the last line
                without = int((found[:, UNKNOWN] > 0).sum()), int(found[:, UNKNOWN].sum())
            yield Tokens(text, whole, found if held_out else None, lost, without)


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """As many documents as the tokenizer gets at once."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) >= DOCUMENTS_PER_CALL or characters >= CHARACTERS_PER_CALL:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def unknown_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens for text that a tokenizer can't spell, by their ids.

    A fast tokenizer's model may have one that its wrapper in transformers does not name.
    """
    found = {tokenizer.unk_token_id}
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        found |= {model.get("unk_id"), tokenizer.backend_tokenizer.token_to_id(model.get("unk_token") or "")}
    return {token: tokenizer.convert_ids_to_tokens(token) for token in found if token is not None}


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise UserError(
        "the tokenizer has no end-of-text token to put between documents.\n"
        "Set preprocess.end_of_text=false to run documents together."
    )


def group_texts(lengths: np.ndarray, block_size: int, drop_remainder_every: int | None = None) -> np.ndarray:
    """Cut the documents, laid end to end, into blocks (guide, `group_texts`).

    Args:
        lengths: [documents] tokens of each.
        block_size: tokens of a block.
        drop_remainder_every: documents per group; what does not fill a block at the end
            of a group is dropped. None makes one group of all and keeps a short last block.

    Returns:
        [blocks, 2] int64: the first token of each block and the one past its last.
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    total = ends[-1]
    if drop_remainder_every is None:
        starts = np.arange(0, total, block_size, dtype=np.int64)
        return np.stack([starts, np.minimum(starts + block_size, total)], axis=1)
    edges = [*ends[:-1:drop_remainder_every], total]
    starts = np.concatenate(
        [ends[:0], *(np.arange(a, b - block_size + 1, block_size, dtype=np.int64) for a, b in pairwise(edges))]
    )
    return np.stack([starts, starts + block_size], axis=1)


def prepare(
    corpus: Corpus,
    choices: Preprocessing,
    make_tokenizer: Callable[[Iterable[str]], PreTrainedTokenizerBase],
    tokenizer_key: Any,
    cache: Path,
) -> Prepared:
    """All the steps, each kept in the cache under a key of all that went into it.

    A start that finds all it needs there reads no record.

    Args:
        make_tokenizer: from the training texts to a tokenizer.
        tokenizer_key: the tokenizer's own settings, as plain values; None when it does
            not depend on the texts and needs no keeping.
        cache: a directory for every run's prepared data.
    """
    parts = once(lambda: split(corpus, choices))
    if tokenizer_key is None:
        tokenizer = make_tokenizer([])
    else:
        held_out = [choices.test_size, choices.split_seed, choices.max_records]
        key = fingerprint(FORMAT, corpus.fingerprint, corpus.text, held_out, tokenizer_key)

        def write(place: Path) -> None:
            texts = (text for texts in flatten(parts()["train"], corpus.text) for text in texts)
            make_tokenizer(texts).save_pretrained(place)

        tokenizer = AutoTokenizer.from_pretrained(kept(cache / f"tokenizer-{key}", write))
    return prepare_splits(("train", "validation"), parts, corpus, choices, tokenizer, cache)


def prepare_validation(
    corpus: Corpus, choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Prepared:
    """Only the held-out part, for a tokenizer that is there already."""

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
) -> Prepared:
    """Tokenize the splits, unless the cache has them, and cut them into blocks."""
    hashed = content_hash(tokenizer)
    # How documents are cut into blocks changes nothing in the files.
    decided = asdict(replace(choices, block_size=2, drop_remainder_every=None))
    folders, bounds, ledger = {}, {}, {}
    for name in names:
        key = fingerprint(FORMAT, name, corpus.fingerprint, corpus.text, decided, hashed)

        def write(place: Path, name: str = name) -> None:
            records, order = in_file_order(parts()[name]) if name == "validation" else (parts()[name], None)
            write_split(place, name, flatten(records, corpus.text), tokenizer, choices, order)

        folders[name] = kept(cache / f"tokens-{key}", write)
        bounds[name], ledger[name] = cut(folders[name], name, choices)
    if "train" in names:
        contained = count_in_training(parts, corpus, choices, cache)
        ledger["validation"] = replace(ledger["validation"], documents_in_training=contained)
    return Prepared(
        tokenizer,
        Blocks(folders["train"] / "train.tokens", bounds["train"]) if "train" in names else None,
        read_documents(folders["validation"], "validation", read_lengths(folders["validation"], "validation")),
        bounds["validation"],
        ledger,
        corpus.fingerprint,
        hashed,
    )


def count_in_training(
    parts: "Callable[[], Mapping[str, Dataset]]", corpus: Corpus, choices: Preprocessing, cache: Path
) -> int:
    """How many held-out documents occur whole in the training text: from the cache, if it is there."""
    made_by = [choices.join, choices.test_size, choices.split_seed, choices.max_records]
    key = fingerprint(FORMAT, corpus.fingerprint, corpus.text, made_by)

    def write(place: Path) -> None:
        training, held_out = (
            documents_of(flatten(parts()[name], corpus.text), choices.join) for name in ("train", "validation")
        )
        (place / "documents").write_text(str(documents_in(training, held_out)))

    return int((kept(cache / f"overlap-{key}", write) / "documents").read_text())


def kept(place: Path, write: Callable[[Path], Any]) -> Path:
    """`place`, written by `write` if it is not there yet: whole or not at all.

    Of several processes one writes and the others wait, here and not inside a collective.
    """
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir={place.parent} can't be made: {error.strerror}. Name another.") from error
    with locked(place.with_name(f"{place.name}.lock")):
        if not place.exists():
            replaced(place, write)
    return place


def write_split(
    place: Path,
    name: str,
    records: Iterable[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    choices: Preprocessing,
    order: np.ndarray | None = None,
) -> None:
    """Write tokens, lengths and counts of one split as files in `place`; of the held-out one its text's spans too.

    Args:
        order: [records] which of the split's records each is; None where they come in its order.
    """
    held_out = name == "validation"
    without_text = documents = kept_tokens = size = truncated = unknown_tokens = unknown_bytes = 0
    counts_of_texts: list[int] = []

    def counted() -> Iterator[list[str]]:
        nonlocal without_text
        for texts in records:
            without_text += not texts
            counts_of_texts.append(len(texts) if choices.join is None else 1)
            yield texts

    with ExitStack() as files:
        tokens = files.enter_context((place / f"{name}.tokens").open("wb"))
        lengths = files.enter_context((place / f"{name}.lengths").open("wb"))
        if held_out:
            found = files.enter_context((place / f"{name}.spans").open("wb"))
            names = files.enter_context(Names(place / f"{name}.documents.parquet"))
        for document in tokenize(counted(), tokenizer, choices, held_out):
            tokens.write(document.ids.tobytes())
            lengths.write(np.int64(len(document.ids)).tobytes())
            documents += 1
            kept_tokens += len(document.ids)
            size += len(encoded(document.text))
            truncated += document.lost
            unknown_tokens += document.unknown[0]
            unknown_bytes += document.unknown[1]
            if document.spans is not None:
                found.write(document.spans.tobytes())
                names.add(document.text, whole=document.lost == 0)
    total = len(counts_of_texts)
    if without_text == total:
        raise UserError(
            f"none of the {total:,} {name} records has a text: it is null or missing, or an empty list.\n"
            "Name where the text is by data.text=…"
        )
    if kept_tokens == 0:
        raise UserError(f"the {name} split gives no token: its {documents} texts are empty (check data.text).")
    counts = {
        "records": total,
        "records_without_text": without_text,
        "documents": documents,
        "bytes": size,
        "tokens": kept_tokens + truncated,
        "tokens_truncated": truncated,
        "unknown_tokens": unknown_tokens,
        "unknown_bytes": unknown_bytes,
    }
    if held_out and order is not None:
        rearrange(place, name, np.argsort(np.repeat(order, counts_of_texts), kind="stable"))
    (place / f"{name}.counts.json").write_text(json.dumps(counts))


def rearrange(place: Path, name: str, wanted: np.ndarray) -> None:
    """Write the documents of the held-out split anew, document wanted[i] as the i-th."""
    put_in_order(place / f"{name}.documents.parquet", wanted)
    lengths = read_lengths(place, name)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    for kind, width in (("tokens", 1), ("spans", 5)):
        written, new = place / f"{name}.{kind}", place / f"{name}.{kind}.ordered"
        rows = np.memmap(written, np.int32, "r").reshape(-1, width)
        with new.open("wb") as stream:
            for document in wanted:
                stream.write(rows[edges[document] : edges[document + 1]].tobytes())
        new.replace(written)
    lengths[wanted].tofile(place / f"{name}.lengths")


def read_lengths(folder: Path, name: str) -> np.ndarray:
    """[documents] int64 tokens of each."""
    return np.fromfile(folder / f"{name}.lengths", np.int64)


def cut(folder: Path, name: str, choices: Preprocessing) -> tuple[np.ndarray, Ledger]:
    """The bounds of a split's blocks, and its ledger."""
    lengths = read_lengths(folder, name)
    bounds = group_texts(lengths, choices.block_size, choices.drop_remainder_every)
    if len(bounds) == 0:
        raise UserError(
            f"the {name} split gives no block: {lengths.sum()} tokens, none fills "
            f"preprocess.block_size={choices.block_size}.\n"
            "Lower the block size, or set preprocess.drop_remainder_every=null to keep short blocks."
        )
    dropped = int(lengths.sum() - (bounds[:, 1] - bounds[:, 0]).sum())
    counts = json.loads((folder / f"{name}.counts.json").read_text())
    return bounds, Ledger(blocks=len(bounds), tokens_dropped=dropped, **counts)
