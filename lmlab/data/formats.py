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
from lmlab.data.texts import kinds_at, split_path
from lmlab.errors import UserError, causes, first_line, reading
from lmlab.io import locked, write_beside

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
"""The errors of a gzip file that is damaged or none."""
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, StopIteration)
"""The errors of a file that is damaged, or of another kind than its name says."""
# The byte order marks of what is no UTF-8. Longer ones first: one begins like a shorter one.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 8000  # bytes by which a file is known for text or none, as git does


def suffix_of(file: Path) -> str:
    """Returns the suffix that tells a file's format: `.txt` for `a.txt` and for `A.TXT.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def builder_for(files: list[Path]) -> str:
    """Returns the builder of `datasets` that reads these files, by their suffix."""
    suffixes = {suffix_of(file) for file in files}
    builders = {BUILDERS.get(suffix) for suffix in suffixes}
    if None in builders or len(builders) > 1:
        raise UserError(
            f"data files end in {', '.join(sorted(suffixes - {''})) or 'nothing'}; "
            f"they must all be of one kind: {', '.join(BUILDERS)} (or these with .gz)."
        )
    return BUILDERS[suffixes.pop()]


def delimiter_of(files: list[Path], text: str, given: str | None) -> str:
    """Returns the delimiter of csv files: the given one, else that by which each file has the column of the text."""
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
    fit = [delimiter for delimiter, names in columns.items() if {text, text.split(".")[0]} & {*names}]
    return max(fit or columns, key=lambda delimiter: len(columns[delimiter]))


def open_file(file: Path) -> io.BufferedIOBase:
    """Opens a file for reading bytes, unpacked."""
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def read_head(file: Path) -> bytes:
    """Reads the first bytes of a file, unpacked; none where it is a damaged gzip file."""
    with suppress(*DAMAGED), reading(file), open_file(file) as stream:
        return stream.read(HEAD)
    return b""


def check_encoding(file: Path) -> None:
    """Refuses a file whose first bytes show that it is no UTF-8, or no text."""
    head = read_head(file)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    even, odd = head[::2].count(0), head[1::2].count(0)
    # Without a mark it is known by the upper halves of letters.
    if encoding is None and even + odd > max(1, len(head) / 20) and 0 in (even, odd):
        encoding = "utf-16be" if even else "utf-16le"
    if encoding is not None:
        raise UserError(
            f"{file}: {encoding.upper()}, and not UTF-8.\nConvert it first, such as by iconv -f {encoding} -t utf-8."
        )
    if 0 in head:
        raise UserError(
            f"{file}: not a text file: its byte {head.index(0)} is zero, which is no character. Leave it out."
        )


def unwrap_json(file: Path, text: str, folder: Path) -> Path:
    """Returns the path of a json file that `datasets` reads as records.

    Of an object with one list of records in it that is a copy of the list, written into a folder. Any other file can be
    read as it is, also an object that has the text and is thus a record.
    """
    whole = read_object(file)
    if whole is None or {text, text.split(".")[0]} & whole.keys():
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


def read_object(file: Path) -> dict[str, Any] | None:
    """Reads a json file that holds one object; None for any other, such as one with a record on each line."""
    # What is wrong with a file, `check_files` says.
    with suppress(*DAMAGED, ValueError), reading(file):
        if read_head(file).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"{") and not has_json_lines(file):
            with open_file(file) as stream:
                whole: dict[str, Any] = json.load(stream)
                return whole
    return None


def has_json_lines(file: Path) -> bool:
    """Returns whether each line of a json file is a record, by its suffix or by the first of several lines."""
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
        UserError: A line is not UTF-8.
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
    """Yields what a json file holds, each with where it is.

    Args:
        path: What is read for the file, see `unwrap_json`.

    Raises:
        UserError: It is malformed.
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
                "Mend that line, or leave the file out."
            ) from error
        if suffix_of(file) == ".jsonl" and not isinstance(value, dict):
            raise UserError(f"{file}, line {number}: not a JSON object, as each line of a .jsonl file is.")
        if isinstance(value, list):
            yield from ((f"{file}, record {place}", record) for place, record in enumerate(value, 1))
        else:
            yield f"{file}, line {number}", value


def check_files(files: Mapping[Path, Path], builder: str, text: str, options: dict[str, Any]) -> None:
    """Refuses files for the first fault in them: no UTF-8, malformed, damaged, or unlike another of them.

    Args:
        files: By the path of each file the one that is read for it, see `unwrap_json`.
        options: Those of the builder.

    Raises:
        UserError: Names the file, and where it can the line.
    """
    import datasets

    schemas = {}
    for file, path in files.items():
        try:
            if builder == "json":
                check_kinds({file: path}, text)
            elif builder != "parquet":
                deque(text_lines(file), maxlen=0)
            # What is still wrong shows when the file is read alone.
            alone = datasets.load_dataset(builder, data_files=glob.escape(str(path)), **options)
            schemas[file] = alone["train"].features.arrow_schema
        except DAMAGED as error:
            raise UserError(f"{file}: not a whole gzip file ({error}). Get it again, or leave it out.") from error
        except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
            *_, deepest = causes(error)
            why = "no record" if isinstance(deepest, StopIteration) else f"could not be read: {first_line(deepest)}"
            raise UserError(f"{file}: {why.rstrip('.!')}. Mend it, or leave it out.") from error
    check_columns(schemas, text)


def check_columns(schemas: Mapping[Path, Any], text: str) -> None:
    """Refuses files of which two have columns of other types, that of the text before any other, or other columns."""
    (first, schema), *others = schemas.items()
    for file, other in others:
        common = {*schema.names} & {*other.names}
        for name in sorted(common, key=lambda name: (name not in (text, text.split(".")[0]), schema.names.index(name))):
            here, there = (shorten(str(each.field(name).type), 60) for each in (other, schema))
            if here != there:
                raise UserError(
                    f'the data files differ in the column "{name}": {there} in {first}, {here} in {file}.\n'
                    "Write all of them alike, or leave one of the files out."
                )
        if {*schema.names} != {*other.names}:
            here, there = (", ".join(sorted(each.names)) for each in (other, schema))
            raise UserError(
                f"the data files differ in their columns: {there} in {first}, {here} in {file}.\n"
                "Name files of one form."
            )


def check_kinds(files: Mapping[Path, Path], text: str) -> None:
    """Refuses json files of which two records differ in what they have as the text, such as a number and a string."""
    kind_before, before = "", ""
    for file, path in files.items():
        for where, record in json_records(file, path):
            if not isinstance(record, dict):
                continue
            column, within = split_path(text, [*record])
            for kind in kinds_at(record.get(column), within):
                if kind_before not in ("", kind):
                    value = shorten(json.dumps(record[column], ensure_ascii=False), 40, placeholder=" …")
                    raise UserError(
                        f"{where}: data.text={text} is {kind} ({value}), and {kind_before} in {before}.\n"
                        "Write all of them alike, or leave that record out."
                    )
                kind_before, before = kind, where
