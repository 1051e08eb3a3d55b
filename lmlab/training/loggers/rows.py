"""Gives the rows of `metrics.jsonl` to a store of another library; training never waits for it."""

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, NamedTuple, Protocol

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lmlab.console import command
from lmlab.errors import root_cause
from lmlab.io import from_here
from lmlab.runs.directory import RunDirectory

LOG = logging.getLogger(__name__)
BATCH = 50  # rows that a store is given at once, at most
RETRY = 10.0  # seconds until a store that took no rows is asked again

Outcome = Literal["finished", "failed", "stopped"]


class Row(NamedTuple):
    """A row of metrics.jsonl."""

    step: int
    time: float
    """Unix seconds."""
    metrics: dict[str, float]


class Store(Protocol):
    """The storage of another library for the metrics of a run.

    Its methods may raise anything, and are then called again. One thread calls them, which is not that of training.
    """

    label: str
    """The name of the store in messages."""
    whole_rows: bool
    """True if the store takes whole rows. Otherwise metrics that it has for their step already are left out of a row:
    the tokens seen, for example, are in the row of a validation and in that of the training step before it."""

    def connect(self) -> dict[str, int]:
        """Finds the run or begins it, and returns the last step that is kept of each of its metrics."""
        ...

    def write(self, rows: Sequence[Row]) -> None:
        """Keeps rows, and returns once they are kept."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Marks the run as ended."""
        ...


class RowLogger(Logger):
    """Gives a store the rows of metrics.jsonl, each metric once at each step, however often the run is killed.

    A kill may come before or after a row is kept, and a run that goes on makes the steps since its checkpoint again.
    So the store is asked at the beginning, and after each of its failures, for the last step that it has of each
    metric, and is given what comes after that in the file. The file is the queue: a store that is away costs no memory.
    """

    def __init__(self, store: Store, run_dir: str, patience: float = 60.0):
        """Begins to give the store the rows that are in the file already.

        Args:
            store: takes the rows.
            run_dir: the run directory.
            patience: seconds that the store has at the end to take the rest.
        """
        super().__init__()
        self.store, self.run, self.patience = store, RunDirectory(run_dir), patience
        self.latest: dict[str, int] | None = None
        """The last step of each metric that the store has; None where it has to be asked."""
        self.offset = 0
        """The bytes of metrics.jsonl that the store has been given."""
        self.warned = self.incomplete = self.closed = False
        self.outcome: Outcome = "failed"
        self.news, self.ended = Event(), Event()
        self.news.set()
        self.thread = Thread(target=self.give_rows, daemon=True)
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.thread.start()

    @property
    def name(self) -> str:
        return self.store.label

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Has the new row read in metrics.jsonl, where it is already: that logger is the first."""
        self.news.set()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: stores are given the config when they are made."""

    def give_rows(self) -> None:
        """Gives the store the rows as they come, until the run has ended and it has all of them."""
        ended = False
        while not ended:
            self.news.wait()
            self.news.clear()
            ended = self.ended.is_set()
            try:
                self.write_new()
                if ended:
                    self.store.finish(self.outcome)
            except Exception as error:  # whatever a library or a service may do, the run goes on
                self.latest = None
                if ended:
                    self.warn_unsent(root_cause(error))
                elif not self.ended.is_set():
                    self.warn(root_cause(error))
                    self.ended.wait(RETRY)
                self.news.set()

    def write_new(self) -> None:
        """Writes all rows of the file that the store does not have."""
        if self.latest is None:
            self.latest, self.offset = self.store.connect(), 0
        if not self.run.metrics.is_file():
            return
        with self.run.metrics.open("rb") as file:
            file.seek(self.offset)
            while lines := [line for line in islice(file, BATCH) if line.endswith(b"\n")]:
                if rows := self.new_rows(lines, self.latest):
                    self.store.write(rows)
                self.offset += sum(map(len, lines))

    def new_rows(self, lines: Sequence[bytes], latest: dict[str, int]) -> list[Row]:
        """Returns the rows among lines that have a metric after its last step, which is then moved on."""
        rows = []
        for line in lines:
            metrics = json.loads(line)
            step, time = metrics.pop("step"), metrics.pop("time")
            new = {name: value for name, value in metrics.items() if step > latest.get(name, -1)}
            if new:
                rows.append(Row(step, time, metrics if self.store.whole_rows else new))
                latest |= dict.fromkeys(new, step)
        return rows

    def warn(self, why: str) -> None:
        """Warns, once, that the store takes no rows for now."""
        if not self.warned:
            self.warned = True
            LOG.warning(
                "%s takes no metrics: %s\nTraining goes on, and metrics.jsonl has all; what is missing is sent later.",
                self.store.label,
                why,
            )

    def warn_unsent(self, why: str) -> None:
        """Warns, once, that the run has ended and the store has not all of it, with the command that sends the rest."""
        if not self.incomplete:
            self.incomplete = True
            with suppress(OSError):  # by which a run that is finished is known to have something to send
                self.run.unsent.touch()
            again = command("python", "-m", "lmlab.resume", from_here(self.run.path))
            LOG.warning("%s does not have all metrics: %s\nTo send the rest: %s", self.store.label, why, again)

    def end(self, exit_code: int, will_go_on: bool, result: Mapping[str, Any] | None) -> None:
        """Gives the store the last rows, and waits until it has them."""
        self.outcome = "stopped" if will_go_on else "failed" if exit_code else "finished"
        self.ended.set()
        self.news.set()
        if self.thread.ident is not None:
            self.thread.join()


def run_name(run_dir: str) -> str:
    """Returns the name of a run that the config gives none: the end of its path, such as `outputs/first`."""
    return "/".join(Path(run_dir).parts[-2:])
