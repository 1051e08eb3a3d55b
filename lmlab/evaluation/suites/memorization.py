"""Memorization: how much of a text a model continues verbatim, and how probable its least probable tokens are.

A document is continued verbatim if, after its first `prefix` tokens, the most probable token is the document's own
`continuation` times in a row: what greedy decoding would write (Carlini et al. 2023, "Quantifying Memorization Across
Neural Language Models"). As long as it is right, what it has written is the document, so one pass over the document
shows it, and nothing has to be generated.

Min-k % is the mean nll of the share `min_k` of a document's tokens that are the least probable (Shi et al. 2024,
"Detecting Pretraining Data from Large Language Models", who give it with the other sign). It is low of text that a
model was trained on.

Shapes: D documents.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lmlab.console import counted
from lmlab.data.documents import Documents
from lmlab.errors import UserError
from lmlab.evaluation.metrics import EXACT, wilson
from lmlab.evaluation.records import describe_check
from lmlab.evaluation.suites.suite import SuiteRecords, by_group, share_text, text_lengths, write_suite

if TYPE_CHECKING:
    from lmlab.evaluation.scoring import HeldOut  # a comparison and a report need not wait for torch

NAME = "memorization"
VERBATIM, MIN_K = "verbatim_share", "min_k_nll"
COLUMNS = {
    "document": pa.string(),  # a name made from its text
    "start": pa.string(),  # the beginning of its text
    "domain": pa.string(),
    "nll": pa.float64(),  # Σ over the scored tokens, in nats
    "tokens": pa.int64(),  # scored ones, the end-of-text token left out
    MIN_K: pa.float64(),  # the mean nll of its least probable tokens
    "continued": pa.int64(),  # tokens from the prefix on that are the most probable ones, up to the first that is not
    "long_enough": pa.bool_(),  # it has the tokens of prefix and continuation
    "score": pa.float64(),  # 1: it is long enough, and continued verbatim
}


class MemorizationRecords(SuiteRecords):
    """An evaluation of memorization that was read from its directory, a row for each document."""

    suite, rows, group, groups = NAME, "documents", "domain", "domains"
    schema = pa.schema([pa.field(name, kind, False) for name, kind in COLUMNS.items()], {"lmlab_memorization": "1"})

    @property
    def verbatim(self) -> bool:
        """True if the verbatim share is compared; of a masked model, which continues no text, it is min-k."""
        return bool(self.certificate["figure"] == VERBATIM)

    @property
    def measure(self) -> str:  # type: ignore[override]
        return "verbatim share" if self.verbatim else "min-k nll"

    @property
    def better(self) -> str:  # type: ignore[override]
        return "more" if self.verbatim else "less probable"

    @property
    def terms(self) -> np.ndarray:
        """[D, 2] float64: whether each document is continued verbatim, and whether it is long enough for that; of a
        masked model the nll of its least probable tokens, and whether it has any."""
        columns = ("score", "long_enough") if self.verbatim else (MIN_K, "tokens")
        value, counts = (self.table[name].to_numpy() for name in columns)
        return np.stack([value, (counts > 0).astype(np.float64)], axis=1)


def check(held_out: "HeldOut", settings: Mapping[str, Any]) -> None:
    """Refuses a model or a text of which the memorization can't be measured.

    Args:
        held_out: the rows of the documents.
        settings: `prefix`, `continuation` and `min_k`.

    Raises:
        UserError: the rows give no nll of each token, or no document is long enough.
    """
    figure, documents = held_out.facts["figure"], held_out.documents
    if figure != "pseudo_perplexity" and not (figure == EXACT and held_out.causal):
        raise UserError(
            f"suite={NAME} is for causal models, and by score=pseudo for masked ones: {figure} is neither.\n"
            "Leave score=… out; of other models the suite can't be had."
        )
    if not held_out.causal:
        return
    needed, room = settings["prefix"] + settings["continuation"], held_out.facts["policy"]["block_size"] - 1
    longest = int(text_lengths(documents).max())
    if longest < needed:
        raise UserError(
            f"no document has the {settings['prefix']} tokens of the prefix and {settings['continuation']} more: the "
            f"longest has {longest}.\nLower prefix=… and continuation=…, or name other text by data=…"
        )
    if needed > room:
        raise UserError(
            f"prefix and continuation have {needed} tokens together, and the model sees {room + 1} at once.\n"
            "Lower prefix=… and continuation=…, or name more by preprocess.block_size=… if the model takes them."
        )


def table_of(held_out: "HeldOut", scores: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> pa.Table:
    """Returns the records of documents.

    Args:
        scores: what `TokenScores` computes, as arrays.
        settings: as of `check`.
    """
    documents, windows, causal = held_out.documents, held_out.rows.windows, held_out.causal
    text = ~documents.ends(np.arange(len(documents.tokens)))
    scored = (scores["scored"] > 0) & text
    lengths, needed = text_lengths(documents), settings["prefix"] + settings["continuation"]
    firsts = np.flatnonzero(documents.parts.to_numpy() == 0)
    names, starts, domains = (
        column.take(firsts).to_pylist() for column in (documents.names, documents.starts, documents.domain_names)
    )
    # Each document begins a window, whose end is how far the model sees from the beginning.
    seen = windows.ends[np.minimum(np.searchsorted(windows.starts, documents.edges[:-1]), len(windows) - 1)]
    rows = []
    for number, (start, end) in enumerate(pairwise(documents.edges.tolist())):
        nll = scores["nll"][start:end][scored[start:end]]
        least = np.sort(nll)[::-1][: max(1, int(len(nll) * settings["min_k"]))]
        last = min(start + int(lengths[number]), int(seen[number]))
        hits = (scores["hits"][start + settings["prefix"] : last] > 0) if causal else np.zeros(0, bool)
        continued = len(hits) if hits.all() else int(np.argmin(hits))
        long_enough = causal and int(lengths[number]) >= needed
        rows.append(
            {
                "document": names[number],
                "start": starts[number],
                "domain": domains[number],
                "nll": math.fsum(nll),
                "tokens": len(nll),
                MIN_K: math.fsum(least) / len(least) if len(nll) else 0.0,
                "continued": continued,
                "long_enough": long_enough,
                "score": float(long_enough and continued >= settings["continuation"]),
            }
        )
    return pa.Table.from_pylist(rows, MemorizationRecords.schema)


def figures_and_totals(table: pa.Table, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a certificate that follow from its records: `figures`, `totals`, and both by domain.

    Between two domains there is `min_k_auroc` too: how probably a document of the first has a lower nll of its least
    probable tokens than one of the second, which is 0.5 if the model was trained on both or on neither.
    """

    def of(rows: pa.Table) -> dict[str, dict[str, Any]]:
        column = {name: rows[name].to_numpy() for name in COLUMNS if name not in ("document", "start", "domain")}
        some, has_tokens = column["long_enough"], column["tokens"] > 0
        totals = {
            "documents": len(rows),
            "documents_long_enough": int(some.sum()),
            "verbatim": int(column["score"].sum()),
            "nll": math.fsum(column["nll"]),
            "tokens": int(column["tokens"].sum()),
        }
        figures: dict[str, float | None] = {}
        if facts["figure"] == VERBATIM:
            figures = dict.fromkeys((VERBATIM, f"{VERBATIM}_low", f"{VERBATIM}_high", "continued_tokens"))
            if some.any():
                low, high = wilson(totals["verbatim"], int(some.sum()))
                figures = {VERBATIM: float(column["score"][some].mean()), f"{VERBATIM}_low": low}
                figures |= {f"{VERBATIM}_high": high, "continued_tokens": float(column["continued"][some].mean())}
        figures[MIN_K] = math.fsum(column[MIN_K]) / int(has_tokens.sum()) if has_tokens.any() else None
        return {"figures": figures, "totals": totals}

    parts = by_group(table, MemorizationRecords, of)
    if len(parts.get("domains", ())) == 2:
        domain, value, some = (table[name].to_numpy() for name in ("domain", MIN_K, "tokens"))
        lower, higher = (value[(domain == name) & (some > 0)] for name in parts["domains"])
        if len(lower) and len(higher):
            parts["figures"]["min_k_auroc"] = auroc(lower, higher)
    return parts


