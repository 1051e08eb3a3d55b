"""Files that may be compressed by gzip or zstd, read as a stream."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lmlab.data.options import COMPRESSED
from lmlab.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError)
"""The errors of a compressed file that is damaged, or is not compressed."""
LONGEST_WINDOW = 31
"""The binary logarithm of the longest window of a zst file. Large dumps are written with it, by `zstd --long=31`, and
zstd does not read them unless it is told to: a file can make a reader take as many bytes of memory."""


def suffix_of(file: Path) -> str:
    """Returns the suffix that tells a file's format: `.txt` for `a.txt` and for `A.TXT.gz`."""
    return Path(file.stem if file.suffix in COMPRESSED else file.name).suffix.lower()


def open_file(file: Path) -> io.BufferedIOBase:
    """Opens a file for reading its bytes, decompressed."""
    if file.suffix == ".zst":
        return open_zst(file)
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def open_zst(file: Path | IO[bytes], mode: str = "rb") -> io.BufferedIOBase:
    """Opens a zst file, of which all frames are read: those that write with several threads make several."""
    options = {zstd.DecompressionParameter.window_log_max: LONGEST_WINDOW} if "r" in mode else None
    opened: io.BufferedIOBase = zstd.ZstdFile(file, mode, options=options)  # type: ignore[call-overload]
    return opened


def read_long_windows() -> None:
    """Lets `datasets`, which reads by fsspec, read each zst file that `open_zst` does."""
    from fsspec.compression import register_compression

    register_compression("zstd", open_zst, "zst", force=True)


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Turns what a damaged compressed file raises inside into a `UserError` that names it."""
    try:
        yield
    except DAMAGED as error:
        kind = "zst" if file.suffix == ".zst" else "gzip"
        raise UserError(f"{file}: not a whole {kind} file ({error}). Get it again, or leave it out.") from error


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file with their numbers, from 1.

    Raises:
        UserError: a line is not UTF-8.
    """
    with open_file(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line).\n"
                    "Convert it first, such as by iconv -f latin1 -t utf-8."
                ) from error
