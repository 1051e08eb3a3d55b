"""A sweep: its points, each a run in a directory of its own, and the command that they came from."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import read_json, write_json

FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One of a sweep's runs."""

    number: int
    overrides: list[str]
    """What makes it, beside what all points share."""
    run: RunDirectory


def points(folder: Path) -> list[Point]:
    """The points of a sweep, by their numbers; none if the folder holds no sweep."""
    if not (folder / FILE).is_file():
        return []
    return [
        Point(number, overrides, RunDirectory(folder / str(number)))
        for number, overrides in enumerate(read_json(folder / FILE)["points"])
    ]


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Make a folder that of a sweep, or go on with the one there: of the command and of `facts`, the last counts."""
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder) as content:
        content.setdefault("started", datetime.now(UTC).isoformat(timespec="seconds"))
        content |= {"directory": os.getcwd(), "arguments": sys.argv[1:], **facts}
        content.setdefault("points", [])


def add(folder: Path, wanted: Sequence[list[str]]) -> list[Point]:
    """The points of those overrides. Those that are new get the next numbers."""
    with written(folder) as content:
        content["points"] += [overrides for overrides in wanted if overrides not in content["points"]]
    return [point for point in points(folder) if point.overrides in wanted]


@contextmanager
def written(folder: Path) -> Iterator[dict[str, Any]]:
    """The file of a sweep, to be changed by one process at a time."""
    with FileLock(folder / ".sweep.lock"):
        content = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        yield content
        write_json(folder / FILE, content)


def facts(folder: Path) -> dict[str, Any]:
    """What is known of a sweep beside its points: when, where and by which arguments it was begun; {} for none."""
    content = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    return {key: value for key, value in content.items() if key != "points"}
