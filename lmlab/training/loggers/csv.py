"""The logger of a CSV file in the run directory."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

from lmlab.training.loggers.rows import Outcome, Row, RowLogger


class CSVFile:
    """A CSV file with the rows of a run and a column per metric. It is begun anew whenever the run goes on."""

    label, whole_rows = "The CSV file", True

    def __init__(self, run_dir: Path):
        """Names the run directory."""
        self.run_dir = run_dir

    def connect(self) -> dict[str, int]:
        (self.run_dir / "csv" / "metrics.csv").unlink(missing_ok=True)
        self.writer = CSVLogger(self.run_dir, name="csv", version="")
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.writer.log_metrics({"time": row.time, **row.metrics}, row.step)
        self.writer.save()

    def finish(self, outcome: Outcome) -> None:
        """Does nothing: each row is in the file already."""


def csv(run_dir: str) -> Logger:
    """Returns the logger that writes `csv/metrics.csv` into the run directory."""
    return RowLogger(CSVFile(Path(run_dir)), run_dir)
