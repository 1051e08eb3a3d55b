"""The prepared data of a run: the results of all steps (preprocess.py), which are kept in a cache.

The tokens of a split lie in one flat file, those of training as uint16 where the vocabulary allows it, held-out ones as
int32; a document is a length, a block a pair of bounds in it. Blocks are cut when they are asked for, so every block
size shares one file. Held-out documents also keep which text each token stands for (documents.py).
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmlab.data.decontaminate import count_duplicates, key_of_dropped, mark_duplicates, training_texts
from lmlab.data.documents import (
    UNKNOWN,
    Documents,
    join_domains,
    open_index,
    read_documents,
    read_lengths,
    reorder,
    write_stretches,
)
from lmlab.data.options import Preprocessing
from lmlab.data.overlap import count_contained
from lmlab.data.preprocess import (
    Bounds,
    Parts,
    Slices,
    Source,
    group_texts,
    held_out_by,
    join_texts,
    lengths_of,
    split,
    tokenize,
)
from lmlab.data.sampler import draw_subset
from lmlab.data.sources import Corpus, fingerprint
from lmlab.data.texts import flatten, sort_by_file, utf8
from lmlab.data.tokenizers import content_hash, smallest_dtype
from lmlab.data.tokens import FlatFile, FlatFiles
from lmlab.errors import UserError
from lmlab.io import write_once

if TYPE_CHECKING:
    from lmlab.data.mixture import MixedBlocks

FORMAT = 5
"""The version of the prepared data, a part of each cache key; it is raised when the steps change their output."""
LEARNED_BYTES = 2**30
"""The number of bytes of records up to which a tokenizer is learned from all of them; else from about so many."""
LEARNED = (
    "this data is tokenized already, and the tokenizer would have to be learned from text.\n"
    "Name the one that it was tokenized by: tokenizer=pretrained tokenizer.name=ID_OR_DIRECTORY"
)
"""The error of tokenized data with a tokenizer that is learned from text."""
DOUBTFUL = 0.01
"""The share of records without a text, or of held-out documents in the training text, that is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The counts of one split: where every record, document, byte and token of it went."""

    records: int
    records_unused: int = 0
    """The number of records that were drawn to be held out and are not, as `Preprocessing.max_test_bytes` are reached:
    they are neither trained on nor scored."""
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
    bytes: int | None = None
    """The number of UTF-8 bytes of the documents; as the unknown ones None where it can't be told from their tokens."""
    tokens: int
    """The number of tokens of the documents before any is dropped, with special and end-of-text tokens."""
    blocks: int
    tokens_dropped: int
    """The number of tokens that fill no block, see `group_texts`."""
    tokens_truncated: int
    unknown_tokens: int | None = None
    """The number of tokens that do not spell all of the text that they stand for."""
    unknown_bytes: int | None = None
    """The number of UTF-8 bytes that they do not spell."""
    samples_drawn: int | None = None
    """The number of blocks that the run draws from a source of a mixture; None for data that is no mixture."""
    share_of_tokens: float | None = None
    """The source's share of the tokens of all blocks that the run draws."""
    epochs_read: float | None = None
    """How often the run reads the source."""

    def doubts(self, split: str) -> Iterator[str]:
        """Yields the reasons to doubt a metric on this split, a line each."""
        if self.records_unused > DOUBTFUL * self.records:
            yield (
                f"{self.records_unused:,} records are neither trained on nor scored: {self.records:,} of those held "
                "out reach preprocess.max_test_bytes. Lower preprocess.test_size to train on more."
            )
        if self.records_without_text > DOUBTFUL * self.records:
            yield (
                f"{self.records_without_text:,} of the {self.records:,} {split} records have no text at data.text: "
                "it is null or missing, or an empty list."
            )
        if self.bytes is None and split == "validation":
            yield (
                f"the tokens of the {split} documents do not come back when they are decoded and encoded again: how "
                "many bytes they stand for is not known, and there is no metric per byte or per word."
            )
        if (self.documents_in_training or 0) > DOUBTFUL * self.documents:
            yield (
                f"{self.documents_in_training:,} of the {self.documents:,} {split} documents occur whole in the "
                "training text, which flatters the metric. Leave them out of one of the two."
            )


