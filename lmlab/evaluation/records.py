"""Writes and reads the records of an evaluation, a row per document, and the certificate that adds them up.

`records.parquet` has one row per document, or per stretch of one if documents are few (data/documents.py);
`certificate.json` has their totals, the metrics made of them, and all that a metric depends on. The totals are the
rows' exactly rounded sums, so they can be recomputed to the last bit.

Shapes: S rows, each a stretch.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmlab import secrets
from lmlab.data.documents import COUNTS, Documents
from lmlab.errors import UserError, first_line
from lmlab.evaluation.metrics import BOUND, NATS_PER_UNKNOWN_BYTE, WORDS, compute_metrics, sum_totals
from lmlab.io import write_beside, write_json
from lmlab.runs.directory import RunDirectory

FORMAT = 3
COLUMNS = {
    "document": (pa.string(), 1),  # a name made from its text
    "stretch": (pa.int64(), 2),  # which part of the document, from 0
    "start": (pa.string(), 1),  # the beginning of its text
    "domain": (pa.string(), 3),  # the part of the held-out text that it belongs to, if that has named parts
    "nll": (pa.float64(), 1),  # Σ over the scored tokens, in nats
    "nll_squared": (pa.float64(), 1),  # Σ of squares, for standard errors; of a bound, the variance of its nll
    "tokens": (pa.int64(), 1),  # scored ones
    "bytes": (pa.int64(), 1),  # UTF-8 bytes of these tokens' text
    "words": (pa.int64(), 1),  # words that begin in it
    "ends": (pa.int64(), 2),  # ends of documents among them
    "lines": (pa.int64(), 2),  # ends of lines in it
    "unknown_tokens": (pa.int64(), 2),  # of the tokens, those that do not spell their text
    "unknown_bytes": (pa.int64(), 2),  # UTF-8 bytes of that text
}
"""The type of each column, and the first format that has it. In format 1 a row was a whole document."""
SCHEMAS = {
    version: pa.schema(
        [pa.field(name, kind, False) for name, (kind, since) in COLUMNS.items() if since <= version],
        {"lmlab_records": str(version)},
    )
    for version in range(1, FORMAT + 1)
}
AGAIN = "Evaluate again: python -m lmlab.evaluate model=…"
"""The last words on an evaluation that can't be read."""
ROWS_AT_ONCE = 10_000
"""The number of rows that are hashed at once."""
AT_MOST = "≤ "
"""The sign before a metric that is an upper bound."""
ROUNDING = {"32": {"total": 1e-6, "document": 1e-5}, "16": {"total": 1e-3, "document": 3e-2}}
"""The relative changes of nll that rounding explains at another batch size or number of devices, by the precision."""
PARTS: dict[str, Any] = {
    **dict.fromkeys(("figures", "totals", "policy"), dict),
    **dict.fromkeys(
        ("figure", "data_hash", "tokenizer_hash", "weights_hash", "records_hash", "precision", "model"), str
    ),
    "run": dict | None,
}
"""The keys that each certificate has to have, with their types."""


