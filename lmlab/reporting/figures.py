"""The figures of a report: one Vega-Lite specification each, for the page and for the files beside it.

A specification names its data and holds none: `validation` and `training` have a row per run and point of their
curves, `runs` one per run, `finals` one per configuration.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from lmlab.reporting.reading import number
from lmlab.reporting.words import brief, shortened

WIDTH, HEIGHT = 640, 320  # of the files; the page makes them as wide as it is itself
COLOURS = 10
"""Configurations that can be told apart by colour."""
DECADE = 10
"""Values whose largest is so many times the smallest are drawn on a logarithmic scale."""
VIRIDIS = alt.SchemeParams(name="viridis", extent=[0, 0.87])  # beyond, it is too light for lines on white
FONT = "Helvetica, Arial, sans-serif"
PLAIN = "format(datum.value, '.4~g')"
TICK = "datum.value != 0 && (abs(datum.value) >= 1e6 || abs(datum.value) < 1e-4) ? format(datum.value, '.6~e') : "
TICK += "format(datum.value, ',.8~r')"
SHORT = "abs(datum.value) < 1000 ? datum.label : format(datum.value, '~s')"
Y = {
    "loss": ("datum.loss", "loss (nats per {})"),
    "perplexity": ("exp(datum.loss)", "{}"),
    "speed": ("datum.speed", "tokens per second"),
}


@dataclass(frozen=True)
class Figure:
    name: str
    """Of its files."""
    title: str
    spec: dict[str, Any]
    data: str
    """What it is drawn from."""
    table: str
    """The CSV file that has its data whole."""


@dataclass(frozen=True)
class Key:
    """A key in which runs differ, as a field of the data."""

    field: str
    title: str
    values: list[Any]
    """Those there are, in order: all numbers or all words."""

    @property
    def numeric(self) -> bool:
        return number(self.values[0])


def scale(values: Sequence[float]) -> alt.Scale:
    """From the least to the most, whatever a filter leaves; logarithmic where they span decades."""
    wide = len(values) > 0 and min(values) > 0 and max(values) >= DECADE * min(values)
    ends: Any = [min(values), max(values)] if len(set(values)) > 1 else alt.Undefined
    if wide:
        return alt.Scale(type="log", nice=False, padding=20, domain=ends)
    return alt.Scale(zero=False, nice=False, padding=20, domain=ends)


def by_number(field: str, title: str, values: Sequence[float]) -> alt.Color:
    """A colour for each number, with a legend of the least and the most."""
    ends = [min(values), max(values)]
    kind = scale(values).to_dict().get("type", "linear")
    legend = alt.Legend(values=ends, labelExpr=PLAIN, gradientLength=180)
    # What lies beyond, of runs that have not finished, gets the colour of the end.
    colours = alt.Scale(scheme=VIRIDIS, type=kind, domain=ends, clamp=True) if ends[0] < ends[1] else alt.Scale()
    return alt.Color(f"{field}:Q", title=title, legend=legend, scale=colours)


def curves(
    split: str, y: str, figure: str, configurations: Sequence[str], several: bool, by: Key | None, seconds: float
) -> dict[str, dict[str, Any]]:
    """Loss, perplexity or speed over a run: the mean of the runs of a configuration, and how far they spread.

    Args:
        figure: what the perplexity is called.
        configurations: best first.
        several: whether one of them has more than one run.
        by: what colours stand for where there are more configurations than `COLOURS`.
        seconds: the longest run.

    Returns:
        The figure against tokens, steps and time.
    """
    unit, name = (3600, "h") if seconds > 7200 else (60, "min") if seconds > 120 else (1, "s")
    against = {
        "tokens": ("datum.tokens", "tokens seen in training"),
        "steps": ("datum.step", "optimizer steps"),
        "time": (f"datum.seconds / {unit}", f"time ({name})"),
    }
    x, title = against["tokens"]
    of = "scored token" if "masked" in figure else "token"
    few = len(configurations) <= COLOURS
    colour: Any = alt.value("#4c78a8")
    if few:
        colour = alt.Color("configuration:N").scale(domain=list(configurations)).title(None)
    elif by:
        colour = by_number(by.field, by.title, by.values)
    field = [by.field] if by and not few else []
    base = (
        alt.Chart(alt.NamedData(split))
        .transform_calculate(y=Y[y][0], x=x)
        .transform_filter("isValid(datum.y) && isFinite(datum.y)")
        .transform_aggregate(
            mean="mean(y)",
            low="min(y)",
            high="max(y)",
            runs="count()",
            x="mean(x)",
            groupby=["configuration", "step", *field],
        )
        .encode(
            x=alt.X("x:Q").title(title).axis(labelExpr=SHORT, tickCount=6),
            color=colour,
            # A line does not go on from the mean of some runs to that of others.
            detail=["configuration:N", "runs:O"],
        )
    )
    picked = alt.selection_point(fields=["configuration"], bind="legend", name="picked")
    high = alt.Scale(type="log", nice=False) if y == "perplexity" else alt.Scale(zero=y == "speed", nice=False)
    axis: Any = {"labelExpr": SHORT if y == "speed" else TICK}
    title_y = Y[y][1].format(of if y == "loss" else figure.replace("_", " "))
    shown = alt.Y("mean:Q").title(title_y).scale(high).axis(alt.Axis(tickCount=6, **axis))
    opacity = alt.condition(picked, alt.value(1 if few else 0.6), alt.value(0.1)) if few else alt.value(0.6)
    lines = base.mark_line(strokeWidth=1.8 if few else 1.3, point=False).encode(
        y=shown,
        strokeOpacity=opacity,
        tooltip=[
            alt.Tooltip("configuration:N"),
            alt.Tooltip("runs:Q", title="runs"),
            alt.Tooltip("x:Q", title=title, format=",.6~g"),
            alt.Tooltip("mean:Q", title="mean" if several else y, format=",.5~g"),
            *([alt.Tooltip("low:Q", format=",.5~g"), alt.Tooltip("high:Q", format=",.5~g")] if several else []),
        ],
    )
    layers = [lines]
    if several and few:
        spread = base.transform_filter("datum.runs > 1").mark_area(line=False)
        visible = alt.condition(picked, alt.value(0.18), alt.value(0.02))
        layers.insert(0, spread.encode(y=alt.Y("low:Q").title(title_y), y2="high:Q", fillOpacity=visible))
    if few:
        layers[-1] = layers[-1].add_params(picked)
    spec = finished(layers, HEIGHT)
    return {name: swapped(spec, {x: other, title: its}) for name, (other, its) in against.items()}


def swapped(part: Any, words: dict[str, str]) -> Any:
    """A part of a specification with other words in the place of some."""
    if isinstance(part, dict):
        return {key: swapped(inner, words) for key, inner in part.items()}
    if isinstance(part, list):
        return [swapped(inner, words) for inner in part]
    return words.get(part, part) if isinstance(part, str) else part


def effect(
    key: Key, title: str, values: Sequence[float], evaluations: Sequence[str], by: Key | None, others: Sequence[str]
) -> dict[str, Any]:
    """The final figure by a key's value: a point per run, and means where they compare like with like.

    Args:
        values: of the figure, of all runs.
        evaluations: their kinds; those of different ones are not joined.
        by: a key for the colours.
        others: the fields of the other keys. Means are over those of their combinations that have every value.
    """
    if key.numeric:
        ticks: dict[str, Any] = {"values": key.values} if len(key.values) <= 8 else {"tickCount": 6}
        x = alt.X(f"{key.field}:Q").title(key.title).scale(scale(key.values)).axis(labelExpr=PLAIN, **ticks)
    else:
        x = alt.X(f"{key.field}:N").title(key.title).sort(key.values).axis(labelAngle=0, labelLimit=140)
    y = alt.Y("final:Q").title(title).scale(scale(values)).axis(labelExpr=TICK, tickCount=6)
    colour: Any = alt.value("#4c78a8")
    if len(evaluations) > 1:
        colour = alt.Color("evaluation:N").title("evaluation").scale(domain=list(evaluations))
    elif by:
        colour = alt.Color(f"{by.field}:{'O' if by.numeric else 'N'}").title(by.title).sort(by.values)
        colour = colour.scale(scheme=VIRIDIS if by.numeric else "tableau10", domain=by.values)
        if by.numeric:
            colour = colour.legend(labelExpr="format(datum.value, '.5~g')")
    base = alt.Chart(alt.NamedData("runs")).transform_filter("isValid(datum.final)")
    points = base.mark_point(filled=True, size=60, opacity=1, fillOpacity=0.8).encode(
        x=x,
        y=y,
        color=colour,
        tooltip=[
            alt.Tooltip("run:N"), alt.Tooltip("configuration:N"), alt.Tooltip("final:Q", title=title, format=",.5~g")
        ],
    )  # fmt: skip
    layers = [points]
    if len(key.values) < len(values) and len(key.values) <= 12:
        balanced = (
            base.transform_joinaggregate(there=f"distinct({key.field})", groupby=["evaluation", *others])
            .transform_joinaggregate(all=f"distinct({key.field})", groupby=["evaluation"])
            .transform_filter("datum.there == datum.all && datum.all > 1")
            .transform_aggregate(final="mean(final)", groupby=["evaluation", key.field, *others])
        )
        mean = balanced.mark_line(color="#444", strokeDash=[4, 3], strokeWidth=1.2, point=False)
        if not key.numeric:
            mean = balanced.mark_tick(color="#444", thickness=2, size=36)
        means = mean.encode(x=x, y=alt.Y("mean(final):Q").title(title), detail="evaluation:N")
        layers.insert(0, means)
    return finished(layers, HEIGHT)


def parallel(keys: Sequence[Key], title: str, values: Sequence[float]) -> dict[str, Any]:
    """A line per run through the values of all keys, to the final figure."""
    axes = [*keys, Key("final", title, sorted(values))]
    calculated, labels = {}, []
    for i, axis in enumerate(axes):
        calculated[f"a{i}"], marks = position(axis)
        labels += [{"axis": i, "place": place, "label": label} for place, label in apart(marks)]
    heads = [
        {"axis": i, "label": shortened(axis.title, 18), "foot": 0, "head": 1, "above": 1.11}
        for i, axis in enumerate(axes)
    ]
    x = alt.X("axis:Q").axis(None).scale(domain=[-0.15, len(axes) - 0.45], nice=False)
    y = alt.Y("place:Q").axis(None).scale(domain=[-0.06, 1.16], nice=False)
    lines = (
        alt.Chart(alt.NamedData("runs"))
        .transform_filter("isValid(datum.final)")
        .transform_calculate(**calculated)
        .transform_fold([f"a{i}" for i in range(len(axes))], as_=["folded", "place"])
        .transform_calculate(axis="toNumber(slice(datum.folded, 1))")
        .mark_line(strokeWidth=1.4, strokeOpacity=0.65)
        .encode(
            x=x,
            y=y,
            detail="run:N",
            color=by_number("final", title, values),
            tooltip=["run:N", "configuration:N", alt.Tooltip("final:Q", title=title, format=",.5~g")],
        )
    )  # fmt: skip
    rules = alt.Chart(alt.Data(values=heads)).mark_rule(color="#999").encode(x=x)
    rules = rules.encode(y=alt.Y("foot:Q").axis(None), y2="head:Q")
    names = alt.Chart(alt.Data(values=heads)).mark_text(fontWeight="bold", fontSize=11, limit=150, color="#222")
    names = names.encode(x=x, y=alt.Y("above:Q").axis(None), text="label:N")
    numbers = alt.Chart(alt.Data(values=labels)).encode(x=x, y=y, text="label:N")
    halo = numbers.mark_text(align="left", dx=5, stroke="white", strokeWidth=4, limit=100)
    text = numbers.mark_text(align="left", dx=5, color="#222", limit=100)
    spec = finished([rules, lines, names, halo, text], HEIGHT)
    return spec | {"width": max(WIDTH, 120 * len(axes)), "usermeta": {"least": 100 * len(axes)}}


def apart(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those of an axis that don't print over each other; the last is one of them."""
    kept: list[tuple[float, str]] = []
    for place, label in reversed(marks):
        if not kept or kept[-1][0] - place > 0.06:
            kept.append((place, label))
    return kept


