"""What an evaluation leaves: a row per document, and a certificate that adds them up.

`records.parquet` has one row per document, `certificate.json` their totals, the figures
made of them, and all that a figure depends on. The totals are the rows' exactly rounded
sums, so they can be recomputed to the last bit.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmlab.data.documents import Documents
from lmlab.errors import UserError, first_line
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import write_beside, write_json

if TYPE_CHECKING:
    from torch import Tensor  # a comparison and a report need not wait for it

FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("document", pa.string(), False),  # a name made from its text
        pa.field("start", pa.string(), False),  # the beginning of its text
        pa.field("nll", pa.float64(), False),  # Σ over the scored tokens, nats
        pa.field("nll_squared", pa.float64(), False),  # Σ of squares: for standard errors
        pa.field("tokens", pa.int64(), False),  # scored ones
        pa.field("bytes", pa.int64(), False),  # UTF-8 bytes of these tokens' text
        pa.field("words", pa.int64(), False),  # words that begin in it
    ],
    {"lmlab_records": str(FORMAT)},
)
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
UNITS = ("tokens", "bytes", "words")


@dataclass(frozen=True)
class Records:
    """An evaluation as it was read from its directory."""

    place: Path
    certificate: dict[str, Any]
    table: pa.Table

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """As `DocumentSums` made them: nll [D, 2] float64, units [D, 3] int64."""
        nll, units = (
            np.stack([self.table[name].to_numpy() for name in names], axis=1)
            for names in (("nll", "nll_squared"), UNITS)
        )
        return nll, units


def totals_of(nll: np.ndarray, units: np.ndarray) -> dict[str, Any]:
    """Exactly rounded sums of `DocumentSums`: of their values, whatever their order."""
    return {
        "documents": len(nll),
        "documents_scored": int((units[:, 0] > 0).sum()),
        "nll": math.fsum(nll[:, 0]),
        "nll_squared": math.fsum(nll[:, 1]),
        **{unit: int(counts.sum()) for unit, counts in zip(UNITS, units.T, strict=True)},
    }


def figures_of(totals: Mapping[str, Any], name: str = "perplexity", sample: float | None = None) -> dict[str, Any]:
    """The figures that totals make.

    Args:
        name: of the exponential of the mean nll, such as `masked_perplexity`; the other
            figures get the same prefix, so that none goes by the name of a causal model's.
        sample: the share of the tokens that was scored, where it was a random one; the mean
            nll then has a standard error (Cochran 1977, section 2.11, for a ratio), and the
            perplexity too.

    Returns:
        nll per token (nats), perplexity, bits per byte and per word, perplexity per word;
        None for one that has nothing under it.
    """
    prefix = name.removesuffix("perplexity") if name.endswith("perplexity") else f"{name}_"
    nll = totals.get("nll")
    mean, per_byte, per_word = (nll / totals[unit] if totals.get(unit) else None for unit in UNITS)
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
        nll, units: [D, 2] float64 and [D, 3] int64 of `DocumentSums`.
        facts: what the figures depend on, and where they come from; `figure` and
            `policy` decide their names and errors (see `figures_of`).
    """
    table = pa.table([documents.ids, documents.starts, *nll.T, *units.T], SCHEMA)
    run = RunDirectory(place)
    write_beside(run.records, lambda beside: pq.write_table(table, beside))
    write_json(
        run.certificate,
        {"format": FORMAT, **added_up(nll, units, facts), **facts, "records_hash": rows_hash(table)},
    )


def added_up(nll: np.ndarray, units: np.ndarray, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a certificate says of its records: figures and totals."""
    totals = totals_of(nll, units)
    sample = (facts["policy"].get("pseudo") or {}).get("sample")
    return {"figures": figures_of(totals, facts["figure"], sample), "totals": totals}


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
    if version != FORMAT:
        raise UserError(
            f"{place} holds records of version {version}, and this lmlab reads version {FORMAT}.\n"
            "Evaluate again, or use the lmlab that wrote them."
        )
    try:
        records = Records(place, certificate, pq.read_table(run.records))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{run.records} is damaged or cut short: {first_line(error)}\n{again}") from error
    if not records.table.schema.equals(SCHEMA, check_metadata=True):
        raise UserError(f"{run.records} has other columns than records of version {FORMAT}.\n{again}")
    for part, kind in PARTS.items():
        if not isinstance(certificate.get(part), kind):
            raise UserError(f"{run.certificate} lacks a part, or has another in its place: {part}.\n{again}")
    changed = [
        f"{name}={value}, and the certificate says {certificate[part].get(name)}"
        for part, values in added_up(*records.sums, certificate).items()
        for name, value in values.items()
        if repr(value) != repr(certificate[part].get(name))  # nan is not equal to itself
    ]
    hashed = rows_hash(records.table)
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
    """The figures of a certificate for people, by what to call them."""
    figures, totals, policy = (certificate[part] for part in ("figures", "totals", "policy"))
    shown = {}
    for name, value in figures.items():
        error = figures.get(f"{name}_standard_error")
        if value is not None and not name.endswith("_standard_error"):
            shown[name.replace("_", " ")] = f"{value:,.4f}" + (
                "" if error is None else f" ± {error:.4f} (standard error)"
            )
    shown["scored"] = ", ".join(f"{totals[unit]:,} {unit}" for unit in UNITS)
    shown["documents"] = f"{totals['documents']:,}, of which {totals['documents_scored']:,} hold something to score"
    stride = f", stride {policy['stride']}" if policy["stride"] else ""
    shown["context"] = f"{policy['context']}, {policy['block_size']} positions{stride}"
    if "check" in certificate:
        check = certificate["check"]
        shown["check"] = (
            f"passed: batch size {' and '.join(map(str, check['batch_size']))}, "
            f"devices {' and '.join(map(str, check['devices']))}; the total moved by {check['total_moved_by']:.1e}"
        )
    return shown


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
