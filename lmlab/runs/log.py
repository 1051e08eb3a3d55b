"""The log of a run: on the terminal as it is, in a file with the time, and nowhere with a secret in it."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lmlab import secrets


class RedactingFormatter(logging.Formatter):
    """Formats records without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        return secrets.redacted_text(super().format(record))


class StdoutHandler(logging.StreamHandler):
    """Writes to what is standard output at the time, which a progress bar may have replaced."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


class TolerantFileHandler(logging.FileHandler):
    """Writes to a file, and leaves out a line that can't be written: a full disk ends no run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def redact_logger(name: str) -> Iterator[None]:
    """Removes secrets from what a logger of another library logs inside the block."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = secrets.redacted_text(record.getMessage()), ()
        return True

    logging.getLogger(name).addFilter(redact)
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(redact)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Sends what lmlab logs inside the block to the terminal, and that and others' warnings to the end of a file."""
    terminal, file = StdoutHandler(), TolerantFileHandler(path)
    terminal.setFormatter(RedactingFormatter())
    file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("lmlab")
    attached = [(ours, terminal), (ours, file), (root, file)]
    for logger, handler in attached:
        logger.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # Hydra shows what reaches the root, in a format of its own
    try:
        yield
    finally:
        ours.propagate = True
        for logger, handler in attached:
            logger.removeHandler(handler)
        file.close()