@dataclass(frozen=True)
class Records:
    """An evaluation that was read from its directory."""

    path: Path
    certificate: dict[str, Any]
    table: pa.Table
    """The records, with the columns `COLUMNS`."""

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The result of `DocumentSums`: nll [S, 2] float64 and counts [S, 7] int64."""
        nll, counts = (
            np.stack([self.table[name].to_numpy() for name in names], axis=1)
            for names in (("nll", "nll_squared"), COUNTS)
        )
        return nll, counts

    @property
    def terms(self) -> np.ndarray:
        """[S, 2] float64: of each row the terms of the ratio by which evaluations are compared, bits per byte.

        They are the bits of its text, unknown tokens charged, and its bytes."""
        nll, counts = self.sums
        nats = nll[:, 0] + NATS_PER_UNKNOWN_BYTE * counts[:, COUNTS.index("unknown_bytes")]
        return np.stack([nats / math.log(2), counts[:, COUNTS.index("bytes")].astype(np.float64)], axis=1)

    @property
    def domains(self) -> list[str]:
        """The names of the domains of the text, in their order; none of a text without domains."""
        return [*self.certificate.get("domains", {})]

    def of_domain(self, domain: str) -> "Records":
        """Returns the records of one domain."""
        certificate = self.certificate | self.certificate["domains"][domain]
        return replace(
            self, table=self.table.filter(self.table["domain"].to_numpy() == domain), certificate=certificate
        )

    def by_document(self) -> "Records":
        """Returns these records with the stretches of each document summed into one row."""
        firsts = np.flatnonzero(self.table["stretch"].to_numpy() == 0)
        columns = {
            name: self.table[name].take(firsts)
            if name in ("document", "stretch", "start", "domain")
            else np.add.reduceat(self.table[name].to_numpy(), firsts)
            for name in self.table.column_names
        }
        return replace(self, table=pa.table(columns))


def write(path: Path, documents: Documents, nll: np.ndarray, counts: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Writes the records and their certificate into a directory, each whole or not at all.

    Args:
        nll: [S, 2] float64 of `DocumentSums`.
        counts: [S, 7] int64 of `DocumentSums`.
        facts: the other entries of the certificate: all that the metrics depend on. `figure`, `policy` and `units`
            decide their names and errors (see `metrics_and_totals`).
    """
    of_rows = [documents.names, documents.parts, documents.starts, documents.domain_names]
    table = pa.table([*of_rows, *nll.T, *counts.T], SCHEMAS[FORMAT])
    run = RunDirectory(path)
    write_beside(run.records, lambda beside: pq.write_table(table, beside))
    write_json(
        run.certificate,
        {
            "format": FORMAT,
            **metrics_and_totals(nll, counts, table, facts),
            **secrets.redacted(facts),
            "words": WORDS[facts["units"]],
            "records_hash": rows_hash(table),
        },
    )


