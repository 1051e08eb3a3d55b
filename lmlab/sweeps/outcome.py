"""The table of a sweep's points, with the status of each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lmlab.console import command, show_rows
from lmlab.errors import UserError
from lmlab.io import from_here
from lmlab.runs.status import ENDED, Status, read_status
from lmlab.sweeps.points import Point, read_points, read_sweep


def conclude(folder: Path) -> None:
    """Shows the points of a sweep that has ended.

    Raises:
        UserError: some failed.
    """
    if not read_sweep(folder):
        raise UserError(f"{from_here(folder)} was moved or deleted while the sweep went on.")
    statuses = show(read_points(folder))
    failed = sum(status.name == "failed" for status in statuses)
    if failed:
        raise UserError(
            f"{failed} of {len(statuses)} runs failed. To run what has not come to its end: {resume_command(folder)}"
        )


def resume_command(folder: Path) -> str:
    """Returns the command that runs the points of a sweep that have not come to their end."""
    return command("python", "-m", "lmlab.sweep", "resume", from_here(folder))


def show(points: Sequence[Point]) -> list[Status]:
    """Prints a table of points, why some failed, and how many have each status; returns the statuses."""
    statuses = [read_status(point.run) for point in points]
    rows = []
    for point, status in zip(points, statuses, strict=True):
        result = point.run.read_summary() if status.name in ENDED else {}
        loss = f"{result['val/loss']:.4f}" if result else ""
        steps = f"{status.step}/{status.steps}" if status.steps else ""
        rows.append([f"{point.number}  {' '.join(point.overrides)}", status.name, steps, loss, status.cause or ""])
    show_rows("Runs", ["run", "status", "step", "val/loss", "cause"], rows)
    for point, status in zip(points, statuses, strict=True):
        if status.name == "failed":
            print(f"{point.number}: {status.message}")
    counts = Counter(status.name for status in statuses)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return statuses
