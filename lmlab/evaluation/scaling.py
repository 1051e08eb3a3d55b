"""Scaling laws: how the loss of a model falls with its parameters, its tokens, and the computation that both take.

Two approaches of Hoffmann et al. 2022 ("Training Compute-Optimal Large Language Models") to a *ladder*, runs of
several sizes at each of several budgets: parabolas at equal computation (isoFLOP, their approach 2), and a parametric
law of the loss (approach 3), fitted as Besiroglu et al. 2024 ("Chinchilla Scaling: A replication attempt") correct it:
the Huber loss is summed, and minimized to convergence. Intervals are those of a bootstrap over the runs of each budget.

All fits are of many samples of the runs at once, of which the first is the ladder itself.

Shapes: R runs, G budgets, S samples.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

REPLICATES = 1000
"""Samples of the bootstrap."""
APART = 1.25
"""The FLOPs of the runs of one budget differ by no more than this factor: runs make whole steps, and so exceed it."""
SIZES = 3
"""Fewest sizes of a budget that a parabola is fitted to."""
DELTA = 1e-3
"""Residual of the log loss from which the Huber loss is linear."""
FEWEST = 5
"""Fewest runs of the parametric law: it has as many parameters."""
BESIDES = 3
"""Fewest other budgets from which the largest one is predicted."""
STEPS, TOLERANCE, PATIENCE = 2000, 1e-9, 10
"""The fit of a sample ends after so many steps, or once its Huber loss has fallen by no more than this share in each of
as many steps as its patience."""
EXACT = 1e-18
"""Huber loss of runs that follow the law up to rounding."""


@dataclass(frozen=True)
class Ladder:
    """The runs that a scaling law is fitted to, an array [R] of each quantity."""

    parameters: np.ndarray
    """Parameters of the models, embeddings included."""
    tokens: np.ndarray
    """Tokens trained on, repeated ones included."""
    flops: np.ndarray
    """Floating-point operations of training."""
    losses: np.ndarray
    """The metric that the law is of, by default the nll in nats per token."""

    @cached_property
    def budgets(self) -> np.ndarray:
        """[R]: the number of the budget of each run, from 0 for the least."""
        order, numbers = np.argsort(self.flops), np.zeros(len(self.flops), int)
        number, least = -1, -np.inf
        for run in order:
            if self.flops[run] > APART * least:
                number, least = number + 1, self.flops[run]
            numbers[run] = number
        return numbers

    @cached_property
    def budget_flops(self) -> np.ndarray:
        """[G]: the geometric mean of the FLOPs of the runs of each budget."""
        logs = np.log(self.flops)
        return np.array([np.exp(logs[self.budgets == g].mean()) for g in range(self.budgets.max() + 1)])

    def of(self, chosen: np.ndarray) -> "Ladder":
        """Returns the ladder of some runs, by a mask [R]."""
        return Ladder(self.parameters[chosen], self.tokens[chosen], self.flops[chosen], self.losses[chosen])

    def samples(self) -> np.ndarray:
        """Returns how often each run occurs in each sample [S, R]: once in the first, and in each other one as often as
        it was drawn, with replacement, among the runs of its budget."""
        random = np.random.default_rng(0)
        counts = np.ones((1 + REPLICATES, len(self.flops)))
        for budget in range(len(self.budget_flops)):
            (runs,) = np.nonzero(self.budgets == budget)
            counts[1:, runs] = random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=REPLICATES)
        return counts


@dataclass(frozen=True)
class IsoFlop:
    """The parabolas of the budgets of a ladder, loss against the logarithm of the parameters, and their minima."""

    curves: np.ndarray
    """[G, 3]: the coefficients of each parabola of the ladder itself, the highest power first; nan without one."""
    minima: np.ndarray
    """[S, G, 3]: log parameters, log tokens and loss at each minimum; nan where there is none inside the sizes."""
    faults: list[str]
    """[G]: why a budget has no minimum; the empty string where it has one."""


def fit_isoflop(ladder: Ladder, counts: np.ndarray) -> IsoFlop:
    """Fits a parabola to the runs of each budget, and finds its minimum.

    The tokens at the minimum are those that its budget pays for there, by a parabola of their logarithm.

    Args:
        counts: [S, R], as of `Ladder.samples`.
    """
    budgets = len(ladder.budget_flops)
    curves, faults = np.full((budgets, 3), np.nan), []
    minima = np.full((len(counts), budgets, 3), np.nan)
    for budget in range(budgets):
        runs = ladder.budgets == budget
        sizes, of_sizes = np.unique(ladder.parameters[runs], return_inverse=True)
        if len(sizes) < SIZES:
            faults.append(f"fewer than {SIZES} sizes")
            continue
        logs = np.log(ladder.parameters[runs])
        middle, spread = logs.mean(), np.ptp(logs) / 2
        x = (logs - middle) / spread
        y = np.stack([ladder.losses[runs], np.log(ladder.tokens[runs])], axis=1)
        weights = counts[:, runs]
        drawn = np.stack([weights[:, of_sizes == size].any(axis=1) for size in range(len(sizes))], axis=1).sum(axis=1)
        fitted = polynomials(x, y, np.where(drawn[:, None] < SIZES, 1.0, weights))  # [S, 3, 2]
        square, slope, _ = fitted[..., 0].T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -slope / (2 * square)
        inside = (drawn >= SIZES) & (square > 0) & (at >= x.min()) & (at <= x.max())
        powers = np.stack([at**2, at, np.ones_like(at)], axis=-1)
        loss, tokens = np.einsum("sp,spk->ks", powers, fitted)
        minima[inside, budget] = np.stack([at * spread + middle, tokens, loss], axis=-1)[inside]
        scaling = np.array([[1, 0, 0], [-2 * middle, spread, 0], [middle**2, -spread * middle, spread**2]]) / spread**2
        curves[budget] = scaling @ fitted[0, :, 0]
        side = "below" if at[0] < x.min() else "above"
        faults.append("" if inside[0] else "opens downward" if square[0] <= 0 else f"minimum {side} the sizes tried")
    minima[:, [bool(fault) for fault in faults]] = np.nan
    return IsoFlop(curves, minima, faults)


def polynomials(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the coefficients [S, 3, K] of the parabolas through points by weighted least squares.

    Args:
        x: [R].
        y: [R, K].
        weights: [S, R], with three different x or more that have a weight in each sample.
    """
    design = np.vander(x, 3)
    normal = np.einsum("sr,rp,rq->spq", weights, design, design)
    fitted: np.ndarray = np.linalg.solve(normal, np.einsum("sr,rp,rk->spk", weights, design, y))
    return fitted


