"""The logger of TensorBoard: an event file in the run directory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.loggers import Logger

from lmlab.training.loggers.rows import Outcome, Row, RowLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventFile:
    """An event file with the rows of a run.

    It is begun anew whenever a run goes on, from the rows in metrics.jsonl: so it has no step twice, and neither has a
    TensorBoard that is showing the run, which by `purge_step` drops what it has of it.
    """

    label, whole_rows = "TensorBoard's event file", False

    def __init__(self, folder: Path, config: dict[str, Any]):
        """Names the folder of the file, and the config of the run, which is shown as text."""
        self.folder, self.config = folder, config
        self.writer: SummaryWriter | None = None

    def connect(self) -> dict[str, int]:
        from torch.utils.tensorboard import SummaryWriter

        writer, self.writer = self.writer, None
        if writer is not None:  # it failed, and may do so once more
            writer.close()
        for earlier in self.folder.glob("events.out.tfevents.*"):
            if earlier.stat().st_size:  # a TensorBoard that is reading it would not go on to the next if it were gone
                os.truncate(earlier, 0)
            else:
                earlier.unlink()
        self.writer = SummaryWriter(str(self.folder), purge_step=0)
        text = yaml.safe_dump(self.config, sort_keys=False)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))  # code, in Markdown
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        assert self.writer is not None
        for row in rows:
            for name, value in row.metrics.items():
                self.writer.add_scalar(name, value, row.step, walltime=row.time)
        self.writer.flush()

    def finish(self, outcome: Outcome) -> None:
        assert self.writer is not None
        self.writer.close()


def tensorboard(run_dir: str, config: dict[str, Any]) -> Logger:
    """Returns the logger that writes an event file into the folder `tensorboard` of the run directory."""
    return RowLogger(EventFile(Path(run_dir) / "tensorboard", config), run_dir, patience=60.0)
