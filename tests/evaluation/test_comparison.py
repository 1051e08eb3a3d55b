"""Comparing: intervals that cover, tests that reject as often as they say, sides as they are meant."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmlab.data.documents import Documents
from lmlab.errors import UserError
from lmlab.evaluation import comparison, records
from lmlab.evaluation.comparison import difference
from lmlab.evaluation.sides import Side, check_comparable, differing_choices, make_sides, ratio, read_evaluations
from lmlab.runs.choices import config_choices

POLICY = {"context": "blocks", "block_size": 32, "stride": None, "objective": {}, "pseudo": None, "masks_seed": None}
BYTES = np.random.default_rng(1).integers(50, 400, 40)

Write = Callable[..., records.Records]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the records of one evaluation and read them back."""

    def write(
        name: str, bits_per_byte: np.ndarray, sizes: np.ndarray = BYTES, config: dict | None = None, **facts: Any
    ) -> records.Records:
        place = tmp_path / name
        place.mkdir(parents=True)
        nll = bits_per_byte * sizes * math.log(2)
        count = len(sizes)
        documents = Documents(
            np.zeros(0, np.int32),
            np.zeros((0, 5), np.int32),
            np.zeros(count + 1, np.int64),
            np.zeros(count + 1, np.int64),
            [f"document-{i}" for i in range(count)],
            [0] * count,
            [f"Text {i}" for i in range(count)],
            "",
        )
        none = np.zeros(count, np.int64)
        counts = np.stack([sizes // 4, sizes, sizes // 5, none, none, none, none], axis=1)
        run = None if config is None else {"run_id": name, "config": {"run_dir": str(place), **config}}
        made = {
            "figure": "perplexity",
            "policy": POLICY,
            "data_hash": "text",
            "tokenizer_hash": "tokens",
            "weights_hash": name,
            "precision": "32-true",
            "model": name,
            "run": run,
            "units": "text",
        }
        records.write(place, documents, np.stack([nll, nll**2], axis=1), counts, made | facts)
        return records.read(place)

    return write


def simulated(seed: int, gap: float, documents: int, runs: int, of_seeds: float) -> list[Side]:
    """Two sides whose figures truly lie `gap` bits per byte apart, over documents and seeds drawn at random."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(50, 400, documents)
    hardness = draw.normal(1.5, 0.4, documents)  # shared: the pairing is what makes small gaps visible
    sides = []
    for name, level in (("first", 0.0), ("other", gap)):
        tables = []
        for _ in range(runs):
            own = hardness + level + draw.normal(0, 0.08, documents) + draw.normal(0, of_seeds)
            tables.append(np.stack([own * sizes, sizes], axis=1))
        side = Side(name, [None] * runs)  # type: ignore[list-item]
        side.__dict__["sums"] = np.mean(tables, axis=0)
        side.__dict__["ratios"] = np.array([ratio(table.sum(axis=0)) for table in tables])
        sides.append(side)
    return sides


@pytest.mark.parametrize(("runs", "of_seeds"), [(1, 0.0), (3, 0.05), (2, 0.05)])
def test_the_interval_covers_the_true_difference(runs: int, of_seeds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 95 times in 100; of 200 simulations fewer than 180 or none outside would be a chance below 1 in 500."""
    monkeypatch.setattr(comparison, "REPLICATES", 400)
    gap, covered, rejected = 0.02, 0, 0
    for seed in range(200):
        sides = simulated(seed, gap, 40, runs, of_seeds)
        found = difference(sides[1], sides[0])
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= gap <= found.high
        none = simulated(seed + 1000, 0.0, 40, runs, of_seeds)
        rejected += (difference(none[1], none[0]).p or 1) <= 0.05
    assert 180 <= covered <= 199
    # Where there is no difference, the test says so as often as it should.
    assert 1 <= rejected <= 20


def test_seeds_that_are_left_out_of_account_would_mislead() -> None:
    """The same documents, seeds far apart: an interval over documents alone is far too narrow."""
    sides = simulated(3, 0.0, 200, 3, 0.1)
    found = difference(sides[1], sides[0])
    alone = [Side(side.name, side.runs[:1]) for side in sides]
    for side, whole in zip(alone, sides, strict=True):
        side.__dict__.update(sums=whole.sums, ratios=whole.ratios[:1])
    narrow = difference(alone[1], alone[0])
    assert (found.high or 0) - (found.low or 0) > 5 * ((narrow.high or 0) - (narrow.low or 0))


def test_against_the_textbook() -> None:
    """With equal bytes the interval and the test are those of a mean of paired differences."""
    draw = np.random.default_rng(0)
    documents = 400
    bits = draw.normal(100, 20, documents)
    gaps = draw.normal(0.3, 2.0, documents)
    sides = [Side("first", [None]), Side("other", [None])]  # type: ignore[list-item]
    for side, own in zip(sides, (bits, bits + gaps), strict=True):
        side.__dict__["sums"] = np.stack([own, np.full(documents, 50.0)], axis=1)
        side.__dict__["ratios"] = np.array([own.mean() / 50])
    found = difference(sides[1], sides[0])
    error = gaps.std(ddof=1) / math.sqrt(documents)
    assert found.difference == pytest.approx(gaps.mean() / 50)
    assert found.low == pytest.approx((gaps.mean() - 1.96 * error) / 50, abs=0.1 * error / 50)
    assert found.high == pytest.approx((gaps.mean() + 1.96 * error) / 50, abs=0.1 * error / 50)
    assert found.p == pytest.approx(math.erfc(abs(gaps.mean()) / error / math.sqrt(2)), abs=0.02)


def test_few_documents_have_no_interval(write: Write) -> None:
    few = comparison.FEWEST - 1
    runs = [write(name, np.full(few, level), np.full(few, 100)) for name, level in (("a", 1.0), ("b", 1.25))]
    row = comparison.compare_sides(make_sides(runs))[1]
    assert row["difference"] == pytest.approx(0.25)
    assert (row["low"], row["high"], row["p"]) == (None, None, None)


def test_runs_that_differ_in_their_seed_are_one_side(write: Write, tmp_path: Path) -> None:
    for lr in (1, 2):
        for seed in (1, 2, 3):
            config = {
                "seed": seed,
                "optim": {"lr": lr},
                # How they ran is no choice of what they are.
                **{"profile": seed == 1, "compile": seed == 2, "logits_chunk_size": 64 * seed, "num_workers": seed},
                "trainer": {"precision": "32-true", "devices": seed, "accumulate_grad_batches": seed},
                "callbacks": {
                    "best": {"dirpath": f"{tmp_path}/{lr}/{seed}/x"},
                    "checkpoints": {"keep_best": 1, "every_steps": seed},
                    "end": {"run_dir": f"{tmp_path}/{lr}/{seed}"},
                },
            }
            write(f"{lr}/{seed}", np.full(40, lr + seed / 10), config=config)
    sides = make_sides(read_evaluations([tmp_path]))
    assert [(side.name, len(side.runs)) for side in sides] == [("optim.lr=1", 3), ("optim.lr=2", 3)]
    assert differing_choices(sides) == {"optim.lr": [1, 2]}
    first, second = comparison.compare_sides(sides)
    assert (first["value"], second["value"]) == (pytest.approx(1.2), pytest.approx(2.2))
    assert first["deviation_of_seeds"] == pytest.approx(0.1)
    assert first["difference"] is None
    assert second["difference"] == pytest.approx(1.0)
    # Two seeds of one thing are compared as they are.
    two = make_sides(read_evaluations([tmp_path / "1/1", tmp_path / "1/2"]))
    assert [side.name for side in two] == ["seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("values", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 × 0.01, 2 × 0.03, and 0.04 no less than the one before
        ([0.9, None, 0.02, 0.5], [1.0, None, 0.06, 1.0]),
        ([0.02], [0.02]),
        ([None], [None]),
    ],
)
def test_correction_for_the_number_of_pairs(values: list[float | None], corrected: list[float | None]) -> None:
    """Holm 1979, worked by hand."""
    assert comparison.holm(values) == [p if p is None else pytest.approx(p) for p in corrected]


def test_the_documents_that_differ_most(write: Write) -> None:
    level = np.full(40, 1.0)
    other = level.copy()
    other[7] += 0.5
    other[20] -= 0.4
    runs = [write("a", level, np.full(40, 100)), write("b", other, np.full(40, 100))]
    rows = comparison.largest_differences(make_sides(runs), 2)
    assert [row["document"] for row in rows] == ["document-7", "document-20"]
    assert [row["bits_more"] for row in rows] == [pytest.approx(50), pytest.approx(-40)]
    assert rows[0]["of_the_other"] == pytest.approx(1)
    assert rows[0]["begins"] == "Text 7"


def test_a_document_of_which_more_bytes_were_scored_does_not_differ_for_that(write: Write) -> None:
    """A bound scores the first token of each block, and an exact metric does not."""
    level, sizes = np.full(40, 1.0), np.full(40, 90)
    other = level.copy()
    other[7] += 0.5
    more = sizes.copy()
    more[20] += 60  # at as many bits per byte
    runs = [write("a", level, sizes), write("b", other, more)]
    first, second = comparison.largest_differences(make_sides(runs), 2)
    assert (first["document"], first["bits_more"], first["bytes"]) == ("document-7", pytest.approx(45), 90)
    assert second["bits_more"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"data_hash": "other"}, "other text; 40 of 40 documents are in both"),
        ({"figure": "masked_perplexity"}, "perplexity is not masked_perplexity"),
        ({"figure": "masked_perplexity"}, "python -m lmlab.evaluate RUN score=elbo context=blocks"),
        ({"policy": POLICY | {"block_size": 64}}, "block_size is 32 in one and 64 in the other"),
        ({"policy": POLICY | {"context": "sliding"}}, "context is blocks in one and sliding in the other"),
    ],
)
def test_what_is_not_comparable_is_refused(write: Write, facts: dict, said: str) -> None:
    runs = [write("a", np.ones(40)), write("b", np.ones(40), **facts)]
    with pytest.raises(UserError, match=said):
        check_comparable(runs)


