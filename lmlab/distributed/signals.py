"""Signals that stop a run: it ends where its checkpoint can be written, with exit code 128 + signal."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lmlab import early
from lmlab.distributed import slurm
from lmlab.errors import Stopped

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that stop a run."""
BEFORE_THE_LIMIT = (signal.SIGUSR1, signal.SIGUSR2)
"""The signals that SLURM and submitit send ahead of a time limit; SIGTERM is for those who want the job to end."""


class Signals:
    """The signals that this process was sent."""

    def __init__(self) -> None:
        self.received = 0
        """The first signal that came while `patient`, or 0."""
        self.patient = False
        """True while `received` is looked at, as by training after each step; otherwise a signal ends the process."""
        self.ending = False
        """True once `Stopped` was raised, by which the process ends."""
        self.process = 0
        """The id of the process that installed the handlers; processes that it forks inherit them, and do nothing."""
        self.ignored: set[signal.Signals] = set()
        """The signals that were ignored when the handlers were installed, by nohup or a shell's &, and stay so."""

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Installs handlers for the block inside, which a signal ends by raising `Stopped`."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other may have handlers
        if not in_main_thread or self.process == os.getpid():  # or they are installed already
            yield
            return
        before = {number: signal.getsignal(number) for number in HEEDED}
        if before[signal.SIGINT] is early.end:
            before[signal.SIGINT] = signal.SIG_DFL  # a Ctrl-C while Python shuts down prints no traceback
        self.ignored = {number for number, handler in before.items() if handler is signal.SIG_IGN}
        self.received, self.patient, self.ending, self.process = 0, False, False, os.getpid()
        self.heed()
        hook, sys.unraisablehook = sys.unraisablehook, self.send_again
        try:
            yield
        finally:
            sys.unraisablehook = hook
            self.patient, self.process = False, 0
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def heed(self) -> None:
        """Installs the handlers, again where a library has put its own over them."""
        if self.process != os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        for number in HEEDED:
            signal.signal(number, signal.SIG_IGN if number in self.ignored else self.note)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only notes the first signal inside in `received`; the same one again ends the process."""
        self.received, self.patient = 0, True
        try:
            yield
        finally:
            self.patient = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: notes it for training to see, or ends the process if it came twice or nobody looks."""
        if os.getpid() != self.process:
            return
        if self.ending and number != signal.SIGINT:  # whoever stops a job may say so often
            return
        # SLURM signals every process of a job, and a rank also gets what its parent passes on: that is one wish.
        again = number == self.received and (number == signal.SIGINT or not slurm.in_job())
        if (self.patient or self.ahead_of_a_limit(number)) and not again:
            self.received = self.received or number
            return
        self.end(number)

    def send_again(self, unraisable: Any) -> None:
        """Sends a signal again if its `Stopped` was raised in a finalizer, where Python drops exceptions."""
        if not isinstance(unraisable.exc_value, Stopped):
            sys.__unraisablehook__(unraisable)
            return
        self.ending = False
        threading.Timer(0.1, os.kill, (os.getpid(), unraisable.exc_value.signal)).start()

    @staticmethod
    def ahead_of_a_limit(number: int) -> bool:
        """Returns whether a signal announces the time limit of a job, so that there is time to go on for a while."""
        return number in BEFORE_THE_LIMIT and slurm.in_job()

    def end(self, number: int) -> None:
        """Ends this process for a signal.

        Raises:
            Stopped: always.
        """
        self.ending = True
        raise Stopped(number)

    def __reduce__(self) -> str:
        """Pickles by name: submitit pickles what a job runs, and the job's process has signals of its own."""
        return "SIGNALS"


SIGNALS = Signals()
"""The signals of this process, as there is one set of handlers for each."""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Keeps the signals from processes that are started inside: SLURM sends them to each process of a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
