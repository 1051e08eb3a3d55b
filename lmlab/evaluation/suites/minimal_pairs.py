"""Minimal pairs: whether a model gives the good sentence of a pair a higher probability than the bad one.

The probability of a sentence is that of all its tokens, without a division by their number, as in BLiMP (Warstadt et
al. 2020). Each sentence is a document, without an end-of-text token, and on its own (`context=document`); masked models
have its pseudo-log-likelihood in place of it.

Shapes: P pairs, D sentences, S stretches of them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lmlab.console import counted
from lmlab.data.documents import Documents
from lmlab.data.pairs import Pair, pairs_hash
from lmlab.errors import UserError
from lmlab.evaluation.metrics import BOUND, EXACT, wilson
from lmlab.evaluation.records import describe_check
from lmlab.evaluation.suites.suite import SuiteRecords, by_group, pseudo_text, share_text, write_suite

if TYPE_CHECKING:
    from lmlab.evaluation.scoring import HeldOut  # a comparison and a report need not wait for torch

LOG = logging.getLogger(__name__)
NAME = "minimal_pairs"
ACCURACY = "pairs_accuracy"
COLUMNS = {
    "pair": pa.int64(),  # its number, from 0
    "phenomenon": pa.string(),
    "good": pa.string(),  # the sentences; of several bad ones the most probable
    "bad": pa.string(),
    "nll_good": pa.float64(),  # Σ over the tokens, in nats
    "nll_bad": pa.float64(),
    "tokens_good": pa.int64(),  # scored ones
    "tokens_bad": pa.int64(),
    "bytes_good": pa.int64(),  # UTF-8 bytes of these tokens' text
    "bytes_bad": pa.int64(),
    "equal_tokens": pa.bool_(),  # the tokenizer makes the same tokens of both
    "score": pa.float64(),  # 1: the good one is more probable; 0.5: a tie
}
TIE = 1e-6
"""The relative difference of two nll that is a tie: rounding in float32 explains as much."""


class PairRecords(SuiteRecords):
    """An evaluation by minimal pairs that was read from its directory, a row for each pair."""

    suite, rows, group, groups, measure = NAME, "pairs", "phenomenon", "phenomena", "accuracy"
    schema = pa.schema([pa.field(name, kind, False) for name, kind in COLUMNS.items()], {"lmlab_pairs": "1"})

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The nll [2P, 1] float64 and tokens [2P, 1] int64 of all good sentences, and then of all bad ones."""
        nll, tokens = (
            np.concatenate([self.table[f"{name}_{side}"].to_numpy() for side in ("good", "bad")])[:, None]
            for name in ("nll", "tokens")
        )
        return nll, tokens


def check(pairs: Sequence[Pair], held_out: "HeldOut") -> None:
    """Refuses pairs that a model can't be scored on, and warns of those that no model can tell apart.

    Args:
        held_out: the rows of the sentences.

    Raises:
        UserError: the nll of the rows is not that of a sentence; a sentence has no token, or too many.
    """
    documents, figure = held_out.documents, held_out.facts["figure"]
    if figure not in (EXACT, BOUND, "pseudo_perplexity"):
        raise UserError(
            f"suite={NAME} is for causal and masked models: {figure} is not of the whole sentence.\n"
            "Leave score=… or callbacks.suites.pairs=… out; of other models the suite can't be had."
        )
    sentences = [sentence for pair in pairs for sentence in pair.sentences]
    document = np.searchsorted(documents.edges, held_out.rows.windows.starts, side="right") - 1
    windows = np.bincount(document, minlength=len(documents))
    for number in np.flatnonzero(windows != 1).tolist():
        begins, tokens = f'"{sentences[number][:60]}"', int(documents.lengths[number])
        if tokens == 0:
            raise UserError(f"the tokenizer has no token for the sentence {begins}. Leave that pair out.")
        if windows[number]:
            size = held_out.facts["policy"]["block_size"]
            raise UserError(
                f"a sentence of {tokens:,} tokens is longer than the {size:,} positions of the model, special tokens "
                f"included: {begins} …\nLeave that pair out, or name more by preprocess.block_size=… if the model "
                "takes them."
            )
        raise UserError(
            f"the sentence {begins} is a single token, and this tokenizer has none that opens a text:\n"
            "there is nothing that a causal model could predict it from. Leave that pair out."
        )
    copies = equal_tokens(pairs, documents)
    same = sum(bool(copies[first : first + len(pair.sentences)].any()) for first, pair in numbered(pairs))
    if same:
        LOG.warning(
            "%s of %s: this tokenizer makes the same tokens of the good and the bad sentence, which counts as a tie.",
            f"{same:,}",
            counted(len(pairs), "pair"),
        )


def numbered(pairs: Sequence[Pair]) -> list[tuple[int, Pair]]:
    """Returns each pair with the number of its good sentence among all sentences; the bad ones follow on it."""
    return [*zip(accumulate((len(pair.sentences) for pair in pairs), initial=0), pairs, strict=False)]


