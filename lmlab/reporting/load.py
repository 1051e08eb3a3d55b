"""Reads the runs and evaluations in directories, each as far as it can be read."""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lmlab.console import command, counted
from lmlab.errors import UserError, first_line
from lmlab.evaluation.metrics import metric_prefix
from lmlab.evaluation.records import Records
from lmlab.evaluation.sides import run_choices
from lmlab.evaluation.suites.certificates import read
from lmlab.io import rows
from lmlab.runs.choices import MACHINERY, config_choices, is_in
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import ENDED, Status, read_status
from lmlab.secrets import redacted_command
from lmlab.sweeps.points import Point, read_points

if TYPE_CHECKING:
    import pandas as pd  # imported where it is used, as what is refused need not wait for it

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML was built with libyaml
SPLITS = {"validation": "val/loss", "training": "train/loss"}
COUNTS = ("parameters", "trainable_parameters", "flops")
POINTS = {
    "step": "step",
    "data/tokens_seen": "tokens",
    "seconds": "seconds",
    "perf/flops_total": "flops",
    "perf/tokens_per_s": "speed",
}
"""The columns of metrics that a curve has, and their names there."""
METRICS = {*SPLITS.values(), *POINTS, "tokens_per_s", *COUNTS}
"""The metrics and parts of summaries that a report shows, beside those that begin with val/."""
PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "datasets")
DAMAGED = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError)
"""The errors of reading the files of a run in which somebody or something else has written."""


@dataclass
class Run:
    """A run, as far as its directory can be read."""

    path: Path
    name: str
    """The path below the directory that holds all of the report's runs."""
    objective: str
    """The dotted name of the class of the objective; of a run that has not begun its name in the sweep, or nothing."""
    chosen: dict[str, Any]
    """The choices of the config by dotted keys; of a run that has not begun those of its sweep."""
    status: Status
    manifest: dict[str, Any]
    origin: dict[str, list[str]]
    """The commands, the software and the machines that made it, and where it went on after a pause, in words."""
    metrics: "pd.DataFrame"
    """A row each time that metrics were logged, with the `seconds` since the first, pauses left out."""
    summary: dict[str, Any]
    """The summary of its end; empty before that."""
    records: Records | None
    """The evaluation at its end."""
    samples: list[dict[str, Any]]
    """The samples that its model generated at validations."""
    sweep: Path | None
    """The directory of the sweep that it is a point of."""
    faults: list[str]
    """The parts of its files that could not be read, and why."""

    @property
    def begun(self) -> bool:
        """True if it has begun to train."""
        return bool(self.manifest)

    @cached_property
    def metric(self) -> str | None:
        """The name of its perplexity, such as masked_perplexity; None where none was measured."""
        if self.records:
            return self.records.certificate["figure"]
        named = [key.removeprefix("val/") for key in (*self.summary, *self.metrics) if key.startswith("val/")]
        # That of all held-out text, and not of a domain.
        return next((key for key in named if "/" not in key and bits_per_byte(key) in named), None)

    @cached_property
    def final(self) -> dict[str, float | None]:
        """Perplexity and bits per byte at its end, or the best so far."""
        if self.records:
            return evaluation_metrics(self.records)
        source, bits = self.summary or self.best_so_far, bits_per_byte(self.metric or "")
        return {"perplexity": source.get(f"val/{self.metric}"), "bits_per_byte": source.get(f"val/{bits}")}

    @cached_property
    def by_domain(self) -> dict[str, float | None]:
        """Bits per byte at its end of each part of the held-out text that has a name; empty without such parts."""
        domains = self.records.certificate.get("domains", {}) if self.records else {}
        return {name: own["figures"][bits_per_byte(self.metric or "")] for name, own in domains.items()}

    @cached_property
    def best_so_far(self) -> dict[str, Any]:
        """The row of the lowest perplexity of its validations; empty before the first of weights that were trained."""
        logged = self.metrics[self.metrics["step"] > 0].get(f"val/{self.metric}")
        return {} if logged is None or logged.isna().all() else self.metrics.loc[logged.idxmin()].to_dict()

    @property
    def so_far_at(self) -> int | None:
        """The step whose metrics `final` has, where the run has not ended."""
        return None if self.status.name in ENDED or not self.best_so_far else int(self.best_so_far["step"])

    @property
    def tokens(self) -> int:
        """Tokens seen in training."""
        return int(max([0, *self.metrics["data/tokens_seen"].dropna()]))

    @property
    def seconds(self) -> float:
        """The time from the first row of metrics to the last."""
        return max([0.0, *self.metrics["seconds"]])

    @property
    def speed(self) -> float:
        """Tokens a second over the whole run, or the median so far; NaN if none were logged."""
        return self.summary.get("tokens_per_s", self.metrics["perf/tokens_per_s"].median())

    def curves(self) -> "pd.DataFrame":
        """Returns a row for each point of a curve: run, split, step, tokens, seconds, FLOPs, loss and speed."""
        import pandas as pd

        points = [
            self.metrics[self.metrics[key].notna()].assign(run=self.name, split=split, loss=self.metrics[key])
            for split, key in SPLITS.items()
        ]
        return pd.concat(points).rename(columns=POINTS)[["run", "split", "loss", *POINTS.values()]]


