"""The file with all metrics of a run, `metrics.jsonl` in its directory, and other files of a JSON object per line."""

import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lmlab.errors import disk_full
from lmlab.io import flush
from lmlab.runs.directory import RunDirectory

LOG = logging.getLogger(__name__)


class JSONLines:
    """A file that JSON objects are appended to, one per line, whole or not at all.

    Lines that a full disk has no room for stay in memory, and are written with later ones.
    """

    def __init__(self, path: Path, content: str):
        """Names the file, and what its lines are, for a warning."""
        self.path, self.content = path, content
        self.unwritten = b""

    def append(self, *objects: Mapping[str, Any]) -> None:
        """Writes a line for each object."""
        lines = self.unwritten + "".join(json.dumps(line) + "\n" for line in objects).encode()
        done = False
        try:
            with self.path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    done = file.write(lines) == len(lines)
                finally:
                    if not done:
                        file.truncate(size)  # no half of a line
        except OSError as error:
            if not disk_full(error):
                raise
        if not done and not self.unwritten:
            LOG.warning("no room for %s in %s: they are written once there is some.", self.content, self.path)
        self.unwritten = b"" if done else lines


def flushed_size(path: Path) -> int:
    """Brings a file to the disk and returns its size in bytes; 0 if there is none.

    Called before a checkpoint is written, so that no checkpoint outlives the lines of its steps.
    """
    if not path.is_file():
        return 0
    flush(path)
    return path.stat().st_size


def truncate(path: Path, size: int) -> None:
    """Removes the lines of a file behind its first `size` bytes: a run that goes on from there writes them again."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n", 0, size) + 1)


class MetricsFile(Logger):
    """Writes `metrics.jsonl`: an object per line with `step`, `time` (Unix seconds) and the metrics."""

    def __init__(self, run_dir: str):
        super().__init__()
        self.lines = JSONLines(RunDirectory(run_dir).metrics, "metrics")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append({"step": step, "time": round(time.time(), 3), **metrics})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run directory holds the config already."""
