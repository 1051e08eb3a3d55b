"""The points of a sweep, each a run in a directory of its own, and the file that lists them."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lmlab.errors import UserError
from lmlab.io import from_here, locked, read_json, write_json
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import redacted_command

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One combination of a sweep's values, or one trial of a search."""

    number: int
    overrides: list[str]
    """The overrides that it does not share with the other points."""
    run: RunDirectory


def read_sweep(folder: Path) -> dict[str, Any]:
    """Returns what the file of a sweep holds: its last command, the overrides of its points, and facts of its sweeper.

    Returns {} if the folder holds no sweep.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    points, arguments = content.get("points"), content.get("arguments")
    lists = [arguments, *points] if isinstance(points, list) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise UserError(f"{path} is damaged: it is not the file of a sweep.")
    return content


def read_points(folder: Path) -> list[Point]:
    """Returns the points of a sweep in the order of their numbers; none if the folder holds no sweep."""
    return [
        Point(number, overrides, RunDirectory(folder / str(number)))
        for number, overrides in enumerate(read_sweep(folder).get("points", []))
    ]


def begin_sweep(folder: Path, **facts: Any) -> None:
    """Writes the file of a sweep, or updates the one that is there with the command and facts of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with updated_sweep(folder) as content:
        content.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
        content |= {"directory": os.getcwd(), "arguments": redacted_command(sys.argv[1:]), **facts}
        content.setdefault("points", [])


def add_points(folder: Path, points: Sequence[list[str]]) -> None:
    """Gives points, by their overrides, the next numbers of a sweep where they are new to it."""
    with updated_sweep(folder) as content:
        known = set(map(point_identity, content["points"]))
        for overrides in points:
            if point_identity(overrides) not in known:
                known.add(point_identity(overrides))
                content["points"].append(overrides)


def point_identity(overrides: Sequence[str]) -> frozenset[str]:
    """Returns what two ways to write the same point have in common."""
    return frozenset(word.lstrip("+") for word in overrides)


@contextmanager
def updated_sweep(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the content of a sweep's file, to be changed by one process at a time, and writes it."""
    with locked(folder / ".sweep.lock"):
        content = read_sweep(folder)
        yield content
        write_json(folder / SWEEP_FILE, content)


def name_run(cfg: DictConfig) -> None:
    """Makes loggers group the runs of a sweep, and name each after its point, unless the config says otherwise."""
    run, loggers = RunDirectory(cfg.run_dir), cfg.get("logger") or {}
    blocks = [loggers[name] for name in ("wandb", "mlflow", "trackio") if loggers.get(name)]
    if not blocks:
        return
    point = next((point for point in read_points(run.path.parent) if point.run.path == run.path), None)
    for block in blocks:
        if block.get("group", "") is None:
            block.group = str(from_here(run.path.parent))
        if point and block.get("name", "") is None:
            block.name = " ".join(point.overrides)