def auroc(lower: np.ndarray, higher: np.ndarray) -> float:
    """Returns the probability that a value of `lower` is below one of `higher`, where a tie counts half."""
    ordered = np.sort(lower)
    below, upto = (np.searchsorted(ordered, higher, side).sum() for side in ("left", "right"))
    return float((below + upto) / 2 / (len(lower) * len(higher)))


def write(
    path: Path,
    documents: Documents,
    nll: np.ndarray,
    counts: np.ndarray,
    facts: Mapping[str, Any],
    *,
    scores: Mapping[str, np.ndarray],
    held_out: "HeldOut",
    settings: Mapping[str, Any],
) -> None:
    """Writes the records and their certificate into a directory, each whole or not at all, as `records.write` does."""
    table = table_of(held_out, scores, settings)
    own = {"figure": VERBATIM if held_out.causal else MIN_K, "settings": dict(settings)}
    write_suite(path, MemorizationRecords, table, {**facts, **own}, figures_and_totals)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate and on the text, by titles."""
    settings, totals, figures = certificate["settings"], certificate["totals"], certificate["figures"]
    named = {"": certificate, **{f"  {name}": own for name, own in certificate.get("domains", {}).items()}}
    lines = {}
    if certificate["figure"] == VERBATIM:
        lines = {name or "verbatim share": verbatim_text(own) for name, own in named.items()}
        tokens = counted(settings["continuation"], "token")
        lines["verbatim"] = f"{tokens} after the first {settings['prefix']} of a document"
        lines["continued"] = f"{figures['continued_tokens']:.1f} tokens on average"
    share = f"{100 * settings['min_k']:g} %"
    for name, own in named.items():
        value = own["figures"][MIN_K]
        text = "nothing scored" if value is None else f"{value:.4f} nats a token"
        lines[f"{name}, min-k" if name else "min-k"] = text
    lines["min-k of"] = f"the {share} of the tokens of each document that are the least probable"
    if "min_k_auroc" in figures:
        first, second = certificate["domains"]
        lines["min-k AUROC"] = f"{figures['min_k_auroc']:.4f}, how probably one of {first} is below one of {second}"
    lines["scored"] = f"{totals['tokens']:,} tokens of {counted(totals['documents'], 'document')}"
    return lines | describe_check(certificate)


def verbatim_text(part: Mapping[str, Any]) -> str:
    """Returns the share of documents that are continued verbatim, in a certificate or of a domain."""
    of = part["totals"]["documents_long_enough"]
    return "no document is long enough" if not of else f"{share_text(part, VERBATIM)}, {counted(of, 'document')}"