@dataclass(frozen=True, eq=False)
class Blocks(TorchDataset[np.ndarray]):
    """The blocks of one split: item i is an int32 array [T], T being at most the block size."""

    tokens: FlatFiles
    """The ids of all tokens."""
    bounds: Bounds
    """The first token of each block and the one past its last."""
    continued: FlatFiles | None = None
    """Whether each token continues the word of the token before it; None if they were prepared without."""

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens.part(*self.bounds[index]).astype(np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """The lengths that blocks have, each once."""
        return lengths_of(self.bounds)

    @property
    def kept(self) -> int:
        """The number of tokens of all blocks."""
        return self.bounds.tokens if isinstance(self.bounds, Slices) else int(np.diff(self.bounds).sum())

    def continues(self, index: int) -> np.ndarray | None:
        """Returns `continued` of the tokens of a block."""
        return None if self.continued is None else self.continued.part(*self.bounds[index])


@dataclass(frozen=True)
class Prepared:
    """The data that training and evaluation need, tokenized."""

    tokenizer: PreTrainedTokenizerBase
    train: "Blocks | MixedBlocks | None"
    """The training blocks; None if only the held-out part was asked for."""
    validation: Documents
    bounds: Bounds
    """The blocks of the validation documents, as `group_texts` gives them."""
    ledger: dict[str, Ledger]
    """The counts of each split, by its name."""
    data_fingerprint: str
    tokenizer_hash: str

    @property
    def identity(self) -> dict[str, str]:
        """The hashes by which a run's manifest names its data."""
        return {"data_fingerprint": self.data_fingerprint, "tokenizer_hash": self.tokenizer_hash}


class Tokenized(ABC):
    """A source whose text is tokenized already."""

    @abstractmethod
    def prepared(
        self, names: Sequence[str], choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path, words: bool
    ) -> Prepared:
        """Returns the data of the splits of these names, cut into blocks.

        Args:
            cache: the directory for the prepared data of all runs.
            words: True if which tokens of the training text continue a word has to be known.

        Raises:
            UserError: the text was tokenized by other choices, or by another tokenizer.
        """


def prepare(
    corpus: Corpus | Tokenized,
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
    names = ("train", "validation")
    if isinstance(corpus, Tokenized):
        if tokenizer_key is not None:
            raise UserError(LEARNED)
        return corpus.prepared(names, choices, make_tokenizer([]), cache, words)
    sources = {"": Source(corpus, once(lambda: split(corpus, choices)))}
    source = mark_duplicates(sources, choices, cache)[""]
    tokenizer = learn_tokenizer([source], choices, make_tokenizer, tokenizer_key, cache)
    return prepare_splits(names, source, choices, tokenizer, cache, words)


def tokenizer_texts(source: Source, choices: Preprocessing) -> Iterator[str]:
    """Yields the training texts that a tokenizer is learned from: all of them, or of a large corpus a random part."""
    records = source.parts().train
    assert records is not None
    texts = training_texts(source, choices)
    if records.data.nbytes > LEARNED_BYTES:  # of the whole file, the held-out records included
        count = max(1, len(records) * LEARNED_BYTES // records.data.nbytes)
        drawn = draw_subset(0, count, len(records))
        if key_of_dropped(source.marks, choices):
            texts = (each for each, kept in zip(texts, np.isin(np.arange(len(records)), drawn), strict=False) if kept)
        else:
            texts = flatten(records.select(drawn), source.corpus.text)
    yield from chain.from_iterable(texts)


def learn_tokenizer(
    training: Sequence[Source],
    choices: Preprocessing,
    make_tokenizer: Callable[[Iterable[str]], PreTrainedTokenizerBase],
    tokenizer_key: Any,
    cache: Path,
) -> PreTrainedTokenizerBase:
    """Makes a tokenizer from the training texts of some sources, unless the cache has it."""
    if tokenizer_key is None:
        return make_tokenizer([])

    def write(folder: Path) -> None:
        texts = (tokenizer_texts(source, choices) for source in training)
        make_tokenizer(chain.from_iterable(texts)).save_pretrained(folder)

    sources = [value for source in training for value in (source.corpus.fingerprint, source.corpus.text)]
    dropped = [key for source in training for key in key_of_dropped(source.marks, choices)]
    key = fingerprint(FORMAT, *sources, held_out_by(choices), tokenizer_key, *dropped)
    return AutoTokenizer.from_pretrained(write_once(cache / f"tokenizer-{key}", write))


def prepare_validation(
    corpus: Corpus | Tokenized, choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Prepared:
    """Prepares only the held-out part, for a given tokenizer."""
    if isinstance(corpus, Tokenized):
        return corpus.prepared(("validation",), choices, tokenizer, cache, words=False)

    def parts() -> Parts:
        if corpus.train is None and corpus.validation is not None:
            return Parts(None, corpus.validation)
        return split(corpus, choices)

    return prepare_splits(("validation",), Source(corpus, once(parts)), choices, tokenizer, cache)


def prepare_splits(
    names: Sequence[str],
    source: Source,
    choices: Preprocessing,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    words: bool = False,
    training: Sequence[Source] = (),
) -> Prepared:
    """Tokenizes the splits of these names, unless the cache has them, and cuts them into blocks.

    Args:
        training: all sources of training text, if this is one of several.
    """
    tokenizer_hash, decisive = content_hash(tokenizer), decisive_choices(choices)
    corpus, parts, marks = source
    # Without a fast tokenizer no token's word is known, and the objective refuses to be made.
    words = words and tokenizer.is_fast

    def tokens_of(name: str, domain: str = "") -> Path:
        more = [domain] if domain else ["words"] if words and name == "train" else []
        more += key_of_dropped(marks, choices) if name == "train" else []
        own = decisive | ({"max_test_bytes": None} if name == "train" else {})
        key = fingerprint(FORMAT, name, corpus.fingerprint, corpus.text, own, tokenizer_hash, *more)

        def write(folder: Path) -> None:
            if name == "train":
                write_split(folder, name, training_texts(source, choices), tokenizer, choices, words=words)
            else:
                records, order = sort_by_file(parts().validation[domain])
                texts, unused = flatten(records, corpus.text), parts().unused
                write_split(folder, name, texts, tokenizer, choices, order, unused=unused)
            check_counts(name, read_counts(folder, name))

        return write_once(cache / f"tokens-{key}", write)

    train = [tokens_of("train")] if "train" in names else []
    domains = {domain: tokens_of("validation", domain) for domain in corpus.domains}
    contained = {
        domain: count_in_training(training or [source], source, domain, choices, cache) for domain in domains if train
    }
    data = read_prepared(train, domains, choices, tokenizer, corpus.fingerprint, contained)
    if train and marks is not None:
        found = count_duplicates(source, choices, tokenizer, tokenizer_hash, cache)
        data.ledger["train"] = replace(data.ledger["train"], **found)
    return data


def read_prepared(
    train: Sequence[Path],
    domains: Mapping[str, Path],
    choices: Preprocessing,
    tokenizer: PreTrainedTokenizerBase,
    data_fingerprint: str,
    contained: Mapping[str, int],
) -> Prepared:
    """Cuts what `write_split` wrote into blocks.

    Args:
        train: the folders of the training text, whose tokens follow on one another; none for held-out text alone.
        domains: the folder of the held-out text of each domain, by its name.
        contained: the number of documents of each domain that occur in the training text, where it is known.
    """
    ledger, blocks = {}, None
    if train:
        bounds, ledger["train"] = cut_blocks(train, "train", choices)
        blocks = read_blocks(train, "train", bounds)
    for domain, folder in domains.items():
        counts = cut_blocks([folder], "validation", choices)[1]
        counts = replace(counts, documents_in_training=contained.get(domain))
        ledger[f"validation/{domain}".rstrip("/")] = counts
    documents = join_domains({domain: read_documents(folder, "validation") for domain, folder in domains.items()})
    bounds = group_documents(documents, choices)
    return Prepared(tokenizer, blocks, documents, bounds, ledger, data_fingerprint, content_hash(tokenizer))


def decisive_choices(choices: Preprocessing) -> dict[str, Any]:
    """Returns the choices that tokenized text depends on.

    It does not on how documents are cut into blocks, and has the marks of duplicates in its key where they are dropped.
    """
    free = ("block_size", "drop_remainder_every", "decontaminate", "similarity", "benchmarks")
    return {key: value for key, value in asdict(choices).items() if key not in free}


def held_out_beforehand(choices: Preprocessing) -> dict[str, Any]:
    """Returns the choices of what is held out that data which is split already does not look at.

    Their defaults are not the same for all sources, and so need not be those by which the data was prepared.
    """
    return {"split_by": choices.split_by, "max_test_bytes": choices.max_test_bytes}


def count_in_training(
    training: Sequence[Source],
    source: Source,
    domain: str,
    choices: Preprocessing,
    cache: Path,
) -> int:
    """Counts the held-out documents of a domain that occur whole in the training text, unless the cache has it."""

    def write(folder: Path) -> None:
        trained_on = chain.from_iterable(training_texts(one, choices) for one in training)
        texts = trained_on, flatten(source.parts().validation[domain], source.corpus.text)
        (folder / "documents").write_text(str(count_contained(*(join_texts(each, choices.join) for each in texts))))

    more = [choices.max_test_bytes, *([domain] if domain else [])]
    decisive = [choices.join, *held_out_by(choices), *(value for value in more if value is not None)]
    others = [value for one in training if one is not source for value in (one.corpus.fingerprint, one.corpus.text)]
    dropped = [key for one in training for key in key_of_dropped(one.marks, choices)]
    key = fingerprint(FORMAT, source.corpus.fingerprint, source.corpus.text, decisive, *others, *dropped)
    return int((write_once(cache / f"overlap-{key}", write) / "documents").read_text())


def write_split(
    folder: Path,
    name: str,
    records: Iterable[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    choices: Preprocessing,
    order: np.ndarray | None = None,
    words: bool = False,
    unused: int = 0,
) -> None:
    """Writes the tokens, lengths and counts of one split as files; of the held-out one also its documents' spans.

    Args:
        order: [records] the number of each record in the split; None if they come in the order of the split.
        words: True to write also which tokens continue a word.
        unused: the number of records that are left out of all splits.
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

    dtype = "int32" if held_out else smallest_dtype(tokenizer)
    with ExitStack() as files:
        kinds = ["tokens", "lengths"] + ["spans"] * held_out + ["continued"] * words
        streams = {kind: files.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in kinds}
        if held_out:
            add_to_index = files.enter_context(open_index(folder / f"{name}.documents.parquet"))
        for document in tokenize(count_records(), tokenizer, choices, held_out, words):
            streams["tokens"].write(document.ids.astype(dtype).tobytes())
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
    if order is not None:
        reorder(folder, name, np.argsort(np.repeat(order, documents_of_record), kind="stable"))
    if held_out:
        write_stretches(folder, name)
    (folder / f"{name}.counts.json").write_text(json.dumps({**counts, "records_unused": unused, "dtype": dtype}))


def check_counts(name: str, counts: Mapping[str, Any]) -> None:
    """Refuses the counts of a split in which there is no text, or no token in any."""
    if counts["records_without_text"] == counts["records"]:
        raise UserError(
            f"none of the {counts['records']:,} {name} records has a text: it is null or missing, or an empty list.\n"
            "Name where the text is by data.text=…"
        )
    if counts["tokens"] == counts["tokens_truncated"]:
        texts = counts["documents"]
        raise UserError(f"the {name} split gives no token: its {texts} texts are empty (check data.text).")


def group_documents(documents: Documents, choices: Preprocessing) -> Bounds:
    """Returns the bounds of the blocks of held-out documents; no block has text of two domains."""
    if not documents.domains:
        return group_texts(documents.lengths, choices.block_size, choices.drop_remainder_every)
    bounds = []
    for first, stop in documents.domains.values():
        lengths = documents.lengths[first:stop]
        own = group_texts(lengths, choices.block_size, choices.drop_remainder_every)
        bounds.append(documents.edges[first] + np.asarray(own))
    return np.concatenate(bounds)


def cut_blocks(folders: Sequence[Path], name: str, choices: Preprocessing) -> tuple[Bounds, Ledger]:
    """Returns the bounds of a split's blocks, and its ledger.

    Args:
        folders: those of `write_split`, whose tokens follow on one another.
    """
    counts = added_up(read_counts(folder, name) for folder in folders)
    tokens = counts["tokens"] - counts["tokens_truncated"]
    # Where no token is dropped, blocks don't depend on where documents end: the lengths of a large corpus stay unread.
    one = choices.drop_remainder_every is None
    lengths = [np.array([tokens])] if one else [read_lengths(folder, name) for folder in folders]
    bounds = group_texts(np.concatenate(lengths), choices.block_size, choices.drop_remainder_every)
    if len(bounds) == 0:
        raise UserError(
            f"the {name} split gives no block: {tokens} tokens, none fills "
            f"preprocess.block_size={choices.block_size}.\n"
            "Lower the block size, or set preprocess.drop_remainder_every=null to keep short blocks."
        )
    kept = bounds.tokens if isinstance(bounds, Slices) else int(np.diff(bounds).sum())
    return bounds, Ledger(blocks=len(bounds), tokens_dropped=tokens - kept, **counts)


def read_counts(folder: Path, name: str) -> dict[str, Any]:
    """Returns the counts of a split that `write_split` wrote: those of its ledger, and the `dtype` of its tokens."""
    counts: dict[str, Any] = json.loads((folder / f"{name}.counts.json").read_text())
    return counts


def added_up(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the sums of the counts of one split or of its parts, for its ledger."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update({key: value for key, value in part.items() if key != "dtype"})
    return dict(total)


def read_blocks(folders: Sequence[Path], name: str, bounds: Bounds) -> Blocks:
    """Returns the blocks of a split whose tokens `write_split` wrote into folders, in which they follow on."""
    tokens = (FlatFile(folder / f"{name}.tokens", read_counts(folder, name)["dtype"]) for folder in folders)
    words = [FlatFile(folder / f"{name}.continued", "bool") for folder in folders]
    return Blocks(FlatFiles(*tokens), bounds, FlatFiles(*words) if words[0].path.is_file() else None)
