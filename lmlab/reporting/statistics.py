"""The final metrics of configurations with their intervals, and the sentences that say what these decide.

Shapes: D documents, R replicates, S sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmlab.console import counted
from lmlab.errors import UserError, first_line
from lmlab.evaluation.comparison import CELLS, FEWEST, REPLICATES, Difference, chunks, difference, interval, resample
from lmlab.evaluation.metrics import BOUND, metric_prefix, perplexity
from lmlab.evaluation.records import AT_MOST, Records
from lmlab.evaluation.sides import Side, align, check_comparable, row_unit, shared_draw
from lmlab.reporting.text import interval_text, letter
from lmlab.runs.status import ENDED

BEST = 40
"""Configurations whose difference from the best is worked out, and that a chart has room for."""
NAMED = 2
"""Configurations that a sentence names before it counts them."""
BITS_OF_BOUND = f"{metric_prefix(BOUND)}bits_per_byte".replace("_", " ")
BY_DEFINITION = "these models write in any order, and the exact value may be lower."
BY_CHARGE = "of text that a tokenizer can't spell, each byte is charged 8 bits."

Estimate = tuple[float, float | None, float | None]
"""A value, and the ends of its 95 % interval; these are None where there are too few documents."""


@dataclass(frozen=True)
class Final:
    """The final metrics of a configuration."""

    name: str
    paths: list[Path]
    """The directories of its runs."""
    bits_per_byte: Estimate
    """The mean over the runs."""
    bound: bool
    """True if bits per byte are an upper bound, by the metric's definition or as some tokens were unknown."""
    unit: str
    """The unit that the intervals are over: documents, or stretches of them."""
    perplexity: Estimate
    """exp of the mean over the runs of nll per token."""
    difference: Difference | None
    """The difference from the best, in bits per byte; None for the best itself, and beyond `BEST`."""


def split_comparable(evaluations: Sequence[Records]) -> tuple[list[list[Records]], list[str]]:
    """Puts evaluations together whose metrics mean the same.

    Returns:
        the kinds of evaluation, the most frequent first, and for each but the first why it stands apart from it.
    """
    kinds: list[list[Records]] = []
    for records in evaluations:
        alike = next((kind for kind in kinds if not why_incomparable(kind[0], records)), None)
        if alike is None:
            kinds.append(alike := [])
        alike.append(records)
    kinds.sort(key=len, reverse=True)
    return kinds, [why_incomparable(kinds[0][0], kind[0]) for kind in kinds[1:]]


def why_incomparable(one: Records, other: Records) -> str:
    """Returns why two evaluations can't be compared; the empty string where they can."""
    try:
        check_comparable([one, other])
    except UserError as error:
        return first_line(error).partition("can't be compared: ")[2]
    return ""


def final_metrics(evaluations: Sequence[Records], names: Mapping[Path, str]) -> list[Final]:
    """Returns the final metrics of the configurations of evaluations that can be compared, best first.

    Args:
        names: the configuration of each evaluation, by its directory.
    """
    evaluations = align(evaluations)
    sides = sorted(sides_by_name(evaluations, names), key=lambda side: float(side.ratios.mean()))
    return [
        Final(
            side.name,
            [run.path for run in side.runs],
            (float(side.ratios.mean()), *of_bits),
            side.bound,
            row_unit(evaluations),
            (perplexity(float(nll_per_token(side).mean())), *of_perplexity),
            difference(side, sides[0]) if 0 < i < BEST else None,
        )
        for i, (side, (of_bits, of_perplexity)) in enumerate(zip(sides, intervals(sides), strict=True))
    ]


def sides_by_name(evaluations: Sequence[Records], names: Mapping[Path, str]) -> list[Side]:
    """Takes evaluations of one name and precision as one side.

    Of several of the same weights or seed one counts: the others are no further draws of the seed.
    """
    groups: dict[tuple[str, str], list[Records]] = {}
    for records in evaluations:
        group = groups.setdefault((names[records.path], records.certificate["precision"]), [])
        if not any(shared_draw(other, records) for other in group):
            group.append(records)
    several = len({precision for _, precision in groups}) > 1
    return [
        Side(f"{name}, evaluated in {precision}" if several else name, group)
        for (name, precision), group in groups.items()
    ]


def nll_per_token(side: Side) -> np.ndarray:
    """Returns the nll per token of each run [runs], in nats."""
    sums = (run.sums for run in side.runs)
    return np.array([nll[:, 0].sum() / units[:, 0].sum() for nll, units in sums])


