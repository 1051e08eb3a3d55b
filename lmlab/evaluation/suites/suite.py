"""The evaluations of all suites: records with a row for each item, and a certificate that adds them up by group.

Shapes: R rows, D documents.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmlab import secrets
from lmlab.data.documents import Documents
from lmlab.evaluation.records import Records, check_added_up, read_files, rows_hash
from lmlab.io import write_beside, write_json
from lmlab.runs.directory import RunDirectory


class SuiteRecords(Records):
    """An evaluation by a suite that was read from its directory."""

    suite: ClassVar[str]
    rows: ClassVar[str]
    """The word for the rows, in the plural: "pairs"."""
    group: ClassVar[str]
    """The column that puts rows into groups: "phenomenon"."""
    groups: ClassVar[str]
    """The part of the certificate with `figures` and `totals` of each group: "phenomena"."""
    measure: ClassVar[str]
    """The name of the mean of the scores: "accuracy"."""
    better: ClassVar[str] = "better"
    """The word for a higher mean: "better"."""
    schema: ClassVar[pa.Schema]
    """The columns of the records; the key `lmlab_NAME` of its metadata says which version of them."""

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The nll [R, 1] float64 and the scored tokens [R, 1] int64 of each row."""
        return self.table["nll"].to_numpy()[:, None], self.table["tokens"].to_numpy()[:, None]

    @property
    def terms(self) -> np.ndarray:
        """[R, 2] float64: the score of each row and 1, whose ratio over rows is what is compared."""
        score = self.table["score"].to_numpy()
        return np.stack([score, np.ones_like(score)], axis=1)

    @property
    def domains(self) -> list[str]:
        """The names of the groups, in their order."""
        return [*self.certificate.get(self.groups, {})]

    def of_domain(self, domain: str) -> Self:
        """Returns the records of one group."""
        table = self.table.filter(self.table[self.group].to_numpy() == domain)
        return replace(self, table=table, certificate=self.certificate | self.certificate[self.groups][domain])


Parts = Callable[[pa.Table, Mapping[str, Any]], dict[str, dict[str, Any]]]
"""A function that returns the parts of a certificate that follow from its records and its other entries."""


def by_group(table: pa.Table, kind: type[SuiteRecords], of: Callable[[pa.Table], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `of` makes of all rows, and under the name of the groups what it makes of those of each."""
    names = table[kind.group].to_numpy()
    named = {str(name): of(table.filter(names == name)) for name in dict.fromkeys(names.tolist()) if name}
    return of(table) | ({kind.groups: named} if named else {})


def write_suite(path: Path, kind: type[SuiteRecords], table: pa.Table, facts: Mapping[str, Any], parts: Parts) -> None:
    """Writes records and their certificate into a directory, each whole or not at all, as `records.write` does."""
    run = RunDirectory(path)
    path.mkdir(parents=True, exist_ok=True)
    write_beside(run.records, lambda beside: pq.write_table(table, beside))
    # Words are units of an nll, which a suite does not divide.
    facts = {"suite": kind.suite, **{name: fact for name, fact in facts.items() if name != "units"}}
    content = {"format": version_of(kind), **parts(table, facts), **secrets.redacted(facts)}
    write_json(run.certificate, content | {"records_hash": rows_hash(table)})


def read_suite(path: Path, kind: type[SuiteRecords], parts: Parts) -> SuiteRecords:
    """Reads the evaluation by a suite in a directory, and adds it up again.

    Raises:
        UserError: there is none, it is of another version, damaged, or does not add up.
    """
    certificate, table = read_files(path, {version_of(kind): kind.schema})
    records = kind(path, certificate, table)
    check_added_up(records, parts(table, certificate), rows_hash(table))
    return records


def version_of(kind: type[SuiteRecords]) -> int:
    """Returns the version of the records of a suite."""
    return int(next(iter(kind.schema.metadata.values())))


def share_text(part: Mapping[str, Any], name: str) -> str:
    """Returns a share in the figures of a certificate or of a group, with its interval."""
    value, low, high = (part["figures"][key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.4f} ({low:.4f} to {high:.4f}, 95 % interval)"


def pseudo_text(within_word: bool) -> str:
    """Returns a text on how the score of a masked model hides tokens."""
    hides = "a token and the rest of its word" if within_word else "a token"
    return f"pseudo-log-likelihood, which hides {hides} at a time"


def text_lengths(documents: Documents) -> np.ndarray:
    """Returns the number of tokens of each document, its end-of-text token left out: [D] int64."""
    ends = np.concatenate([[0], np.cumsum(documents.ends(np.arange(len(documents.tokens))))])
    lengths: np.ndarray = documents.lengths - np.diff(ends[documents.edges])
    return lengths
