"""The charts of a report: a Vega-Lite specification each, for the page and for the image files beside it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from lmlab.evaluation.metrics import BOUND, EXACT
from lmlab.reporting.load import SPLITS, Run

POINTS = 2000
"""Points of a curve in an image of one run: more than its width shows."""
WIDTH, HEIGHT = 640, 320
"""Pixels of the image files; the page makes charts as wide as there is room."""
COLOURS = 10
"""Configurations that can be told apart by colour."""
DECADE = 10
"""Values whose largest is so many times the smallest are drawn on a logarithmic scale."""
BLUE = "#4c78a8"
VIRIDIS = alt.SchemeParams(name="viridis", extent=[0, 0.87])  # beyond, it is too light for lines on white
AXIS: dict[str, Any] = {"labelExpr": "format(datum.value, abs(datum.value) < 1e4 ? ',.6~g' : '~s')", "tickCount": 6}
"""The options of an axis: numbers below 10,000 in full, larger ones like 10k and 2M."""


class Chart(NamedTuple):
    """A chart of a report."""

    name: str
    """The name of its image files, without the ending."""
    title: str
    spec: dict[str, Any]
    """The Vega-Lite specification, which holds its data."""
    table: str
    """The name of the CSV file that holds its data, without the ending."""


def draw_curve(
    points: pd.DataFrame,
    y: tuple[str, str],
    time: tuple[float, str],
    configurations: Sequence[str],
    key: tuple[str, str] | None,
    select: str,
    most: int,
) -> dict[str, Any]:
    """Draws a metric over training: the mean of the runs of a configuration, and the range that they span.

    Args:
        points: a row for each point of the curve of each run, as `Run.curves` yields it, with run and configuration,
            where the metric is finite.
        y: the column of the metric, and the title of its axis.
        time: the seconds of a unit of time, and the unit.
        configurations: the names of all configurations that have curves, best first; the legend lists those that
            have points here, and each has the same colour in every chart.
        key: the column that colours stand for where there are more configurations than `COLOURS`, and its title.
        select: the CSS selector of the element of the page that says what the curve is drawn against.
        most: the greatest number of points of a curve.
    """
    few, several = len(configurations) <= COLOURS, points["configuration"].nunique() < points["run"].nunique()
    colour: Any = alt.value(BLUE)
    values = {}
    if few:
        here = set(points["configuration"])
        listed = [name for name in configurations if name in here]
        colour = alt.Color("configuration:N").scale(domain=[*configurations]).title(None).legend(values=listed)
    elif key:
        colour = alt.Color("value:Q", title=key[1])
        colour = colour.scale(scheme=VIRIDIS, type=scale(points[key[0]].dropna()).to_dict().get("type", "linear"))
        values = {"value": (key[0], "first")}
    curves = (
        points.assign(time=points["seconds"] / time[0])
        .groupby(["configuration", "step"], sort=False, as_index=False)
        .agg(
            tokens=("tokens", "mean"),
            time=("time", "mean"),
            flops=("flops", "mean"),
            mean=(y[0], "mean"),
            low=(y[0], "min"),
            high=(y[0], "max"),
            runs=("run", "count"),
            **values,
        )
    )
    # Every n-th point of a configuration, counted from its last, which is kept.
    of_each = curves.groupby("configuration")["step"]
    stride = np.ceil(of_each.transform("size") / most)
    curves = curves[of_each.cumcount(ascending=False) % stride == 0].round(4)
    # A line of one point can't be seen: it gets a dot, which needs room at the edge.
    curves["alone"] = curves.groupby(["configuration", "runs"])["step"].transform("size") == 1
    dots = bool(curves["alone"].any())
    room: dict[str, Any] = {"nice": False, "padding": 6} if dots else {}

    titles = {
        "tokens": "tokens seen in training",
        "step": "optimizer steps",
        "time": f"time ({time[1]})",
        "flops": "floating-point operations",
    }
    against = alt.param(name="against", value="tokens", bind=alt.BindDirect(element=select, event="change"))
    x = alt.X("x:Q").title(None).scale(zero=False, **room).axis(**AXIS)
    base = (
        alt.Chart(curves)
        .transform_calculate(x="datum[against]")
        # A line does not go on from the mean of some runs to that of others.
        .encode(x=x, color=colour, detail=["configuration:N", "runs:O"])
    )
    picked = alt.selection_point(fields=["configuration"], bind="legend", name="picked")
    zoomed = alt.selection_interval(
        bind="scales",
        name="zoomed",
        zoom="wheel![event.shiftKey]",
        translate="[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
    )
    shown = ["configuration", "tokens", "step", "time", "flops", "mean", *(["runs", "low", "high"] if several else [])]
    means = base.encode(
        y=alt.Y("mean:Q").title(y[1]).scale(**{"zero": y[0] == "speed", "nice": False} | room).axis(**AXIS),
        tooltip=[tooltip(field, titles.get(field)) for field in shown],
    )
    visible: Any = alt.condition(picked, alt.value(1), alt.value(0.1)) if few else alt.value(0.6)
    lines = means.mark_line(strokeWidth=1.8 if few else 1.3).encode(strokeOpacity=visible)
    layers = [lines.add_params(zoomed, *([picked] if few else []))]
    if dots:
        layers.append(means.transform_filter("datum.alone").mark_circle(size=40, opacity=1).encode(fillOpacity=visible))
    if several and few:
        ranges = base.transform_filter("datum.runs > 1").mark_area()
        opacity = alt.condition(picked, alt.value(0.18), alt.value(0.02))
        layers.insert(0, ranges.encode(y=alt.Y("low:Q").title(y[1]), y2="high:Q", fillOpacity=opacity))
    below = alt.Title(alt.expr(f"({titles})[against]"), orient="bottom", anchor="middle", fontSize=12)
    return render(alt.layer(*layers).add_params(against).properties(title=below))


def draw_series(points: pd.DataFrame, title: str, select: str) -> dict[str, Any]:
    """Draws the bits per byte of the models of series over training, on a logarithmic scale where the steps double.

    Args:
        points: a row for each model: series, step, tokens and bits_per_byte.
        title: that of the axis of the metric.
        select: the CSS selector of the element of the page that says what the curve is drawn against.
    """
    points = points[["series", "step", "tokens", "bits_per_byte"]]
    doubling = {1, 2} <= {*points["step"]}
    if doubling:
        points = points[points["step"] > 0]
    against = alt.param(name="against", value="tokens", bind=alt.BindDirect(element=select, event="change"))
    x = alt.X("x:Q").title(None).scale(type="log" if doubling else "linear", nice=False, padding=10).axis(**AXIS)
    lines = (
        alt.Chart(points)
        .transform_calculate(x="against == 'step' ? datum.step : datum.tokens")  # of time it knows nothing
        .mark_line(point=True)
        .encode(
            x=x,
            y=alt.Y("bits_per_byte:Q").title(title).scale(zero=False, nice=False, padding=10).axis(**AXIS),
            color=alt.Color("series:N").title(None),
            tooltip=[alt.Tooltip("series:N"), tooltip("step"), tooltip("tokens"), tooltip("bits_per_byte", title)],
        )
    )
    words = "against == 'step' ? 'optimizer steps' : 'tokens seen in training'"
    return render(lines.add_params(against).properties(title=alt.Title(alt.expr(words), orient="bottom", fontSize=12)))


def draw_effect(done: pd.DataFrame, key: str, heads: Mapping[str, str], metric: str) -> dict[str, Any]:
    """Draws the final metric by a key's value: a point for each run, and means where they compare like with like.

    Args:
        done: a row for each finished run: run, configuration, evaluation, final, and its value of each key.
        heads: the keys in which these runs differ, and what each is called; means are over those combinations of the
            other keys that have every value of this one.
    """
    others = [other for other in heads if other != key]
    kinds = done.groupby("evaluation")[key].transform("nunique")
    alike = done.groupby(["evaluation", *others], dropna=False)[key].transform("nunique")
    means = done[(alike == kinds) & (kinds > 1)].groupby(["evaluation", *others, key], dropna=False)["final"].mean()
    means = means.groupby(level=["evaluation", key]).mean().reset_index().rename(columns={key: "value"})

    values = sorted(done[key].dropna().unique().tolist())
    numeric = not isinstance(values[0], str)
    if numeric:
        ticks: dict[str, Any] = {"values": values} if len(values) <= 8 else {}
        x = alt.X("value:Q").scale(scale(values)).axis(**AXIS, **ticks)
    else:
        x = alt.X("value:N").sort(values).axis(labelAngle=0, labelLimit=140)
    x = x.title(heads[key])
    y = alt.Y("final:Q").title(metric).scale(scale(done["final"])).axis(**AXIS)
    colour: Any = alt.value(BLUE)
    by = next((other for other in others if done[other].nunique() <= 8), None)
    if done["evaluation"].nunique() > 1:
        colour = alt.Color("evaluation:N")
    elif by:
        ordered = sorted(done[by].dropna().unique().tolist())
        kind, scheme = ("N", alt.SchemeParams("tableau10")) if isinstance(ordered[0], str) else ("O", VIRIDIS)
        colour = alt.Color(f"by:{kind}").title(heads[by]).sort(ordered).scale(scheme=scheme, domain=ordered)
    shown = done[["run", "configuration", "evaluation", "final"]].assign(value=done[key], by=done[by] if by else None)
    points = alt.Chart(shown).mark_point(filled=True, size=60, opacity=0.8)
    points = points.encode(
        x=x, y=y, color=colour, tooltip=["run:N", tooltip("configuration"), tooltip("final", metric)]
    )
    if len(values) == len(done) or len(values) > 12:
        return render(points)
    line = {"strokeDash": [4, 3], "strokeWidth": 1.2} if numeric else {"thickness": 2, "size": 36}
    dashes = (alt.Chart(means).mark_line if numeric else alt.Chart(means).mark_tick)(color="#444", **line)
    return render(dashes.encode(x=x, y=y, detail="evaluation:N") + points)


def draw_final(finals: pd.DataFrame, field: str, title: str) -> dict[str, Any]:
    """Draws a metric of each configuration with its 95 % interval, best first.

    Args:
        finals: the rows of the table of final metrics that are shown, all of one kind of evaluation.
        field: the column of the metric; with `_low` and `_high` the ends of its interval.
    """
    low, high = f"{field}_low", f"{field}_high"
    finals = finals[["configuration", "runs", field, low, high]]
    finals = finals[finals[field].notna()]
    values, ends = finals[field].astype(float), finals[[low, high]].stack().dropna().astype(float)
    differences = field == "difference"
    if not differences:  # an interval over many decades goes on beyond the chart
        ends = ends.clip(values.min() / 1e6, values.max() * 1e6)
    x: dict[str, Any] = {
        "scale": scale([*values, *ends, *([0.0] if differences else [])], differences),
        "title": title,
        "axis": AXIS,
    }
    base = alt.Chart(finals).encode(y=alt.Y("configuration:N").title(None).sort([*finals["configuration"]]))
    rules = base.transform_filter(f"isValid(datum.{low})").mark_rule(strokeWidth=2, color=BLUE, clip=True)
    points = base.mark_point(filled=True, size=60, color="#1f4e79", opacity=1)
    shown = [tooltip(name) for name in ("configuration", "runs", field, low, high)]
    chart = rules.encode(x=alt.X(f"{low}:Q", **x), x2=high) + points.encode(x=alt.X(f"{field}:Q", **x), tooltip=shown)
    if differences:
        zero = alt.Chart(alt.Data(values=[{}])).mark_rule(color="#888", strokeDash=[4, 3]).encode(x=alt.XDatum(0))
        chart = zero + chart
    return render(chart, 22 * max(2, len(finals)))


def image_files(charts: Iterable[Chart]) -> Iterator[tuple[str, str | bytes]]:
    """Yields the names and contents of the image files of charts, an SVG and a PNG of each."""
    for chart in charts:
        svg = vl_convert.vegalite_to_svg(chart.spec)
        yield f"{chart.name}.svg", svg
        yield f"{chart.name}.png", vl_convert.svg_to_png(svg, scale=2)


def losses_png(run: Run) -> bytes | None:
    """Returns the chart of the losses of a run over training, as a PNG image; None if none were logged."""
    curves = run.curves()
    points = curves[np.isfinite(curves["loss"].astype(float))]
    if points.empty:
        return None
    loss = "loss (nats per token)" if run.metric in (EXACT, BOUND) else "loss (nats per scored token)"
    points = points.assign(configuration=points["split"])
    spec = draw_curve(points, ("loss", loss), (1, "s"), [*SPLITS], None, "#against", POINTS)
    return vl_convert.vegalite_to_png(spec, scale=2)


def scale(values: Sequence[float] | pd.Series, linear: bool = False) -> alt.Scale:
    """Returns a scale from the least value to the most; logarithmic over decades."""
    low, high = float(min(values)), float(max(values))
    log = not linear and low > 0 and high >= DECADE * low
    domain: Any = [low, high] if low < high else alt.Undefined
    kind: dict[str, Any] = {"type": "log"} if log else {"zero": False}
    return alt.Scale(**kind, domain=domain, nice=False, padding=20)


def tooltip(field: str, title: str | None = None) -> alt.Tooltip:
    """Returns what a chart says of a field under the pointer."""
    if field == "configuration":
        return alt.Tooltip(f"{field}:N")
    return alt.Tooltip(f"{field}:Q", title=title or field.replace("_", " "), format=",.5~g")


def render(chart: Any, height: int = HEIGHT) -> dict[str, Any]:
    """Returns the specification of a chart."""
    with alt.data_transformers.disable_max_rows():
        return (
            chart.properties(width=WIDTH, height=height)
            .configure(font="Helvetica, Arial, sans-serif", background="white", padding=8)
            .configure_view(stroke=None)
            .configure_axis(gridColor="#e4e4e4", domainColor="#888", labelFontSize=11, titleFontSize=12)
            .configure_axisY(labelLimit=400)
            .configure_legend(orient="top", columns=3, labelLimit=320, symbolStrokeWidth=3, symbolOpacity=1)
            .to_dict(validate=False)
        )
