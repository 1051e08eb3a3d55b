"""Processes that have ended, with all that they started, before the check that began them is through."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What a job or torchrun says of its ranks is not for these.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC_", "SLURM_PROC", "SLURM_STEP")


class Process(subprocess.Popen[bytes]):
    """A command in a session of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]):
        self.log = log
        with log.open("wb") as out:
            super().__init__(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True)

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit code and output; the code of SIGKILL, which it is sent then, where it takes too long."""
        try:
            self.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
        return self.wait(), self.log.read_text(errors="replace")


@contextmanager
def processes() -> Iterator[tuple[Path, Callable[..., Process]]]:
    """Yields a folder, and a function that starts a command with more variables; both are for the block alone."""
    begun: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="lmlab-doctor-", ignore_cleanup_errors=True) as folder:
        common = {key: value for key, value in os.environ.items() if not key.startswith(RANKS)}
        common = {"OMP_NUM_THREADS": "1"} | common | {"TMPDIR": folder}

        def start(command: list[str], **variables: str) -> Process:
            begun.append(Process(command, Path(folder, f"{len(begun)}.log"), common | variables))
            return begun[-1]

        try:
            yield Path(folder), start
        finally:
            for process in begun:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ended(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command, as of `Process.end`."""
    with processes() as (_, start):
        return start(command, **variables).end(seconds)


def calling(function: Callable[..., None], *arguments: str) -> list[str]:
    """The command that calls a function of a module."""
    name = function.__name__
    return [sys.executable, "-c", f"from {function.__module__} import {name}; {name}(*{arguments!r})"]


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "(it said nothing)"
