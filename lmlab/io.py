"""Files and folders that are whole or not there (promise 6)."""

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
"""In a folder that a command writes: where its files are until all of them are whole."""
UNLOCKABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
"""What a file system without locks says, such as Lustre where it is mounted without them."""


def write_json(place: Path, content: Any) -> None:
    write_text(place, json.dumps(content, indent=2) + "\n")


def read_json(place: Path) -> dict[str, Any]:
    """Raises a `UserError` for a file that is not what `write_json` writes."""
    try:
        content = json.loads(place.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{place} is damaged: it holds no object.")
    return content


def rows(place: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one a line; a line that a kill left unfinished is none."""
    if place.is_file():
        with place.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def write_text(place: Path, text: str) -> None:
    write_beside(place, lambda beside: beside.write_text(text))


def write_beside(place: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `place`, flush it, and put it in its place."""
    beside = place.with_name(f".{place.name}.partial")
    try:
        write(beside)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, place)
        flush_folder(place.parent)
    finally:
        beside.unlink(missing_ok=True)


def replaced(place: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder beside `place`, flush it, and put it in its place."""
    beside = place.with_name(f".{place.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        readable = beside.stat().st_mode & 0o666  # as the umask has it; safetensors leaves its files to their owner
        for file in beside.rglob("*"):
            if file.is_file():
                file.chmod(readable)
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        old = place.with_name(f".{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            os.replace(place, old)
        os.replace(beside, place)
        flush_folder(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_out(folder: Path, files: Iterable[tuple[str, str | bytes]], instead_of: Iterable[str] = ()) -> None:
    """Write the files of a command's `--out` folder: all of them or, where one can't be written, none.

    What else there is in the folder stays.

    Args:
        files: names and contents; what is written first takes its place first.
        instead_of: names of earlier ones, which go once all the new ones are written.

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
                    with (partial / name).open("wb") as stream:
                        stream.write(content.encode() if isinstance(content, str) else content)
                        os.fsync(stream.fileno())
                    names.append(name)
                for name in set(instead_of) - set(names):
                    (folder / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(partial / name, folder / name)
                flush_folder(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.\nChoose another by --out DIR.") from error


def flush_folder(folder: Path) -> None:
    """Bring a rename to the disk: until then a power cut may undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO, wait: bool = True) -> None:
    """Keep other processes from an open file until it is closed, or this process ends, however that ends.

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
def locked(place: Path) -> Iterator[None]:
    """Wait until no other process has a lock file, and have it."""
    with place.open("ab") as file:
        lock(file)
        yield


@contextmanager
def kept_locked(place: Path) -> Iterator[Path]:
    """A file that other processes find `held` as long as this one lives."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        lock(file)
        try:
            yield place
        finally:
            place.unlink(missing_ok=True)


def held(place: Path) -> bool:
    """Whether another process has a file locked. Not to be asked of one's own: to close it would free it."""
    if not place.is_file():
        return False
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of Linux
    with place.open("rb") as file:
        try:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            return False  # a file system without locks: nobody holds one
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def content(folder: Path) -> set[Path]:
    """What lies in a folder; nothing where there is none."""
    return {*folder.iterdir()} if folder.is_dir() else set()


def take_back(folder: Path, before: Collection[Path]) -> None:
    """Remove what has come to lie in a folder since `before` was its content."""
    for path in content(folder).difference(before):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def empty_folders_removed(folder: Path) -> Iterator[None]:
    """Remove a folder, and those above it, if they are made inside and hold nothing at the end."""
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def from_here(path: Path) -> Path:
    """A path as a person would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
