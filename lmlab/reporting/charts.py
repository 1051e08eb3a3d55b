"""The charts of a report: a Vega-Lite specification each, for the page and for the image files beside it.

A specification names its data and holds none: `validation` and `training` have a row for each point of the curves,
`runs` one for each run, `finals` one for each configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

WIDTH, HEIGHT = 640, 320
"""Pixels of the image files; the page makes charts as wide as there is room."""
COLOURS = 10
"""Configurations that can be told apart by colour."""
DECADE = 10
"""Values whose largest is so many times the smallest are drawn on a logarithmic scale."""
BLUE = "#4c78a8"
VIRIDIS = alt.SchemeParams(name="viridis", extent=[0, 0.87])  # beyond, it is too light for lines on white
NUMBER = "format(datum.value, ',.6~g')"
SHORT = "format(datum.value, '~s')"
"""Expressions for the numbers on axes: with their digits, or as 10k and 2M."""
Y = {"loss": "datum.loss", "perplexity": "exp(datum.loss)", "speed": "datum.speed"}


@dataclass(frozen=True)
class Chart:
    """A chart of a report."""

    name: str
    """The name of its image files, without the ending."""
    title: str
    spec: dict[str, Any]
    data: Sequence[str]
    """The names of the data that it is drawn from."""
    table: str
    """The name of the CSV file that holds its data."""


@dataclass(frozen=True)
class Key:
    """A key of the config in which runs differ, as a column of the data."""

    field: str
    title: str
    values: list[Any]
    """The different values, in order: all numbers, or all texts."""

    @property
    def numeric(self) -> bool:
        """True if the values are numbers."""
        return not isinstance(self.values[0], str)


def draw_curve(
    data: str,
    x: tuple[str, str],
    y: tuple[str, str],
    configurations: Sequence[str],
    several: bool,
    key: Key | None,
) -> dict[str, Any]:
    """Draws a metric over training: the mean of the runs of a configuration, and the range that they span.

    Args:
        data: training or validation.
        x: an expression of the data, and the title of its axis.
        y: a key of `Y`, and the title of its axis.
        configurations: best first.
        several: whether one of them has more than one run.
        key: what colours stand for where there are more configurations than `COLOURS`.
    """
    few = len(configurations) <= COLOURS
    colour: Any = alt.value(BLUE)
    if few:
        colour = alt.Color("configuration:N").scale(domain=[*configurations]).title(None)
    elif key:
        colour = alt.Color(f"{key.field}:Q").title(key.title)
        colour = colour.scale(scheme=VIRIDIS, type=scale(key.values).to_dict().get("type", "linear"))
    fields = ["configuration", *([key.field] if key and not few else [])]
    base = (
        alt.Chart(alt.NamedData(data))
        .transform_lookup("run", alt.LookupData(alt.NamedData("runs"), "run", fields))
        .transform_calculate(y=Y[y[0]], x=x[0])
        # A run that a filter hides has no configuration.
        .transform_filter("isValid(datum.y) && isFinite(datum.y) && isValid(datum.configuration)")
        .transform_aggregate(
            mean="mean(y)", low="min(y)", high="max(y)", runs="count()", x="mean(x)", groupby=["step", *fields]
        )
        .encode(
            x=alt.X("x:Q").title(x[1]).axis(labelExpr=NUMBER if "time" in x[1] else SHORT, tickCount=6),
            color=colour,
            # A line does not go on from the mean of some runs to that of others.
            detail=["configuration:N", "runs:O"],
        )
    )
    y_scale = alt.Scale(type="log", nice=False) if y[0] == "perplexity" else alt.Scale(zero=y[0] == "speed", nice=False)
    y_axis = alt.Axis(labelExpr=SHORT if y[0] == "speed" else NUMBER, tickCount=6)
    picked = alt.selection_point(fields=["configuration"], bind="legend", name="picked")
    zoomed = alt.selection_interval(
        bind="scales",
        name="zoomed",
        zoom="wheel![event.shiftKey]",
        translate="[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
    )
    shown = [("configuration", None), ("runs", None), ("x", x[1]), ("mean", None), ("low", None), ("high", None)]
    lines = base.mark_line(strokeWidth=1.8 if few else 1.3).encode(
        y=alt.Y("mean:Q").title(y[1]).scale(y_scale).axis(y_axis),
        strokeOpacity=alt.condition(picked, alt.value(1), alt.value(0.1)) if few else alt.value(0.6),
        tooltip=[tooltip(field, name) for field, name in (shown if several else shown[:4])],
    )
    lines = lines.add_params(zoomed, *([picked] if few else []))
    if not (several and few):
        return render([lines])
    ranges = base.transform_filter("datum.runs > 1").mark_area()
    opacity = alt.condition(picked, alt.value(0.18), alt.value(0.02))
    return render([ranges.encode(y=alt.Y("low:Q").title(y[1]), y2="high:Q", fillOpacity=opacity), lines])


def draw_effect(
    key: Key, others: Sequence[Key], metric: str, values: Sequence[float], evaluations: Sequence[str]
) -> dict[str, Any]:
    """Draws the final metric by a key's value: a point for each run, and means where they compare like with like.

    Args:
        others: the other keys; means are over those of their combinations that have every value of this one.
        values: the metrics of all runs.
        evaluations: the kinds of evaluation; those of different kinds are not joined.
    """
    if key.numeric:
        x = alt.X(f"{key.field}:Q").scale(scale(key.values)).axis(labelExpr=NUMBER, tickCount=6)
        x = x.axis(labelExpr=NUMBER, values=key.values) if len(key.values) <= 8 else x
    else:
        x = alt.X(f"{key.field}:N").sort(key.values).axis(labelAngle=0, labelLimit=140)
    encoding = {
        "x": x.title(key.title),
        "y": alt.Y("final:Q").title(metric).scale(scale(values)).axis(labelExpr=NUMBER, tickCount=6),
    }
    colour: Any = alt.value(BLUE)
    by = next((other for other in others if len(other.values) <= 8), None)
    if len(evaluations) > 1:
        colour = alt.Color("evaluation:N").scale(domain=[*evaluations])
    elif by:
        colour = alt.Color(f"{by.field}:{'O' if by.numeric else 'N'}").title(by.title).sort(by.values)
        colour = colour.scale(scheme=VIRIDIS if by.numeric else "tableau10", domain=by.values)
    base = alt.Chart(alt.NamedData("runs")).transform_filter("isValid(datum.final)")
    points = base.mark_point(filled=True, size=60, opacity=0.8).encode(
        **encoding, color=colour, tooltip=["run:N", "configuration:N", tooltip("final", metric)]
    )
    if len(key.values) == len(values) or len(key.values) > 12:
        return render([points])
    fields = [other.field for other in others]
    means = (
        base.transform_joinaggregate(there=f"distinct({key.field})", groupby=["evaluation", *fields])
        .transform_joinaggregate(all=f"distinct({key.field})", groupby=["evaluation"])
        .transform_filter("datum.there == datum.all && datum.all > 1")
        .transform_aggregate(final="mean(final)", groupby=["evaluation", key.field, *fields])
    )
    line = {"strokeDash": [4, 3], "strokeWidth": 1.2} if key.numeric else {"thickness": 2, "size": 36}
    means = (means.mark_line if key.numeric else means.mark_tick)(color="#444", **line)
    return render(
        [means.encode(x=encoding["x"], y=alt.Y("mean(final):Q").title(metric), detail="evaluation:N"), points]
    )


def draw_final(finals: pd.DataFrame, field: str, title: str) -> dict[str, Any]:
    """Draws a metric of each configuration with its 95 % interval, best first.

    Args:
        finals: the rows of the data that are shown, all of one kind of evaluation.
        field: the column of the metric; with `_low` and `_high` the ends of its interval.
    """
    low, high = f"{field}_low", f"{field}_high"
    values = finals[field].dropna().astype(float)
    ends = pd.concat([finals[low], finals[high]]).dropna().astype(float)
    if field == "difference":
        ends = pd.concat([ends, pd.Series([0.0])])
    else:  # an interval over many decades goes on beyond the chart
        ends = ends.clip(values.min() / 1e6, values.max() * 1e6)
    base = alt.Chart(alt.NamedData("finals")).transform_filter(
        f"datum.evaluation == '{finals['evaluation'].iloc[0]}' && datum.rank <= {len(finals)} && isValid(datum.{field})"
    )
    across = scale([*values, *ends], linear=field == "difference")
    axis = alt.Axis(labelExpr=NUMBER, tickCount=6)
    y = alt.Y("configuration:N").title(None).sort([*finals["configuration"]])
    shown = [tooltip(name, name.replace("_", " ")) for name in (field, low, high)]
    layers = [
        base.transform_filter(f"isValid(datum.{low})")
        .mark_rule(strokeWidth=2, color=BLUE, clip=True)
        .encode(x=alt.X(f"{low}:Q").title(title).scale(across).axis(axis), x2=high, y=y),
        base.mark_point(filled=True, size=60, color="#1f4e79", opacity=1).encode(
            x=alt.X(f"{field}:Q").title(title).scale(across).axis(axis),
            y=y,
            tooltip=["configuration:N", "runs:Q", *shown],
        ),
    ]
    if field == "difference":
        zero = alt.Chart(alt.Data(values=[{}])).mark_rule(color="#888", strokeDash=[4, 3]).encode(x=alt.XDatum(0))
        layers.insert(0, zero)
    return render(layers, 22 * max(2, len(finals)))


def scale(values: Sequence[float], linear: bool = False) -> alt.Scale:
    """Returns a scale from the least value to the most, whatever a filter leaves; logarithmic over decades."""
    low, high = min(values), max(values)
    log = not linear and low > 0 and high >= DECADE * low
    domain: Any = [low, high] if low < high else alt.Undefined
    kind: dict[str, Any] = {"type": "log"} if log else {"zero": False}
    return alt.Scale(**kind, domain=domain, nice=False, padding=20)


def tooltip(field: str, title: str | None = None) -> alt.Tooltip:
    """Returns what a chart says of a field under the pointer."""
    if field == "configuration":
        return alt.Tooltip(f"{field}:N")
    return alt.Tooltip(f"{field}:Q", title=title or field, format=",.5~g")


def render(layers: Sequence[alt.Chart], height: int = HEIGHT) -> dict[str, Any]:
    """Returns the specification of a chart of layers."""
    return (
        alt.layer(*layers)
        .properties(width=WIDTH, height=height)
        .configure(font="Helvetica, Arial, sans-serif", background="white", padding=8)
        .configure_view(stroke=None)
        .configure_axis(gridColor="#e4e4e4", domainColor="#888", labelFontSize=11, titleFontSize=12)
        .configure_axisY(labelLimit=400)
        .configure_legend(orient="top", columns=3, labelLimit=320, symbolStrokeWidth=3, symbolOpacity=1)
        .to_dict(validate=False)
    )
