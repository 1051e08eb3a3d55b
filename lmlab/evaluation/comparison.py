"""Tests of the difference between two models: evaluations paired by document, with the seed as a random effect.

Shapes: D documents, R replicates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lmlab.evaluation.sides import Side, ratio
from lmlab.evaluation.suites.suite import SuiteRecords

REPLICATES = 10_000
"""The number of random draws of a test: of documents drawn anew, and of sides exchanged."""
FEWEST = 6
"""The least number of documents for a test: with fewer, no exchange of the two sides is rarer than 5 in 100."""
CELLS = 2**20
"""The greatest number of replicates × documents that are in memory at once."""


@dataclass(frozen=True)
class Difference:
    """The difference of one side from another, in bits per byte or in the score of a suite.

    Of a side from itself, every field is None.
    """

    difference: float | None = None
    low: float | None = None
    """The lower end of the 95 % interval; None where there are fewer than `FEWEST` documents."""
    high: float | None = None
    p: float | None = None
    """The probability of a difference at least as large, in either direction, if the sides did not differ."""
    decides: bool | None = None
    """False where the side with more bits is an upper bound and the other is exact: the exact value behind the bound
    may be the lower one. A bound below an exact value shows that its model is the better one."""


def seed_error(one: Side, other: Side) -> tuple[float, float]:
    """Returns the standard error of the difference of two sides that is due to seeds, and its degrees of freedom.

    Another seed would give another bits per byte, so a difference between two runs is partly chance even on
    infinitely many documents. The seed is taken as a random effect with a variance s² of its own on each side: the
    mean of n runs then has the variance s²/n, the variances of the two means add up, and the degrees of freedom of
    the sum are those of Welch (1947, "The generalization of Student's problem when several different population
    variances are involved", Biometrika 34). A side of a single run is taken to vary as the other does. Two such sides
    say nothing about seeds, and give (0, 0).
    """
    sides = [side.ratios for side in (one, other)]
    known = [values.var(ddof=1) for values in sides if len(values) > 1]
    if not known or not any(known):
        return 0.0, 0.0
    parts = [(values.var(ddof=1) if len(values) > 1 else known[0]) / len(values) for values in sides]
    if len(known) == 1:
        freedom = max(map(len, sides)) - 1.0
    else:
        freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, sides, strict=True))
    return math.sqrt(sum(parts)), freedom


def difference(side: Side, other: Side) -> Difference:
    """Returns how far `side` lies from `other`: a paired bootstrap interval and a permutation test over the documents.

    Both models were scored on the same documents, and a document that is hard for one is hard for the other. So the
    documents are kept in pairs, which leaves only what the two models do not share:

    - *Interval* (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). The documents are drawn
      anew with replacement, R times, and the difference is worked out each time: what it would have been had other
      documents of the same kind been held out. The interval holds the middle 95 % of these differences, widened for
      few documents (`expansion`).
    - *p* (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"). If the models did not differ, it would
      not matter which of the two scores of a document belongs to which. So they are exchanged at random, document by
      document, R times; p is the share of these that lie as far from 0 as what was measured, the measurement itself
      counted as one of them.

    Where sides have several runs, each replicate also gets a difference that their seeds could have made: a draw from
    Student's t with the standard error of `seed_error`. `difference(a, b)` is `difference(b, a)` with the other sign.
    """
    sums = np.stack([side.sums, other.sums])  # [2, D, 2]
    value = float(np.subtract(*ratio(sums.sum(axis=1))))
    if value < 0:
        found = difference(other, side)
        low, high = (None if end is None else -end for end in (found.high, found.low))
        return Difference(value, low, high, found.p, found.decides)
    decides = side.exact or not other.exact  # as `side` has more bits
    scored = sums[0].any(axis=1) | sums[1].any(axis=1)
    sums = sums[:, scored]
    documents = sums.shape[1]
    if documents < FEWEST:
        return Difference(value, decides=decides)
    random = np.random.default_rng(0)
    error, freedom = seed_error(side, other)
    from_seeds = [error * random.standard_t(freedom, REPLICATES) if freedom else 0.0 for _ in range(2)]
    columns = sums.transpose(1, 0, 2).reshape(documents, 4)
    middle, half = sums.mean(axis=0).sum(axis=0), (sums[0] - sums[1]) / 2
    resampled, exchanged = [], []
    for count in chunks(REPLICATES, max(1, CELLS // documents)):
        both = ratio(resample(columns, count, random).reshape(count, 2, 2))
        resampled.append(both[:, 0] - both[:, 1])
        moved = (2.0 * random.integers(2, size=(count, documents)) - 1) @ half
        exchanged.append(ratio(middle + moved) - ratio(middle - moved))
    low, high = interval(value, np.concatenate(resampled), documents, from_seeds[0])
    as_far = np.abs(np.concatenate(exchanged) + from_seeds[1]) >= abs(value) * (1 - 1e-12)
    return Difference(value, float(low), float(high), float((1 + as_far.sum()) / (1 + REPLICATES)), decides)


def resample(columns: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Returns the sums [count, K] of columns [D, K] over D documents drawn with replacement, `count` times."""
    documents = len(columns)
    drawn = random.integers(documents, size=(count, documents)) + documents * np.arange(count)[:, None]
    times = np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)
    sums: np.ndarray = times @ columns
    return sums


def interval(value: Any, resampled: np.ndarray, documents: int, from_seeds: Any) -> np.ndarray:
    """Returns the ends [2, ...] of 95 % intervals from values resampled over documents [R, ...], and draws of seeds."""
    values = value + (resampled - value) * expansion(documents) + from_seeds
    ends: np.ndarray = np.nanquantile(values, [0.025, 0.975], axis=0)
    return ends


def expansion(documents: int) -> float:
    """Returns the factor by which a percentile interval of the bootstrap over so many documents is too narrow.

    It takes the normal quantile z where Student's t belongs, and divides by n where n - 1 belongs (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap", The American Statistician 69, section 3.2).
    """
    z, freedom = 1.959964, documents - 1
    # The quantile of t by its expansion around z: Abramowitz and Stegun 1964, 26.7.5.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(documents / freedom)


def chunks(count: int, size: int) -> Iterator[int]:
    """Yields the sizes of the pieces into which `count` is cut, each `size` at most."""
    for start in range(0, count, size):
        yield min(size, count - start)


def compare_sides(sides: Sequence[Side], against: int = 0) -> list[dict[str, Any]]:
    """Returns a row for each side: bits per byte, their deviation over seeds, the difference from side `against`."""
    figure = next(name for name in sides[0].runs[0].certificate["figures"] if name.endswith("bits_per_byte"))
    return [
        {
            "side": side.name,
            "runs": len(side.runs),
            "figure": figure.removeprefix("bound_").replace("_", " "),
            "bytes": float(side.sums[:, 1].sum()),
            "exact": side.exact,
            "ends": side.runs[0].certificate["totals"].get("ends"),
            "unknown_bytes": max(run.certificate["totals"].get("unknown_bytes", 0) for run in side.runs),
            **compare_ratios(sides, number, against),
        }
        for number, side in enumerate(sides)
    ]


def compare_groups(sides: Sequence[Side], against: int = 0) -> list[dict[str, Any]]:
    """Returns a row for each side of evaluations by a suite, first over all their records and then over each group.

    A row has the mean score, its deviation over seeds, and the difference from side `against`, paired by record.
    """
    kind = sides[0].runs[0]
    assert isinstance(kind, SuiteRecords)
    of_all: list[tuple[str, Sequence[Side]]] = [("all", sides)]
    of_each: list[tuple[str, Sequence[Side]]] = [
        (name, [side.of_domain(name) for side in sides]) for name in sides[0].runs[0].domains
    ]
    return [
        {
            kind.group: name,
            "side": side.name,
            "runs": len(side.runs),
            kind.rows: len(side.sums),
            **compare_ratios(some, number, against),
        }
        for name, some in (of_all + of_each if len(of_each) > 1 else of_all)
        for number, side in enumerate(some)
    ]


def compare_ratios(sides: Sequence[Side], number: int, against: int) -> dict[str, Any]:
    """Returns the ratio of a side, its deviation over seeds, and the difference from side `against`."""
    ratios = sides[number].ratios
    return {
        "value": float(ratios.mean()),
        "deviation_of_seeds": float(ratios.std(ddof=1)) if len(ratios) > 1 else None,
        **vars(Difference() if number == against else difference(sides[number], sides[against])),
    }


def compare_pairs(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Returns a row for each pair of sides: the difference of the later from the earlier, and p corrected by `holm`."""
    rows: list[dict[str, Any]] = [
        {
            "row": later + 1,
            "side": sides[later].name,
            "from_row": earlier + 1,
            "from_side": sides[earlier].name,
            **vars(difference(sides[later], sides[earlier])),
        }
        for earlier, later in combinations(range(len(sides)), 2)
    ]
    corrected = holm([row["p"] if row["decides"] else None for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Returns p values corrected for their number; None stays None.

    Of twenty p values of models that do not differ, one is below 0.05 on average. After the correction the chance
    that any is, is at most 5 in 100. The smallest of m values is multiplied by m, the next by m - 1, and so on, and
    none is below one before it (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian
    Journal of Statistics 6).
    """
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        corrected[i] = least
    return corrected


def excess_bits(sums: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns the bits [D] by which documents take more than others of as many bytes, of bits and bytes [D, 2]."""
    share = np.divide(reference[:, 1], sums[:, 1], out=np.ones(len(sums)), where=(sums[:, 1] > 0))
    excess: np.ndarray = sums[:, 0] * share - reference[:, 0]
    return excess


def largest_differences(sides: Sequence[Side], count: int, against: int = 0) -> list[dict[str, Any]]:
    """Returns rows for the `count` documents on which each side differs most, in bits, from side `against`.

    `bits_more` is the difference in bits per byte times the bytes that side `against` scored. Sides need not have
    scored the same bytes: the first token of a block has a bound, but no nll under a causal model.
    """
    reference = sides[against]
    names, starts = (reference.runs[0].table[column].to_pylist() for column in ("document", "start"))
    rows = []
    for number, side in enumerate(sides, 1):
        if side is reference:
            continue
        more = excess_bits(side.sums, reference.sums)
        ranked = np.argsort(-np.abs(more), kind="stable")
        scored = (side.sums + reference.sums)[ranked].any(axis=1)
        for i in ranked[scored][:count].tolist():
            own, other = (float(sums[0] / sums[1]) if sums[1] else None for sums in (side.sums[i], reference.sums[i]))
            rows.append(
                {
                    "row": number,
                    "side": side.name,
                    "document": names[i],
                    "begins": starts[i],
                    "bits_more": float(more[i]),
                    "bits_per_byte": own,
                    "of_the_other": other,
                    "bytes": int(reference.sums[i, 1]),
                }
            )
    return rows
