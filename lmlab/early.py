"""Ends a command that gets a Ctrl-C while it still imports what it needs to handle signals.

Nothing else is imported here.
"""

import os
import signal
from types import FrameType

NOTHING = "Nothing was begun."


def end(number: int, frame: FrameType | None) -> None:
    """Ends this process without a traceback: a signal handler."""
    os.write(2, f"Stopped by {signal.Signals(number).name}. {NOTHING}\n".encode())
    os._exit(128 + number)


def heed() -> None:
    """Installs `end` for Ctrl-C, until another handler is installed. A Ctrl-C that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