def metrics_and_totals(
    nll: np.ndarray, counts: np.ndarray, rows: pa.Table, facts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns the parts of a certificate that follow from its records.

    They are `figures` (the metrics) and `totals`, and where the text has domains also `domains`: both of each domain.

    Args:
        rows: the records, of which the columns `stretch` and `domain` are read.
        facts: the other entries of the certificate.
    """
    stretches, domains = rows["stretch"].to_numpy(), rows["domain"]
    sample = (facts["policy"].get("pseudo") or {}).get("sample")

    def of(some: Any) -> dict[str, dict[str, Any]]:
        totals = sum_totals(nll[some], counts[some], stretches[some])
        units = facts.get("units", "text")
        return {"figures": compute_metrics(totals, facts["figure"], sample, units), "totals": totals}

    named = {name: of(pc.equal(domains, name).to_numpy()) for name in domains.unique().to_pylist() if name}
    return of(slice(None)) | ({"domains": named} if named else {})


def read(path: Path) -> Records:
    """Reads the evaluation in a directory, and adds it up again.

    Raises:
        UserError: there is none, it is of another version, damaged, or does not add up.
    """
    certificate, table = read_files(path, SCHEMAS)
    version, hashed = certificate["format"], rows_hash(table)
    for name, (_, since) in COLUMNS.items():
        if since > version:
            nothing = [""] * len(table) if name == "domain" else np.zeros(len(table), np.int64)
            table = table.append_column(name, pa.array(nothing))
    records = Records(path, certificate, table)
    found = metrics_and_totals(*records.sums, table, certificate)
    since_then = {name for name, (_, since) in COLUMNS.items() if since > version}
    check_added_up(records, found, hashed, since_then)
    return records


def read_files(path: Path, schemas: Mapping[Any, pa.Schema]) -> tuple[dict[str, Any], pa.Table]:
    """Reads the certificate and the records in a directory.

    Args:
        schemas: the columns that records of each version have.

    Raises:
        UserError: there are none, they are of another version, or damaged.
    """
    run = RunDirectory(path)
    for file in (run.certificate, run.records):
        if not file.is_file():
            raise UserError(f"{path} holds no evaluation: it has no {file.name}.\n{AGAIN}")
    try:
        certificate = json.loads(run.certificate.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{run.certificate} can't be read: {first_line(error)}.\n{AGAIN}") from error
    version = certificate.get("format") if isinstance(certificate, dict) else None
    schema = schemas.get(version)
    if schema is None:
        raise UserError(
            f"{path} holds records of version {version}, and this lmlab reads versions up to {max(schemas)}.\n"
            "Evaluate again, or use the lmlab that wrote them."
        )
    try:
        table = pq.read_table(run.records)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{run.records} is damaged or cut short: {first_line(error)}\n{AGAIN}") from error
    if not table.schema.equals(schema, check_metadata=True):
        raise UserError(f"{run.records} has other columns than records of version {version}.\n{AGAIN}")
    for part, kind in PARTS.items():
        if not isinstance(certificate.get(part), kind):
            raise UserError(f"{run.certificate} lacks a part, or has another in its place: {part}.\n{AGAIN}")
    return certificate, table


def check_added_up(
    records: Records, found: Mapping[str, Mapping[str, Any]], hashed: str, left_out: Collection[str] = ()
) -> None:
    """Refuses records that do not add up to their certificate.

    Args:
        found: the parts of a certificate that follow from the records.
        hashed: the hash of the records.
        left_out: the names in these parts that the version of the records does not have.
    """
    certificate = records.certificate
    changed = [
        f"{name}={value}, and the certificate says {certificate.get(part, {}).get(name)}"
        for part, values in found.items()
        for name, value in values.items()
        if repr(value) != repr(certificate.get(part, {}).get(name))  # nan is not equal to itself
        and name not in left_out
    ]
    if not changed and hashed != certificate["records_hash"]:
        changed = [f"the same totals in other rows, {hashed}"]
    if changed:
        raise UserError(f"{records.path}: the records add up to {changed[0]}.\nOne of them was changed. {AGAIN}")


def check_agreement(one: Records, other: Records) -> dict[str, float]:
    """Compares two evaluations of the same model and text at another batch size and number of devices.

    Returns:
        the relative change of the total nll, and the largest of a row's.

    Raises:
        UserError: a change is larger than the rounding of the precision explains, or other tokens were scored.
    """
    (nll, counts), (other_nll, other_counts) = one.sums, other.sums
    if not np.array_equal(counts, other_counts):
        raise UserError("the check failed: another batch size or number of devices scored other tokens.")
    limit = ROUNDING["32" if one.certificate["precision"] == "32-true" else "16"]
    totals = math.fsum(nll[:, 0]), math.fsum(other_nll[:, 0])
    total = abs(totals[0] - totals[1]) / max(totals[0], 1.0)
    scored = counts[:, 0] > 0
    document = float(np.max(np.abs(nll[scored, 0] - other_nll[scored, 0]) / np.maximum(nll[scored, 0], 1)))
    if not (total <= limit["total"] and document <= limit["document"]):
        raise UserError(
            f"the check failed: at another batch size or number of devices the total nll moved by {total:.1e} "
            f"(relative), and one document's by {document:.1e}.\n"
            f"Rounding in {one.certificate['precision']} explains {limit['total']:.0e} and {limit['document']:.0e}."
        )
    return {"total_moved_by": total, "a_document_moved_by": document}


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate and on the scored text, by titles."""
    metrics, totals, policy = (certificate[part] for part in ("figures", "totals", "policy"))
    unknown, bound = totals.get("unknown_tokens", 0), certificate["figure"] == BOUND
    lines = {}
    for name, value in metrics.items():
        error = metrics.get(f"{name}_standard_error")
        if value is not None and not name.endswith("_standard_error"):
            sign = AT_MOST if bound or (unknown and ("byte" in name or "word" in name)) else ""
            lines[name.replace("_", " ")] = f"{sign}{value:{',.4f' if value < 1e6 else '.4g'}}" + (
                "" if error is None else f" ± {error:.4f} (standard error)"
            )
    if bound:
        drawn = policy["elbo"]["draws"]
        lines["bound"] = f"of the nll of a text written in random order, from {drawn} random masks of each window"
    lines["scored"] = ", ".join(f"{totals[name]:,} {name}" for name in ("tokens", "bytes", "words"))
    if certificate.get("units") == "words":
        lines["scored"] += f" and {totals['lines']:,} ends of lines"
    if unknown:
        lines["unknown tokens"] = (
            f"{unknown:,}, for {totals['unknown_bytes']:,} bytes, which are charged 8 bits each: ≤ is an upper bound"
        )
    documents, scored = totals["documents"], totals["documents_scored"]
    note = f", of which {scored:,} hold something to score" if scored < documents else ""
    lines["documents"] = f"{documents:,}{note}"
    for name, own in certificate.get("domains", {}).items():
        bits = next((key for key in metrics if key.endswith("bits_per_byte")), None)
        shown = [key for key in (certificate["figure"], bits) if key and own["figures"][key] is not None]
        values = ", ".join(f"{key.replace('_', ' ')} {own['figures'][key]:,.4f}" for key in shown)
        lines[f"domain {name}"] = f"{values or 'nothing scored'} ({own['totals']['documents']:,} documents)"
    stride = f", stride {policy['stride']}" if policy["stride"] else ""
    apart = ", documents apart" if policy.get("document_attention") else ""
    ends = "" if policy.get("score_end", True) else ", ends of documents not scored"
    lines["context"] = f"{policy['context']}, {policy['block_size']} positions{stride}{apart}{ends}"
    if "calibration" in certificate:
        of = certificate["calibration"]
        lines["calibration"] = (
            f"expected calibration error {of['expected_calibration_error']:.4f}: accuracy {of['accuracy']:.4f}, "
            f"confidence {of['confidence']:.4f}"
        )
    if "surprisal" in certificate:
        of = certificate["surprisal"]
        corrected = f", also corrected for their ends ({of['correction']})" if of["correction"] else ""
        lines["surprisal"] = f"of {of['words']:,} words, in words.parquet{corrected}"
    return lines | describe_check(certificate)


def describe_check(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns a text on what `check=true` found, by its title; nothing where there was no check."""
    if "check" not in certificate:
        return {}
    check = certificate["check"]
    widths = {name: " and ".join(map(str, check[name])) for name in ("batch_size", "devices")}
    moved = f"the total moved by {check['total_moved_by']:.1e}"
    return {"check": f"passed: batch size {widths['batch_size']}, devices {widths['devices']}; {moved}"}


def is_bound(certificate: Mapping[str, Any]) -> bool:
    """Returns whether a certificate's metrics per byte and per word are upper bounds of what they are named after.

    They are if the metric is a `BOUND`, or if some tokens were unknown.
    """
    return certificate["figure"] == BOUND or bool(certificate["totals"].get("unknown_tokens", 0))


def rows_hash(table: pa.Table) -> str:
    """Returns a hash of all values of the records."""
    digest = hashlib.sha256()
    for column in table.columns:
        # As the JSON of the whole column, of which Python's memory has a part at a time.
        for start in range(0, max(len(column), 1), ROWS_AT_ONCE):
            part = json.dumps(column.slice(start, ROWS_AT_ONCE).to_pylist())[1:-1]
            digest.update(f"{', ' if start else '['}{part}".encode())
        digest.update(b"]")
    return digest.hexdigest()[:32]
