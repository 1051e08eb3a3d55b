"""Scaling laws, fitted to simulated runs of a law that is known, and against scipy and numpy."""

import numpy as np
import pytest

from lmlab.evaluation import scaling
from lmlab.evaluation.scaling import Ladder

TRUE = {"E": 0.9, "A": 40.0, "alpha": 0.45, "B": 90.0, "beta": 0.37}
GAMMA, KAPPA = 0.97, 9.0
EXPONENT = TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"] * GAMMA)


def law(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return TRUE["E"] + TRUE["A"] / parameters ** TRUE["alpha"] + TRUE["B"] / tokens ** TRUE["beta"]


def simulated(noise: float = 0.0, seed: int = 0, budgets: int = 5) -> Ladder:
    """Six sizes at each budget, with losses of the law and noise."""
    flops, parameters = map(np.ravel, np.meshgrid(3e10 * 2.0 ** np.arange(budgets), np.geomspace(5e3, 1.2e5, 6)))
    tokens = flops / (KAPPA * parameters**GAMMA)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(flops)))
    return Ladder(parameters, tokens, flops, law(parameters, tokens) * scatter)


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "REPLICATES", 100)


def test_a_law_is_recovered() -> None:
    """Exactly without noise; with it, the intervals hold the truth and a new run, as often as they say."""
    fitted = scaling.fit_law(simulated(), np.ones((1, 30)))
    assert {name: values[0] for name, values in fitted.constants.items()} == pytest.approx(TRUE, rel=1e-3)
    assert fitted.exponents[0][0] == pytest.approx(EXPONENT, rel=1e-4)
    held = dict.fromkeys([*TRUE, "exponent", "new run"], 0)
    beyond = np.array([4e5]), np.array([2e7])
    for seed in range(10):
        ladder = simulated(0.004, seed)
        fitted = scaling.fit_law(ladder, ladder.samples())
        new = law(*beyond) * np.exp(0.004 * np.random.default_rng(100 + seed).standard_normal())
        of = {name: (samples, TRUE[name]) for name, samples in fitted.constants.items()}
        of |= {"exponent": (fitted.exponents[0], EXPONENT)}
        of |= {"new run": (fitted.scattered(fitted.loss(*beyond))[:, 0], new[0])}
        for name, (samples, true) in of.items():
            low, high = scaling.intervals(samples[:, None])
            held[name] += bool(low[0] <= true <= high[0])
    assert min(held.values()) >= 8, held


def test_the_optimum_is_that_of_scipy() -> None:
    """Also where runs occur several times in a sample, or not at all."""
    optimize, special = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.special")
    ladder = simulated(0.01)
    counts = ladder.samples()[:2]
    fitted = scaling.fit_law(ladder, counts)
    n, d, y = (np.log(values) for values in (ladder.parameters, ladder.tokens, ladder.losses))

    def objective(theta: np.ndarray, runs: np.ndarray) -> float:
        a, b, e, alpha, beta = theta
        terms = [a - alpha * n[runs], b - beta * d[runs], np.full(len(runs), e)]
        return float(special.huber(1e-3, y[runs] - special.logsumexp(terms, axis=0)).sum() * 1e3)

    for sample, theta in zip(counts, fitted.theta, strict=True):
        runs = np.repeat(np.arange(len(y)), sample.astype(int))
        start = [np.log(TRUE["A"]), np.log(TRUE["B"]), np.log(TRUE["E"]), TRUE["alpha"], TRUE["beta"]]
        options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-9, "fatol": 1e-12, "adaptive": True}
        found = optimize.minimize(objective, start, (runs,), "Nelder-Mead", options=options)
        found = optimize.minimize(objective, found.x, (runs,), "Nelder-Mead", options=options)
        assert objective(theta, runs) <= found.fun * (1 + 1e-6)
        assert theta == pytest.approx(found.x, rel=1e-3)


def test_the_optimum_of_a_budget_is_the_lowest_loss_that_it_pays_for() -> None:
    fitted = scaling.fit_law(simulated(), np.ones((1, 30)))
    parameters, tokens = fitted.optimum(np.array([1e13]))
    others = parameters[0] * np.geomspace(0.5, 2, 2001)
    losses = law(others, 1e13 / (KAPPA * others**GAMMA))
    assert others[losses.argmin()] == pytest.approx(parameters[0, 0], rel=2e-3)
    assert KAPPA * parameters[0, 0] ** GAMMA * tokens[0, 0] == pytest.approx(1e13, rel=1e-6)


