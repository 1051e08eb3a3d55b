"""Counts, or leaves out, the training documents that duplicates.py marks: `preprocess.decontaminate`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmlab.data.duplicates import left_out, mark_documents
from lmlab.data.options import Preprocessing
from lmlab.data.preprocess import Parts, Source, held_out_by, join_texts, tokenize
from lmlab.data.sources import Corpus, fingerprint, load_items
from lmlab.data.texts import flatten, utf8
from lmlab.errors import UserError
from lmlab.io import read_json, write_json, write_once

FORMAT = 1
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
    return [marks.name] if marks is not None and choices.decontaminate == "drop" else []


def training_texts(source: Source, choices: Preprocessing) -> Iterator[list[str]]:
    """Yields the texts of each training record, without those that `preprocess.decontaminate=drop` leaves out."""
    texts = flatten(source.parts().train, source.corpus.text)
    if source.marks is not None and choices.decontaminate == "drop":
        return left_out(texts, np.load(source.marks / "marks.npy"), choices.join)
    return texts


def mark_duplicates(parts: Callable[[], Parts], corpus: Corpus, choices: Preprocessing, cache: Path) -> Path | None:
    """Returns a folder with the marks of the training documents, from the cache if it is there; None if unasked.

    Raises:
        UserError: benchmarks are given and nothing is to be done, or no document would be left.
    """
    if choices.decontaminate is None:
        if choices.benchmarks:
            raise UserError("preprocess.benchmarks is read only with preprocess.decontaminate=report or drop. Set one.")
        return None
    items, of_items = load_items(choices.benchmarks) if choices.benchmarks else (lambda: iter([]), "")

    def write(folder: Path) -> None:
        held_out_records = chain.from_iterable(flatten(part, corpus.text) for part in parts().validation.values())
        training, held_out = (
            join_texts(texts, choices.join) for texts in (flatten(parts().train, corpus.text), held_out_records)
        )
        marks = mark_documents(training, held_out, items(), choices.similarity, folder)
        np.save(folder / "marks.npy", marks)
        if choices.decontaminate == "drop" and marks.all():
            raise UserError(
                "each training document is a duplicate of a held-out one or contains a test item: none is left.\n"
                "Count them by preprocess.decontaminate=report, and check data.validation and preprocess.benchmarks."
            )

    decisive = [choices.join, *held_out_by(choices), choices.max_test_bytes, choices.similarity]
    return write_once(
        cache / f"duplicates-{fingerprint(FORMAT, corpus.fingerprint, corpus.text, decisive, of_items)}", write
    )


def count_duplicates(
    source: Source,
    choices: Preprocessing,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    cache: Path,
) -> dict[str, int]:
    """Returns the counts of the documents that have a mark, as the ledger has them."""
    marks = source.marks
    assert marks is not None

    def write(folder: Path) -> None:
        each = np.load(marks / "marks.npy")
        documents = join_texts(flatten(source.parts().train, source.corpus.text), choices.join)
        marked = ([text] for text, mark in zip(documents, each, strict=True) if mark)
        counts = dict(zip(MARKED, np.bincount(each, minlength=len(MARKED) + 1)[1:].tolist(), strict=True))
        counts |= {"duplicate_bytes": 0, "duplicate_tokens": 0}
        for document in tokenize(marked, tokenizer, replace(choices, join=None)):
            counts["duplicate_bytes"] += len(utf8(document.text))
            counts["duplicate_tokens"] += len(document.ids) + document.lost
        write_json(folder / "counts.json", counts)

    key = fingerprint(FORMAT, marks.name, tokenizer_hash, choices.end_of_text, choices.special_tokens)
    counts: dict[str, int] = read_json(write_once(cache / f"duplicates-{key}", write) / "counts.json")
    return counts
