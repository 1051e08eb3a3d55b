"""Reads minimal pairs: sentences of which one is acceptable, and the others are not.

The formats are those of BLiMP (Warstadt et al. 2020) and Zorro (Huebner et al. 2021), and tables with two columns.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from lmlab.data.compressed import damage_named, suffix_of, text_lines
from lmlab.data.formats import UNREADABLE, builder_for, check_encoding, guess_delimiter
from lmlab.data.json_files import json_records
from lmlab.data.options import BUILDERS
from lmlab.data.sources import Corpus, find_files, fingerprint, load_texts
from lmlab.errors import UserError, first_line, reading

GOOD, BAD = ("sentence_good", "good"), ("sentence_bad", "bad")
"""The columns of the sentences; those of BLiMP come first."""
PHENOMENON = ("phenomenon", "linguistics_term", "UID")
"""The columns that name a pair's phenomenon, the first that is there. BLiMP has the last two: 12 phenomena, and the 67
paradigms that make them up."""


class Pair(NamedTuple):
    """A good sentence, and a bad one or several that differ from it in what a phenomenon is about."""

    good: str
    bad: tuple[str, ...]
    phenomenon: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The good sentence, and then the bad ones."""
        return self.good, *self.bad


def load_pairs(pairs: str | Sequence[str], phenomenon: str | None = None) -> Corpus:
    """Loads the sentences of minimal pairs as a corpus of held-out text, each of them a document; see `read_pairs`."""
    return corpus_of(read_pairs(pairs, phenomenon))


def corpus_of(pairs: Sequence[Pair]) -> Corpus:
    """Returns the sentences of pairs as a corpus of held-out text, each of them a document."""
    return load_texts([sentence for pair in pairs for sentence in pair.sentences])


def pairs_hash(pairs: Sequence[Pair]) -> str:
    """Returns a hash of pairs, their order and their phenomena."""
    return fingerprint("pairs", [[pair.phenomenon, *pair.sentences] for pair in pairs])


def read_pairs(pairs: str | Sequence[str], phenomenon: str | None = None) -> list[Pair]:
    """Reads minimal pairs from files: jsonl, json, csv, tsv, txt, each also compressed, and parquet.

    A record has a good and a bad sentence in columns `GOOD` and `BAD`; several bad ones, if it is JSON, in a list. In a
    plain text file each bad sentence has the good one in the next line, as in Zorro.

    Args:
        pairs: a path or glob, or a list of them.
        phenomenon: the column that names the phenomenon; None for the first of `PHENOMENON` that a record has, and
            else the name of its file.

    Raises:
        UserError: a file is missing, empty or damaged, or lacks a column; or the sentences of a pair are equal.
    """
    files = find_files(pairs, "pairs")
    builder_for(files)
    return [pair for file in files for pair in pairs_of(file, phenomenon)]


def pairs_of(file: Path, phenomenon: str | None) -> list[Pair]:
    """Returns the pairs in a file."""
    with reading(file), damage_named(file):
        found = [make_pair(where, record, phenomenon, file) for where, record in records_in(file)]
    if not found:
        raise UserError(f"{file}: there is no pair in it. Leave the file out.")
    return found


def records_in(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the records in a file, each with the name of its position there."""
    kind = BUILDERS[suffix_of(file)]
    if kind == "parquet":
        try:
            rows = pq.read_table(file).to_pylist()
        except UNREADABLE as error:
            raise UserError(f"{file}: could not be read: {first_line(error)} Leave the file out.") from error
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    check_encoding(file)
    if kind == "json":
        for where, value in json_records(file, file):
            for number, record in enumerate(value if isinstance(value, list) else [value], 1):
                place = f"{file}, record {number}" if isinstance(value, list) else where
                if not isinstance(record, dict):
                    raise UserError(f"{place}: a record is an object with a good and a bad sentence in it.")
                yield place, record
    elif kind == "csv":
        table = csv.DictReader((line for _, line in text_lines(file)), delimiter=guess_delimiter(file, GOOD[1]))
        for row in table:
            yield f"{file}, line {table.line_num}", {name: value for name, value in row.items() if name is not None}
    else:
        lines = [(number, line.strip()) for number, line in text_lines(file) if line.strip()]
        for (number, bad), good in zip_longest(lines[::2], lines[1::2]):
            if good is None:
                raise UserError(
                    f"{file}, line {number}: a sentence without another. In a plain text file each bad sentence has "
                    "the good one in the next line."
                )
            yield f"{file}, line {number}", {"good": good[1], "bad": bad}


def make_pair(where: str, record: Mapping[str, Any], phenomenon: str | None, file: Path) -> Pair:
    """Returns the pair of a record.

    Args:
        where: the name of its position, for messages.
        phenomenon: as of `read_pairs`.
        file: the file that it is in.
    """

    def column(names: Sequence[str]) -> str:
        found = next((name for name in names if name in record), None)
        if found is None:
            wanted, there = " or ".join(names), ", ".join(map(str, record))
            raise UserError(f"{where}: there is no column {wanted}, but {there or 'none'}.")
        return found

    def text(name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'{where}: "{name}" has to be text, and is {value!r}. Fix it, or leave that record out.')
        return value

    good_name, bad_name = column(GOOD), column(BAD)
    good, bad = text(good_name, record[good_name]), record[bad_name]
    several = tuple(text(bad_name, one) for one in (bad if isinstance(bad, list) and bad else [bad]))
    if good in several:
        raise UserError(
            f"{where}: the sentences of the pair are equal ({good!r}), so that none is better.\n"
            "Fix it, or leave that record out."
        )
    if phenomenon is None and not any(name in record for name in PHENOMENON):
        return Pair(good, several, file.name.partition(".")[0])
    name = column(PHENOMENON if phenomenon is None else (phenomenon,))
    return Pair(good, several, text(name, record[name]))
