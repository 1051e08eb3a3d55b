"""Errors a person can cause, and how they are shown: one to three lines, exit code 1. Stops are shown in one."""

import argparse
import errno
import os
import pwd
import re
import signal
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lmlab.early import NOTHING
from lmlab.secrets import redacted_command, redacted_text

# What the file system says when the fault lies with the place written to.
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


class UserError(Exception):
    """A fault its reader can mend. The message says what to do next; `cause` is one word or two for a table."""

    def __init__(self, message: str, cause: str = "error"):
        super().__init__(message)
        self.cause = cause


class Stopped(SystemExit):
    """Ends the process for a signal, with exit code 128 + its number.

    It derives from SystemExit rather than Exception: submitit would take an Exception for the job's result, and a
    sweep would go on with its next job.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.kept: str | None = NOTHING
        """What to say of what was stopped; None where it is said."""

    def __str__(self) -> str:
        return f"Stopped by {self.signal.name}. {self.kept or ''}".rstrip()


RENAMED = {"loss_rows": "logits_chunk_size"}
"""Keys of lmlab 0.1 that have another name since."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`' Did you mean "x"?'` for the closest of `names`, or the empty string.

    A key that was renamed is answered with its new name.
    A dotted name is also compared by its last part: `data.block_size` finds
    `preprocess.block_size`.
    """
    if name in RENAMED:
        return f' It is called "{RENAMED[name]}" now.'
    names = sorted(names)
    by_leaf: dict[str, list[str]] = {}
    for known in names:
        by_leaf.setdefault(known.rpartition(".")[2], []).append(known)
    leaf = name.rpartition(".")[2]
    # The right last part in a wrong place says more than any likeness of the whole.
    close = get_close_matches(name, by_leaf.get(leaf, []), n=1, cutoff=0) or get_close_matches(name, names, n=1)
    if not close:
        close = [by_leaf[known][0] for known in get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return f' Did you mean "{close[0]}"?' if close else ""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, or its type's name."""
    text = re.sub("\x1b\\[[0-9;]*m", "", str(error))  # torch prints in bold
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def plainly(error: BaseException) -> str | None:
    """What to show for an error a person can mend; None for a defect of lmlab."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}\n"
            "Use less of it: smaller batches (trainer.accumulate_grad_batches=2 leaves the training the same), "
            "activation_checkpointing=true, logits_chunk_size=256, or trainer.precision=bf16-mixed."
        )
    number = error.errno if isinstance(error, OSError) else os_error(error) if disk_full(error) else None
    if number not in UNWRITABLE:
        return None
    path = getattr(error, "filename", None)
    if isinstance(error, OSError) and path and number in (errno.EACCES, errno.EPERM):
        there = nearest_there(path)
        # Of what is there, it is reading that can be forbidden; of what is not, the way to it.
        if not os.access(there, os.R_OK if there == Path(path).absolute() else os.X_OK):
            return cannot_read(path, error)
    return (
        f"cannot write{f' {path}' if path else ''}: {os.strerror(number)}.\n"
        f"{'Free some space, or choose' if disk_full(error) else 'Choose'} another path "
        "by hydra.run.dir=DIR, cache_dir=DIR or the variable HF_HOME."
    )


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn a fault of the file system into a `UserError`: what a config or a command names can't be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # no fault of the file system, but gzip's of what it read
            raise
        raise UserError(cannot_read(path, error)) from error


def cannot_read(path: str | Path, error: OSError) -> str:
    """What to show for a file or folder that is there, and that a fault of the file system keeps from being read."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"cannot read {path}: {error.strerror}. Name another, or try again once it can be read."
    there = nearest_there(path)
    about = there.stat()
    owner = f"user {about.st_uid}"
    with suppress(KeyError):
        owner = pwd.getpwuid(about.st_uid).pw_name
    whose = "Its permissions" if there == Path(path).absolute() else f"The permissions of {there}"
    return (
        f"cannot read {path}: {error.strerror}. {whose} are {stat.filemode(about.st_mode)}, the owner is {owner}.\n"
        "Have them changed (chmod), or name another."
    )


def nearest_there(path: str | Path) -> Path:
    """A path, or where it is missing or can't be looked at, the nearest folder above that is neither."""
    for there in (Path(path).absolute(), *Path(path).absolute().parents):
        with suppress(OSError):
            there.stat()
            return there
    return Path("/")


def cause_of(error: BaseException) -> str:
    """What ended a run, in one word or two."""
    if isinstance(error, UserError):
        return error.cause
    return "out of memory" if out_of_memory(error) else "disk full" if disk_full(error) else "error"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of the device, or of the machine."""
    # torch's own class is a RuntimeError, and what its allocator for CPUs raises has no class of its own.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)) is not None
    )


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a full quota, is what an error came from."""
    return os_error(error) in (errno.ENOSPC, errno.EDQUOT)


def os_error(error: BaseException | None) -> int | None:
    """The number of the system error that an error came from; torch and safetensors raise their own over it."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if f"(os error {errno.ENOSPC})" in str(cause):
            return errno.ENOSPC
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Arguments(argparse.ArgumentParser):
    """Shows what is wrong with ordinary arguments as any other error."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        if options.get("nargs") == "*":  # without a default argparse says that it is required
            options.setdefault("default", [])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.\nFor all arguments: {self.prog} --help")


@contextmanager
def stopped_with(kept: str | None) -> Iterator[None]:
    """Say this of what was begun inside, if it is stopped by a signal."""
    try:
        yield
    except Stopped as stop:
        stop.kept = kept
        raise


@contextmanager
def shown_plainly(debug: bool = False) -> Iterator[None]:
    """Print an error a person can mend without a traceback or a secret, and exit 1.

    Anything else is a defect of lmlab and keeps its traceback; `debug` keeps all.
    """
    redacted_command(sys.argv[1:])  # to know its secrets
    try:
        try:
            yield
        except SystemExit:  # as after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except Stopped as stop:
        if stop.kept is not None:
            print(stop, file=sys.stderr)
            stop.kept = None
        raise
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message = None if debug else plainly(error)
        if message is None:
            raise
        print(f"error: {redacted_text(message)}", file=sys.stderr)
        sys.exit(1)
