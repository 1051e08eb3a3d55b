"""Is the difference real? Evaluations paired by document, with the seed as a random effect.

A side is what is compared: one evaluation, or several of runs that differ in their seed only.

Where documents are few, their stretches stand for them (data/documents.py).

Shapes: D documents, R replicates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.errors import UserError, nearest
from lmlab.evaluation.records import Records, is_bound, read
from lmlab.runs.choices import as_typed, config_choices
from lmlab.runs.directory import RunDirectory

REPLICATES = 10_000
FEWEST = 6  # documents; with fewer, no swap of sides is rarer than 5 in 100
CELLS = 2**20  # replicates × documents that are held at once


@dataclass(frozen=True)
class Side:
    """Evaluations that stand for one thing."""

    name: str
    runs: list[Records]

    @cached_property
    def sums(self) -> np.ndarray:
        """[D, 2]: bits and bytes of each document, means over the runs."""
        return np.mean([run.bits_and_bytes for run in self.runs], axis=0)

    @cached_property
    def figures(self) -> np.ndarray:
        """[runs] bits per byte."""
        return np.array([ratio(run.bits_and_bytes.sum(axis=0)) for run in self.runs])

    @property
    def bound(self) -> bool:
        """Whether its bits per byte are an upper bound."""
        return any(is_bound(run.certificate) for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """How a side differs from another, in bits per byte."""

    value: float | None
    """None for a side from itself."""
    low: float | None
    """Of the 95 % interval; None where there are too few documents."""
    high: float | None
    p: float | None
    """Probability of such a difference, either way, if there were none."""


def aligned(runs: Sequence[Records]) -> list[Records]:
    """Evaluations of one text with rows of the same kind: whole documents, unless all of them have stretches."""
    return [*runs] if len({len(run.table) for run in runs}) == 1 else [run.of_whole_documents() for run in runs]


def paired(runs: Sequence[Records]) -> str:
    """What people are told that the rows of records are: all statistics here pair and resample them."""
    return "stretches" if any(run.cut for run in runs) else "documents"


def ratio(sums: np.ndarray) -> np.ndarray:
    """Bits per byte [...] of sums [..., 2]."""
    return sums[..., 0] / sums[..., 1]


def evaluations(places: Sequence[Path]) -> list[Records]:
    """The evaluations in directories; one that holds none itself stands for all those under it."""
    found: list[Path] = []
    for place in places:
        certificate = RunDirectory(place).certificate
        under = [place] if certificate.is_file() else sorted(file.parent for file in place.rglob(certificate.name))
        if not under:
            raise UserError(
                f"{place} holds no evaluation (no {certificate.name}).\n"
                "A run writes one at its end; for any other model: python -m lmlab.evaluate model=…"
            )
        found += under
    twice = next((place for i, place in enumerate(found) if place.resolve() in map(Path.resolve, found[:i])), None)
    if twice:
        raise UserError(f"{twice} is named twice.")
    if len(found) < 2:
        raise UserError(f"{found[0]} is the only evaluation. Name at least two directories.")
    return [read(place) for place in found]


def check_comparable(runs: Sequence[Records]) -> None:
    """Refuse evaluations whose figures do not mean the same."""
    first = runs[0]
    same = "Evaluate both in the same way: python -m lmlab.evaluate model=… data=… context=…"
    for other in runs[1:]:
        one, two = first.certificate, other.certificate
        both = f"{first.place} and {other.place} can't be compared:"
        if one["figure"] != two["figure"]:
            raise UserError(f"{both} {one['figure']} is not {two['figure']}.")
        if one["data_hash"] != two["data_hash"]:
            names = {*first.table["document"].to_pylist()}
            shared = len(names & {*other.table["document"].to_pylist()})
            raise UserError(
                f"{both} they were evaluated on other text; {shared or 'no'} of {len(names)} documents "
                f"{'is' if shared == 1 else 'are'} in both.\n{same}"
            )
        for key in one["policy"] | two["policy"]:
            here, there = one["policy"].get(key), two["policy"].get(key)
            if here != there:
                raise UserError(f"{both} {key} is {as_typed(here)} in one and {as_typed(there)} in the other.\n{same}")
        # Which tokens are masked, or sampled, is drawn token by token.
        drawn = one["policy"]["masks_seed"] is not None or (one["policy"]["pseudo"] or {}).get("sample")
        if drawn and one["tokenizer_hash"] != two["tokenizer_hash"]:
            raise UserError(
                f"{both} their tokenizers differ, so other parts of the text were scored.\n"
                "score=pseudo without a sample scores every token, and compares across tokenizers."
            )


def choices_of(run: Records) -> dict[str, Any]:
    """What was chosen for the evaluated run, by dotted keys; the model's name where it is no run of lmlab."""
    trained, measured = run.certificate["run"], {"evaluated in": run.certificate["precision"]}
    if trained is None:
        return {"model": run.certificate["model"], "weights": run.certificate["weights_hash"]} | measured
    return config_choices(trained["config"]) | measured


