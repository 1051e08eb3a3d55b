"""What the final figures decide, in sentences."""

from collections.abc import Mapping, Sequence

from lmlab.evaluation.comparison import FEWEST
from lmlab.evaluation.records import BOUND
from lmlab.reporting.finals import Final
from lmlab.reporting.words import letter
from lmlab.runs.status import ENDED

NAMED = 2
"""Configurations that a sentence names before it counts them."""


def verdict(kinds: Sequence[tuple[str, Sequence[Final]]], statuses: Mapping[str, int], unranked: int) -> list[str]:
    """Say which configuration is best, whether that is decided, and what of the runs is not in it.

    A difference is decided where its 95 % interval lies above 0. Only the best and the others are set against each
    other, and the intervals are not corrected for their number.

    Args:
        kinds: of evaluations that can be compared: what their bits per byte are called, and the configurations,
            best first.
        statuses: how many runs are in each.
        unranked: how many have finished without an evaluation.
    """
    found = [
        (f"{letter(number)}: " if len(kinds) > 1 else "") + of_kind(bits_per_byte, finals)
        for number, (bits_per_byte, finals) in enumerate(kinds)
    ]
    if any(final.bound for _, finals in kinds for final in finals):
        found.append(f"{BOUND}is an upper bound: of text that a tokenizer can't spell, each byte is charged 8 bits.")
    if unranked:
        found.append(
            f"{counted(unranked)} finished, without an evaluation to rank {'it' if unranked == 1 else 'them'} by."
        )
    unfinished = sum(count for status, count in statuses.items() if status not in ENDED)
    if unfinished and not kinds and not unranked:
        found.append("None has finished, so none is ranked; what is known so far is shown.")
    elif unfinished:
        verb = "has" if unfinished == 1 else "have"
        found.append(f"{counted(unfinished)} {verb} not finished, and {verb} no part in this.")
    return found


def of_kind(bits_per_byte: str, finals: Sequence[Final]) -> str:
    """Which of the configurations is best, and whether that is decided."""
    best, *others = finals
    of_best = shown(best)
    if not others:
        runs = len(best.places)
        of = f"in the mean of {runs} seeds" if runs > 1 else "with one run"
        return f"Only one configuration is ranked, {best.name}: {of_best} {bits_per_byte} {of}."
    second = others[0]
    of_second = shown(second)
    seeds = [len(final.places) for final in (best, second)]
    which = "best" if len(others) == 1 else f"the best of {len(finals)}"
    mean = " in the mean" if max(seeds) > 1 else ""
    head = f"{best.name} is {which}{mean}: {of_best} against {of_second} {bits_per_byte} for {second.name}"
    difference = second.difference
    if difference is None or difference.low is None:
        return f"{head}; fewer than {FEWEST} {best.paired} were scored, too few to say whether that is chance."
    decided = difference.low > 0
    head += f", 95 % of the difference {difference.low:+.4f} to {difference.high:+.4f}"
    open_to = [other.name for other in others[1:] if other.difference and (other.difference.low or 0) <= 0]
    rest = ""
    if decided and open_to:
        names = " and ".join(open_to) if len(open_to) <= NAMED else f"{len(open_to)} others"
        rest = f", but not against {names}"
    if max(seeds) == 1:
        alone = f"the {best.paired} alone {'decide' if decided else 'do not decide'} it{rest}"
        return f"{head}: {alone}, and with one run each, another seed could turn it round."
    by = f"{seeds[0]} seeds" if seeds[0] == seeds[1] else f"{seeds[0]} and {seeds[1]} runs"
    return f"{head}: {'' if decided else 'not '}decided by {by}{rest}."


def shown(final: Final) -> str:
    """The bits per byte of a configuration."""
    return f"{BOUND if final.bound else ''}{final.bits_per_byte[0]:.4f}"


def counted(runs: int) -> str:
    return f"{runs} run{'s' if runs != 1 else ''}"
