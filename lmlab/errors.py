"""Errors that a person can cause, and how they are shown: in one to three lines, with exit code 1."""

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lmlab.early import NOTHING
from lmlab.secrets import redacted_command, redacted_text

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
"""The numbers of system errors whose cause is the path that was written to."""


class UserError(Exception):
    """An error that its reader can mend. The message says what to do next; `cause` is one word or two for a table."""

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
        """The sentence on what is kept of what was stopped; None once it was printed."""

    def __str__(self) -> str:
        return f"Stopped by {self.signal.name}. {self.kept or ''}".rstrip()


SOURCE_KEYS = re.compile(r"\bdata\.(?=(train|validation|text|document|delimiter|filter|path|name|revision|keep_raw)\b)")
"""The beginning of a key of a data set, in the message of an error."""
RENAMED = {"loss_rows": "logits_chunk_size"}
"""Keys of lmlab 0.1 that have another name since."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `' Did you mean "x"?'` for the closest of `names`, or the empty string where none is close.

    A key that was renamed is answered with its new name. A dotted name finds one with the same last part
    (`data.block_size` finds `preprocess.block_size`) or, if others share its block, the closest of these.
    """
    if name in RENAMED:
        return f' It is called "{RENAMED[name]}" now.'
    names = sorted(names)
    block, _, leaf = name.rpartition(".")
    # The right last part in a wrong place says more than any likeness of the whole.
    same_leaf = [known for known in names if known.rpartition(".")[2] == leaf]
    same_block = {known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == block}
    close = get_close_matches(name, same_leaf, n=1, cutoff=0)
    if not close and same_block:
        close = [same_block[known] for known in get_close_matches(leaf, same_block, n=1)]
    elif not close:
        close = get_close_matches(name, names, n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Refuses what takes packages that are not installed.

    Args:
        what: what takes them, for the message.
        extra: the extra of lmlab that brings them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names, verb = " and ".join(missing), "is" if len(missing) == 1 else "are"
        raise UserError(f"{what} takes {names}, which {verb} not installed:\npip install 'lmlab[{extra}]'")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text that is not empty, or the name of its type."""
    text = re.sub("\x1b\\[[0-9;]*m", "", str(error))  # torch prints in bold
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def root_cause(error: BaseException) -> str:
    """Returns the first line of the error that all those before this one came from, such as a refused connection."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return first_line(error)


def plainly(error: BaseException) -> str | None:
    """Returns the message of an error that a person can mend; None for a defect of lmlab."""
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
        existing = nearest_existing(path)
        # A path that exists can be forbidden to read; one that does not, to enter the folder above it.
        if not os.access(existing, os.R_OK if existing == Path(path).absolute() else os.X_OK):
            return cannot_read(path, error)
    return (
        f"cannot write{f' {path}' if path else ''}: {os.strerror(number)}.\n"
        f"{'Free some space, or choose' if disk_full(error) else 'Choose'} another path "
        "by hydra.run.dir=DIR, cache_dir=DIR or the variable HF_HOME."
    )


@contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Names the source of a mixture in the errors inside, which speak of `data.train` where it has a block of its own.

    Args:
        name: that of the source; "" for data that is no mixture.
    """
    try:
        yield
    except UserError as error:
        if not name:
            raise
        message = SOURCE_KEYS.sub(f"data.sources.{name}.", str(error))
        if message == str(error) and f"data.sources.{name}" not in message:
            message = f"data.sources.{name}: {message}"
        raise UserError(message, error.cause) from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an error of the file system inside into a `UserError`: a path that the config names can't be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # no fault of the file system, but gzip's of what it read
            raise
        raise UserError(cannot_read(path, error)) from error


def cannot_read(path: str | Path, error: OSError) -> str:
    """Returns the message for a path that exists, and that an error of the file system keeps from being read."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"cannot read {path}: {error.strerror}. Name another, or try again once it can be read."
    existing = nearest_existing(path)
    about = existing.stat()
    owner = f"user {about.st_uid}"
    with suppress(KeyError):
        owner = pwd.getpwuid(about.st_uid).pw_name
    whose = "Its permissions" if existing == Path(path).absolute() else f"The permissions of {existing}"
    return (
        f"cannot read {path}: {error.strerror}. {whose} are {stat.filemode(about.st_mode)}, the owner is {owner}.\n"
        "Have them changed (chmod), or name another."
    )


def nearest_existing(path: str | Path) -> Path:
    """Returns a path or, where it is missing or can't be looked at, the nearest folder above it that is neither."""
    for candidate in (Path(path).absolute(), *Path(path).absolute().parents):
        with suppress(OSError):
            candidate.stat()
            return candidate
    return Path("/")


def cause_of(error: BaseException) -> str:
    """Returns the cause of an error in one word or two, for a table of runs."""
    if isinstance(error, UserError):
        return error.cause
    return "out of memory" if out_of_memory(error) else "disk full" if disk_full(error) else "error"


def out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out, that of the device or that of the machine."""
    # torch's own class is a RuntimeError, and what its allocator for CPUs raises has no class of its own.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)) is not None
    )


def disk_full(error: BaseException | None) -> bool:
    """Returns whether an error came from a full disk, or a full quota."""
    return os_error(error) in (errno.ENOSPC, errno.EDQUOT)


def os_error(error: BaseException | None) -> int | None:
    """Returns the number of the system error that an error came from: torch, safetensors and shutil raise their own."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if any(sign in str(cause) for sign in (f"(os error {errno.ENOSPC})", f"[Errno {errno.ENOSPC}]")):
            return errno.ENOSPC
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, the one that it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are shown as any other."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        if options.get("nargs") == "*":  # without a default argparse says that it is required
            options.setdefault("default", [])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.\nFor all arguments: {self.prog} --help")


@contextmanager
def stopped_with(kept: str | None) -> Iterator[None]:
    """Sets the sentence on what is kept of what is begun inside, if a signal stops it."""
    try:
        yield
    except Stopped as stop:
        stop.kept = kept
        raise


@contextmanager
def shown_plainly(debug: bool = False) -> Iterator[None]:
    """Prints an error inside that a person can mend, without a traceback or a secret, and exits with code 1.

    Any other error is a defect of lmlab and keeps its traceback, as all do where `debug` is true.
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