def test_masks_on_other_tokens_are_not_comparable(write: Write) -> None:
    masked = {"figure": "masked_perplexity", "policy": POLICY | {"masks_seed": 0}}
    runs = [write("a", np.ones(40), **masked), write("b", np.ones(40), **masked, tokenizer_hash="other")]
    with pytest.raises(UserError, match="their tokenizers differ"):
        check_comparable(runs)
    # A causal figure per byte is made for that.
    runs = [write("c", np.ones(40)), write("d", np.ones(40), tokenizer_hash="other")]
    check_comparable(runs)


def test_a_sample_of_other_tokens_is_not_comparable(write: Write) -> None:
    facts = {"figure": "pseudo_perplexity", "policy": POLICY | {"pseudo": {"sample": 0.5}}}
    runs = [write("a", np.ones(40), **facts), write("b", np.ones(40), **facts, tokenizer_hash="other")]
    with pytest.raises(UserError, match="without a sample"):
        check_comparable(runs)


def test_models_of_one_name_are_not_seeds_of_one_thing(write: Write) -> None:
    runs = [write(place, np.ones(40), model="m") for place in ("a", "b")] + [write("c", np.ones(40))]
    assert [len(side.runs) for side in make_sides(runs)] == [1, 1, 1]


@pytest.mark.parametrize("runs", [1, 3])
def test_from_the_other_side_the_sign_is_all_that_changes(runs: int) -> None:
    """So that `compare` and a report, which take the best first, decide alike."""
    one, other = simulated(4, 0.02, 40, runs, 0.02)
    there, back = difference(one, other), difference(other, one)
    assert there.low is not None
    assert there.high is not None
    assert (there.difference, there.low, there.high, there.p) == (-back.difference, -back.high, -back.low, back.p)