def load_runs(paths: Sequence[Path]) -> tuple[list[Run], dict[str, Records], list[str]]:
    """Reads what lies in directories and under them.

    Returns:
        the runs, the evaluations of other models by their names, and a line on each thing that could not be read.

    Raises:
        UserError: a directory does not exist, or holds nothing to report.
    """
    found: dict[Path, Point | None] = {}
    unread: list[str] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no directory.\nName run directories, or a folder with runs in it.")
        below = find_runs(path, unread)
        if not below and not unread:
            raise UserError(
                f"{path} holds no run: there is no manifest.json in it or in a folder under it.\n"
                "Name run directories, or a folder with runs in it, such as outputs or multirun."
            )
        found |= {run: point for run, point in below.items() if point or run not in found}
    top = Path(os.path.commonpath([path.parent for path in found or paths]))
    runs: list[Run] = []
    evaluations: dict[str, Records] = {}
    for path, point in found.items():
        name = str(path.relative_to(top))
        try:
            loaded = load_run(path, name, point)
        except DAMAGED as error:
            unread.append(f"{name}: {describe_damage(error)}")
            continue
        if isinstance(loaded, Run):
            runs.append(loaded)
        else:
            evaluations[name] = loaded
    if not runs and not evaluations:
        raise UserError(f"nothing in {paths[0]} can be read.\n{unread[0]}")
    name_objectives(runs)
    return runs, evaluations, list(dict.fromkeys(unread))


def find_runs(folder: Path, unread: list[str]) -> dict[Path, Point | None]:
    """Finds the directories of runs in a folder and under it, each with the point of a sweep that it is.

    Args:
        unread: gets a line for each sweep that can't be read; its runs are found all the same.
    """
    found: dict[Path, Point | None] = {}
    seen: set[Path] = set()

    @functools.cache
    def points_in(sweep: Path) -> dict[Path, Point]:
        try:
            return {point.run.path.resolve(): point for point in read_points(sweep)}
        except UserError as error:
            unread.append(first_line(error))
            return {}

    for name, folders, files in os.walk(folder, followlinks=True):
        path = Path(name).resolve()
        if path in seen:  # a link leads in a circle, or to the same folder twice
            folders.clear()
            continue
        seen.add(path)
        folders.sort()
        if path in found or {"manifest.json", "failure.json", "certificate.json"} & set(files):
            # No run lies in another, but the evaluations of its models do in that of a series.
            folders[:] = [folder for folder in folders if (path / folder / "certificate.json").is_file()]
            # A run that is named by itself may still be a point of a sweep; what is neither never began.
            point = points_in(path.parent).get(path)
            if point or ({"manifest.json", "certificate.json"} & set(files) and not folders):
                found[path] = point
        found |= points_in(path)
    return found


