"""A run, or an evaluation, as far as its directory can be read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lmlab.errors import UserError, first_line
from lmlab.evaluation.comparison import choices_of
from lmlab.evaluation.records import Records, read
from lmlab.io import rows
from lmlab.runs.choices import MACHINERY, config_choices, is_in
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import ENDED, Status, read_status
from lmlab.sweeps.points import Point

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where PyYAML was built with libyaml
SPLITS = {"validation": "val/loss", "training": "train/loss"}
COUNTS = ("parameters", "trainable_parameters", "flops")
FIGURES = (*SPLITS.values(), "data/tokens_seen", "perf/tokens_per_s", "tokens_per_s", *COUNTS)
DAMAGED = (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError)
"""What reading the files of a run can raise when somebody or something else has written in them."""
MANIFEST: dict[str, Any] = {
    **dict.fromkeys(("run_id", "started", "lmlab", "python"), str),
    **dict.fromkeys(("packages", "machine"), dict),
    "command": list,
    "git": dict | None,
}
"""What a report relies on."""


@dataclass
class Run:
    """A run, as far as its directory can be read."""

    place: Path
    name: str
    objective: str
    """Class of its objective, by its dotted name; what the sweep calls it where no run of that kind has begun."""
    chosen: dict[str, Any]
    """By dotted keys, machinery left out; of a run that has not begun what its sweep says of it."""
    state: Status
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
        source = self.result or self.best_so_far
        return {"perplexity": source.get(f"val/{self.figure}"), "bits_per_byte": source.get(f"val/{bits}")}

    @cached_property
    def best_so_far(self) -> dict[str, Any]:
        """The row of the lowest perplexity of its validations; empty before the first of weights that were trained."""
        name = f"val/{self.figure}"
        logged = [row for row in self.rows if row["step"] and row.get(name) is not None and not math.isnan(row[name])]
        return min(logged, key=lambda row: row[name], default={})

    @property
    def so_far_at(self) -> int | None:
        """The step that the final figures are of, where the run has not ended."""
        return None if self.state.name in ENDED else self.best_so_far.get("step")

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
    manifest = run.read_manifest() if run.begun() else {}
    if manifest and "run_id" not in manifest:
        raise UserError(f"{run.manifest} is no manifest of lmlab.")
    if manifest:
        check_manifest(run, manifest)
    config = config_of(run)
    if config and not isinstance(config.get("objective"), dict):
        raise UserError(f"{run.config} is damaged: it names no objective.")
    state = read_status(run)
    if not isinstance(state.message, str | None):
        raise UserError(f"{run.failure} is damaged: its message is no text.")
    ended = state.name in ENDED
    result = run.read_summary() if ended else {}
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
        chosen=config_choices(config) if config else chosen_by(point.overrides if point else []),
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
    """The choices of a run that has not begun, from the overrides that its sweep gives it."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: yaml.load(value, LOADER) for key, _, value in pairs if not is_in(key, MACHINERY)}


def objective_of(evaluation: Records) -> str:
    return evaluation.certificate["policy"]["objective"]["_target_"]
