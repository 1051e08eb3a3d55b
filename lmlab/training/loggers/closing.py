"""Ends the loggers of a run: they get what is missing in limited time, and are told how the run ended."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Any

from lightning.pytorch.loggers import Logger

from lmlab.errors import Stopped
from lmlab.runs.directory import RunDirectory
from lmlab.training.loggers.rows import RowLogger
from lmlab.training.loggers.wandb import ANSWER, WandB


def close(
    loggers: Iterable[Logger],
    exit_code: int = 0,
    will_go_on: bool = False,
    result: Mapping[str, Any] | None = None,
    timeout: float = float("inf"),
) -> None:
    """Ends the runs of services, so that the next run of this process begins one of its own.

    Args:
        will_go_on: whether they show the run as pre-empted.
        result: the summary of a run that has come to its end.
        timeout: seconds to wait for each, if that is less than its patience.
    """
    endings = []
    for logger in loggers:
        if isinstance(logger, WandB | RowLogger) and not logger.closed:
            logger.closed = True
            # In a thread, since a service that is not there would be asked again and again; side by side.
            endings.append((logger, Thread(target=logger.end, args=(exit_code, will_go_on, result), daemon=True)))
            endings[-1][1].start()
    began = time.monotonic()
    for logger, ending in endings:
        more = 5 * ANSWER if isinstance(logger, WandB) else 0  # for what W&B asks its service about
        seconds = min(timeout, logger.patience + more)
        ending.join(max(0.0, began + seconds - time.monotonic()))
        if ending.is_alive():
            logger.warn_unsent(f"not done in {min(seconds, logger.patience):g} seconds")


@contextmanager
def closed_at_the_end(loggers: Iterable[Logger], run: RunDirectory) -> Iterator[None]:
    """Closes loggers with the summary of the run, or as failed or pre-empted where an error ends what is inside."""
    try:
        yield
    except BaseException as error:
        close(loggers, exit_code=1, will_go_on=isinstance(error, Stopped))
        raise
    close(loggers, result=run.read_summary() if run.finished() else None)
