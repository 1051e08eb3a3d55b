"""What a comparison can show, against simulated ones whose difference is known."""

import math

import numpy as np
import pytest

from lmlab.errors import UserError
from lmlab.evaluation import power
from lmlab.evaluation.comparison import seed_error

from .test_comparison import simulated


@pytest.mark.parametrize(("documents", "runs", "of_seeds"), [(200, 1, 0.0), (60, 8, 0.01)])
def test_a_difference_that_is_shown_is_found_8_times_in_10(documents: int, runs: int, of_seeds: float) -> None:
    typical = np.mean([power.shown_difference(*simulated(s, 0.0, documents, runs, of_seeds)) for s in range(60)])
    found = 0
    for seed in range(400):
        one, other = simulated(1000 + seed, float(typical), documents, runs, of_seeds)
        error = math.hypot(power.document_error(one, other), seed_error(one, other)[0])
        found += abs(one.ratios.mean() - other.ratios.mean()) > 1.96 * error
    assert 0.72 < found / 400 < 0.88


def test_so_many_documents_and_seeds_show_it() -> None:
    """Drawn again with as many as it says, the comparison shows the difference that was asked for.

    It may show less: more documents also take from the error of seeds, and more runs from that of documents.
    """
    wanted = 0.01
    documents, runs = power.needed(*simulated(0, 0.0, 60, 40, 0.01), wanted)
    assert documents is not None
    assert runs is not None
    assert documents > 60
    assert runs > 40
    for count, each in ((documents, 40), (60, runs)):
        shown = [power.shown_difference(*simulated(seed, 0.0, count, each, 0.01)) for seed in range(40)]
        assert 0.7 * wanted < np.mean(shown) < 1.15 * wanted
    assert power.needed(*simulated(0, 0.0, 60, 6, 0.05), 0.001) == (None, None)
    assert power.needed(*simulated(0, 0.0, 60, 1, 0.0), wanted)[1] is None  # one run a side says nothing of seeds
    alike = simulated(0, 0.0, 60, 1, 0.0)[0]
    assert power.needed(alike, alike, wanted) == (None, None)


def test_what_is_read_as_a_difference() -> None:
    reference, _ = simulated(0, 0.0, 20, 1, 0.0)
    assert power.read_difference("0.01", reference) == 0.01
    assert power.read_difference("2%", reference) == pytest.approx(0.02 * float(reference.ratios.mean()))
    for text in ("x", "0", "-1%", "nan", "%"):
        with pytest.raises(UserError, match="--power"):
            power.read_difference(text, reference)
