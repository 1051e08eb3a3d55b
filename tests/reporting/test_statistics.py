"""What a report says that its final figures decide: the words follow from the numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from lmlab.evaluation.comparison import Difference
from lmlab.reporting.statistics import Final, verdict

BITS = "bits per byte"


def final(name: str, seeds: int, value: float, low: float | None = None, high: float | None = None) -> Final:
    """A configuration's figures; `low` and `high` are of its difference from the best, of 3.698."""
    runs = [Path(f"{name}/{seed}") for seed in range(seeds)]
    difference = Difference(value - 3.698, low, high, None) if value != 3.698 else None
    return Final(name, runs, (value, None, None), False, "documents", (9.9, None, None), difference)


BEST = final("lr=1", 3, 3.698)
FOR = "lr=1 is best in the mean: 3.6980 against 3.7480 bits per byte for lr=3"
ALONE = FOR.replace(" in the mean", "")
OPEN = "95 % interval of the difference -0.1270 to +0.2170"
CLEAR = "95 % interval of the difference +0.0200 to +0.0800"
TURN = "and with one run each, another seed could turn it round."


@pytest.mark.parametrize(
    ("finals", "said"),
    [
        ([BEST, final("lr=3", 3, 3.748, -0.127, 0.217)], f"{FOR}, {OPEN}: not decided by 3 seeds."),
        ([BEST, final("lr=3", 3, 3.748, 0.02, 0.08)], f"{FOR}, {CLEAR}: decided by 3 seeds."),
        ([BEST, final("lr=3", 1, 3.748, 0.02, 0.08)], f"{FOR}, {CLEAR}: decided by 3 and 1 runs."),
        (
            [final("lr=1", 1, 3.698), final("lr=3", 1, 3.748, 0.02, 0.08)],
            f"{ALONE}, {CLEAR}: the documents alone decide it, {TURN}",
        ),
        (
            [final("lr=1", 1, 3.698), final("lr=3", 1, 3.748, -0.127, 0.217)],
            f"{ALONE}, {OPEN}: the documents alone do not decide it, {TURN}",
        ),
        (
            [BEST, final("lr=3", 3, 3.748)],
            f"{FOR}; fewer than 6 documents were scored, too few to say whether that is chance.",
        ),
        # The runner-up is behind for sure, another, whose seeds lie further apart, is not.
        (
            [
                BEST,
                final("lr=3", 3, 3.748, 0.02, 0.08),
                final("lr=9", 3, 3.9, -0.1, 0.5),
                final("lr=8", 3, 4, 0.1, 0.5),
            ],
            f"{FOR.replace('best', 'the best of 4')}, {CLEAR}: decided by 3 seeds, but not against lr=9.",
        ),
        (
            [BEST, final("lr=3", 3, 3.748, 0.02, 0.08), *(final(f"lr={n}", 3, 3.9, -0.1, 0.5) for n in range(4, 7))],
            f"{FOR.replace('best', 'the best of 5')}, {CLEAR}: decided by 3 seeds, but not against 3 others.",
        ),
        ([BEST], "Only one configuration is ranked, lr=1: 3.6980 bits per byte in the mean of 3 seeds."),
        ([final("lr=1", 1, 3.698)], "Only one configuration is ranked, lr=1: 3.6980 bits per byte with one run."),
    ],
)
def test_of_one_kind_of_evaluation(finals: list[Final], said: str) -> None:
    assert verdict([(BITS, finals)], {"done": 3, "pruned": 2}, 0) == [said]
    assert verdict([(f"masked {BITS}", finals)], {}, 0) == [said.replace(BITS, f"masked {BITS}")]


def test_kinds_that_can_not_be_compared_have_a_sentence_each() -> None:
    other = final("lr=5", 1, 3.698)
    assert verdict([(BITS, [BEST]), (f"pseudo {BITS}", [other])], {}, 0) == [
        "A: Only one configuration is ranked, lr=1: 3.6980 bits per byte in the mean of 3 seeds.",
        "B: Only one configuration is ranked, lr=5: 3.6980 pseudo bits per byte with one run.",
    ]


@pytest.mark.parametrize(
    ("statuses", "unranked", "said"),
    [
        ({"done": 1, "stopped": 1}, 0, ["1 run has not finished, and has no part in this."]),
        (
            {"done": 1, "running": 1, "failed": 1, "waiting": 1},
            0,
            ["3 runs have not finished, and have no part in this."],
        ),
        ({"done": 2}, 1, ["1 run finished, without an evaluation to rank it by."]),
        ({"done": 3}, 2, ["2 runs finished, without an evaluation to rank them by."]),
    ],
)
def test_what_has_no_part_in_it_is_said(statuses: dict[str, int], unranked: int, said: list[str]) -> None:
    assert verdict([(BITS, [BEST])], statuses, unranked)[1:] == said


def test_nothing_has_finished() -> None:
    said = "None has finished, so none is ranked; what is known so far is shown."
    assert verdict([], {"running": 2, "waiting": 1}, 0) == [said]
    assert verdict([], {"running": 1, "done": 1}, 1)[0] == "1 run finished, without an evaluation to rank it by."


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (BITS, "of text that a tokenizer can't spell, each byte is charged 8 bits."),
        (f"bound {BITS}", "these models write in any order, and the exact value may be lower."),
    ],
)
def test_a_bound_has_its_sign_and_its_reason(name: str, why: str) -> None:
    best, note = verdict([(name, [replace(BEST, bound=True)])], {}, 0)
    assert best == f"Only one configuration is ranked, lr=1: ≤ 3.6980 {name} in the mean of 3 seeds."
    assert note == f"≤ is an upper bound: {why}"
