"""The report as files: a page that needs nothing else, and figures and tables beside it."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from importlib import resources
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup

from lmlab.console import command
from lmlab.distributed.signals import signals_blocked
from lmlab.errors import UserError
from lmlab.io import PARTIAL, read_json
from lmlab.reporting.drawing import svg_and_png
from lmlab.reporting.finals import BEST
from lmlab.reporting.gather import Group
from lmlab.reporting.reading import Run
from lmlab.reporting.section import Section
from lmlab.reporting.words import letter
from lmlab.runs.manifest import environment
from lmlab.runs.tables import as_csv, as_latex
from lmlab.secrets import redacted_command

POINTS = 40_000
"""Of curves, in the page: more than that no screen shows, and no phone draws."""
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the page's script uses of Vega's bundle
LISTED = "report.json"
"""Names the files of a report, so that the next one into the same folder can remove them."""
CLIP = 2000  # characters of a sample


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """A section per objective, each with a name of its own for its files."""
    total = sum(len(group.runs) for group in groups) or 1
    found: list[Section] = []
    for group in groups:
        name = ([*group.objective.split("."), ""][-3:-1] or [""])[0].lower()
        slug = "".join(c if c.isalnum() else "-" for c in name) or "runs"
        if slug in {section.slug for section in found}:
            slug = f"{slug}{len(found) + 1}"
        found.append(Section(group, slug, POINTS * len(group.runs) // total))
    return found


def files(sections: Sequence[Section], unread: Sequence[str]) -> Iterator[tuple[str, str | bytes]]:
    """The files of a report, by their names; the first lists them all."""
    with debug_mode(False):  # no check of what is not the user's: it takes Altair half the time
        drawn = [(section, figure) for section in sections for figure in section.filed]
    names = [f"{figure.name}.{kind}" for _, figure in drawn for kind in ("svg", "png")]
    names += [f"{name}.csv" for section in sections for name in section.tables]
    yield LISTED, json.dumps({"files": [*names, "runs.csv", "runs.tex", "report.html"]}, indent=2) + "\n"
    # Each process its own V8: drawing holds the interpreter.
    pool = ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn"))
    try:
        with signals_blocked():  # processes are begun here: a Ctrl-C is for this one to heed
            bundle = pool.submit(vl_convert.javascript_bundle, SNIPPET)
        data = {section.slug: plain(section.drawn) for section in sections}
        specs = [
            figure.spec | {"datasets": {figure.data: data[section.slug][figure.data]}} for section, figure in drawn
        ]
        with signals_blocked():
            images = pool.map(svg_and_png, specs)
        for section in sections:
            for name, rows in section.tables.items():
                yield f"{name}.csv", as_csv(rows)
        yield "runs.csv", as_csv(table(sections))
        yield "runs.tex", latex(sections)
        yield "report.html", html(sections, unread, bundle.result())
        for (_, figure), (svg, png) in zip(drawn, images, strict=True):
            yield f"{figure.name}.svg", svg
            yield f"{figure.name}.png", png
    finally:
        pool.shutdown(cancel_futures=True)


def earlier(folder: Path) -> list[str]:
    """The files of the report that a folder holds already.

    Raises:
        UserError: there is something else in it, and no report.
    """
    listed = folder / LISTED
    if listed.is_file():
        return [name for name in read_json(listed).get("files", ()) if Path(name).name == name]
    if folder.is_dir() and {file.name for file in folder.iterdir()} - {PARTIAL}:
        raise UserError(f"{folder} holds other things than a report.\nChoose another folder by --out DIR.")
    return []


def table(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The main tables as one, each row with every column."""
    rows = [section.row(run) for section in sections for run in section.runs]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [dict.fromkeys(columns) | row for row in rows]


def latex(sections: Sequence[Section]) -> str:
    """A tabular for each objective."""
    return "\n".join(
        f"% {section.group.objective}\n"
        + as_latex(
            [head for head, _ in section.columns],
            [[" ".join(cell.text.split()) for cell in section.cells(run)] for run in section.runs],
            "".join("r" if numeric else "l" for numeric in section.numeric),
        )
        for section in sections
        if section.runs
    )


