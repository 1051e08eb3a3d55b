"""What a run says: on the terminal as it is, in its log with the time."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lmlab import secrets


class Lines(logging.Formatter):
    """Shows no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return secrets.redacted_text(super().format(record))


class Terminal(logging.StreamHandler):
    """Writes to what is standard output at the time: a progress bar puts itself in front of it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


class Log(logging.FileHandler):
    """Goes on without a line that can't be written: a full disk ends no run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def shown_without_secrets(name: str) -> Iterator[None]:
    """Redact what a logger that is not lmlab's says meanwhile."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = secrets.redacted_text(record.getMessage()), ()
        return True

    logging.getLogger(name).addFilter(redact)
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(redact)


@contextmanager
def kept_log(place: Path) -> Iterator[None]:
    """Send what lmlab logs meanwhile to the terminal, and that and others' warnings to `place`, which is added to."""
    terminal, file = Terminal(), Log(place)
    terminal.setFormatter(Lines())
    file.setFormatter(Lines("%(asctime)s %(levelname)s %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("lmlab")
    attached = [(ours, terminal), (ours, file), (root, file)]
    for logger, handler in attached:
        logger.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # Hydra shows what reaches the root, in a manner of its own
    try:
        yield
    finally:
        ours.propagate = True
        for logger, handler in attached:
            logger.removeHandler(handler)
        file.close()
