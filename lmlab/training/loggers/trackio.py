"""The logger of trackio: a database on this machine, which its dashboard shows without an account."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from lightning.pytorch.loggers import Logger

from lmlab.errors import UserError, first_line
from lmlab.training.loggers.rows import Outcome, Row, RowLogger, run_name


class TrackioRun:
    """A run in the database of a project, under its own id.

    Rows are written by trackio's storage. Its `Run` would queue them without a word on what has become of them, and
    with the time at which it got them.
    """

    label, whole_rows = "trackio", True

    def __init__(self, project: str, run_id: str, name: str, group: str | None, config: dict[str, Any]):
        """Keeps what the run is begun with.

        Args:
            project: the name of the project.
            run_id: the identity of the run.
            name: the name under which it is shown.
            group: the runs that it is shown with.
            config: the config of the run.
        """
        self.project, self.run_id, self.name = project, run_id, name
        # The keys with a line are those by which the dashboard sorts and groups runs.
        self.config = {**config, "_Created": datetime.now(UTC).isoformat(), "_Group": group, "_Username": None}

    def connect(self) -> dict[str, int]:
        from trackio.sqlite_storage import SQLiteStorage

        self.unsent: dict[str, Any] | None = self.config
        latest: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(self.project, run_id=self.run_id):
            latest |= {name: max(row["step"], latest.get(name, -1)) for name in row}
        return latest

    def write(self, rows: Sequence[Row]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_log(
            self.project,
            self.name,
            [row.metrics for row in rows],
            [row.step for row in rows],
            [datetime.fromtimestamp(row.time, UTC).isoformat() for row in rows],
            self.unsent,
            run_id=self.run_id,
        )
        self.unsent = None

    def finish(self, outcome: Outcome) -> None:
        """Does nothing: trackio keeps no status of a run."""


def trackio(
    run_dir: str,
    run_id: str,
    config: dict[str, Any],
    *,
    project: str = "lmlab",
    name: str | None = None,
    group: str | None = None,
) -> Logger:
    """Returns the logger of a run in trackio's database on this machine.

    Args:
        project: the project that has the run.
        name: the name under which the run is shown; null for the end of its path.
        group: the name of the runs that it is shown with.
    """
    from trackio.sqlite_storage import SQLiteStorage

    try:
        SQLiteStorage.validate_project_name(project)
    except ValueError as error:
        raise UserError(f"logger.trackio.project={project}: {first_line(error)}") from error
    return RowLogger(TrackioRun(project, run_id, name or run_name(run_dir), group, config), run_dir)
