"""Counts, or leaves out, the training documents that duplicates.py marks: `preprocess.decontaminate`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmlab.data.duplicates import KEPT, left_out, mark_documents
from lmlab.data.options import Preprocessing
from lmlab.data.preprocess import Source, held_out_by, join_texts, tokenize
from lmlab.data.sources import fingerprint, load_items
from lmlab.data.texts import flatten, utf8
from lmlab.errors import UserError
from lmlab.io import read_json, write_json, write_once

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

FORMAT = 2
"""The version of the marks, a part of their cache key."""
MARKED = (
    "documents_equal_to_held_out",
    "documents_near_held_out",
    "documents_with_test_items",
    "documents_repeated",
    "documents_nearly_repeated",
)
"""The names that the ledger has for the marks of training documents (duplicates.py), from 1."""


def key_of_dropped(marks: Path | None, choices: Preprocessing) -> list[str]:
    """Returns what the key of a cache has of the documents that are left out; nothing where none is."""
    return key_of_marks(marks) if marks is not None and choices.decontaminate == "drop" else []


def key_of_marks(marks: Path) -> list[str]:
    """Returns what stands for the marks of a source in the key of a cache."""
    return [marks.parent.name, marks.name]


def training_texts(source: Source, choices: Preprocessing) -> Iterator[list[str]]:
    """Yields the texts of each training record, without those that `preprocess.decontaminate=drop` leaves out."""
    texts = flatten(source.parts().train, source.corpus.text)
    if source.marks is not None and choices.decontaminate == "drop":
        return left_out(texts, np.load(source.marks), choices.join)
    return texts


def mark_duplicates(sources: Mapping[str, Source], choices: Preprocessing, cache: Path) -> dict[str, Source]:
    """Returns sources with the marks of their training documents, from the cache if these are there.

    Each training document is compared with the held-out documents of all sources, and with the training documents
    before it, those of earlier sources included. Where nothing is asked for, the sources are as they were.

    Raises:
        UserError: benchmarks are given and nothing is to be done, or a source would have no document left.
    """
    items, of_items = benchmark_items(choices)
    if choices.decontaminate is None:
        return dict(sources)

    def write(folder: Path) -> None:
        training = [documents_of(source, source.parts().train, choices) for source in sources.values()]
        held_out = chain.from_iterable(
            documents_of(source, part, choices)
            for source in sources.values()
            for part in source.parts().validation.values()
        )
        for number, marks in enumerate(mark_documents(training, held_out, items(), choices.similarity, folder)):
            np.save(folder / f"{number}.npy", marks)

    decisive = [choices.join, *held_out_by(choices), choices.max_test_bytes, choices.similarity]
    texts = [value for source in sources.values() for value in (source.corpus.fingerprint, source.corpus.text)]
    folder = write_once(cache / f"duplicates-{fingerprint(FORMAT, *texts, decisive, of_items)}", write)
    marked = {}
    for number, (name, source) in enumerate(sources.items()):
        marked[name] = source._replace(marks=folder / f"{number}.npy")
        refuse_nothing(np.load(folder / f"{number}.npy"), name, choices)
    return marked


def benchmark_items(choices: Preprocessing) -> tuple[Callable[[], Iterator[str]], str]:
    """Returns a function that reads the items of `preprocess.benchmarks`, and a hash of their files."""
    if choices.benchmarks and choices.decontaminate is None:
        raise UserError("preprocess.benchmarks is read only with preprocess.decontaminate=report or drop. Set one.")
    return load_items(choices.benchmarks) if choices.benchmarks else (lambda: iter([]), "")


def refuse_nothing(marks: np.ndarray, name: str, choices: Preprocessing) -> None:
    """Refuses to leave out all documents of a source.

    Args:
        name: that of one of several sources; "" for the only one.
    """
    if choices.decontaminate != "drop" or not len(marks) or not marks.all():
        return
    if name:
        raise UserError(
            f"each training document of data.sources.{name} occurs in held-out text, in an earlier source or in a "
            "benchmark: none is left.\nLeave the source out, or count them by preprocess.decontaminate=report."
        )
    raise UserError(
        "each training document is a duplicate of a held-out one or contains a test item: none is left.\n"
        "Count them by preprocess.decontaminate=report, and check data.validation and preprocess.benchmarks."
    )


def documents_of(source: Source, records: "Dataset | None", choices: Preprocessing) -> Iterator[str]:
    """Yields the documents in records of a source."""
    assert records is not None
    return join_texts(flatten(records, source.corpus.text), choices.join)


def count_duplicates(
    source: Source,
    choices: Preprocessing,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    cache: Path,
) -> dict[str, int]:
    """Returns the counts of the documents that have a mark, as the ledger has them."""
    assert source.marks is not None
    key = fingerprint(FORMAT, *key_of_marks(source.marks), tokenizer_hash, choices.end_of_text, choices.special_tokens)

    def write(folder: Path) -> None:
        write_json(folder / "counts.json", duplicates_in(source, choices, tokenizer))

    counts: dict[str, int] = read_json(write_once(cache / f"duplicates-{key}", write) / "counts.json")
    return counts


def duplicates_in(source: Source, choices: Preprocessing, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Counts the training documents of a source that have a mark, and their bytes and tokens."""
    assert source.marks is not None
    each = np.load(source.marks)
    marked = (
        [text]
        for text, mark in zip(documents_of(source, source.parts().train, choices), each, strict=True)
        if mark != KEPT
    )
    counts = dict(zip(MARKED, np.bincount(each, minlength=len(MARKED) + 1)[1:].tolist(), strict=True))
    counts |= {"duplicate_bytes": 0, "duplicate_tokens": 0}
    for document in tokenize(marked, tokenizer, replace(choices, join=None)):
        counts["duplicate_bytes"] += len(utf8(document.text))
        counts["duplicate_tokens"] += len(document.ids) + document.lost
    return counts