def fit_power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fits lines y = slope · x + intercept by least squares, of logarithms for a power law.

    Args:
        x: [G].
        y: [S, G]; nan is left out.

    Returns:
        slope and intercept [S, 2]; nan where fewer than two points are left.
    """
    known = ~np.isnan(y)
    count = known.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x = (known * x).sum(axis=1) / count
        mean_y = np.nansum(y, axis=1) / count
        away = known * (x - mean_x[:, None])
        slope = np.nansum(away * y, axis=1) / (away**2).sum(axis=1)
    slope[count < 2] = np.nan
    return np.stack([slope, mean_y - slope * mean_x], axis=1)


@dataclass(frozen=True)
class Law:
    """The parametric law L(N, D) = E + A / N^α + B / D^β of the samples of a ladder.

    A budget of C FLOPs is C = κ · N^γ · D, by least squares over the runs: γ is 1 and κ is 6 where all operations are
    those of matrices, and attention or embeddings make them others.
    """

    theta: np.ndarray
    """[S, 5]: log A, log B, log E, α and β."""
    cost: np.ndarray
    """[2]: γ and log κ."""
    residuals: np.ndarray
    """[R]: those of the log losses of the runs, widened for the number of parameters that were fitted to them."""

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """The constants of the law by their names, each [S]; E is 0 where the fit lets it vanish."""
        a, b, e, alpha, beta = self.theta.T
        return {"E": np.exp(e).round(9), "A": np.exp(a), "alpha": alpha, "B": np.exp(b), "beta": beta}

    @property
    def exponents(self) -> tuple[np.ndarray, np.ndarray]:
        """The exponents of the FLOPs in the optimal parameters and in the optimal tokens, each [S]."""
        *_, alpha, beta = self.theta.T
        of_parameters = beta / (alpha + beta * self.cost[0])
        return of_parameters, 1 - self.cost[0] * of_parameters

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Returns the loss [S, K] at parameters and tokens, each [K] or [S, K]."""
        a, b, e, alpha, beta = self.theta.T[..., None]
        losses: np.ndarray = np.exp(e) + np.exp(a - alpha * np.log(parameters)) + np.exp(b - beta * np.log(tokens))
        return losses

    def scattered(self, losses: np.ndarray) -> np.ndarray:
        """Returns losses [S, K] with the scatter of single runs: a residual is drawn for each but the first sample."""
        drawn = np.random.default_rng(1).choice(self.residuals, size=losses.shape)
        drawn[0] = 0
        scattered: np.ndarray = losses * np.exp(drawn)
        return scattered

    def optimum(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the parameters and the tokens, each [S, K], that give the lowest loss for FLOPs [K]."""
        a, b, _, alpha, beta = self.theta.T[..., None]
        gamma, log_kappa = self.cost
        affordable = np.log(flops) - log_kappa  # γ log N + log D
        with np.errstate(invalid="ignore"):  # a sample whose loss does not fall with one of them has no optimum
            log_n = (np.log(alpha / (beta * gamma)) + a - b + beta * affordable) / (alpha + beta * gamma)
        return np.exp(log_n), np.exp(affordable - gamma * log_n)


def why_unfit(ladder: Ladder) -> str:
    """Returns why the parametric law can't be fitted to a ladder; the empty string where it can."""
    runs, sizes, tokens = len(ladder.losses), len(np.unique(ladder.parameters)), len(np.unique(ladder.tokens))
    if runs < FEWEST:
        return f"a scaling law has {FEWEST} parameters, and takes as many runs; there are {runs}"
    if min(sizes, tokens) < SIZES:
        return f"a scaling law takes {SIZES} sizes and {SIZES} numbers of tokens; there are {sizes} and {tokens}"
    return ""


def fit_law(ladder: Ladder, counts: np.ndarray) -> Law:
    """Fits the parametric law: the sum over runs of the Huber loss of log L is minimized from a grid of starts.

    Each other sample starts at the optimum of the first.

    Args:
        counts: [S, R], as of `Ladder.samples`.
    """
    logs = [np.log(values) for values in (ladder.parameters, ladder.tokens, ladder.losses)]
    middles = np.array([logs[0].mean(), logs[1].mean()])
    x, z, y = logs[0] - middles[0], logs[1] - middles[1], logs[2]
    starts = law_starts(x, z, ladder.losses)
    fitted, values = minimize(starts, x, z, y, np.broadcast_to(counts[:1], (len(starts), len(y))))
    best = fitted[values.argmin()]
    theta, _ = minimize(np.broadcast_to(best, (len(counts), FEWEST)).copy(), x, z, y, counts)
    theta[0] = best
    residuals = y - predicted(theta[:1], x, z)[0][0]
    theta[:, :2] += theta[:, 3:] * middles
    cost = fit_power(logs[0], (np.log(ladder.flops) - logs[1])[None])[0]
    freedom = max(1, len(y) - FEWEST)
    return Law(theta, cost, residuals * np.sqrt(len(y) / freedom))


def law_starts(x: np.ndarray, z: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns starts [K, 5] of the fit: a grid of α, β and E, with A and B by least squares, above 0."""
    grid = np.meshgrid([0.1, 0.3, 0.6, 1.0, 1.5], [0.1, 0.3, 0.6, 1.0, 1.5], [0.05, 0.3, 0.6, 0.9], indexing="ij")
    alpha, beta, share = (values.ravel() for values in grid)
    level = share * losses.min()
    columns = np.stack([np.exp(-alpha[:, None] * x), np.exp(-beta[:, None] * z)], axis=-1)  # [K, R, 2]
    normal = np.einsum("krp,krq->kpq", columns, columns) + 1e-9 * np.eye(2)
    aims = np.einsum("krp,kr->kp", columns, losses - level[:, None])
    heights = np.maximum(np.linalg.solve(normal, aims[..., None])[..., 0], 0.05 * (losses.min() - level)[:, None])
    return np.column_stack([np.log(heights), np.log(level), alpha, beta])


def predicted(theta: np.ndarray, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log losses [S, R] of the law at log parameters and tokens [R], and their derivatives [S, R, 5]."""
    a, b, e, alpha, beta = theta.T[..., None]
    terms = np.stack([a - alpha * x, b - beta * z, np.broadcast_to(e, (len(theta), len(x)))])
    highest = terms.max(axis=0)
    shares = np.exp(terms - highest)
    total = shares.sum(axis=0)
    of_n, of_d, of_e = shares / total
    return highest + np.log(total), np.stack([of_n, of_d, of_e, -x * of_n, -z * of_d], axis=-1)


def huber(residuals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the sum [S] of the Huber loss of residuals [S, R], each counted as often as its run occurs."""
    size = np.abs(residuals)
    summed: np.ndarray = (counts * np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))).sum(axis=-1)
    return summed


def minimize(
    theta: np.ndarray, x: np.ndarray, z: np.ndarray, y: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes the Huber loss of log losses from each start, by Levenberg-Marquardt steps with Huber's weights.

    Args:
        theta: [S, 5], the starts.
        x: [R], log parameters; z: [R], log tokens; y: [R], log losses.
        counts: [S, R].

    Returns:
        the optima [S, 5] and their Huber losses [S].
    """
    theta, values = theta.copy(), np.empty(len(theta))
    values[:] = huber(y - predicted(theta, x, z)[0], counts)
    damping, idle = np.full(len(theta), 1e-2), np.zeros(len(theta), int)
    active = np.arange(len(theta))
    for _ in range(STEPS):
        now, weights = theta[active], counts[active]
        log_loss, slopes = predicted(now, x, z)
        residuals = y - log_loss
        weights = weights * np.minimum(1, DELTA / np.maximum(np.abs(residuals), 1e-30))
        weighted = slopes * weights[..., None]
        normal = weighted.swapaxes(1, 2) @ slopes
        downhill = (weighted * residuals[..., None]).sum(axis=1)
        diagonal = np.einsum("spp->sp", normal)
        diagonal += damping[active, None] * diagonal + 1e-12 * weights.sum(axis=1)[:, None]
        new = now + np.linalg.solve(normal, downhill[..., None])[..., 0]
        value = huber(y - predicted(new, x, z)[0], counts[active])
        better = value < values[active]
        slow = ~better | (values[active] - value <= TOLERANCE * values[active] + EXACT)
        theta[active[better]], values[active[better]] = new[better], value[better]
        damping[active] = np.clip(np.where(better, damping[active] / 4, damping[active] * 3), 1e-9, 1e9)
        idle[active] = np.where(slow, idle[active] + 1, 0)
        active = active[idle[active] < PATIENCE]
        if not len(active):
            break
    return theta, values


def intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends [K] of the 95 % intervals of values by their samples [S, K], the first of which is the estimate.

    They are nan where fewer than half of the samples have a value.
    """
    drawn = np.where(np.isfinite(values[1:]), values[1:], np.nan)
    rare = np.isfinite(drawn).sum(axis=0) < max(2, len(drawn) / 2)
    low, high = np.nanquantile(np.where(rare, 0.0, drawn), [0.025, 0.975], axis=0)
    return np.where(rare, np.nan, low), np.where(rare, np.nan, high)


def power_laws(ladder: Ladder, isoflop: IsoFlop) -> np.ndarray:
    """Returns the power laws of the minima [2, S, 2]: exponent and log factor of parameters, and those of tokens."""
    logs = np.log(ladder.budget_flops)
    return np.stack([fit_power(logs, isoflop.minima[..., i]) for i in range(2)])


def predict_largest(ladder: Ladder) -> list[dict[str, Any]]:
    """Predicts the losses of the runs of the largest budget from those of the others, of which three are needed.

    Returns:
        a row for each run of the largest budget: its size and loss, the predicted one, and the ends of the interval
        that a run would lie in; none where the others are too few.
    """
    largest = ladder.budgets == ladder.budgets.max()
    rest, last = ladder.of(~largest), ladder.of(largest)
    if ladder.budgets.max() < BESIDES or why_unfit(rest):
        return []
    law = fit_law(rest, rest.samples())
    losses = law.scattered(law.loss(last.parameters, last.tokens))
    ends = intervals(losses)
    columns = (last.parameters, last.tokens, last.losses, losses[0], *ends)
    names = ("parameters", "tokens", "measured", "predicted", "low", "high")
    rows = [dict(zip(names, map(float, values), strict=True)) for values in zip(*columns, strict=True)]
    return sorted(rows, key=lambda row: row["parameters"])