def test_a_third_side_moves_no_interval(write: Write) -> None:
    sides = simulated(5, 0.1, 40, 3, 0.05)
    wild = Side("wild", sides[0].runs)
    wild.__dict__.update(sums=sides[0].sums * [2, 1], ratios=sides[0].ratios * np.array([1, 3, 9]))
    assert comparison.seed_error(sides[1], sides[0])[1] <= 4
    one, other = difference(sides[1], sides[0]), difference(wild, sides[0])
    assert difference(sides[1], sides[0]) == one != other


def test_other_documents(write: Write) -> None:
    one, other = write("a", np.ones(40)), write("b", np.ones(40), data_hash="other")
    names = [f"else-{i}" for i in range(40)]
    table = other.table.set_column(0, other.table.schema.field(0), [names])
    with pytest.raises(UserError, match="no of 40 documents are in both"):
        check_comparable([one, records.Records(other.path, other.certificate, table)])


@pytest.mark.parametrize("same", ["weights", "seed"])
def test_one_draw_twice_is_no_two_seeds(write: Write, same: str) -> None:
    hashed, seed = {"weights": ({"weights_hash": "same"}, 2), "seed": ({}, 1)}[same]
    runs = [
        write("a", np.ones(40), config={"seed": 1, "lr": 1, "compile": False}, **hashed),
        write("b", np.ones(40), config={"seed": seed, "lr": 1, "compile": True}, **hashed),
        write("c", np.ones(40), config={"seed": 1, "lr": 2, "compile": False}),
    ]
    with pytest.raises(UserError, match=f"the same {same}: .* they would count twice"):
        make_sides(runs)


def test_a_key_that_older_runs_lack_is_no_difference() -> None:
    old = {"run_dir": "outputs/one", "seed": 1}
    assert config_choices(old) == config_choices(old | {"float32_matmul_precision": "highest"})
    assert config_choices(old) != config_choices(old | {"float32_matmul_precision": "high"})
    masked = {"_target_": "lmlab.objectives.mlm.MaskedLM", "mask_probability": 0.15}
    added = {"mask_schedule": "constant", "final_mask_probability": None, "whole_word": False}
    assert config_choices(old | {"objective": masked}) == config_choices(old | {"objective": masked | added})
    assert config_choices(old | {"objective": masked}) != config_choices(
        old | {"objective": masked | {"whole_word": True}}
    )


def test_precision_is_a_difference(write: Write) -> None:
    runs = [write(kind, np.ones(40), config={"seed": 1, "trainer": {"precision": kind}}) for kind in ("32", "bf16")]
    assert [side.name for side in make_sides(runs)] == ["trainer.precision=32", "trainer.precision=bf16"]


def test_runs_that_differ_in_machinery_alone_go_by_their_directories(write: Write) -> None:
    runs = [write(name, np.ones(40), config={"seed": 1, "compile": name == "a"}) for name in "ab"]
    assert [Path(side.name).name for side in make_sides(runs)] == ["a", "b"]


def test_directories(write: Write, tmp_path: Path) -> None:
    write("a", np.ones(40))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no evaluation"):
        read_evaluations([tmp_path / "a", tmp_path / "empty"])
    with pytest.raises(UserError, match="is named twice"):
        read_evaluations([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(UserError, match="only evaluation"):
        read_evaluations([tmp_path / "a"])
