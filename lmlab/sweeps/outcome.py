"""What became of the points of a sweep."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lmlab.console import command
from lmlab.errors import UserError
from lmlab.io import from_here
from lmlab.runs import status
from lmlab.runs.status import Status
from lmlab.sweeps.points import Point, read_points, read_sweep


def conclude(folder: Path) -> None:
    """Say what became of a sweep's points.

    Raises:
        UserError: some failed.
    """
    if not read_sweep(folder):
        raise UserError(f"{from_here(folder)} was moved or deleted while the sweep went on.")
    found = show(read_points(folder))
    failed = sum(state.name == "failed" for state in found)
    if failed:
        raise UserError(
            f"{failed} of {len(found)} runs failed. To run again what has not come to its end: "
            f"{command('python', '-m', 'lmlab.sweep', 'resume', from_here(folder))}"
        )


def show(points: Sequence[Point]) -> list[Status]:
    """Print a sweep's points and their states, which are returned."""
    from lmlab.console import show_rows

    found = [status.read_status(point.run) for point in points]
    rows = []
    for point, state in zip(points, found, strict=True):
        result = point.run.read_summary() if state.name in status.ENDED else {}
        loss = f"{result['val/loss']:.4f}" if result else ""
        steps = f"{state.step}/{state.steps}" if state.steps else ""
        rows.append([f"{point.number}  {' '.join(point.overrides)}", state.name, steps, loss, state.cause or ""])
    show_rows("Runs", ["run", "state", "step", "val/loss", "cause"], rows)
    for point, state in zip(points, found, strict=True):
        if state.name == "failed":
            print(f"{point.number}: {state.message}")
    counts = Counter(state.name for state in found)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return found