def intervals(sides: Sequence[Side]) -> list[tuple[tuple[float | None, float | None], ...]]:
    """Returns the 95 % intervals of bits per byte and of perplexity of each side, over documents and seeds.

    They are made as that of `comparison.difference` is: by a bootstrap over the documents, widened for few of them,
    to which a draw from t with the standard error of the runs' mean is added where a side has several runs. All sides
    are resampled alike.
    """
    sums = np.stack([np.mean([document_sums(run) for run in side.runs], axis=0) for side in sides], axis=1)  # [D, S, 4]
    sums = sums[sums.any(axis=(1, 2))]
    documents = len(sums)
    if documents < FEWEST:
        return [((None, None), (None, None))] * len(sides)
    random = np.random.default_rng(0)
    columns = sums.reshape(documents, -1)
    resampled = np.concatenate(
        [
            ratios(resample(columns, count, random).reshape(count, len(sides), 4))
            for count in chunks(REPLICATES, max(1, CELLS // max(columns.shape)))
        ]
    )
    from_seeds = np.zeros_like(resampled)  # [R, S, 2]
    for i, side in enumerate(sides):
        runs = len(side.runs)
        if runs > 1:
            errors = [values.std(ddof=1) / math.sqrt(runs) for values in (side.ratios, nll_per_token(side))]
            from_seeds[:, i] = random.standard_t(runs - 1, REPLICATES)[:, None] * errors
    ends = interval(ratios(sums.sum(axis=0)), resampled, documents, from_seeds).tolist()  # [2][S][2]
    return [((low[0], high[0]), (perplexity(low[1]), perplexity(high[1]))) for low, high in zip(*ends, strict=True)]


def document_sums(run: Records) -> np.ndarray:
    """Returns bits and bytes, nll in nats and tokens of each document [D, 4]."""
    nll, units = run.sums
    return np.concatenate([run.terms, nll[:, :1], units[:, :1]], axis=1)


def ratios(sums: np.ndarray) -> np.ndarray:
    """Returns bits per byte and nats per token [..., 2] of sums [..., 4]."""
    return sums[..., ::2] / sums[..., 1::2]


def verdict(kinds: Sequence[tuple[str, Sequence[Final]]], statuses: Mapping[str, int], unranked: int) -> list[str]:
    """Returns sentences on which configuration is best, whether that is decided, and which runs have no part in it.

    A difference is decided where its 95 % interval lies above 0. Only the best and the others are compared, and the
    intervals are not corrected for their number.

    Args:
        kinds: the name of the bits per byte and the configurations, best first, of each kind of evaluation.
        statuses: the number of runs of each.
        unranked: the number of runs that have finished without an evaluation.
    """
    sentences = [
        (f"{letter(number)}: " if len(kinds) > 1 else "") + kind_verdict(name, finals)
        for number, (name, finals) in enumerate(kinds)
    ]
    bounded = [name for name, finals in kinds if any(final.bound for final in finals)]
    reasons = [BY_DEFINITION if name == BITS_OF_BOUND else BY_CHARGE for name in bounded]
    sentences += [f"{AT_MOST}is an upper bound: {reason}" for reason in dict.fromkeys(reasons)]
    if unranked:
        them = "it" if unranked == 1 else "them"
        sentences.append(f"{counted(unranked, 'run')} finished, without an evaluation to rank {them} by.")
    unfinished = sum(count for status, count in statuses.items() if status not in ENDED)
    if unfinished and not kinds and not unranked:
        sentences.append("None has finished, so none is ranked; what is known so far is shown.")
    elif unfinished:
        verb = "has" if unfinished == 1 else "have"
        sentences.append(f"{counted(unfinished, 'run')} {verb} not finished, and {verb} no part in this.")
    return sentences


def kind_verdict(bits_per_byte: str, finals: Sequence[Final]) -> str:
    """Returns a sentence on which of the configurations is best, and whether that is decided."""
    best, *others = finals
    value = bits_text(best)
    if not others:
        runs = len(best.paths)
        how = f"in the mean of {runs} seeds" if runs > 1 else "with one run"
        return f"Only one configuration is ranked, {best.name}: {value} {bits_per_byte} {how}."
    second = others[0]
    seeds = [len(final.paths) for final in (best, second)]
    which = "best" if len(others) == 1 else f"the best of {len(finals)}"
    mean = " in the mean" if max(seeds) > 1 else ""
    head = f"{best.name} is {which}{mean}: {value} against {bits_text(second)} {bits_per_byte} for {second.name}"
    gap = second.difference
    if gap is None or gap.low is None:
        return f"{head}; fewer than {FEWEST} {best.unit} were scored, too few to say whether that is chance."
    decided = gap.low > 0
    head += f", 95 % interval of the difference {interval_text(gap.low, gap.high)}"
    undecided = [other.name for other in others[1:] if other.difference and (other.difference.low or 0) <= 0]
    rest = ""
    if decided and undecided:
        names = " and ".join(undecided) if len(undecided) <= NAMED else f"{len(undecided)} others"
        rest = f", but not against {names}"
    if max(seeds) == 1:
        alone = f"the {best.unit} alone {'decide' if decided else 'do not decide'} it{rest}"
        return f"{head}: {alone}, and with one run each, another seed could turn it round."
    by = f"{seeds[0]} seeds" if seeds[0] == seeds[1] else f"{seeds[0]} and {seeds[1]} runs"
    return f"{head}: {'' if decided else 'not '}decided by {by}{rest}."


def bits_text(final: Final) -> str:
    """Returns the bits per byte of a configuration for a person."""
    return f"{AT_MOST if final.bound else ''}{final.bits_per_byte[0]:.4f}"
