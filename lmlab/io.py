"""Writes files and folders that are whole or not there (promise 6), and locks them."""

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lmlab.errors import UserError, first_line

PARTIAL = ".partial"
"""The suffix of a file or folder that is not whole yet. Inside an `--out` folder, the name of the folder that holds its
files until all of them are whole."""
UNLOCKABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
"""The errors of a file system without locks, such as Lustre where it is mounted without them."""


def write_json(path: Path, content: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object of a JSON file.

    Raises:
        UserError: the file holds none.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object.")
    return content


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file that has one a line, without a last line that a kill left unfinished."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    write_beside(path, lambda beside: beside.write_text(text))


def partial_of(path: Path) -> Path:
    """Returns the path beside `path` of a file or folder that is being written or removed."""
    return path.with_name(f".{path.name}{PARTIAL}")


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path`, flushes it, and renames it to `path`."""
    beside = partial_of(path)
    try:
        write(beside)
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a folder beside `path`, flushes it, and renames it to `path`, in place of one that is there."""
    beside, old = partial_of(path), path.with_name(f".{path.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
        readable = beside.stat().st_mode & 0o666  # as the umask has it; safetensors leaves its files to their owner
        for file in beside.rglob("*"):
            if file.is_file():
                file.chmod(readable)
                flush(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_once(path: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a folder, whole or not at all, unless it is there already; returns its path.

    Of several processes one writes and the others wait, here and not inside a collective.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir={path.parent} can't be made: {error.strerror}. Name another.") from error

    def fill(folder: Path) -> None:
        folder.mkdir()
        write(folder)

    with locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            replaced(path, fill)
    return path


def write_out(folder: Path, files: Iterable[tuple[str, str | bytes]], instead_of: Iterable[str] = ()) -> None:
    """Writes the files of a command's `--out` folder: all of them or, where one can't be written, none.

    Other files in the folder stay.

    Args:
        files: names and contents; what is written first is renamed first.
        instead_of: names of earlier files, which are removed once all the new ones are written.

    Raises:
        UserError: there is no room, or no permission.
    """
    partial = folder / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with empty_folders_removed(folder):
            partial.mkdir(parents=True)
            try:
                names = []
                for name, content in files:
                    (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
                    flush(partial / name)
                    names.append(name)
                for name in set(instead_of) - set(names):
                    (folder / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(partial / name, folder / name)
                flush(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.\nChoose another by --out DIR.") from error


def flush(path: Path) -> None:
    """Brings a file, or the renames in a folder, to the disk: until then a power cut may undo them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO, wait: bool = True) -> None:
    """Keeps other processes from an open file until it is closed, or this process ends, however that ends.

    POSIX locks hold over NFS too, and a forked worker does not inherit them.

    Raises:
        UserError: the file system has no locks.
        OSError: without `wait`, another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
        raise UserError(
            f"{Path(file.name).parent} lies on a file system without locks ({os.strerror(error.errno)}).\n"
            "Mount it with them (Lustre: -o flock), or choose another directory: hydra.run.dir=DIR, cache_dir=DIR."
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file inside the block, once no other process does."""
    with path.open("ab") as file:
        lock(file)
        yield


@contextmanager
def kept_locked(path: Path) -> Iterator[Path]:
    """Makes a lock file that other processes find `held` while this process is inside the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        lock(file)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def held(path: Path) -> bool:
    """Returns whether another process has a file locked. A process that asks it of its own file loses the lock."""
    if not path.is_file():
        return False
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of Linux
    with path.open("rb") as file:
        try:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            return False  # a file system without locks: nobody holds one
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def content(folder: Path) -> set[Path]:
    """Returns the paths of all that lies in a folder; none where there is no folder."""
    return {*folder.iterdir()} if folder.is_dir() else set()


def take_back(folder: Path, before: Collection[Path]) -> None:
    """Removes what was added to a folder since `before` was its content."""
    for path in content(folder).difference(before):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def empty_folders_removed(folder: Path) -> Iterator[None]:
    """Removes a folder, and those above it, if they are made inside and hold nothing at the end."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def from_here(path: Path) -> Path:
    """Returns a path as a person would type it: relative to the working directory, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
