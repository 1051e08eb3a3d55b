"""The formats of data files: how each is read, and what is wrong with one that can't be read."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from lmlab.data.options import BUILDERS
from lmlab.data.texts import columns_in, kinds_at, paths_in, split_path
from lmlab.errors import UserError, causes, first_line, reading
from lmlab.io import locked, write_beside

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
"""The errors of a gzip file that is damaged, or is no gzip file."""
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, StopIteration)
"""The errors of a file that is damaged, or is of another format than its suffix says."""
HEAD = 8000
"""The number of bytes by which a file is taken for text or not, as by git."""


def suffix_of(file: Path) -> str:
    """Returns the suffix that tells a file's format: `.txt` for `a.txt` and for `A.TXT.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def builder_for(files: list[Path]) -> str:
    """Returns the name of the `datasets` builder that reads files of this suffix."""
    for file in files:
        suffix = suffix_of(file)
        if suffix not in BUILDERS:
            raise UserError(
                f"{file}: files {f'that end in {suffix}' if suffix else 'without a suffix'} are not read. "
                f"Those that are: {', '.join(BUILDERS)} (also with .gz)."
            )
    suffixes = sorted({suffix_of(file) for file in files})
    builders = {BUILDERS[suffix] for suffix in suffixes}
    if len(builders) > 1:
        raise UserError(f"the data files end in {', '.join(suffixes)}. Name files of one kind.")
    return builders.pop()


def delimiter_of(files: list[Path], text: str, given: str | None) -> str:
    """Returns the delimiter of csv files: the given one, or the one by which each file has the column of the text."""
    if given is not None:
        character = given.replace("\\t", "\t")  # as it can be typed
        if len(character) != 1:
            raise UserError(f'data.delimiter is one character, such as ";" or "\\t", not "{given}".')
        return character
    first, *others = ((file, guess_delimiter(file, text)) for file in files)
    for file, delimiter in others:
        if delimiter != first[1]:
            raise UserError(
                f"the data files differ in their form: {DELIMITERS[first[1]]} divides the columns of {first[0]}, "
                f"{DELIMITERS[delimiter]} those of {file}.\n"
                "Name files of one form, or their delimiter by data.delimiter=…"
            )
    return first[1]


def guess_delimiter(file: Path, text: str) -> str:
    """Returns the delimiter by which the first line of a file has the column of the text, or else the most columns."""
    if suffix_of(file) == ".tsv":
        return "\t"
    head = read_head(file).decode("utf-8-sig", "replace")
    columns = {
        delimiter: next(filter(None, csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)), [])
        for delimiter in DELIMITERS
    }
    fit = [delimiter for delimiter, names in columns.items() if columns_in(text) & {*names}]
    return max(fit or columns, key=lambda delimiter: len(columns[delimiter]))


def open_file(file: Path) -> io.BufferedIOBase:
    """Opens a file for reading its bytes, decompressed."""
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def read_head(file: Path) -> bytes:
    """Reads the first bytes of a file, decompressed; none if it is a damaged gzip file."""
    with suppress(*DAMAGED), reading(file), open_file(file) as stream:
        return stream.read(HEAD)
    return b""


def check_encoding(file: Path) -> None:
    """Refuses a file whose first bytes show that it is not UTF-8, or not text."""
    head = read_head(file)
    even, odd = head[::2].count(0), head[1::2].count(0)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # first: one begins like a mark of UTF-16
        encoding = "utf-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif even + odd > max(1, len(head) / 20) and 0 in (even, odd):  # the upper halves of letters
        encoding = "utf-16be" if even else "utf-16le"
    elif 0 in head:
        raise UserError(
            f"{file}: not a text file: its byte {head.index(0)} is zero, which is no character. Leave it out."
        )
    else:
        return
    raise UserError(
        f"{file}: {encoding.upper()}, and not UTF-8.\nConvert it first, such as by iconv -f {encoding} -t utf-8."
    )


