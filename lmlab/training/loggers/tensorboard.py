"""The logger of TensorBoard: an event file in the run directory."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from lightning.pytorch.loggers import Logger

from lmlab.training.loggers.rows import Outcome, Row, RowLogger


class EventFile:
    """An event file with the rows of a run.

    It is begun anew whenever a run goes on, from the rows in metrics.jsonl: so it has no step twice, and neither has a
    TensorBoard that is showing the run, which at the start of a session drops what it has of later steps.

    TensorBoard's record writer is used as it is, since its `SummaryWriter` writes in a thread, where an error of the
    disk is printed with its traceback.
    """

    label, whole_rows = "TensorBoard's event file", False

    def __init__(self, folder: Path, config: dict[str, Any]):
        """Names the folder of the file, and the config of the run, which is shown as text."""
        self.folder, self.config = folder, config
        self.file: BinaryIO | None = None

    def connect(self) -> dict[str, int]:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        file, self.file = self.file, None
        if file is not None:  # it failed, and may do so once more
            file.close()
        self.folder.mkdir(exist_ok=True)
        for earlier in self.folder.glob("events.out.tfevents.*"):
            if earlier.stat().st_size:  # a TensorBoard that is reading it would not go on to the next if it were gone
                os.truncate(earlier, 0)
            else:
                earlier.unlink()
        now = time.time()
        self.file = (self.folder / f"events.out.tfevents.{now:.6f}").open("wb")
        self.records = RecordWriter(self.file)
        self.write_event(now, file_version="brain.Event:2")
        self.write_event(now, session_log=SessionLog(status=SessionLog.START))
        lines = yaml.safe_dump(self.config, sort_keys=False).splitlines()
        code = "".join(f"    {line}\n" for line in lines)  # in Markdown
        self.write_event(now, summary=text("config", code))  # type: ignore[no-untyped-call]
        return {}

    def write_event(self, wall_time: float, step: int = 0, **content: Any) -> None:
        """Writes a record of an event."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=wall_time, step=step, **content).SerializeToString())

    def write(self, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self.file is not None
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.metrics.items()]
            self.write_event(row.time, row.step, summary=Summary(value=values))
        self.file.flush()

    def finish(self, outcome: Outcome) -> None:
        assert self.file is not None
        self.file.close()


def tensorboard(run_dir: str, config: dict[str, Any]) -> Logger:
    """Returns the logger that writes an event file into the folder `tensorboard` of the run directory."""
    return RowLogger(EventFile(Path(run_dir) / "tensorboard", config), run_dir)
