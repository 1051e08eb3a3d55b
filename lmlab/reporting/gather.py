"""From directories to the runs that a report shows, those of each objective by themselves."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lmlab.errors import UserError, first_line
from lmlab.evaluation.comparison import check_comparable, choices_of
from lmlab.evaluation.records import Records
from lmlab.reporting.reading import DAMAGED, Run, holds_evaluation, objective_of, read_evaluation, read_run, what_ails
from lmlab.reporting.words import brief, shortened
from lmlab.runs.directory import RunDirectory
from lmlab.sweeps.points import Point, read_points

LABEL = 64
"""Characters of a configuration's name: no chart has room for more."""


@dataclass
class Group:
    """The runs of one objective: nothing is compared beyond."""

    objective: str
    runs: list[Run]
    """Best first, those without a rank last."""
    evaluations: list[list[Records]]
    """Of its runs and of other models, those together that can be compared."""
    apart: list[str] = field(default_factory=list)
    """Why the second and each later of those is not compared with the first."""
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By a run's name: which of `evaluations` it belongs to, and its place there."""
    others: dict[Path, str] = field(default_factory=dict)
    """What those of `evaluations` are called that are none of its runs'."""

    @cached_property
    def keys(self) -> list[str]:
        """The keys in which its runs differ, the seed left out."""
        begun = [run.chosen for run in self.runs if run.begun]
        of_points = {key for run in self.runs if not run.begun for key in run.chosen}
        found = dict.fromkeys(key for run in self.runs for key in run.chosen)

        def differs(key: str) -> bool:
            # A run that has not begun has only what the sweep varies.
            values = [chosen.get(key) for chosen in begun]
            values += [run.chosen[key] for run in self.runs if not run.begun and key in run.chosen]
            return any(value != values[0] for value in values) or (not begun and key in of_points)

        return [key for key in found if key not in ("seed", "objective") and differs(key)]

    @cached_property
    def heads(self) -> dict[str, str]:
        """Each key by its last part, or by as many as tell it from the others."""
        short = {}
        for key in self.keys:
            parts = key.split(".")
            ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            short[key] = next(
                (end for end in ends if sum(other == end or other.endswith(f".{end}") for other in self.keys) == 1), key
            )
        return short

    @cached_property
    def configurations(self) -> dict[str, str]:
        """By a run's name: what it shares with those that differ from it in their seed only, in few words."""
        if not self.keys:
            return {run.name: "all runs" for run in self.runs}
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            # 0 and 0.0 are the same choice; True and 1 are not.
            values: list[Any] = [run.chosen.get(key) for key in self.keys]
            same = tuple(repr(float(value)) if type(value) in (int, float) else repr(value) for value in values)
            alike.setdefault(same, []).append(run)
        found: dict[str, str] = {}
        for runs in alike.values():
            name = self.configuration(runs[0], self.keys, len(runs) > 1)
            if name in found.values():  # what tells them apart was cut off
                name = f"{name} ({shortened(runs[0].name, 20)})"
            found |= {run.name: name for run in runs}
        return found

    def configuration(self, run: Run, keys: Sequence[str], several: bool) -> str:
        """A run's choices, short enough for a chart; `several` runs may have them, with other seeds."""
        if len(keys) > 4:
            return f"{shortened(run.name, LABEL - 14)}{' and its seeds' if several else ''}"
        whole = ", ".join(f"{self.heads[key]}={brief(run.chosen.get(key))}" for key in keys)
        if len(whole) <= LABEL:
            return whole
        room = max(8, LABEL // (2 * len(keys)))
        named = (f"{shortened(self.heads[key], room)}={brief(run.chosen.get(key), room)}" for key in keys)
        return ", ".join(named)


def gather(places: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """The runs in directories and under them, by objective; and what could not be read.

    Raises:
        UserError: a place is not there, or holds nothing to report.
    """
    found: dict[Path, tuple[Path | None, Point | None]] = {}
    unread: list[str] = []
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is no directory.\nName run directories, or a folder with runs in it.")
        here = {path.resolve(): origin for path, origin in run_places(place, unread)}
        if not here:
            raise UserError(
                f"nothing in {place} can be read.\n{unread[0]}"
                if unread
                else f"{place} holds no run: there is no manifest.json in it or in a folder under it.\n"
                "Name run directories, or a folder with runs in it, such as outputs or multirun."
            )
        found |= {path: origin for path, origin in here.items() if path not in found or origin[0]}
    top = Path(os.path.commonpath([path.parent for path in found]))
    runs, others = [], []
    for path, (sweep, point) in found.items():
        try:
            if holds_evaluation(RunDirectory(path)):
                others.append(read_evaluation(path))
            else:
                runs.append(read_run(path, str(path.relative_to(top)), sweep, point))
        except DAMAGED as error:
            unread.append(f"{path.relative_to(top)}: {what_ails(error)}")
    if not runs and not others:
        raise UserError(f"nothing in {places[0]} can be read.\n{unread[0]}")
    name_objectives(runs)
    names = dict.fromkeys([*(run.objective for run in runs), *map(objective_of, others)])
    return [
        group_of(name, [r for r in runs if r.objective == name], [e for e in others if objective_of(e) == name], top)
        for name in names
    ], list(dict.fromkeys(unread))


def run_places(folder: Path, unread: list[str]) -> Iterator[tuple[Path, tuple[Path | None, Point | None]]]:
    """The places of runs in a folder and under it, each with the sweep and the point that it is of.

    Args:
        unread: gets a line for each sweep that can't be read; its runs are found all the same.
    """
    known: set[Path] = set()
    been: set[Path] = set()
    damaged: set[Path] = set()

    def points_in(sweep: Path) -> list[Point]:
        try:
            return read_points(sweep)
        except UserError as error:
            if sweep.resolve() not in damaged:
                damaged.add(sweep.resolve())
                unread.append(first_line(error))
            return []

    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name)
        if here.resolve() in been:  # a link leads in a circle, or there twice
            folders.clear()
            continue
        been.add(here.resolve())
        if here in known or {"manifest.json", "failure.json"} & set(files):
            folders.clear()  # no run lies in another
            if here not in known:
                # A run that is named by itself may still be a point of a sweep.
                siblings = {point.run.path.resolve(): point for point in points_in(here.resolve().parent)}
                point = siblings.get(here.resolve())
                if point or "manifest.json" in files:  # else it never began
                    yield here, (here.parent if point else None, point)
        for point in points_in(here):
            known.add(point.run.path)
            yield point.run.path, (here, point)
        folders.sort()


def name_objectives(runs: Sequence[Run]) -> None:
    """Put runs that have not begun to those whose objective they will have."""
    begun = [run for run in runs if run.objective]
    for run in runs:
        if run.objective:
            continue
        option = run.chosen.get("objective")
        siblings = {other.objective for other in begun if other.sweep == run.sweep}
        alike = {name for name in siblings if option and f".{option}." in f".{name}."}
        names = alike or (siblings if option is None else set())
        run.objective = names.pop() if len(names) == 1 else str(option or "not begun")


def group_of(objective: str, runs: list[Run], others: list[Records], top: Path) -> Group:
    """The runs of one objective, ranked where they can be compared."""
    of_runs = [run.records for run in runs if run.records and run.state.name == "done"]
    evaluations, apart = comparable([*of_runs, *others])
    names = {run.manifest["run_id"]: run.name for run in runs if run.begun}
    group = Group(objective, runs, evaluations, apart)
    named: dict[str, str] = {}
    for other in others:  # those of several seeds, evaluated alike, go by one name
        same = repr([other.certificate["policy"], sorted((choices_of(other) | {"seed": None}).items())])
        group.others[other.path] = named.setdefault(same, evaluation_name(other, names, top))
    for number, alike in enumerate(evaluations):
        places = {records.path for records in alike}
        ranked = sorted((run for run in runs if run.records and run.place in places), key=by_figure)
        group.ranks |= {run.name: (number, rank) for rank, run in enumerate(ranked, 1)}
    last = (len(runs), 0)
    runs.sort(key=lambda run: (*group.ranks.get(run.name, last), by_figure(run)))
    return group


def evaluation_name(records: Records, names: dict[str, str], top: Path) -> str:
    """What was evaluated, and where that lies in the report's folder.

    Args:
        names: of the report's runs, by their ids.
    """
    trained, model = records.certificate["run"], records.certificate["model"]
    of_run = names.get(trained.get("run_id", "")) if trained else None
    evaluated = of_run or (Path(model).name if Path(model).is_absolute() else model)
    return (
        f"{shortened(evaluated, LABEL // 2)}, evaluated in {shortened(str(records.path.relative_to(top)), LABEL // 2)}"
    )


def by_figure(run: Run) -> float:
    """Bits per byte: it compares across tokenizers too."""
    value = run.final["bits_per_byte"]
    return float("inf") if value is None or value != value else value


def comparable(evaluations: Sequence[Records]) -> tuple[list[list[Records]], list[str]]:
    """Evaluations put together where their figures mean the same, most first; and why the others stand apart."""
    classes: list[list[Records]] = []
    for records in evaluations:
        for alike in classes:
            if reason(alike[0], records) is None:
                alike.append(records)
                break
        else:
            classes.append([records])
    classes.sort(key=len, reverse=True)
    return classes, [reason(classes[0][0], alike[0]) or "" for alike in classes[1:]]


def reason(one: Records, other: Records) -> str | None:
    """Why two evaluations can't be compared; None where they can."""
    try:
        check_comparable([one, other])
    except UserError as error:
        return first_line(error).partition("can't be compared: ")[2]
    return None