def unwrap_json(file: Path, text: str, folder: Path) -> Path:
    """Returns the path of a json file that `datasets` reads as records.

    For an object with one list of records in it, this is a copy of the list, written into a folder. Any other file is
    read as it is, also an object that has the text and is thus a record.
    """
    whole: dict[str, Any] = {}
    # `check_files` reports what is wrong with a file.
    with suppress(*DAMAGED, ValueError), reading(file):
        if read_head(file).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"{") and not has_json_lines(file):
            with open_file(file) as stream:
                whole = json.load(stream)
    if columns_in(text) & whole.keys():
        return file
    lists = [
        name
        for name, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if not lists:
        return file
    if len(lists) > 1:
        raise UserError(
            f"{file}: one object, with {len(lists)} lists of records: {', '.join(lists)}.\n"
            f"Make a file of one of them, such as by jq .{lists[0]}."
        )
    content = json.dumps(whole[lists[0]]).encode()
    copy = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(copy.with_suffix(".lock")):
        if not copy.exists():  # else `datasets` would take it for another
            write_beside(copy, partial(Path.write_bytes, data=content))
    return copy


def has_json_lines(file: Path) -> bool:
    """Returns whether each line of a json file is a record: by its suffix, or since the first of several is JSON."""
    if suffix_of(file) == ".jsonl":
        return True
    with suppress(ValueError), open_file(file) as stream:
        first = stream.readline()
        if any(map(bytes.strip, stream)):
            json.loads(first)
            return True
    return False


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


def json_records(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the values in a json file, each with the name of its position in the file.

    Args:
        path: the path that is read for the file, see `unwrap_json`.

    Raises:
        UserError: the file is malformed.
    """
    lines: Iterable[tuple[int, str]] = text_lines(path)
    if not has_json_lines(path):
        lines = [(1, "".join(line for _, line in lines))]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number + error.lineno - 1}: malformed JSON ({error.msg} at column {error.colno}).\n"
                "Fix that line, or leave the file out."
            ) from error
        if suffix_of(file) == ".jsonl" and not isinstance(value, dict):
            raise UserError(f"{file}, line {number}: not a JSON object, as each line of a .jsonl file is.")
        if isinstance(value, list):
            yield from ((f"{file}, record {place}", record) for place, record in enumerate(value, 1))
        else:
            yield f"{file}, line {number}", value


def check_files(files: Mapping[Path, Path], builder: str, text: str, options: dict[str, Any]) -> None:
    """Refuses files for the first fault in them: not UTF-8, malformed, damaged, or unlike another of them.

    Args:
        files: the path that is read for each file, see `unwrap_json`.
        options: the options of the builder.

    Raises:
        UserError: names the file and, if possible, the line.
    """
    import datasets

    schemas = {}
    for file, path in files.items():
        try:
            if builder == "json":
                check_kinds({file: path}, text)
            elif builder != "parquet":
                deque(text_lines(file), maxlen=0)
            # Any other fault shows when the file is read alone.
            alone = datasets.load_dataset(builder, data_files=glob.escape(str(path)), **options)
            schemas[file] = alone["train"].features.arrow_schema
        except DAMAGED as error:
            raise UserError(f"{file}: not a whole gzip file ({error}). Get it again, or leave it out.") from error
        except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
            *_, deepest = causes(error)
            why = "no record" if isinstance(deepest, StopIteration) else f"could not be read: {first_line(deepest)}"
            raise UserError(f"{file}: {why.rstrip('.!')}. Fix it, or leave it out.") from error
    check_columns(schemas, text)


def check_columns(schemas: Mapping[Path, Any], text: str) -> None:
    """Refuses files of which two differ in the type of a column, or one lacks it; that of the text is checked first."""
    (first, schema), *others = schemas.items()
    for file, other in others:
        names = dict.fromkeys([*schema.names, *other.names])
        for name in sorted(names, key=lambda name: name not in columns_in(text)):
            there, here = (str(each.field(name).type) if name in each.names else "missing" for each in (schema, other))
            if there != here:
                raise UserError(
                    f'the data files differ in the column "{name}": {shorten(there, 60)} in {first}, '
                    f"{shorten(here, 60)} in {file}.\nWrite all of them alike, or leave one of the files out."
                )


def check_kinds(files: Mapping[Path, Path], text: str) -> None:
    """Refuses json files in which two records have texts of different kinds, such as a number and a string."""
    kinds: dict[str, tuple[str, str]] = {}
    for file, path in files.items():
        for where, record in json_records(file, path):
            if not isinstance(record, dict):
                continue
            for field in paths_in(text):
                column, within = split_path(field, [*record])
                for kind in kinds_at(record.get(column), within):
                    kind_before, before = kinds.get(field, (kind, where))
                    if kind != kind_before:
                        value = shorten(json.dumps(record[column], ensure_ascii=False), 40, placeholder=" …")
                        raise UserError(
                            f"{where}: data.text={field} is {kind} ({value}), and {kind_before} in {before}.\n"
                            "Write all of them alike, or leave that record out."
                        )
                    kinds[field] = kind, where
