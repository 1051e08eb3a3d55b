"""From directories to the runs that a report shows, those of each objective by themselves."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lmlab.errors import UserError, first_line
from lmlab.evaluation.comparing import check_comparable, choices_of, chosen, said
from lmlab.evaluation.records import Records, read
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import rows
from lmlab.runs.states import ENDED, State, state_of
from lmlab.runs.sweep import Point, points

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML was built with libyaml
SPLITS = {"validation": "val/loss", "training": "train/loss"}
FIGURES = (*SPLITS.values(), "data/tokens_seen", "perf/tokens_per_s", "tokens_per_s")
DAMAGED = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError)
"""What reading the files of a run can raise when somebody or something else has written in them."""
MANIFEST: dict[str, Any] = {
    **dict.fromkeys(("run_id", "started", "lmlab", "python"), str),
    **dict.fromkeys(("packages", "machine"), dict),
    "command": list,
    "git": dict | None,
}
"""What a report relies on."""


LABEL = 64
"""Characters of a configuration's name: no chart has room for more."""


@dataclass
class Run:
    """A run, as far as its directory can be read."""

    place: Path
    name: str
    objective: str
    """Class of its objective, by its dotted name; what the sweep calls it where no run of that kind has begun."""
    chosen: dict[str, Any]
    """By dotted keys, machinery left out; of a run that has not begun what its sweep says of it."""
    state: State
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of its metrics, whole ones."""
    result: dict[str, Any]
    """Its summary; empty before its end."""
    records: Records | None
    """The evaluation at its end."""
    samples: list[dict[str, Any]]
    sweep: Path | None
    faults: list[str]
    """What of its files could not be read, and why."""

    @property
    def begun(self) -> bool:
        return bool(self.manifest)

    @cached_property
    def figure(self) -> str | None:
        """What its perplexity is called."""
        if self.records:
            return self.records.certificate["figure"]
        rows = (self.result, *self.rows)
        named = (key.removeprefix("val/") for row in rows for key in row if key.startswith("val/"))
        return next((key for key in named if key.endswith("perplexity") and "word_" not in key), None)

    @cached_property
    def final(self) -> dict[str, float | None]:
        """Perplexity and bits per byte: at its end, or the best so far."""
        bits = (self.figure or "").removesuffix("perplexity") + "bits_per_byte"
        if self.records:
            figures = self.records.certificate["figures"]
            return {"perplexity": figures[self.figure], "bits_per_byte": figures[bits]}
        logged = [row for row in self.rows if row.get(f"val/{self.figure}") is not None]
        best = min(logged, key=lambda row: row[f"val/{self.figure}"], default={})
        source = self.result or best
        return {"perplexity": source.get(f"val/{self.figure}"), "bits_per_byte": source.get(f"val/{bits}")}

    @cached_property
    def seconds(self) -> list[float]:
        """Of each row, since the first: without the time between two attempts."""
        begun = [datetime.fromisoformat(attempt["time"]).timestamp() for attempt in self.manifest.get("went_on", ())]
        passed, total, before = [], 0.0, None
        for row in self.rows:
            if before is not None:
                total += row["time"] - max([before, *(time for time in begun if time <= row["time"])])
            before = row["time"]
            passed.append(round(total, 3))
        return passed

    @cached_property
    def tokens(self) -> int:
        return next((row["data/tokens_seen"] for row in reversed(self.rows) if "data/tokens_seen" in row), 0)

    @property
    def speed(self) -> float | None:
        """Tokens a second: over the whole run, or the median so far."""
        logged = sorted(row["perf/tokens_per_s"] for row in self.rows if "perf/tokens_per_s" in row)
        return self.result.get("tokens_per_s", logged[len(logged) // 2] if logged else None)

    def curve(self, split: str) -> list[dict[str, Any]]:
        """Of each row of a split: step, tokens, seconds, loss; speed where it was measured."""
        key = SPLITS[split]
        return [
            {
                "step": row["step"],
                "tokens": row.get("data/tokens_seen"),
                "seconds": seconds,
                "loss": row[key],
                "speed": row.get("perf/tokens_per_s"),
            }
            for row, seconds in zip(self.rows, self.seconds, strict=True)
            if key in row
        ]


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
            name = self.configuration(runs[0], self.keys)
            if name in found.values():  # what tells them apart was cut off
                name = f"{name} ({shortened(runs[0].name, 20)})"
            found |= {run.name: name for run in runs}
        return found

    def configuration(self, run: Run, keys: Sequence[str]) -> str:
        """A run's choices, short enough for a chart."""
        if len(keys) > 4:
            return f"{shortened(run.name, LABEL - 14)} and its seeds"
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
            return points(sweep)
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
                yield here, (here.parent if point else None, point)
        for point in points_in(here):
            known.add(point.run.path)
            yield point.run.path, (here, point)
        folders.sort()


def holds_evaluation(run: RunDirectory) -> bool:
    """Whether a directory is that of an evaluation, not of a run."""
    return run.certificate.is_file() and not run.finished() and "optim" not in config_of(run)


def config_of(run: RunDirectory) -> dict[str, Any]:
    if not run.config.is_file():
        return {}
    try:
        config = yaml.load(run.config.read_bytes(), LOADER)  # as safe as yaml.safe_load
    except yaml.YAMLError as error:
        raise UserError(f"{run.config} is damaged: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{run.config} is damaged: it holds no config.")
    return config


