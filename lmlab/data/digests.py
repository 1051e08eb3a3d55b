"""Digests of files, and the memo that keeps them, so that the next start need not read the files.

A file is taken to be unchanged if its size, times and inode are, as git and ccache do. A program can set the time of
modification back, but not that of change (ctime). Both are as fine as the clock of the file system, so a file that
changed just now could change again unseen (git's "racily clean" entries): no memo is written of a file that was not at
rest. What remains undetected is a clock that was set back, that of a file server far behind ours, and a write to the
raw disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lmlab.errors import reading
from lmlab.io import write_text

AT_REST = 2.0
"""The number of seconds without a change after which a file is at rest; FAT's times, the coarsest, are 2 s apart."""


def digest(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    with reading(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests_of(files: Sequence[Path], memo: Path) -> list[str]:
    """Returns the SHA-256 of files, which are read only if one of them has changed since the memo was written."""
    versions = [file_version(file) for file in files]
    found = read_memo(memo, versions)
    if found is None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = list(threads.map(digest, files))
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_memo(memo, versions, found)
    return found


def file_version(file: Path) -> list[int]:
    """Returns the size, times and inode of a file, which change with its content."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def read_memo(memo: Path, versions: list[list[int]]) -> list[str] | None:
    """Returns the digests of files that were read without a fault, if the files have not changed since."""
    # A memo that is missing or damaged counts as none.
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(memo.read_text())
        digests: list[str] = content["digests"]
        if content["check"] == check_of(versions, digests):
            return digests
    return None


def write_memo(memo: Path, versions: list[list[int]], digests: list[str]) -> None:
    """Keeps the digests of files for the next start, if none of the files changed just before they were read."""
    last = max(max(modified, changed) for _, modified, changed, _ in versions)
    if time.time() - last / 1e9 >= AT_REST:
        with suppress(OSError):  # a memo only saves time
            write_text(memo, json.dumps({"digests": digests, "check": check_of(versions, digests)}))


def check_of(versions: list[list[int]], digests: list[str]) -> str:
    """Returns a hash of what a memo says, which shows damage to it."""
    return hashlib.sha256(json.dumps([versions, digests]).encode()).hexdigest()[:32]
