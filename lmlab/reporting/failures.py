"""Tables and charts of where models fail: by position, frequency and length, and by how sure they are."""

import math
from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lmlab.evaluation.records import Records
from lmlab.reporting.charts import AXIS, Chart, render
from lmlab.runs.directory import RunDirectory

HARDEST = 5
"""Documents of each evaluation that the page lists."""


def failure_tables(evaluations: Mapping[str, Records]) -> dict[str, pd.DataFrame]:
    """Returns what evaluations with `surprisal=true` or `calibration=true` say, a table for each view of it.

    They are, by their names, position and frequency (a row for each range of words, twice as wide as the one before),
    length (the same of documents), calibration (a row for each bin of confidence) and hardest (documents).
    """
    parts: dict[str, list[pd.DataFrame]] = {}

    def add(view: str, name: str, table: pd.DataFrame) -> None:
        parts.setdefault(view, []).append(table.assign(evaluation=name))

    for name, records in evaluations.items():
        words, of = RunDirectory(records.path).words, records.certificate
        if "surprisal" in of and words.is_file():
            with pq.ParquetFile(words) as file:
                table = file.read().to_pandas()
            column = "nll_corrected" if of["surprisal"]["correction"] else "nll"
            table = table[(table["text"] != "") & table[column].notna()]
            bits = table[column] / math.log(2)
            add("position", name, means(table["word"] + 1, bits))
            add("frequency", name, means(table.groupby("text")["text"].transform("size"), bits))
        if "surprisal" in of or "calibration" in of:
            documents = records.by_document().table.to_pandas()
            documents = documents[documents["bytes"] > 0]
            bits = documents["nll"] / math.log(2)
            add("length", name, means(documents["bytes"], bits, documents["bytes"]))
            hardest = documents.assign(bits_per_byte=bits / documents["bytes"]).nlargest(HARDEST, "bits_per_byte")
            add("hardest", name, hardest[["start", "bits_per_byte", "bytes", "document"]])
        if "calibration" in of:
            add("calibration", name, pd.DataFrame(of["calibration"]["by_confidence"]))
    return {view: pd.concat(tables, ignore_index=True) for view, tables in parts.items()}


def means(values: pd.Series, bits: pd.Series, units: pd.Series | None = None) -> pd.DataFrame:
    """Returns the mean bits in each range of positive values: 1, 2 to 3, 4 to 7, and so on.

    Args:
        units: what the bits are counted per; None counts them per row.
    """
    rows = pd.DataFrame({"bits": bits, "units": 1 if units is None else units, "rows": 1})
    sums = rows.groupby(np.log2(values.to_numpy()).astype(int)).sum()
    first = 2.0 ** sums.index.to_numpy()
    return pd.DataFrame(
        {
            "from": first.astype(int),
            "to": (2 * first - 1).astype(int),
            "rows": sums["rows"].to_numpy(),
            "bits": (sums["bits"] / sums["units"]).to_numpy(),
        }
    )


def failure_charts(tables: Mapping[str, pd.DataFrame], slug: str) -> list[Chart]:
    """Returns the charts of `failure_tables`.

    Args:
        slug: the beginning of the names of their files.
    """
    of = {
        "position": ("Surprisal by position", "number of the word in its document", "bits per word"),
        "frequency": ("Surprisal by frequency", "times the word occurs in this text", "bits per word"),
        "length": ("Bits per byte by length", "bytes of the document", "bits per byte"),
    }
    charts = []
    for view, (title, x, y) in of.items():
        if view in tables:
            base = alt.Chart(tables[view]).mark_line(point=True)
            spec = base.encode(
                x=alt.X("from:Q").title(x).scale(type="log", base=2).axis(**AXIS),
                y=alt.Y("bits:Q").title(y).scale(zero=False),
                color=alt.Color("evaluation:N", sort=None).title(None),
                tooltip=["evaluation", "from", "to", "rows", "bits"],
            )
            charts.append(Chart(f"{slug}_by_{view}", title, render(spec), f"{slug}_by_{view}"))
    if "calibration" in tables:
        unit = alt.Scale(domain=[0, 1])
        ideal = (
            alt.Chart(pd.DataFrame({"p": [0, 1]})).mark_line(strokeDash=[4, 4], color="#999").encode(x="p:Q", y="p:Q")
        )
        found = alt.Chart(tables["calibration"]).mark_line(point=True)
        found = found.encode(
            x=alt.X("confidence:Q", scale=unit).title("confidence"),
            y=alt.Y("accuracy:Q", scale=unit).title("accuracy"),
            color=alt.Color("evaluation:N", sort=None).title(None),
            tooltip=["evaluation", "tokens", "confidence", "accuracy"],
        )
        name = f"{slug}_by_calibration"
        charts.append(Chart(name, "Reliability of predictions", render(alt.layer(ideal, found)), name))
    return charts