def sides_of(runs: Sequence[Records]) -> list[Side]:
    """Runs that differ in their seed only are one side, unless that would leave a single one."""
    groups: dict[str, list[Records]] = {}
    for run in runs:
        groups.setdefault(repr(sorted((choices_of(run) | {"seed": None}).items())), []).append(run)
    together = list(groups.values()) if len(groups) > 1 else [[run] for run in runs]
    for group in together:
        for one, other in combinations(group, 2):
            same = same_draw(one, other)
            if same:
                raise UserError(
                    f"{one.place} and {other.place} are evaluations of the same {same}: as runs of several seeds "
                    "they would count twice.\nLeave one of them out."
                )
    keys = differing([Side("", group) for group in together])
    names = [side_name(keys, i, group) for i, group in enumerate(together)]
    if len(set(names)) < len(names):  # what they differ in is machinery
        names = [side_name({}, i, group) for i, group in enumerate(together)]
    return [Side(name, group) for name, group in zip(names, together, strict=True)]


def same_draw(one: Records, other: Records) -> str | None:
    """What two runs of one configuration share that makes them a single draw of its seed; None if nothing."""
    if one.certificate["weights_hash"] == other.certificate["weights_hash"]:
        return "weights"
    trained = [run.certificate["run"] for run in (one, other)]
    seeds = [run["config"].get("seed") for run in trained if run]
    return "seed" if len(seeds) == 2 and seeds[0] == seeds[1] is not None else None


