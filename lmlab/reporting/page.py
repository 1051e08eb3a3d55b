"""Writes a report: a page that needs nothing else to be shown, and its charts and tables as files beside it."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from lmlab.console import command, counted
from lmlab.errors import UserError
from lmlab.io import PARTIAL, from_here, read_json
from lmlab.reporting.charts import image_files
from lmlab.reporting.load import Run, local_time
from lmlab.reporting.section import Section
from lmlab.reporting.suites import shown
from lmlab.reporting.text import as_text, latex, letter
from lmlab.runs.manifest import environment
from lmlab.secrets import redacted_command

POINTS = 40_000
"""Points of curves in a report: more than that no screen shows, and no phone draws."""
SNIPPET = "window.vegaEmbed = vegaEmbed;"
"""The part of Vega's JavaScript that the page uses."""
LISTED = "report.json"
"""Names the files of a report, so that the next one into the same folder can remove them."""
CLIP = 2000
"""Characters of a sample that the page shows."""


def report_files(
    sections: Sequence[Section], suites: pd.DataFrame, unread: Sequence[str]
) -> Iterator[tuple[str, str | bytes]]:
    """Yields the names and contents of the files of a report; the first lists them all.

    Args:
        suites: the metrics of evaluations by suites, see `suites_table`.
        unread: a line on each thing that could not be read.
    """
    charts = [chart for section in sections for chart in section.charts]
    tables = {name: table for section in sections for name, table in section.csv.items()}
    if sections:
        tables["runs"] = pd.concat([section.table for section in sections])
    if len(suites):
        tables["suites"] = suites
    images = [f"{chart.name}.{kind}" for chart in charts for kind in ("svg", "png")]
    listed = [*images, *(f"{name}.csv" for name in tables), "runs.tex", "report.html"]
    yield LISTED, json.dumps({"files": listed}, indent=2) + "\n"
    yield from ((f"{name}.csv", table.to_csv(index=False)) for name, table in tables.items())
    yield "runs.tex", runs_latex(sections)
    yield "report.html", html(sections, suites, unread)
    yield from image_files(charts)


def earlier_files(folder: Path) -> list[str]:
    """Returns the names of the files of the report that a folder holds already.

    Raises:
        UserError: the folder holds something else, and no report.
    """
    listed = folder / LISTED
    if listed.is_file():
        return [name for name in read_json(listed).get("files", ()) if Path(name).name == name]
    if folder.is_dir() and {file.name for file in folder.iterdir()} - {PARTIAL}:
        raise UserError(f"{folder} holds other things than a report.\nChoose another folder by --out DIR.")
    return []


def runs_latex(sections: Sequence[Section]) -> str:
    """Returns the table of runs of each section as a `tabular`."""
    tables = []
    for section in sections:
        if section.runs:
            layout = ["l" if column.map(type).eq(str).any() else "r" for _, column in section.shown.items()]
            tables.append(f"% {section.objective}\n{latex(section.shown, ''.join(layout))}")
    return "\n".join(tables)


def html(sections: Sequence[Section], suites: pd.DataFrame, unread: Sequence[str]) -> str:
    """Returns the page, with all that it needs in it."""
    jinja = jinja2.Environment(
        loader=jinja2.PackageLoader("lmlab", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    jinja.filters["text"] = as_text
    here = resources.files("lmlab") / "reporting"
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    # A bundle is source code; the sign that would end its element stands in strings and patterns only.
    vega = vl_convert.javascript_bundle(SNIPPET).replace("</script", "<\\/script")
    runs = [run for section in sections for run in section.runs]
    return jinja.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        vega=Markup(vega),
        sections=sections,
        suites=[(name, shown(table)) for (name, _), table in suites.groupby(["suite", "data_hash"], sort=False)],
        charts={chart.name: chart.spec for section in sections for chart in section.charts},
        origin=describe_origins(runs),
        statuses=Counter(run.status.name for run in runs),
        count=counted(len(runs), "run"),
        counted=counted,
        unread=unread,
        clip=CLIP,
        letter=letter,
    )


def describe_origins(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns where the report and its runs come from, in words."""
    here = environment()
    began = sorted(time for run in runs for time in run.origin.get("runs began", ()))
    origins = {
        "written": [f"{local_time()} on {here['machine']['host']}, lmlab {here['lmlab']}"],
        "by": [command(*redacted_command([Path(sys.executable).name, *sys.orig_argv[1:]]))],
        "runs began": list(dict.fromkeys(began[:1] + began[-1:])),
        "sweeps": count_values(str(from_here(run.sweep)) for run in runs if run.sweep),
    }
    for name in ("commands", "software", "went on", "machines"):
        origins[name] = count_values(line for run in runs for line in run.origin.get(name, ()))
    return {name: values for name, values in origins.items() if values}


def count_values(values: Iterable[str]) -> list[str]:
    """Returns the different values, most frequent first, with how many runs have each where there are several."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return [counts[0][0]]
    lines = [f"{value} ({counted(count, 'run')})" for value, count in counts[:5]]
    return lines + ([f"and {len(counts) - 5} others"] if len(counts) > 5 else [])
