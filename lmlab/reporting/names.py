"""Names what a report shows: the keys in which runs differ, and the configurations that these make.

A *configuration* is what runs share that differ from each other in their seed only.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmlab.evaluation.records import Records
from lmlab.evaluation.sides import run_choices
from lmlab.reporting.load import Run
from lmlab.reporting.text import brief, shorten

LABEL = 64
"""Characters of the name of a configuration: no chart has room for more."""
HEAD = 40
"""Characters of a key at the top of a column, and on an axis."""


def differing_keys(runs: Iterable[Run]) -> list[str]:
    """Returns the keys in which runs differ, the seed left out."""
    # A run that has not begun has only what its sweep varies.
    begun = [run.chosen for run in runs if run.begun]
    others = [run.chosen for run in runs if not run.begun]

    def differs(key: str) -> bool:
        values = [chosen.get(key) for chosen in begun] + [chosen[key] for chosen in others if key in chosen]
        return any(value != values[0] for value in values)

    keys = dict.fromkeys(key for chosen in [*begun, *others] for key in chosen)
    return [key for key in keys if key not in ("seed", "objective") and differs(key)]


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Returns each dotted key by its last part, or by as many as tell it from the others."""
    short = {}
    for key in keys:
        ends = (key.split(".", cuts)[-1] for cuts in range(key.count("."), 0, -1))
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        short[key] = shorten(next(alone, key), HEAD)
    return short


def name_configurations(runs: Sequence[Run], heads: Mapping[str, str]) -> dict[Path, str]:
    """Returns the name of the configuration of each run, by the directory of the run.

    Args:
        heads: the keys in which the runs differ, and what each is called.
    """
    if not heads:
        return dict.fromkeys((run.path for run in runs), "all runs")
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(identity(run.chosen.get(key)) for key in heads), []).append(run)
    names: dict[Path, str] = {}
    for group in groups.values():
        first, more = group[0], ""
        if len(group) > 1:
            seeds = {run.chosen.get("seed") for run in group}
            more = " and its seeds" if len(seeds) > 1 else f" and {len(group) - 1} more"
        name = f"{shorten(first.name, LABEL - 14)}{more}"
        if len(heads) <= 4:
            room = LABEL // (2 * len(heads))
            name = ", ".join(
                f"{shorten(head, room)}={brief(first.chosen.get(key), room)}" for key, head in heads.items()
            )
        if name in names.values():  # what tells them apart was cut off
            name = f"{name} ({shorten(first.name, 20)})"
        names |= {run.path: name for run in group}
    return names


def identity(value: Any) -> str:
    """Returns what is equal for the same choices: 0 and 0.0 are, True and 1 are not."""
    return repr(float(value)) if type(value) in (int, float) else repr(value)


def name_series(evaluations: Mapping[str, Records], runs: Sequence[Run]) -> dict[str, str]:
    """Returns the name of the series of each evaluation of a model of one: its run and, of several, their folder.

    Args:
        evaluations: by their names in the report.
        runs: of the report.
    """
    trained = {run.manifest["run_id"]: run.name for run in runs if run.begun}
    folders: dict[str, dict[str, None]] = {}
    of = {}
    for name, records in evaluations.items():
        certificate = records.certificate
        of[name] = trained.get(certificate["run"]["run_id"]) or Path(certificate["model"]).parents[1].name
        folders.setdefault(of[name], {})[str(Path(name).parent)] = None
    return {
        name: shorten(run, LABEL // 2)
        + (f", evaluated in {shorten(str(Path(name).parent), LABEL // 2)}" if len(folders[run]) > 1 else "")
        for name, run in of.items()
    }


def name_evaluations(evaluations: Mapping[str, Records], runs: Sequence[Run]) -> dict[Path, str]:
    """Returns the name of each evaluation that is not of a run's end: what was evaluated, and where this lies.

    Those of several seeds that were evaluated alike have one name.

    Args:
        evaluations: by their names in the report.
        runs: of the report; an evaluation of one of them goes by its name.
    """
    trained = {run.manifest["run_id"]: run.name for run in runs if run.begun}
    names: dict[str, str] = {}
    found = {}
    for name, records in evaluations.items():
        model, policy = records.certificate["model"], records.certificate["policy"]
        settings = records.certificate.get("settings")
        run_id = (records.certificate["run"] or {}).get("run_id")
        evaluated = trained.get(run_id) or (Path(model).name if Path(model).is_absolute() else model)
        step = (records.certificate.get("series") or {}).get("step")
        alike = repr([policy, settings, step, sorted((run_choices(records) | {"seed": None}).items())])
        text = f"{shorten(evaluated, LABEL // 2)}, evaluated in {shorten(name, LABEL // 2)}"
        found[records.path] = names.setdefault(alike, text)
    return found