def read_run(path: Path, name: str, sweep: Path | None, point: Point | None) -> Run:
    """A run as far as its directory can be read.

    Raises:
        one of `DAMAGED`: what makes it a run is damaged.
    """
    run = RunDirectory(path)
    faults: list[str] = []
    manifest = run.identity() if run.begun() else {}
    if manifest and "run_id" not in manifest:
        raise UserError(f"{run.manifest} is no manifest of lmlab.")
    if manifest:
        check_manifest(run, manifest)
    config = config_of(run)
    if config and not isinstance(config.get("objective"), dict):
        raise UserError(f"{run.config} is damaged: it names no objective.")
    state = state_of(run)
    if not isinstance(state.message, str | None):
        raise UserError(f"{run.failure} is damaged: its message is no text.")
    ended = state.name in ENDED
    result = run.result() if ended else {}
    if not measured(result):
        raise UserError(f"{run.summary} is damaged: a figure is no number.")
    records = None
    if ended and run.certificate.is_file():
        try:
            records = read_evaluation(path)
        except DAMAGED as error:
            faults.append(what_ails(error))
    if state.name == "done" and not records:
        faults.append("It has finished, without an evaluation to rank it by.")
    found = Run(
        place=path,
        name=name,
        objective=config["objective"]["_target_"] if config else "",
        chosen=chosen(config) if config else chosen_by(point.overrides if point else []),
        state=state,
        manifest=manifest,
        rows=as_far_as_whole(
            run.metrics,
            lambda row: number(row.get("step")) and number(row.get("time")) and measured(row),
            faults,
        ),
        result=result,
        records=records,
        samples=as_far_as_whole(run.samples, lambda row: {"step", "text", "said"} <= row.keys(), faults),
        sweep=sweep,
        faults=faults,
    )
    _ = found.seconds  # the times of a manifest are read here, where they can fail
    return found


def read_evaluation(path: Path) -> Records:
    """An evaluation with all that a report asks of it.

    Raises:
        one of `DAMAGED`: there is none, or it lacks a part.
    """
    records = read(path)
    for _ in (choices_of(records), objective_of(records), records.certificate["policy"]["masks_seed"]):
        pass
    figure = records.certificate["figure"]
    if not {figure, figure.removesuffix("perplexity") + "bits_per_byte"} <= records.certificate["figures"].keys():
        raise UserError(f"{path}: its certificate lacks a figure.")
    return records


def check_manifest(run: RunDirectory, manifest: dict[str, Any]) -> None:
    """Refuse a manifest without what a report relies on."""
    lacking = [part for part, kind in MANIFEST.items() if not isinstance(manifest.get(part, ...), kind)]
    if not lacking:
        lacking = [part for part in ("host", "platform", "cpus") if part not in manifest["machine"]]
        lacking += [part for part in ("commit", "dirty") if manifest["git"] and part not in manifest["git"]]
    if lacking:
        raise UserError(f"{run.manifest} is damaged: it lacks {lacking[0]}, or has another thing in its place.")
    datetime.fromisoformat(manifest["started"])


def measured(row: dict[str, Any]) -> bool:
    """Whether what a report shows of figures are numbers, as lmlab writes them."""
    for key, value in row.items():
        if type(value) is float or type(value) is int:
            continue
        if key in FIGURES or (key.startswith("val/") and value is not None):
            return False
    return True


def number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def what_ails(error: BaseException) -> str:
    """An error of `DAMAGED` in one line."""
    if isinstance(error, UserError):
        return first_line(error)
    return f"a file of it is not as lmlab writes it ({type(error).__name__}: {first_line(error)})"


def as_far_as_whole(file: Path, right: Callable[[dict], bool], faults: list[str]) -> list[dict[str, Any]]:
    """The rows of a file until one is damaged, which is noted."""
    whole: list[dict[str, Any]] = []
    try:
        for row in rows(file):
            if not (isinstance(row, dict) and right(row)):
                raise ValueError("no such row is written by lmlab")
            whole.append(row)
    except ValueError as error:
        faults.append(f"{file.name} is damaged in line {len(whole) + 1}: {first_line(error)}. Read up to there.")
    if file.is_file() and not file.read_bytes().endswith(b"\n") and file.stat().st_size:
        faults.append(f"{file.name} ends in half a line, which is left out.")
    return whole


def chosen_by(overrides: Sequence[str]) -> dict[str, Any]:
    """The same of a run that has not begun: what its sweep gives it."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: yaml.load(value, LOADER) for key, _, value in pairs}


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


def objective_of(evaluation: Records) -> str:
    return evaluation.certificate["policy"]["objective"]["_target_"]


def group_of(objective: str, runs: list[Run], others: list[Records], top: Path) -> Group:
    """The runs of one objective, ranked where they can be compared."""
    of_runs = [run.records for run in runs if run.records and run.state.name == "done"]
    evaluations, apart = comparable([*of_runs, *others])
    names = {run.manifest["run_id"]: run.name for run in runs if run.begun}
    group = Group(objective, runs, evaluations, apart)
    named: dict[str, str] = {}
    for other in others:  # those of several seeds, evaluated alike, go by one name
        same = repr([other.certificate["policy"], sorted((choices_of(other) | {"seed": None}).items())])
        group.others[other.place] = named.setdefault(same, evaluation_name(other, names, top))
    for number, alike in enumerate(evaluations):
        places = {records.place for records in alike}
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
        f"{shortened(evaluated, LABEL // 2)}, evaluated in {shortened(str(records.place.relative_to(top)), LABEL // 2)}"
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


def brief(value: Any, most: int = 40) -> str:
    """A value of a config for people: of numbers four digits that count, long text cut in its middle."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return shortened(" ".join(said(value).split()), most)


def shortened(text: str, most: int) -> str:
    """Text without its middle, where both ends may be what tells it from others."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"