def position(axis: Key) -> tuple[str, list[tuple[float, str]]]:
    """Where on an axis from 0 to 1 a value lies, as a Vega expression; and what stands beside it."""
    values = axis.values
    if not axis.numeric:
        last = max(1, len(values) - 1)
        return f"indexof({json.dumps(values)}, datum.{axis.field}) / {last}", [
            (i / last, brief(value, 18)) for i, value in enumerate(values)
        ]
    low, high = values[0], values[-1]
    if low == high:
        return "0.5", [(0.5, f"{low:.4g}")]
    marked = values if len(set(values)) <= 6 else (low, high)
    if low > 0 and high >= DECADE * low:
        places = [math.log(value / low) / math.log(high / low) for value in marked]
        where = f"log(datum.{axis.field} / {low}) / log({high} / {low})"
    else:
        places = [(value - low) / (high - low) for value in marked]
        where = f"(datum.{axis.field} - {low}) / ({high} - {low})"
    return where, [(place, f"{value:.4g}") for place, value in zip(places, marked, strict=True)]


def final(rows: Sequence[dict[str, Any]], field: str, title: str, rule: float | None = None) -> dict[str, Any]:
    """A figure of each configuration with its 95 % interval, best first.

    Args:
        rows: those of the data that are shown, of one kind of evaluation.
        field: its value; with `_low` and `_high` its interval's ends.
        rule: where to draw a line.
    """
    ends = [f"{field}_low", f"{field}_high"]
    values = [row[field] for row in rows if number(row[field])]
    # An interval over many decades goes on beyond the chart.
    limits = (min(values) / 1e6, max(values) * 1e6) if values and rule is None else (-math.inf, math.inf)
    values += [min(max(row[end], limits[0]), limits[1]) for row in rows for end in ends if number(row[end])]
    names = [row["label"] for row in rows]
    y = alt.Y("label:N").title(None).sort(names).axis(labelLimit=400)
    # A difference has its line too, and none is logarithmic.
    whole = [*values, rule or 0.0]
    across = scale(values) if rule is None else alt.Scale(domain=[min(whole), max(whole)], padding=20, nice=False)
    x = alt.X(f"{field}:Q").title(title).scale(across).axis(labelExpr=TICK, tickCount=6)
    kind = json.dumps(rows[0]["evaluation"])
    shown = f"datum.evaluation == {kind} && datum.rank <= {len(rows)} && isValid(datum.{field})"
    base = alt.Chart(alt.NamedData("finals")).transform_filter(shown)
    tooltip: list[Any] = [alt.Tooltip("configuration:N"), alt.Tooltip("runs:Q")]
    tooltip += [alt.Tooltip(f"{end}:Q", title=end.replace("_", " "), format=",.5~g") for end in (field, *ends)]
    bars = base.transform_filter(f"isValid(datum.{ends[0]})").mark_rule(strokeWidth=2, color="#4c78a8", clip=True)
    layers = [
        bars.encode(y=y, x=alt.X(f"{ends[0]}:Q").title(title).scale(across), x2=ends[1]),
        base.mark_point(filled=True, size=60, color="#1f4e79", opacity=1).encode(x=x, y=y, tooltip=tooltip),
    ]
    if rule is not None:
        layers.insert(0, alt.Chart(alt.Data(values=[{}])).mark_rule(color="#888", strokeDash=[4, 3]).encode(
            x=alt.XDatum(rule)
        ))  # fmt: skip
    return finished(layers, 22 * max(2, len(rows))) | {"usermeta": {"bars": True}}


def finished(layers: Sequence[alt.Chart], height: Any) -> dict[str, Any]:
    """The specification of a chart of layers."""
    spec = (
        alt.layer(*layers)
        .properties(width=WIDTH, height=height)
        .configure(font=FONT, background="white", padding={"left": 8, "right": 28, "top": 8, "bottom": 8})
        .configure_view(stroke=None)
        .configure_axis(
            gridColor="#e4e4e4", domainColor="#888", labelFontSize=11, titleFontSize=12, titleFontWeight=600
        )
        .configure_legend(orient="top", columns=3, labelLimit=320, symbolStrokeWidth=3, symbolOpacity=1)
        .to_dict(validate=False)
    )
    spec.pop("$schema")
    return spec