def equal_tokens(pairs: Sequence[Pair], documents: Documents) -> np.ndarray:
    """Returns whether each sentence is a bad one that has the tokens of its good one: [D] bool."""
    tokens, edges = documents.tokens, documents.edges

    def ids(number: int) -> np.ndarray:
        return np.asarray(tokens[edges[number] : edges[number + 1]])

    same = np.zeros(len(documents), bool)
    for first, pair in numbered(pairs):
        for bad in range(first + 1, first + len(pair.sentences)):
            same[bad] = np.array_equal(ids(first), ids(bad))
    return same


def table_of(pairs: Sequence[Pair], documents: Documents, nll: np.ndarray, counts: np.ndarray) -> pa.Table:
    """Returns the records of pairs.

    Args:
        nll: [S, 2] float64 of `DocumentSums`.
        counts: [S, 7] int64 of `DocumentSums`.
    """
    of_sentence, counted_in = np.zeros(len(documents)), np.zeros((len(documents), 2), np.int64)
    np.add.at(of_sentence, documents.document_of_stretch, nll[:, 0])  # a very long sentence has several stretches
    np.add.at(counted_in, documents.document_of_stretch, counts[:, :2])
    equal, rows = equal_tokens(pairs, documents), []
    for number, (first, pair) in enumerate(numbered(pairs)):
        those = slice(first + 1, first + len(pair.sentences))
        good = float(of_sentence[first])
        of_sentence[those][equal[those]] = good  # other batches may have rounded it in another way
        best = first + 1 + int(np.argmin(of_sentence[those]))
        bad = float(of_sentence[best])
        tie = abs(bad - good) <= TIE * max(good, bad)
        rows.append(
            {
                "pair": number,
                "phenomenon": pair.phenomenon,
                "good": pair.good,
                "bad": pair.sentences[best - first],
                "nll_good": good,
                "nll_bad": bad,
                **{
                    f"{name}_{side}": int(counted_in[i, column])
                    for column, name in enumerate(("tokens", "bytes"))
                    for side, i in (("good", first), ("bad", best))
                },
                "equal_tokens": bool(equal[those].any()),
                "score": 0.5 if tie else float(good < bad),
            }
        )
    return pa.Table.from_pylist(rows, PairRecords.schema)


def figures_and_totals(table: pa.Table, _: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a certificate that follow from its records: `figures`, `totals`, and both by phenomenon."""

    def of(rows: pa.Table) -> dict[str, dict[str, Any]]:
        column = {name: rows[name].to_numpy() for name in COLUMNS if name not in ("good", "bad", "phenomenon")}
        score = column["score"]
        low, high = wilson(float(score.sum()), len(score))
        totals = {
            "pairs": len(score),
            "ties": int((score == 0.5).sum()),
            "equal_tokens": int(column["equal_tokens"].sum()),
            **{name: math.fsum(column[name]) for name in ("nll_good", "nll_bad")},
            **{name: int(column[f"{name}_good"].sum() + column[f"{name}_bad"].sum()) for name in ("tokens", "bytes")},
        }
        figures = {ACCURACY: float(score.mean()), f"{ACCURACY}_low": low, f"{ACCURACY}_high": high}
        return {"figures": figures, "totals": totals}

    return by_group(table, PairRecords, of)


def write(
    path: Path,
    documents: Documents,
    nll: np.ndarray,
    counts: np.ndarray,
    facts: Mapping[str, Any],
    *,
    pairs: list[Pair],
) -> None:
    """Writes the records and their certificate into a directory, each whole or not at all, as `records.write` does.

    Args:
        pairs: the pairs whose sentences the documents are.
    """
    table = table_of(pairs, documents, nll, counts)
    own = {"figure": ACCURACY, "data_hash": pairs_hash(pairs)}
    write_suite(path, PairRecords, table, {**facts, **own}, figures_and_totals)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the accuracy of a certificate and on the pairs, by titles."""
    totals, policy = certificate["totals"], certificate["policy"]
    lines = {"pairs accuracy": accuracy_text(certificate)}
    lines |= {f"  {name}": accuracy_text(own) for name, own in certificate["phenomena"].items()}
    equal = f", of which {totals['equal_tokens']:,} of equal tokens" if totals["equal_tokens"] else ""
    lines["ties"] = f"{totals['ties']:,}{equal}"
    lines["scored"] = f"{totals['tokens']:,} tokens, {totals['bytes']:,} bytes"
    if policy["pseudo"]:
        lines["score"] = pseudo_text(policy["pseudo"]["within_word"])
    elif policy.get("elbo"):
        lines["score"] = f"a bound of the nll, from {policy['elbo']['draws']} random masks of each sentence"
    else:
        lines["score"] = "log-likelihood"
    return lines | describe_check(certificate)


def accuracy_text(part: Mapping[str, Any]) -> str:
    """Returns the accuracy in the figures of a certificate, or of a phenomenon, with its interval."""
    return f"{share_text(part, ACCURACY)}, {counted(part['totals']['pairs'], 'pair')}"
