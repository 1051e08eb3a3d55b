"""Child processes that have ended, with everything they started, before the block that started them is left."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Variables by which a job or torchrun tells its ranks apart. They do not apply to the children.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC_", "SLURM_PROC", "SLURM_STEP")


class Process(subprocess.Popen[bytes]):
    """A command in a session of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]):
        self.log = log
        with log.open("wb") as out:
            super().__init__(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True)

    def end(self, seconds: float | None = None) -> tuple[int, str]:
        """Waits for the end, and kills the process after so many seconds; returns the exit code and the output."""
        try:
            self.wait(seconds if seconds is None else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
        return self.wait(), self.log.read_text(errors="replace")


@contextmanager
def processes(threads: int | None = None) -> Iterator[tuple[Path, Callable[..., Process]]]:
    """Yields a temporary folder and a function that starts a command; neither outlives the block.

    Keyword arguments of the function are added to the environment of the command.

    Args:
        threads: OMP_NUM_THREADS of the children, where the environment does not set it.
    """
    started: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="lmlab-", ignore_cleanup_errors=True) as folder:
        env = {key: value for key, value in os.environ.items() if not key.startswith(RANKS)} | {"TMPDIR": folder}
        if threads:
            env.setdefault("OMP_NUM_THREADS", str(threads))

        def start(command: list[str], **variables: str) -> Process:
            started.append(Process(command, Path(folder, f"{len(started)}.log"), env | variables))
            return started[-1]

        try:
            yield Path(folder), start
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Runs a command for so many seconds at most; returns what `Process.end` does."""
    with processes(threads=1) as (_, start):
        return start(command, **variables).end(seconds)


def python_call(function: Callable[..., None], *arguments: str) -> list[str]:
    """Returns the command that calls a function of a module in a Python of its own."""
    name = function.__name__
    return [sys.executable, "-c", f"from {function.__module__} import {name}; {name}(*{arguments!r})"]


def printed_error(output: str) -> str | None:
    """Returns the error that a command of lmlab printed for its user, or None if its output has none."""
    found = re.search(r"^error: (.+)", output, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else None


def last_line(output: str) -> str:
    """Returns the last line of what a command printed."""
    return (output.strip().splitlines() or ["(it printed nothing)"])[-1].strip()
