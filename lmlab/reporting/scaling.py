"""The charts of a scaling law: loss against size at equal computation, and the lowest loss against computation."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from lmlab.evaluation.scaling import IsoFlop, Ladder, Law, fit_isoflop, fit_law, intervals, power_laws, why_unfit
from lmlab.reporting.charts import AXIS, BLUE, VIRIDIS, Chart, render, tooltip
from lmlab.reporting.load import Run
from lmlab.reporting.text import number_text

POINTS = 60
"""Points of a curve."""
BEYOND = 10
"""The law is drawn up to a budget so many times the largest one."""


def draw_isoflop(ladder: Ladder, isoflop: IsoFlop, metric: str) -> dict[str, Any]:
    """Draws the loss of the runs of each budget against their parameters, with its parabola and its minimum."""
    labels = [number_text(flops) for flops in ladder.budget_flops]
    runs = pd.DataFrame(
        {
            "budget": [labels[budget] for budget in ladder.budgets],
            "parameters": ladder.parameters,
            "tokens": ladder.tokens,
            "loss": ladder.losses,
        }
    )
    curves, minima = [], []
    for budget, label in enumerate(labels):
        sizes = ladder.parameters[ladder.budgets == budget]
        along = np.geomspace(sizes.min(), sizes.max(), POINTS)
        loss = np.polyval(isoflop.curves[budget], np.log(along))
        curves.append(pd.DataFrame({"budget": label, "parameters": along, "loss": loss}))
        log_n, _, lowest = isoflop.minima[0, budget]
        minima.append({"budget": label, "parameters": np.exp(log_n), "loss": lowest})
    x = alt.X("parameters:Q").title("parameters").scale(type="log", nice=False, padding=15)
    x = x.axis(labelExpr=AXIS["labelExpr"], values=ticks(ladder.parameters))
    y = alt.Y("loss:Q").title(metric).scale(zero=False, nice=False, padding=15).axis(**AXIS)
    colour = alt.Color("budget:O").title("FLOPs").sort(labels).scale(scheme=VIRIDIS).legend(columns=len(labels))
    shown = [tooltip(name) for name in ("parameters", "tokens", "loss")]
    points = alt.Chart(runs).mark_point(filled=True, size=50, opacity=0.8)
    lines = alt.Chart(pd.concat(curves).dropna()).mark_line(strokeWidth=1.6)
    stars = alt.Chart(pd.DataFrame(minima).dropna()).mark_point(
        filled=True, shape="diamond", size=130, opacity=1, stroke="white"
    )
    encoding = {"x": x, "y": y, "color": colour}
    return render(lines.encode(**encoding) + points.encode(**encoding, tooltip=shown) + stars.encode(**encoding))


def draw_frontier(ladder: Ladder, isoflop: IsoFlop, law: Law, metric: str) -> dict[str, Any]:
    """Draws the loss of all runs against computation, and the lowest loss of the law for each budget with its
    95 % interval."""
    runs = pd.DataFrame({"flops": ladder.flops, "parameters": ladder.parameters, "loss": ladder.losses})
    flops = np.geomspace(ladder.flops.min(), BEYOND * ladder.flops.max(), POINTS)
    losses = law.loss(*law.optimum(flops))
    low, high = intervals(losses)
    frontier = pd.DataFrame({"flops": flops, "loss": losses[0], "low": low, "high": high})
    minima = pd.DataFrame({"flops": ladder.budget_flops, "loss": isoflop.minima[0, :, 2]}).dropna()
    x = alt.X("flops:Q").title("floating-point operations").scale(type="log", nice=False, padding=10)
    x = x.axis(format=".0e", values=ticks(flops))
    y = alt.Y("loss:Q").title(metric).scale(type="log", zero=False, nice=False, padding=15).axis(**AXIS)
    size = alt.Color("parameters:Q").scale(type="log", scheme=VIRIDIS)
    size = size.legend(values=ticks(ladder.parameters), format="~s")
    ends = {"y": alt.Y("low:Q").title(metric), "y2": "high:Q"}
    band = alt.Chart(frontier).mark_area(opacity=0.18, color=BLUE).encode(x=x, **ends)
    line = alt.Chart(frontier).mark_line(strokeWidth=1.8, color=BLUE).encode(x=x, y=y)
    shown = [tooltip(name) for name in ("flops", "parameters", "loss")]
    points = alt.Chart(runs).mark_point(filled=True, size=50, opacity=0.8).encode(x=x, y=y, color=size, tooltip=shown)
    stars = alt.Chart(minima).mark_point(shape="diamond", filled=True, size=130, color="#1f4e79", opacity=1)
    return render(band + line + points + stars.encode(x=x, y=y))


def ticks(values: np.ndarray) -> list[float]:
    """Returns the numbers 1, 2 and 5 of each decade that lie among values."""
    decades = 10.0 ** np.arange(np.floor(np.log10(values.min())), np.log10(values.max()) + 1)
    numbers = np.outer(decades, [1, 2, 5]).ravel()
    among: list[float] = numbers[(numbers >= values.min()) & (numbers <= values.max())].tolist()
    return among


def ladder_charts(ladder: Ladder, isoflop: IsoFlop, law: Law, metric: str, slug: str = "") -> list[Chart]:
    """Returns the charts of a ladder, whose data are in `runs.csv`; `slug` begins the names of their files."""
    return [
        Chart(f"{slug}isoflop", f"{metric} at equal computation", draw_isoflop(ladder, isoflop, metric), "runs"),
        Chart(
            f"{slug}frontier",
            f"Lowest {metric} for each budget",
            draw_frontier(ladder, isoflop, law, metric),
            "runs",
        ),
    ]


def scaling_charts(runs: Sequence[Run], slug: str) -> list[Chart]:
    """Returns the charts of finished runs of several sizes and budgets, whose losses mean the same; none where these
    make no ladder."""
    names = ("parameters", "tokens", "flops", "val/loss")
    found = [[run.summary[name] for name in names] for run in runs if all(name in run.summary for name in names)]
    if not found:
        return []
    ladder = Ladder(*np.array(found, float).T)
    if len(ladder.budget_flops) == 1 or why_unfit(ladder):
        return []
    counts = ladder.samples()
    isoflop = fit_isoflop(ladder, counts)
    if np.isnan(power_laws(ladder, isoflop)[:, 0]).any():
        return []
    return ladder_charts(ladder, isoflop, fit_law(ladder, counts), "val/loss", f"{slug}_")