def load_run(path: Path, name: str, point: Point | None) -> Run | Records:
    """Reads a run, or the evaluation of another model.

    Raises:
        one of `DAMAGED`: what makes it a run or an evaluation is damaged.
    """
    run = RunDirectory(path)
    config = yaml.load(run.config.read_bytes(), LOADER) if run.config.is_file() else {}  # as safe as yaml.safe_load
    if run.certificate.is_file() and not run.finished() and "optim" not in config:
        return read_evaluation(path)
    manifest = run.read_manifest() if run.begun() else {}
    status = read_status(run)
    ended = status.name in ENDED
    summary = run.read_summary() if ended else {}
    if not are_numbers(summary):
        raise UserError(f"{run.summary} is damaged: a metric is no number.")
    faults: list[str] = []
    records = None
    if ended and run.certificate.is_file():
        try:
            records = read_evaluation(path)
        except DAMAGED as error:
            faults.append(describe_damage(error))
    if status.name == "done" and not records:
        faults.append("It has finished, without an evaluation to rank it by.")
    overrides = [override.lstrip("+~").partition("=") for override in point.overrides] if point else []
    return Run(
        path=path,
        name=name,
        objective=config["objective"]["_target_"] if config else "",
        chosen=config_choices(config)
        if config
        else {key: yaml.load(value, LOADER) for key, _, value in overrides if not is_in(key, MACHINERY)},
        status=status,
        manifest=manifest,
        origin=describe_origin(manifest) if manifest else {},
        metrics=read_metrics(run, manifest, faults),
        summary=summary,
        records=records,
        samples=read_whole_rows(run.samples, lambda row: {"step", "text", "said"} <= row.keys(), faults),
        sweep=path.parent if point else None,
        faults=faults,
    )


def read_metrics(run: RunDirectory, manifest: Mapping[str, Any], faults: list[str]) -> "pd.DataFrame":
    """Reads the logged metrics of a run, and computes their seconds without the pauses between two attempts."""
    import pandas as pd

    logged = read_whole_rows(
        run.metrics, lambda row: math.isfinite(row["step"] + row["time"]) and are_numbers(row), faults
    )
    metrics = pd.DataFrame(logged)
    metrics = metrics.reindex(columns=metrics.columns.union([*SPLITS.values(), *POINTS, "time"], sort=False))
    counted = metrics["perf/flops_total"].notna()  # with the metrics of training, and not of validations
    if counted.any():
        steps, flops = [0, *metrics["step"][counted]], [0.0, *metrics["perf/flops_total"][counted]]
        metrics["perf/flops_total"] = np.interp(metrics["step"], steps, flops)
    times = metrics["time"].to_numpy(float)
    resumed = sorted(datetime.fromisoformat(attempt["time"]).timestamp() for attempt in manifest.get("went_on", ()))
    attempts = np.array([-np.inf, *resumed])[np.searchsorted(resumed, times, side="right")]
    elapsed = times[1:] - np.maximum(times[:-1], attempts[1:])
    return metrics.assign(seconds=np.cumsum([0.0, *elapsed])[: len(times)].round(3))


def read_evaluation(path: Path) -> Records:
    """Reads an evaluation, and all that a report asks of it later.

    Raises:
        one of `DAMAGED`: there is none, or it lacks a part.
    """
    records = read(path)
    if "suite" in records.certificate:
        return records
    _ = (  # what is missing shows here, not while a section is made
        run_choices(records),
        evaluation_metrics(records),
        objective_of(records),
        records.certificate["policy"]["masks_seed"],
        *(records.certificate.get("series", {}).get(key, 0) + 0 for key in ("step", "tokens")),
    )
    return records


