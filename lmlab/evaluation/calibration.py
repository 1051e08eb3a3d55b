"""Calibration: measures whether a model is right as often as it is sure.

Shapes: B bins.
"""

from collections.abc import Mapping
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

    def means(bins: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        for number in np.unique(bins).tolist():
            inside = bins == number
            values = {"confidence": confidence, "accuracy": hits, "nll": nll}
            rows.append(
                {"bin": number, "tokens": int(inside.sum())}
                | {name: float(value[inside].mean()) for name, value in values.items()}
            )
        return rows

    by_confidence = [{"from": row["bin"] / BINS, "to": (row["bin"] + 1) / BINS, **row} for row in means(of_confidence)]
    by_frequency = [{"from": 2 ** row["bin"], "to": 2 ** (row["bin"] + 1) - 1, **row} for row in means(of_frequency)]
    for row in (*by_confidence, *by_frequency):
        del row["bin"]
    error = sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in by_confidence) / len(nll)
    return {
        "expected_calibration_error": error,
        "accuracy": float(hits.mean()),
        "confidence": float(confidence.mean()),
        "by_confidence": by_confidence,
        "by_frequency": by_frequency,
    }