def test_parabolas_are_those_of_numpy() -> None:
    ladder = simulated(0.004)
    isoflop = scaling.fit_isoflop(ladder, ladder.samples())
    assert isoflop.faults == [""] * 5
    for budget in range(5):
        runs = ladder.budgets == budget
        curve = np.polyfit(np.log(ladder.parameters[runs]), ladder.losses[runs], 2)
        assert isoflop.curves[budget] == pytest.approx(curve, rel=1e-6)
        lowest = -curve[1] / 2 / curve[0]
        tokens = np.log(ladder.budget_flops[budget] / KAPPA) - GAMMA * lowest
        assert isoflop.minima[0, budget] == pytest.approx([lowest, tokens, np.polyval(curve, lowest)], rel=1e-5)


def test_the_exponent_of_minima_is_recovered() -> None:
    """Losses are parabolas with minima at 2 · C^0.4 parameters, and the interval of noisy ones holds the exponent."""
    ladder = simulated()
    minima = np.log(2) + 0.4 * np.log(ladder.flops)
    losses = 2 + 0.1 * (np.log(ladder.parameters) - minima) ** 2
    held = 0
    for seed in range(20):
        scatter = 0.004 * np.random.default_rng(seed).standard_normal(len(losses)) * (seed > 0)
        noisy = Ladder(ladder.parameters, ladder.tokens, ladder.flops, losses + scatter)
        parameters, tokens = scaling.power_laws(noisy, scaling.fit_isoflop(noisy, noisy.samples()))
        if not seed:
            assert parameters[0] == pytest.approx([0.4, np.log(2)], abs=1e-6)
            assert tokens[0, 0] == pytest.approx(1 - GAMMA * 0.4)
        low, high = scaling.intervals(parameters[:, :1])
        held += bool(low[0] <= 0.4 + 1e-9 and high[0] >= 0.4 - 1e-9)
    assert held >= 16


def test_budgets_without_a_minimum_are_left_out_and_say_why() -> None:
    ladder = simulated()
    losses, keep = ladder.losses.copy(), np.full(30, True)
    of = [np.flatnonzero(ladder.budgets == budget) for budget in range(5)]
    losses[of[0]] *= -1
    losses[of[1]] = np.log(ladder.parameters[of[1]]) ** 2
    losses[of[2]] = (20 - np.log(ladder.parameters[of[2]])) ** 2
    keep[of[3][2:]] = False
    odd = Ladder(ladder.parameters, ladder.tokens, ladder.flops, losses).of(keep)
    isoflop = scaling.fit_isoflop(odd, odd.samples())
    assert isoflop.faults == [
        "opens downward",
        "minimum below the sizes tried",
        "minimum above the sizes tried",
        "fewer than 3 sizes",
        "",
    ]
    assert np.isnan(isoflop.minima[:, :4]).all()
    assert np.isfinite(isoflop.minima[0, 4]).all()
    assert np.isnan(scaling.power_laws(odd, isoflop)).all()  # one minimum makes no law


def test_samples_draw_among_the_runs_of_a_budget() -> None:
    ladder = simulated()
    counts = ladder.samples()
    assert (counts[0] == 1).all()
    assert (counts == ladder.samples()).all()
    assert len(np.unique(counts, axis=0)) > 90
    for budget in range(5):
        assert (counts[:, ladder.budgets == budget].sum(axis=1) == 6).all()


def test_the_largest_budget_is_predicted_from_the_others() -> None:
    rows = scaling.predict_largest(simulated(0.004, 3))
    assert [round(row["parameters"]) for row in rows] == [round(n) for n in np.geomspace(5e3, 1.2e5, 6)]
    assert sum(row["low"] < row["measured"] < row["high"] for row in rows) >= 5
    # The law changes with the last budget, and the others know nothing of it.
    ladder = simulated(0.004, 3)
    other = Ladder(*[*vars(ladder).values()][:3], ladder.losses * np.where(ladder.budgets == 4, 1.1, 1))
    changed = scaling.predict_largest(other)
    assert [row["predicted"] for row in changed] == [row["predicted"] for row in rows]
    assert not any(row["low"] < row["measured"] < row["high"] for row in changed)
    assert scaling.predict_largest(simulated(budgets=3)) == []
