"""A Ctrl-C while a command still imports what it needs to heed signals. Nothing else is imported here."""

import os
import signal
from types import FrameType

NOTHING = "Nothing was begun."


def end(number: int, frame: FrameType | None) -> None:
    """A handler that ends this process without a traceback."""
    os.write(2, f"Stopped by {signal.Signals(number).name}. {NOTHING}\n".encode())
    os._exit(128 + number)


def heed() -> None:
    """Let a Ctrl-C end this process so, until somebody else heeds it. One that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