def evaluation_metrics(records: Records) -> dict[str, float | None]:
    """Returns perplexity and bits per byte of an evaluation, whatever their names are in its certificate."""
    metrics, name = records.certificate["figures"], records.certificate["figure"]
    return {"perplexity": metrics[name], "bits_per_byte": metrics[bits_per_byte(name)]}


def bits_per_byte(perplexity: str) -> str:
    """Returns the name that bits per byte have beside a perplexity of that name."""
    return f"{metric_prefix(perplexity)}bits_per_byte"


def objective_of(records: Records) -> str | None:
    """Returns the dotted name of the class of the objective that an evaluation is of; None if its score needs none."""
    objective = records.certificate["policy"]["objective"]
    return objective and objective["_target_"]


def describe_origin(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns what a manifest says of a run's making, in words."""
    attempts = manifest.get("went_on", ())
    return {
        "commands": [command(*redacted_command(manifest["command"]))],
        "software": [f"lmlab {manifest['lmlab']}, Python {manifest['python']}, {describe_software(manifest)}"],
        "went on": [
            f"{local_time(attempt['time'])} from step {attempt.get('step', '?')} on {attempt.get('host', '?')}"
            + (f", {counted(attempt['devices'], 'device')}" if "devices" in attempt else "")
            + f", {describe_software(attempt)}"
            for attempt in attempts
        ],
        "machines": ["{host}: {platform}, {cpus} CPUs".format(**manifest["machine"])],
        "runs began": [local_time(manifest["started"])],
    }


def describe_software(made: Mapping[str, Any]) -> str:
    """Returns the commit, and the versions of the packages that a result depends on most, of a run or an attempt."""
    git, packages = made.get("git"), made.get("packages", {})
    commit = f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "no git commit"
    return ", ".join([commit, *(f"{name} {packages[name]}" for name in PACKAGES if name in packages)])


def local_time(time: str | None = None) -> str:
    """Returns a time of ISO format, or the present one, as people here write it."""
    return f"{(datetime.fromisoformat(time) if time else datetime.now()).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def are_numbers(row: Mapping[str, Any]) -> bool:
    """Returns whether the metrics of a row that a report shows are numbers; those of a validation may be None."""
    return all(
        type(value) in (int, float) or not (name in METRICS or (name.startswith("val/") and value is not None))
        for name, value in row.items()
    )


def read_whole_rows(file: Path, is_right: Callable[[dict[str, Any]], bool], faults: list[str]) -> list[dict[str, Any]]:
    """Reads the rows of a file of one JSON object a line, until one is damaged, which is added to `faults`."""
    whole: list[dict[str, Any]] = []
    try:
        for row in rows(file):
            if not is_right(row):
                raise ValueError("no such row is written by lmlab")
            whole.append(row)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        faults.append(f"{file.name} is damaged in line {len(whole) + 1}: {first_line(error)}. Read up to there.")
    if file.is_file() and file.stat().st_size and not file.read_bytes().endswith(b"\n"):
        faults.append(f"{file.name} ends in half a line, which is left out.")
    return whole


def describe_damage(error: BaseException) -> str:
    """Returns an error of `DAMAGED` in one line."""
    if isinstance(error, UserError):
        return first_line(error)
    return f"a file of it is not as lmlab writes it ({type(error).__name__}: {first_line(error)})"


def name_objectives(runs: Sequence[Run]) -> None:
    """Gives runs that have not begun the objective that they will have, as far as their sweeps tell."""
    begun = [run for run in runs if run.objective]
    for run in runs:
        if not run.objective:
            option = run.chosen.get("objective")
            siblings = {other.objective for other in begun if other.sweep == run.sweep}
            alike = {name for name in siblings if option is None or f".{option}." in f".{name}."}
            run.objective = alike.pop() if len(alike) == 1 else str(option or "not begun")
