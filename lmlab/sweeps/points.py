"""A sweep: its points, each a run in a directory of its own, and the command that they came from."""

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
    """One of a sweep's runs."""

    number: int
    overrides: list[str]
    """What makes it, beside what all points share."""
    run: RunDirectory


def read_sweep(folder: Path) -> dict[str, Any]:
    """What a sweep's file holds: when and where it was begun, its last arguments, the overrides of its points.

    Returns:
        {} if the folder holds no sweep.

    Raises:
        UserError: the file is damaged.
    """
    place = folder / SWEEP_FILE
    if not place.is_file():
        return {}
    content = read_json(place)
    points, arguments = content.get("points"), content.get("arguments")
    lists = [arguments, *points] if isinstance(points, list) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise UserError(f"{place} is damaged: it is not the file of a sweep.")
    return content


def read_points(folder: Path) -> list[Point]:
    """The points of a sweep, by their numbers; none if the folder holds no sweep."""
    return [
        Point(number, overrides, RunDirectory(folder / str(number)))
        for number, overrides in enumerate(read_sweep(folder).get("points", []))
    ]


def begin_sweep(folder: Path, **facts: Any) -> None:
    """Make a folder that of a sweep, or go on with the one there: of the command and of `facts`, the last counts."""
    folder.mkdir(parents=True, exist_ok=True)
    with updated_sweep(folder) as content:
        content.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
        content |= {"directory": os.getcwd(), "arguments": redacted_command(sys.argv[1:]), **facts}
        content.setdefault("points", [])


def add_points(folder: Path, wanted: Sequence[list[str]]) -> None:
    """Give points of those overrides, where they are new, the next numbers."""
    with updated_sweep(folder) as content:
        known = {point_identity(overrides) for overrides in content["points"]}
        for overrides in wanted:
            if point_identity(overrides) not in known:
                known.add(point_identity(overrides))
                content["points"].append(overrides)


def point_identity(overrides: Sequence[str]) -> frozenset[str]:
    """What makes a point, however it is written."""
    return frozenset(word.lstrip("+") for word in overrides)


@contextmanager
def updated_sweep(folder: Path) -> Iterator[dict[str, Any]]:
    """The file of a sweep, to be changed by one process at a time."""
    with locked(folder / ".sweep.lock"):
        content = read_sweep(folder)
        yield content
        write_json(folder / SWEEP_FILE, content)


def name_run(cfg: DictConfig) -> None:
    """Let W&B group the runs of a sweep, and name each after its point, unless the config says otherwise."""
    run, block = RunDirectory(cfg.run_dir), (cfg.get("logger") or {}).get("wandb")
    if not block:
        return
    if block.get("group") is None:
        block.group = str(from_here(run.path.parent))
    point = next((point for point in read_points(run.path.parent) if point.run.path == run.path), None)
    if point and block.get("name") is None:
        block.name = " ".join(point.overrides)