def html(sections: Sequence[Section], unread: Sequence[str], vega: str) -> str:
    """The page; `vega` is what draws in it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lmlab", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    here = resources.files("lmlab") / "reporting"
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    runs = [run for section in sections for run in section.runs]
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        # A bundle is source code; the sign that would end its element stands in strings and patterns only.
        vega=Markup(vega.replace("</script", "<\\/script")),
        sections=sections,
        facts=facts(runs),
        states=Counter(run.state.name for run in runs),
        count=len(runs),
        unread=unread,
        clip=CLIP,
        best=BEST,
        letter=letter,
        drawings=[drawing(section) for section in sections],
    )


def drawing(section: Section) -> dict[str, Any]:
    """What the page's script draws a section from: each number once, curves by columns."""
    thin = section.thin
    order = {row["run"]: i for i, row in enumerate(section.data["runs"])}
    columns: dict[str, list[Any]] = {
        "run": [order[row["run"]] for row in thin],
        "split": [row["split"] for row in thin],
    }
    columns |= {name: [row[name] for row in thin] for name in ("step", "tokens")}
    columns |= {name: [digits(row[name]) for row in thin] for name in ("seconds", "loss", "speed")}
    return plain(
        {
            "runs": section.data["runs"],
            "curves": columns,
            "finals": [
                row | {"members": section.members(final)}
                for row, final in zip(section.data["finals"], chain(*section.finals), strict=True)
            ],
            "specs": {figure.name: {"spec": figure.spec, "data": figure.data} for figure in section.figures},
        }
    )


def digits(value: float | None) -> float | None:
    """What a chart can show of it."""
    return None if value is None else float(f"{value:.5g}")


def plain(value: Any) -> Any:
    """JSON knows no nan and no infinity."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Where the report and its runs come from."""
    here = environment()
    manifests = [run.manifest for run in runs if run.begun]
    began = [when(manifest["started"]) for manifest in sorted(manifests, key=lambda manifest: manifest["started"])]
    lines: list[tuple[str, list[str]]] = [
        ("written", [f"{when()} on {here['machine']['host']}, lmlab {here['lmlab']}"]),
        ("by", [command(*redacted_command([Path(sys.executable).name, *sys.orig_argv[1:]]))]),
        ("runs began", list(dict.fromkeys([began[0], began[-1]])) if began else []),
        ("sweeps", counted(str(run.sweep) for run in runs if run.sweep)),
        ("commands", counted(command(*redacted_command(manifest["command"])) for manifest in manifests)),
        ("code", counted(f"lmlab {m['lmlab']}, {commit(m['git'])}, Python {m['python']}" for m in manifests)),
        ("versions", counted(versions(manifest["packages"]) for manifest in manifests)),
        ("went on", counted(went_on(attempt) for m in manifests for attempt in m.get("went_on", ()))),
        ("machines", counted("{host}: {platform}, {cpus} CPUs".format(**m["machine"]) for m in manifests)),
    ]
    return [(name, values) for name, values in lines if values]


def when(time: str | None = None) -> str:
    """A time, or this one, for people here."""
    return f"{(datetime.fromisoformat(time) if time else datetime.now()).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def went_on(attempt: dict[str, Any]) -> str:
    """Where, when and by what a run went on after a pause."""
    parts = [f"{when(attempt['time'])} from step {attempt.get('step', '?')} on {attempt.get('host', '?')}"]
    parts += [f"{attempt['devices']} device{'s' if attempt['devices'] != 1 else ''}"] if "devices" in attempt else []
    parts += [commit(attempt["git"])] if "git" in attempt else []
    return ", ".join([*parts, versions(attempt.get("packages", {}))])


def versions(packages: dict[str, str]) -> str:
    shown = ("torch", "lightning", "transformers", "tokenizers", "datasets")
    return ", ".join(f"{name} {packages[name]}" for name in shown if name in packages)


def commit(git: dict[str, Any] | None) -> str:
    return "no git commit" if not git else f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"


def counted(values: Any) -> list[str]:
    """The different ones, most frequent first, with how many runs have each where there are several."""
    found = Counter(values).most_common()
    if len(found) == 1:
        return [found[0][0]]
    lines = [f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in found[:5]]
    return lines + ([f"and {len(found) - 5} others"] if len(found) > 5 else [])
