"""The power of a comparison: the difference that its documents and seeds can show, and how many would show another.

A difference is shown where it is found with p < 0.05 in 8 of 10 repetitions with other documents and seeds.

Shapes: D documents.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmlab.errors import UserError
from lmlab.evaluation.comparison import seed_error
from lmlab.evaluation.sides import Side, ratio

ERRORS = 1.959964 + 0.841621
"""The standard errors of a difference that is shown: the normal quantiles of 97.5 % and of 80 % (Cohen 1988)."""


def document_error(side: Side, other: Side) -> float:
    """Returns the standard error of the difference of two sides that is due to their documents.

    It is that of a difference of two ratios over the same documents (Cochran 1977, "Sampling Techniques", section
    2.11); nan where there are fewer than two documents.
    """
    sums = np.stack([side.sums, other.sums])  # [2, D, 2]
    sums = sums[:, sums.any(axis=(0, 2))]
    documents = sums.shape[1]
    if documents < 2:
        return math.nan
    ratios = ratio(sums.sum(axis=1))
    residuals = (sums[..., 0] - ratios[:, None] * sums[..., 1]) / sums[..., 1].mean(axis=1, keepdims=True)
    return float((residuals[0] - residuals[1]).std(ddof=1) / math.sqrt(documents))


def shown_difference(side: Side, other: Side) -> float:
    """Returns the least difference that the documents and the runs of two sides show."""
    return ERRORS * math.hypot(document_error(side, other), seed_error(side, other)[0])


def needed(side: Side, other: Side, difference: float) -> tuple[int | None, int | None]:
    """Returns how many documents would show a difference, with as many runs, and how many runs a side, with as many
    documents.

    None where no number of them would, or where nothing is known: of the seeds, as each side has one run, or of the
    documents, as there is one or they differ alike.
    """
    allowed = (difference / ERRORS) ** 2
    of_documents, of_seeds = document_error(side, other) ** 2, seed_error(side, other)[0] ** 2
    documents = runs = None
    if not of_documents > 0:
        return None, None
    if allowed > of_seeds:
        documents = max(2, math.ceil(len(side.sums) * of_documents / (allowed - of_seeds)))
    if of_seeds and allowed > of_documents:
        # Two sides of n runs have 2 s² / n, where they have s² (1 / a + 1 / b) now.
        now = sum(1 / len(each.runs) for each in (side, other))
        runs = max(2, math.ceil(2 / now * of_seeds / (allowed - of_documents)))
    return documents, runs


def read_difference(text: str, reference: Side) -> float:
    """Returns a difference that is given as a number, or as a percentage of the metric of a side.

    Raises:
        UserError: it is neither, or not above 0.
    """
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--power {text}: it has to be a difference above 0, such as 0.01 or 0.5%.")
    return value / 100 * float(reference.ratios.mean()) if percent else value


def power_rows(sides: Sequence[Side], against: int, difference: float | None) -> list[dict[str, Any]]:
    """Returns for each side what it can show against side `against`, and what would show a difference that is given."""
    reference, rows = sides[against], []
    for side in sides:
        if side is not reference:
            documents, runs = (None, None) if difference is None else needed(side, reference, difference)
            shown = shown_difference(side, reference)
            seeds, _ = seed_error(side, reference)
            row = {"side": side.name, "shows": shown, "documents": documents, "runs_a_side": runs}
            rows.append(row | {"error_of_documents": document_error(side, reference), "error_of_seeds": seeds or None})
    return rows
