"""Stopping from outside: a signal becomes a wish, and the run ends where its state can be kept.

Under SLURM, the signal before a time limit also puts the job back in the queue.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lmlab import early
from lmlab.errors import Stopped

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# What SLURM and submitit send ahead of a time limit; TERM is for those who want the job to end.
BEFORE_THE_LIMIT = (signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """The signals that this process was sent."""

    def __init__(self) -> None:
        self.received = 0
        """The first of them, while `patient`."""
        self.patient = False
        """Whether somebody looks at `received`; if not, a signal ends the process at once."""
        self.ending = False
        self.process = 0
        """The process that heeds them: what it forks inherits the handlers."""
        self.ignored: set[signal.Signals] = set()
        """Those that were ignored when it began, by nohup or a shell's &, and stay so."""

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let signals end what is done inside, by `Stopped`."""
        alone = threading.current_thread() is threading.main_thread()  # only it may have handlers
        if not alone or self.process == os.getpid():  # or it is so already
            yield
            return
        before = {number: signal.getsignal(number) for number in HEEDED}
        if before[signal.SIGINT] is early.end:
            before[signal.SIGINT] = signal.default_int_handler
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
        """Install the handlers; again where a library has put its own over them."""
        if self.process != os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        for number in HEEDED:
            signal.signal(number, signal.SIG_IGN if number in self.ignored else self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. The same signal twice, or one while nobody looks, is not waited for."""
        if os.getpid() != self.process:
            return
        if self.ending and number != signal.SIGINT:  # whoever stops a job may say so often
            return
        # SLURM signals each process of a job, and a rank's parent passes on what it gets: that is one wish.
        once_more = number == self.received and (number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ)
        if (self.patient or self.ahead_of_a_limit(number)) and not once_more:
            self.received = self.received or number
            return
        self.end(number)

    def send_again(self, unraisable: Any) -> None:
        """A hook: what is raised in a finalizer, Python drops, and with it the signal."""
        if not isinstance(unraisable.exc_value, Stopped):
            sys.__unraisablehook__(unraisable)
            return
        self.ending = False
        threading.Timer(0.1, os.kill, (os.getpid(), unraisable.exc_value.signal)).start()

    @staticmethod
    def ahead_of_a_limit(number: int) -> bool:
        """Whether a signal leaves time: until training begins, to go on another time, or to finish what comes after."""
        return number in BEFORE_THE_LIMIT and "SLURM_JOB_ID" in os.environ

    def end(self, number: int) -> None:
        """End this process for a signal.

        Raises:
            Stopped: always.
        """
        self.ending = True
        raise Stopped(number)

    def __reduce__(self) -> str:
        """By its name: submitit pickles what a job runs, and the job's process has signals of its own."""
        return "SIGNALS"


SIGNALS = Signals()
"""Of this process: handlers are the process's own, and so is this."""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes begun inside never see the signals: SLURM sends them to each process of a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requeue(limit: int) -> str:
    """Put the SLURM job that this process belongs to back in the queue, `limit` times at most; says what came of it."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    times = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if times >= limit:
        return f"Job {job} is not re-queued: it was {times} times already (callbacks.checkpoints.max_requeues)."
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Job {job} could not be re-queued: {error}."
    if done.returncode:
        return f"Job {job} could not be re-queued: {done.stderr.strip()}"
    return f"Job {job} is re-queued."
