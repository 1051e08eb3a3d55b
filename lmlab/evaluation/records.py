"""What an evaluation leaves: a row per document, and a certificate that adds them up.

`records.parquet` has one row per document, or per stretch of one where documents are few (data/documents.py);
`certificate.json` has their totals, the metrics made of them, and all that a metric depends on. The totals are the
rows' exactly rounded sums, so they can be recomputed to the last bit.

Shapes: D documents, S stretches.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmlab import secrets
from lmlab.data.documents import COUNTS, Documents
from lmlab.errors import UserError, first_line
from lmlab.io import write_beside, write_json
from lmlab.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor  # a comparison and a report need not wait for it

FORMAT = 2
COLUMNS = {
    "document": pa.string(),  # a name made from its text
    "stretch": pa.int64(),  # which part of the document, from 0
    "start": pa.string(),  # the beginning of its text
    "nll": pa.float64(),  # Σ over the scored tokens, nats
    "nll_squared": pa.float64(),  # Σ of squares: for standard errors
    "tokens": pa.int64(),  # scored ones
    "bytes": pa.int64(),  # UTF-8 bytes of these tokens' text
    "words": pa.int64(),  # words that begin in it
    "ends": pa.int64(),  # ends of documents among them
    "lines": pa.int64(),  # ends of lines in it
    "unknown_tokens": pa.int64(),  # of the tokens, those that do not spell their text
    "unknown_bytes": pa.int64(),  # UTF-8 bytes of that text
}
SINCE_2 = ("stretch", "ends", "lines", "unknown_tokens", "unknown_bytes")
"""Columns that records of version 1 do not have: a row was a whole document, and none of the rest was counted."""
SCHEMAS = {
    version: pa.schema(
        [pa.field(name, kind, False) for name, kind in COLUMNS.items() if version > 1 or name not in SINCE_2],
        {"lmlab_records": str(version)},
    )
    for version in (1, FORMAT)
}
BOUND = "≤ "
"""Before a metric that is an upper bound."""
BYTE = math.log(256)  # nats that each byte of an unknown token is charged
WORDS = {
    "text": "A word is what stands between white space. The end of a document counts as one, as its nll does.",
    "words": "A word is what stands between white space. The end of a line, as that of a document, counts as one, as "
    "its nll does: the count of the literature on PTB and WikiText.",
}
"""By `units`, what is counted as a word (README.md, "What a word is")."""
# How far a sum may move, relative to itself, when the batch or the number of devices changes.
ROUNDING = {"32": {"total": 1e-6, "document": 1e-5}, "16": {"total": 1e-3, "document": 3e-2}}
# What everything that reads a certificate relies on.
PARTS: dict[str, Any] = {
    **dict.fromkeys(("figures", "totals", "policy"), dict),
    **dict.fromkeys(
        ("figure", "data_hash", "tokenizer_hash", "weights_hash", "records_hash", "precision", "model"), str
    ),
    "run": dict | None,
}


@dataclass(frozen=True)
class Records:
    """An evaluation as it was read from its directory."""

    place: Path
    certificate: dict[str, Any]
    table: pa.Table

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """As `DocumentSums` made them: nll [S, 2] float64, units [S, 7] int64."""
        nll, units = (
            np.stack([self.table[name].to_numpy() for name in names], axis=1)
            for names in (("nll", "nll_squared"), COUNTS)
        )
        return nll, units

    @property
    def bits_and_bytes(self) -> np.ndarray:
        """[S, 2] float64: what the text of each row takes, unknown tokens charged, and its bytes."""
        nll, units = self.sums
        nats = nll[:, 0] + BYTE * units[:, COUNTS.index("unknown_bytes")]
        return np.stack([nats / math.log(2), units[:, COUNTS.index("bytes")].astype(np.float64)], axis=1)

    @property
    def cut(self) -> bool:
        """Whether its rows are stretches of documents, rather than whole ones."""
        return bool(self.table["stretch"].to_numpy().any())

    def of_whole_documents(self) -> "Records":
        """These records with the stretches of each document summed into one row."""
        firsts = np.flatnonzero(self.table["stretch"].to_numpy() == 0)
        columns = {
            name: self.table[name].take(firsts)
            if name in ("document", "stretch", "start")
            else np.add.reduceat(self.table[name].to_numpy(), firsts)
            for name in self.table.column_names
        }
        return replace(self, table=pa.table(columns))


def documents_of(stretches: np.ndarray) -> np.ndarray:
    """[S] the number of the document of each row, from the number of its stretch in it [S]."""
    return np.cumsum(stretches == 0) - 1


def totals_of(nll: np.ndarray, units: np.ndarray, stretches: np.ndarray | None = None) -> dict[str, Any]:
    """Exactly rounded sums of `DocumentSums`: of their values, whatever their order.

    Args:
        stretches: [S] which part of its document each row is; None where each is a whole one.
    """
    documents = np.arange(len(nll)) if stretches is None else documents_of(stretches)
    return {
        "documents": len(np.unique(documents)),
        "documents_scored": len(np.unique(documents[units[:, 0] > 0])),
        "nll": math.fsum(nll[:, 0]),
        "nll_squared": math.fsum(nll[:, 1]),
        **{unit: int(counts.sum()) for unit, counts in zip(COUNTS, units.T, strict=True)},
    }


def figures_of(
    totals: Mapping[str, Any], name: str = "perplexity", sample: float | None = None, units: str = "text"
) -> dict[str, Any]:
    """The metrics that totals make.

    An unknown token does not spell its text, and what the model gives for it is no code for that text. Per byte and
    per word it is charged 8 bits more for each byte that it stands for: the text could be sent so, and the metric is
    an upper bound of what a tokenizer that spells everything would have given with this model.

    Args:
        name: of the exponential of the mean nll, such as `masked_perplexity`; the other
            metrics get the same prefix, so that none goes by the name of a causal model's.
        sample: the share of the tokens that was scored, where it was a random one; the mean
            nll then has a standard error (Cochran 1977, section 2.11, for a ratio), and the
            perplexity too.
        units: of `WORDS`: what counts as a word.

    Returns:
        nll per token (nats), perplexity, bits per byte and per word, perplexity per word;
        None for one that has nothing under it.
    """
    prefix = name.removesuffix("perplexity") if name.endswith("perplexity") else f"{name}_"
    count = Counter(totals)  # those of version 1 have none of the newer counts
    of_text = count["nll"] + BYTE * count["unknown_bytes"]
    words = count["words"] + count["ends" if units == "text" else "lines"]
    mean = count["nll"] / count["tokens"] if count["tokens"] else None
    per_byte, per_word = (of_text / number if number else None for number in (count["bytes"], words))
    figures = {
        "nll_per_token": mean,
        name: None if mean is None else perplexity(mean),
        f"{prefix}bits_per_byte": None if per_byte is None else per_byte / math.log(2),
        f"{prefix}bits_per_word": None if per_word is None else per_word / math.log(2),
        f"{prefix}word_perplexity": None if per_word is None else perplexity(per_word),
    }
    if sample is not None and mean is not None:
        spread = max(0.0, totals["nll_squared"] / totals["tokens"] - mean**2)
        error = math.sqrt((1 - sample) * spread / max(1, totals["tokens"] - 1))
        figures |= {"nll_per_token_standard_error": error, f"{name}_standard_error": perplexity(mean) * error}
    return figures


def write(place: Path, documents: Documents, nll: np.ndarray, units: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write the records and their certificate into a directory, each whole or not at all.

    Args:
        nll, units: [S, 2] float64 and [S, 7] int64 of `DocumentSums`.
        facts: what the metrics depend on, and where they come from; `figure`, `policy`
            and `units` decide their names and errors (see `figures_of`).
    """
    table = pa.table([documents.names, documents.parts, documents.starts, *nll.T, *units.T], SCHEMAS[FORMAT])
    run = RunDirectory(place)
    write_beside(run.records, lambda beside: pq.write_table(table, beside))
    write_json(
        run.certificate,
        {
            "format": FORMAT,
            **added_up(nll, units, np.array(documents.parts), facts),
            **secrets.redacted(facts),
            "words": WORDS[facts["units"]],
            "records_hash": rows_hash(table),
        },
    )


