"""Calibration: measures whether a model is right as often as it is sure.

Shapes: B bins.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BINS = 15
"""The number of bins of confidence, of one width, as Guo et al. (2017) have them."""


def calibrate(scores: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, Any]:
    """Returns how confidence and accuracy go together, over all scored tokens.

    The confidence of a prediction is the probability of the most probable token, its accuracy whether that was the
    token. The expected calibration error is the mean difference of the two over bins of confidence, weighted by the
    tokens in each (Guo et al. 2017, section 2).

    Args:
        scores: what `TokenScores` computes, as arrays.
        tokens: [tokens] the ids of the documents.

    Returns:
        error, accuracy and confidence over all; and by bins of confidence, and of how often a token occurs in the
        documents, the number of tokens, and the means of confidence, accuracy and nll.
    """
    scored = scores["scored"] > 0
    nll, confidence, hits = (scores[name][scored] for name in ("nll", "confidence", "hits"))
    of_confidence = np.minimum((confidence * BINS).astype(int), BINS - 1)
    frequency = np.bincount(tokens)[tokens[scored]]
    of_frequency = np.log2(frequency).astype(int)

    values = {"confidence": confidence, "accuracy": hits, "nll": nll}

    def means(bins: np.ndarray, ends: Callable[[int], tuple[float, float]]) -> list[dict[str, Any]]:
        """Returns a row for each bin that holds tokens; `ends` says where one begins and ends, by its number."""
        rows = []
        for number in np.unique(bins).tolist():
            inside, (low, high) = bins == number, ends(number)
            of_bin = {name: float(value[inside].mean()) for name, value in values.items()}
            rows.append({"from": low, "to": high, "tokens": int(inside.sum()), **of_bin})
        return rows

    by_confidence = means(of_confidence, lambda number: (number / BINS, (number + 1) / BINS))
    by_frequency = means(of_frequency, lambda number: (2**number, 2 ** (number + 1) - 1))
    error = sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in by_confidence) / len(nll)
    return {
        "expected_calibration_error": error,
        "accuracy": float(hits.mean()),
        "confidence": float(confidence.mean()),
        "by_confidence": by_confidence,
        "by_frequency": by_frequency,
    }
