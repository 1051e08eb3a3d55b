"""Runs in processes of their own that can be killed, begun from one that has done the imports already."""

import errno
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lmlab.distributed.signals import HEEDED

from .conftest import run_verb

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes", "tests.preload"])


def begin(verb: str, *arguments: object, out: Path, faults: dict[str, Any] | None = None) -> BaseProcess:
    """Start `python -m lmlab.<verb>` with arguments; what it prints goes to a file."""
    process = CONTEXT.Process(target=work, args=(verb, list(map(str, arguments)), out, faults or {}))
    process.start()
    return process


def heeding() -> None:
    """Let this process begin as a terminal would have it: the tests may run under nohup, or behind a shell's &."""
    for number in HEEDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def work(verb: str, arguments: list[str], out: Path, faults: dict[str, Any]) -> None:
    with out.open("ab") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    heeding()
    for name, fault in faults.items():
        FAULTS[fault[0]](name, *fault[1:])
    run_verb(verb, *arguments)


def finish(verb: str, *arguments: object, out: Path, faults: dict[str, Any] | None = None) -> int:
    """The same to its end; returns its exit code, negative for a signal."""
    process = begin(verb, *arguments, out=out, faults=faults)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """Until `what` says something true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return found


def patch(name: str, wrap: Callable[[Any], Any]) -> None:
    """Put `wrap(it)` in the place of what a dotted name says."""
    holder, _, leaf = name.rpartition(".")
    owner = resolve_name(holder)
    setattr(owner, leaf, functools.wraps(getattr(owner, leaf))(wrap(getattr(owner, leaf))))


def die(name: str, call: int, share: float | None = None) -> None:
    """Kill this process in the n-th call of a function: before it, or when it has written a share of a file."""
    calls = 0

    def wrap(function: Any) -> Any:
        def fatal(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if share is not None:
                    function(*args, **kwargs)
                    stream = args[1]
                    stream.flush()
                    stream.truncate(int(share * stream.tell()))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return fatal

    patch(name, wrap)


def full(name: str, calls: int) -> None:
    """Let a function find the disk full, but for its first calls."""
    there = 0

    def wrap(function: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal there
            there += 1
            if there > calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return fail

    patch(name, wrap)


def slow(name: str, seconds: float) -> None:
    """Let a function take so much longer."""

    def wrap(function: Any) -> Any:
        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return slowly

    patch(name, wrap)


def ignored(name: str) -> None:
    """Let a signal be ignored, as nohup has it."""
    signal.signal(signal.Signals[name], signal.SIG_IGN)


def interrupted(name: str) -> None:
    """Press Ctrl-C where a function is called."""

    def wrap(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return function(*args, **kwargs)

        return called

    patch(name, wrap)


FAULTS = {"die": die, "full": full, "slow": slow, "ignored": ignored, "interrupted": interrupted}
