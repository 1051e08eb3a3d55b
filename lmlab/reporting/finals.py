"""The final figures of what can be compared, with their intervals.

Shapes: D documents, R replicates, S sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmlab.evaluation.comparison import (
    CELLS,
    FEWEST,
    REPLICATES,
    Difference,
    Side,
    aligned,
    chunks,
    difference,
    expansion,
    paired,
    same_draw,
)
from lmlab.evaluation.metrics import perplexity
from lmlab.evaluation.records import Records

BEST = 40
"""Sides whose difference from the best is worked out, and that a chart has room for."""


@dataclass(frozen=True)
class Final:
    """What a side came to."""

    name: str
    places: list[Path]
    bits_per_byte: tuple[float, float | None, float | None]
    """The mean over the runs, and the ends of its 95 % interval; these are None where there are too few documents."""
    bound: bool
    """Whether bits per byte are an upper bound, as some tokens were unknown."""
    paired: str
    """What the intervals are over: documents, or their stretches."""
    perplexity: tuple[float, float | None, float | None]
    """exp of the mean over the side's runs of nll per token."""
    difference: Difference | None
    """From the best, in bits per byte; None for the best itself, and beyond `BEST`."""


def finals(evaluations: Sequence[Records], names: Mapping[Path, str]) -> list[Final]:
    """The sides of evaluations that can be compared, best first.

    Args:
        names: what to call an evaluation, by its place. Those of one configuration have one name.
    """
    evaluations = aligned(evaluations)
    sides = sorted(sides_of(evaluations, names), key=lambda side: float(side.figures.mean()))
    low_and_high = intervals(sides)
    return [
        Final(
            side.name,
            [run.path for run in side.runs],
            (float(side.figures.mean()), *low_and_high[i][0]),
            side.bound,
            paired(evaluations),
            (perplexity(float(nll_per_token(side).mean())), *low_and_high[i][1]),
            difference(side, sides[0]) if 0 < i < BEST else None,
        )
        for i, side in enumerate(sides)
    ]


def sides_of(evaluations: Sequence[Records], names: Mapping[Path, str]) -> list[Side]:
    """Evaluations of one name and precision are one side. Of the same weights or seed one counts: more are no draws."""
    groups: dict[tuple[str, str], list[Records]] = {}
    for e in evaluations:
        alike = groups.setdefault((names.get(e.path, str(e.path)), e.certificate["precision"]), [])
        if not any(same_draw(other, e) for other in alike):
            alike.append(e)
    several = len({precision for _, precision in groups}) > 1
    return [
        Side(f"{name}, evaluated in {precision}" if several else name, alike)
        for (name, precision), alike in groups.items()
    ]


def nll_per_token(side: Side) -> np.ndarray:
    """[runs] nats."""
    sums = (run.sums for run in side.runs)
    return np.array([nll[:, 0].sum() / units[:, 0].sum() for nll, units in sums])


def intervals(sides: Sequence[Side]) -> list[tuple[tuple[float | None, float | None], ...]]:
    """Of each side the 95 % intervals of bits per byte and of perplexity, over documents and seeds.

    As those of `comparing.difference`: a bootstrap over the documents, widened for few of them, to which a draw
    from t with the standard error of the runs' mean is added where a side has several runs. All sides are
    resampled alike.
    """
    sums = np.stack([np.mean([of_documents(run) for run in side.runs], axis=0) for side in sides], axis=1)  # [D, S, 4]
    sums = sums[sums.any(axis=(1, 2))]
    documents = len(sums)
    if documents < FEWEST:
        return [((None, None), (None, None))] * len(sides)
    random = np.random.default_rng(0)
    columns = sums.reshape(documents, -1)
    drawn = []
    for count in chunks(REPLICATES, max(1, CELLS // max(columns.shape))):
        picked = random.integers(documents, size=(count, documents)) + documents * np.arange(count)[:, None]
        counts = np.bincount(picked.ravel(), minlength=count * documents).reshape(count, documents)
        drawn.append(two_ratios((counts.astype(np.float64) @ columns).reshape(count, len(sides), 4)))
    values = two_ratios(sums.sum(axis=0))  # [S, 2]
    spread = values + (np.concatenate(drawn) - values) * expansion(documents)  # [R, S, 2]
    for i, side in enumerate(sides):
        runs = len(side.runs)
        if runs > 1:
            errors = [figures.std(ddof=1) / math.sqrt(runs) for figures in (side.figures, nll_per_token(side))]
            spread[:, i] += random.standard_t(runs - 1, REPLICATES)[:, None] * errors
    low, high = np.nanquantile(spread, [0.025, 0.975], axis=0)
    return [
        ((float(low[i, 0]), float(high[i, 0])), (perplexity(float(low[i, 1])), perplexity(float(high[i, 1]))))
        for i in range(len(sides))
    ]


def of_documents(run: Records) -> np.ndarray:
    """[D, 4]: bits and bytes, nll in nats and tokens of each document."""
    nll, units = run.sums
    return np.concatenate([run.bits_and_bytes, nll[:, :1], units[:, :1]], axis=1)


def two_ratios(sums: np.ndarray) -> np.ndarray:
    """[..., 2] of sums [..., 4]: bits per byte, and nats per token."""
    return np.stack([sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]], axis=-1)
