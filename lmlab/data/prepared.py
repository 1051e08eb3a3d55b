"""The prepared data of a run: the results of all steps (preprocess.py), which are kept in a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmlab.data.blocks import (
    Blocks,
    Ledger,
    check_counts,
    cut_blocks,
    group_documents,
    read_blocks,
    read_counts,
    write_split,
)
from lmlab.data.decontaminate import count_duplicates, key_of_dropped, mark_duplicates, training_texts
from lmlab.data.documents import Documents, join_domains, read_documents
from lmlab.data.mixture import MixedBlocks, Mixture, join_sources
from lmlab.data.options import Preprocessing
from lmlab.data.overlap import count_contained
from lmlab.data.preprocess import Bounds, Parts, Source, held_out_by, join_texts, split
from lmlab.data.sampler import draw_subset
from lmlab.data.sources import Corpus, fingerprint
from lmlab.data.texts import flatten, sort_by_file
from lmlab.data.tokenizers import content_hash
from lmlab.errors import UserError, naming_source
from lmlab.io import write_once

FORMAT = 5
"""The version of the prepared data, a part of each cache key; it is raised when the steps change their output."""
LEARNED_BYTES = 2**30
"""The number of bytes of records up to which a tokenizer is learned from all of them; else from about so many."""
LEARNED = (
    "this data is tokenized already, and the tokenizer would have to be learned from text.\n"
    "Name the one that it was tokenized by: tokenizer=pretrained tokenizer.name=ID_OR_DIRECTORY"
)
"""The error of tokenized data with a tokenizer that is learned from text."""
COMPARED = (
    "preprocess.decontaminate compares texts, and this data is tokenized already.\n"
    "Leave it out. For texts that are still to be tokenized, python -m lmlab.prepare takes it."
)
"""The error of tokenized data whose documents are to be compared."""


@dataclass(frozen=True)
class Prepared:
    """The data that training and evaluation need, tokenized."""

    tokenizer: PreTrainedTokenizerBase
    train: Blocks | MixedBlocks | None
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
    data: Corpus | Tokenized | Mixture,
    choices: Preprocessing,
    make_tokenizer: Callable[[Iterable[str]], PreTrainedTokenizerBase],
    tokenizer_key: Any,
    cache: Path,
    words: bool = False,
) -> Prepared:
    """Takes all the steps, each kept in the cache under a key of everything that went into it.

    If all is there, no record is read. Each source of a mixture is prepared on its own, with one tokenizer. A held-out
    document is counted as one in the training text if it is in that of any source.

    Args:
        make_tokenizer: a function that makes a tokenizer from the training texts.
        tokenizer_key: the tokenizer's own settings, as plain values; None if it does not depend on the texts, and
            is not kept.
        cache: the directory for the prepared data of all runs.
        words: True to keep which tokens of the training text continue a word, see `Blocks.continues`.
    """
    corpora = data.corpora if isinstance(data, Mixture) else {"": data}
    sources = {
        name: Source(corpus, once(partial(split_source, name, corpus, choices)))
        for name, corpus in corpora.items()
        if isinstance(corpus, Corpus)
    }
    if len(sources) < len(corpora) and tokenizer_key is not None:
        raise UserError(LEARNED)
    if len(sources) < len(corpora) and choices.decontaminate:
        raise UserError(COMPARED)
    sources = mark_duplicates(sources, choices, cache)
    training = [*sources.values()]
    tokenizer = learn_tokenizer(training, choices, make_tokenizer, tokenizer_key, cache)
    names, prepared = ("train", "validation"), {}
    for name, corpus in corpora.items():
        with naming_source(name):
            if isinstance(corpus, Tokenized):
                prepared[name] = corpus.prepared(names, choices, tokenizer, cache, words)
            else:
                prepared[name] = prepare_splits(names, sources[name], choices, tokenizer, cache, words, training)
    return join_sources(data, prepared, choices) if isinstance(data, Mixture) else prepared[""]


def split_source(name: str, corpus: Corpus, choices: Preprocessing) -> Parts:
    """Returns the records of a source, split; an error in its keys names it."""
    with naming_source(name):
        parts = split(corpus, choices)
        next(flatten(parts.train, corpus.text))  # a wrong data.text is refused here
        return parts


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
    data: Corpus | Tokenized | Mixture, choices: Preprocessing, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Prepared:
    """Prepares only the held-out part, for a given tokenizer."""
    if isinstance(data, Mixture):
        prepared = {}
        for name, corpus in data.corpora.items():
            with naming_source(name):
                prepared[name] = prepare_validation(corpus, choices, tokenizer, cache)
        return join_sources(data, prepared, choices)
    if isinstance(data, Tokenized):
        return data.prepared(("validation",), choices, tokenizer, cache, words=False)

    def parts() -> Parts:
        if data.train is None and data.validation is not None:
            return Parts(None, data.validation)
        return split(data, choices)

    return prepare_splits(("validation",), Source(data, once(parts)), choices, tokenizer, cache)


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
            check_counts(f"{name}.{domain}".rstrip("."), read_counts(folder, name))

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
        bounds, piece_edges, ledger["train"] = cut_blocks(train, "train", choices)
        blocks = read_blocks(train, "train", bounds, piece_edges, choices)
    for domain, folder in domains.items():
        counts = cut_blocks([folder], "validation", choices)[-1]
        counts = replace(counts, documents_in_training=contained.get(domain))
        ledger[f"validation/{domain}".rstrip("/")] = counts
    documents = join_domains({domain: read_documents(folder, "validation") for domain, folder in domains.items()})
    bounds = group_documents(documents, choices)
    return Prepared(tokenizer, blocks, documents, bounds, ledger, data_fingerprint, content_hash(tokenizer))


def decisive_choices(choices: Preprocessing) -> dict[str, Any]:
    """Returns the choices that tokenized text depends on.

    It does not on how documents are cut into blocks, and has the marks of duplicates in its key where they are dropped.
    """
    cuts = ("block_size", "packing", "drop_remainder_every", "document_attention")
    free = (*cuts, "decontaminate", "similarity", "benchmarks")
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