def added_up(
    nll: np.ndarray, units: np.ndarray, stretches: np.ndarray, facts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a certificate says of its records: metrics and totals."""
    totals = totals_of(nll, units, stretches)
    sample = (facts["policy"].get("pseudo") or {}).get("sample")
    return {"figures": figures_of(totals, facts["figure"], sample, facts.get("units", "text")), "totals": totals}


def read(place: Path) -> Records:
    """The evaluation in a directory.

    Raises:
        UserError: there is none, it is of another version, damaged, or does not add up.
    """
    again = "Evaluate again: python -m lmlab.evaluate model=…"
    run = RunDirectory(place)
    for file in (run.certificate, run.records):
        if not file.is_file():
            raise UserError(f"{place} holds no evaluation: it has no {file.name}.\n{again}")
    try:
        certificate = json.loads(run.certificate.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{run.certificate} can't be read: {first_line(error)}.\n{again}") from error
    if not isinstance(certificate, dict) or "format" not in certificate:
        raise UserError(f"{run.certificate} is no certificate of lmlab.\n{again}")
    version = certificate["format"]
    if version not in SCHEMAS:
        raise UserError(
            f"{place} holds records of version {version}, and this lmlab reads versions up to {FORMAT}.\n"
            "Evaluate again, or use the lmlab that wrote them."
        )
    try:
        table = pq.read_table(run.records)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{run.records} is damaged or cut short: {first_line(error)}\n{again}") from error
    if not table.schema.equals(SCHEMAS[version], check_metadata=True):
        raise UserError(f"{run.records} has other columns than records of version {version}.\n{again}")
    for part, kind in PARTS.items():
        if not isinstance(certificate.get(part), kind):
            raise UserError(f"{run.certificate} lacks a part, or has another in its place: {part}.\n{again}")
    hashed = rows_hash(table)
    if version == 1:
        for column in SINCE_2:
            table = table.append_column(column, pa.array(np.zeros(len(table), np.int64)))
    records = Records(place, certificate, table)
    changed = [
        f"{name}={value}, and the certificate says {certificate[part].get(name)}"
        for part, values in added_up(*records.sums, table["stretch"].to_numpy(), certificate).items()
        for name, value in values.items()
        if repr(value) != repr(certificate[part].get(name))  # nan is not equal to itself
        and (version > 1 or name not in SINCE_2)
    ]
    if not changed and hashed != certificate["records_hash"]:
        changed = [f"the same totals in other rows, {hashed}"]
    if changed:
        raise UserError(f"{place}: the records add up to {changed[0]}.\nOne of them was changed. {again}")
    return records


def difference(one: Records, other: Records) -> dict[str, float]:
    """How far two evaluations of the same model and text lie apart, relative to their nll.

    Raises:
        UserError: further than the rounding of their precision.
    """
    (nll, units), (other_nll, other_units) = one.sums, other.sums
    if not np.array_equal(units, other_units):
        raise UserError("the check failed: another batch size or number of devices scored other tokens.")
    limit = ROUNDING["32" if one.certificate["precision"].startswith("32") else "16"]
    totals = math.fsum(nll[:, 0]), math.fsum(other_nll[:, 0])
    total = abs(totals[0] - totals[1]) / max(totals[0], 1.0)
    scored = units[:, 0] > 0
    document = float(np.max(np.abs(nll[scored, 0] - other_nll[scored, 0]) / np.maximum(nll[scored, 0], 1)))
    if not (total <= limit["total"] and document <= limit["document"]):
        raise UserError(
            f"the check failed: at another batch size or number of devices the total nll moved by {total:.1e} "
            f"(relative), and one document's by {document:.1e}.\n"
            f"Rounding in {one.certificate['precision']} explains {limit['total']:.0e} and {limit['document']:.0e}."
        )
    return {"total_moved_by": total, "a_document_moved_by": document}


def described(certificate: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a certificate for people, by what to call them."""
    figures, totals, policy = (certificate[part] for part in ("figures", "totals", "policy"))
    unknown, bound = totals.get("unknown_tokens", 0), BOUND if is_bound(certificate) else ""
    shown = {}
    for name, value in figures.items():
        error = figures.get(f"{name}_standard_error")
        if value is not None and not name.endswith("_standard_error"):
            of_text = bound if "byte" in name or "word" in name else ""
            shown[name.replace("_", " ")] = f"{of_text}{value:{',.4f' if value < 1e6 else '.4g'}}" + (
                "" if error is None else f" ± {error:.4f} (standard error)"
            )
    shown["scored"] = ", ".join(f"{totals[unit]:,} {unit}" for unit in ("tokens", "bytes", "words"))
    if unknown:
        shown["unknown tokens"] = (
            f"{unknown:,}, for {totals['unknown_bytes']:,} bytes, which are charged 8 bits each: ≤ is an upper bound"
        )
    documents, scored = totals["documents"], totals["documents_scored"]
    of = f", of which {scored:,} hold something to score" if scored < documents else ""
    shown["documents"] = f"{documents:,}{of}"
    stride = f", stride {policy['stride']}" if policy["stride"] else ""
    shown["context"] = f"{policy['context']}, {policy['block_size']} positions{stride}"
    if "check" in certificate:
        check = certificate["check"]
        shown["check"] = (
            f"passed: batch size {' and '.join(map(str, check['batch_size']))}, "
            f"devices {' and '.join(map(str, check['devices']))}; the total moved by {check['total_moved_by']:.1e}"
        )
    return shown


def is_bound(certificate: Mapping[str, Any]) -> bool:
    """Whether what a certificate says per byte and per word is an upper bound, as some tokens were unknown."""
    return certificate["totals"].get("unknown_tokens", 0) > 0


def rows_hash(table: pa.Table) -> str:
    """A hash of all values of the records."""
    digest = hashlib.sha256()
    for column in table.columns:
        digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()[:32]


def weights_hash(state: Mapping[str, "Tensor"]) -> str:
    """A hash of tensors by name: dtype, shape and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def perplexity(nll: float) -> float:
    """exp of a mean nll; infinite where that is beyond a float."""
    import torch

    return float(torch.tensor(nll, dtype=torch.float64).exp())