def differing(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """The keys in which the sides' configs differ, and the value of each side; None where one has no such key."""
    choices = [choices_of(side.runs[0]) for side in sides]
    if any(len(side.runs) > 1 for side in sides):
        choices = [{key: value for key, value in of_side.items() if key != "seed"} for of_side in choices]
    keys = dict.fromkeys(key for of_side in choices for key in of_side)
    values = {key: [of_side.get(key) for of_side in choices] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def side_name(keys: dict[str, list[Any]], index: int, group: Sequence[Records]) -> str:
    """What makes a side, in few words; else its directory."""
    if 0 < len(keys) <= 3:
        return ", ".join(f"{key}={as_typed(found[index])}" for key, found in keys.items())
    return str(group[0].place) if len(group) == 1 else f"{group[0].place} and {len(group) - 1} more"


def seed_error(one: Side, other: Side) -> tuple[float, float]:
    """The standard error that the seeds bring into the difference of two sides, and its degrees of freedom.

    The seed is a random effect of its own variance on each side (Welch 1947). A side of a
    single run is taken to vary as the other does; two such sides say nothing about seeds.
    """
    sides = [side.figures for side in (one, other)]
    known = [figures.var(ddof=1) for figures in sides if len(figures) > 1]
    if not known or not any(known):
        return 0.0, 0.0
    parts = [(figures.var(ddof=1) if len(figures) > 1 else known[0]) / len(figures) for figures in sides]
    if len(known) == 1:
        freedom = max(map(len, sides)) - 1.0
    else:
        freedom = sum(parts) ** 2 / sum(
            part**2 / (len(figures) - 1) for part, figures in zip(parts, sides, strict=True)
        )
    return math.sqrt(sum(parts)), freedom


def difference(side: Side, other: Side) -> Difference:
    """How far `side` lies from `other`: paired bootstrap interval and permutation test over the documents.

    The interval holds the middle 95 % of the differences of R resamples of the documents
    (Efron and Tibshirani 1993, chapter 13), widened for few documents. The test swaps the
    two sides document by document (Noreen 1989). Where sides have several runs, each replicate also gets a
    difference that their seeds could have made: a draw from t with the standard error of
    `seed_error`. Seen from the other side, all of it is the same with the other sign.
    """
    sums = np.stack([side.sums, other.sums])  # [2, D, 2]
    value = float(np.subtract(*ratio(sums.sum(axis=1))))
    if value < 0:
        found = difference(other, side)
        low, high = (None if end is None else -end for end in (found.high, found.low))
        return Difference(value, low, high, found.p)
    scored = sums[0].any(axis=1) | sums[1].any(axis=1)
    sums = sums[:, scored]
    documents = sums.shape[1]
    if documents < FEWEST:
        return Difference(value, None, None, None)
    random = np.random.default_rng(0)
    error, freedom = seed_error(side, other)
    of_seeds = [error * random.standard_t(freedom, REPLICATES) if freedom else 0.0 for _ in range(2)]
    columns = sums.transpose(1, 0, 2).reshape(documents, 4)
    middle, half = sums.mean(axis=0).sum(axis=0), (sums[0] - sums[1]) / 2
    resampled, swapped = [], []
    for count in chunks(REPLICATES, max(1, CELLS // documents)):
        drawn = random.integers(documents, size=(count, documents)) + documents * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)
        both = ratio((counts @ columns).reshape(count, 2, 2))
        resampled.append(both[:, 0] - both[:, 1])
        moved = (2.0 * random.integers(2, size=(count, documents)) - 1) @ half
        swapped.append(ratio(middle + moved) - ratio(middle - moved))
    spread = value + (np.concatenate(resampled) - value) * expansion(documents)
    low, high = np.nanquantile(spread + of_seeds[0], [0.025, 0.975])
    as_far = np.abs(np.concatenate(swapped) + of_seeds[1]) >= abs(value) * (1 - 1e-12)
    return Difference(value, float(low), float(high), float((1 + as_far.sum()) / (1 + REPLICATES)))


def expansion(documents: int) -> float:
    """What a percentile interval is too narrow by (Hesterberg 2015, section 3.2): t over z, and n over n - 1."""
    z, freedom = 1.959964, documents - 1
    # Abramowitz and Stegun 1964, 26.7.5.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(documents / freedom)


def chunks(count: int, size: int) -> Iterator[int]:
    """`count` in pieces of at most `size`."""
    for start in range(0, count, size):
        yield min(size, count - start)


def table(sides: Sequence[Side], against: int = 0) -> list[dict[str, Any]]:
    """One row per side: its bits per byte, the deviation over its seeds, and how it differs from the side `against`."""
    figures = sides[0].runs[0].certificate["figures"]
    rows = []
    for number, side in enumerate(sides):
        found = Difference(None, None, None, None) if number == against else difference(side, sides[against])
        rows.append(
            {
                "side": side.name,
                "runs": len(side.runs),
                "figure": next(name for name in figures if name.endswith("bits_per_byte")).replace("_", " "),
                "bytes": float(side.sums[:, 1].sum()),
                "unknown_bytes": max(run.certificate["totals"].get("unknown_bytes", 0) for run in side.runs),
                "value": float(side.figures.mean()),
                "deviation_of_seeds": float(side.figures.std(ddof=1)) if len(side.runs) > 1 else None,
                **of_difference(found),
            }
        )
    return rows


def of_difference(found: Difference) -> dict[str, float | None]:
    """A difference as part of a table's row."""
    return {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}


def pairs(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """One row per two sides: how the later one differs from the earlier, and p corrected for the number of pairs."""
    rows: list[dict[str, Any]] = [
        {
            "row": later + 1,
            "side": sides[later].name,
            "from_row": earlier + 1,
            "from_side": sides[earlier].name,
            **of_difference(difference(sides[later], sides[earlier])),
        }
        for earlier, later in combinations(range(len(sides)), 2)
    ]
    corrected = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected such that any of them is below 0.05 in 5 of 100 cases at most where nothing differs.

    The smallest of m is multiplied by m, the next by m - 1, and so on, none below one before it (Holm 1979).
    """
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        corrected[i] = least
    return corrected


def row_of(sides: Sequence[Side], wanted: str) -> int:
    """The place of a side that is named by the number of its row, from 1, or as the table names it.

    Raises:
        UserError: there is none.
    """
    names = [side.name for side in sides]
    if wanted.isdecimal() and 1 <= int(wanted) <= len(sides):
        return int(wanted) - 1
    if wanted in names:
        return names.index(wanted)
    raise UserError(
        f"--against {wanted}: there is no such row.{nearest(wanted, names)}\n"
        f"Rows are 1 to {len(sides)}, as the table shows them without --against."
    )


def furthest(sides: Sequence[Side], count: int, against: int = 0) -> list[dict[str, Any]]:
    """Of each side, the documents that take it the most bits more, or fewer, than the side `against`."""
    reference = sides[against]
    names, starts = (reference.runs[0].table[column].to_pylist() for column in ("document", "start"))
    rows = []
    for number, side in enumerate(sides, 1):
        if side is reference:
            continue
        more = side.sums[:, 0] - reference.sums[:, 0]
        ranked = np.argsort(-np.abs(more), kind="stable")
        scored = (side.sums + reference.sums)[ranked].any(axis=1)
        for i in ranked[scored][:count].tolist():
            rows.append(
                {
                    "row": number,
                    "side": side.name,
                    "document": names[i],
                    "begins": starts[i],
                    "bits_more": float(more[i]),
                    **{
                        key: float(sums[0] / sums[1]) if sums[1] else None
                        for key, sums in (("bits_per_byte", side.sums[i]), ("of_the_other", reference.sums[i]))
                    },
                    "bytes": int(reference.sums[i, 1]),
                }
            )
    return rows


def shown_p(p: float | None) -> str:
    """A p value for people; of so many replicates none may have gone as far."""
    return "" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"
