"""What a data file holds by its name and its first bytes, and what is wrong with one that can't be read."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock

from lmlab.data.options import BUILDERS
from lmlab.data.texts import forms
from lmlab.errors import UserError, causes, first_line, reading
from lmlab.io import write_beside

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
# What reading a file that is damaged, or of another kind than its name says, may raise.
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, StopIteration)
# What says of a file that it is no UTF-8. Longer marks first: one begins like a shorter one.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 8000  # bytes by which a file is known for text or none, as git does


def ending(file: Path) -> str:
    """`.txt` of `a.txt` and of `A.TXT.gz`."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def builder_for(files: list[Path]) -> str:
    """The reader for these files, by their ending."""
    endings = {ending(file) for file in files}
    unknown = endings - BUILDERS.keys()
    if unknown or len({BUILDERS[ending] for ending in endings}) > 1:
        raise UserError(
            f"data files end in {', '.join(sorted(endings - {''})) or 'nothing'}; "
            f"they must all be of one kind: {', '.join(BUILDERS)} (or these with .gz)."
        )
    return BUILDERS[endings.pop()]


def delimiter_of(files: list[Path], text: str, given: str | None) -> str:
    """What divides the columns of csv files: as `given`, else what gives each of them the column of the text."""
    if given is not None:
        character = given.replace("\\t", "\t")  # as it can be typed
        if len(character) != 1:
            raise UserError(f'data.delimiter is one character, such as ";" or "\\t", not "{given}".')
        return character
    found = {file: delimiter_in(file, text) for file in files}
    first = found[files[0]]
    for file, other in found.items():
        if other != first:
            raise UserError(
                f"the data files differ in their form: {DELIMITERS[first]} divides the columns of {files[0]}, "
                f"{DELIMITERS[other]} those of {file}.\nName files of one form, or their delimiter by data.delimiter=…"
            )
    return first


def delimiter_in(file: Path, text: str) -> str:
    """The delimiter by which the first line of a file has the column of the text, or the most columns."""
    if ending(file) == ".tsv":
        return "\t"
    head = head_of(file).decode("utf-8-sig", "replace")
    columns: dict[str, list[str]] = {}
    for delimiter in DELIMITERS:
        with suppress(csv.Error):
            rows = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
            columns[delimiter] = next(filter(None, rows), [])
    fit = [delimiter for delimiter, names in columns.items() if {text, text.split(".")[0]} & set(names)]
    return max(fit or columns, key=lambda delimiter: len(columns[delimiter]), default=",")


def check_is_text(file: Path) -> None:
    """Refuse a file that says of itself that it is no UTF-8, or no text."""
    head = head_of(file)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    zeros = [at for at, byte in enumerate(head) if not byte] if 0 in head else []
    # Without a mark it is known by the upper halves of letters.
    if encoding is None and len(zeros) > max(1, len(head) / 20) and len({at % 2 for at in zeros}) == 1:
        encoding = "utf-16le" if zeros[0] % 2 else "utf-16be"
    if encoding is not None:
        raise UserError(
            f"{file}: {encoding.upper()}, and not UTF-8.\nConvert it first, such as by iconv -f {encoding} -t utf-8."
        )
    if zeros:
        raise UserError(f"{file}: not a text file: its byte {zeros[0]} is zero, which is no character. Leave it out.")


def head_of(file: Path) -> bytes:
    """The first bytes of a file, unpacked; none where that can't be done."""
    with suppress(gzip.BadGzipFile, EOFError, zlib.error), reading(file), opened(file) as stream:
        return stream.read(HEAD)
    return b""


def opened(file: Path) -> io.BufferedIOBase:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def unwrapped(file: Path, text: str, folder: Path) -> Path:
    """A json file as it can be read: a copy of the one list of records in it, where it is an object with such a list.

    Any other file is itself; so is an object that has the text, and is a record.
    """
    whole = single_object(file)
    if whole is None or text in whole or text.split(".")[0] in whole:
        return file
    lists = {
        name: value
        for name, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if len(lists) > 1:
        raise UserError(
            f"{file}: one object, with {len(lists)} lists of records: {', '.join(lists)}.\n"
            f"Make a file of one of them, such as by jq .{next(iter(lists))}."
        )
    for records in lists.values():
        content = json.dumps(records).encode()
        copy = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not copy.exists():  # else `datasets` would take it for another
                write_beside(copy, partial(Path.write_bytes, data=content))
        return copy
    return file


def single_object(file: Path) -> dict[str, Any] | None:
    """What is in a json file that holds one object; None for one of another kind, such as an object a line."""
    # What is wrong with it, its reader says.
    with suppress(gzip.BadGzipFile, EOFError, zlib.error, ValueError), reading(file), opened(file) as stream:
        first = stream.readline()
        if not first.lstrip(codecs.BOM_UTF8 + b" \t").startswith(b"{"):
            return None
        rest = next(filter(bytes.strip, stream), b"")
        with suppress(ValueError):
            json.loads(first)
            if rest:
                return None
        return json.loads(first + rest + stream.read())
    return None


def fault(read: Mapping[Path, Path], builder: str, text: str, options: dict[str, Any]) -> str | None:
    """The first fault in files, in words: where one is no UTF-8, malformed or damaged, or unlike another.

    Args:
        read: of each file what was read, itself or what was made of it.
    """
    import datasets

    schemas = {}
    for file in read:
        number = 1
        try:
            if builder != "parquet":
                with opened(file) as stream:
                    for number, line in enumerate(stream, 1):
                        content = line.decode("utf-8").rstrip()
                        if ending(file) == ".jsonl" and content and not isinstance(json.loads(content), dict):
                            return f"{file}, line {number}: not a JSON object, as each line of a .jsonl file is."
                    if ending(file) == ".json":
                        number = 1
                        stream.seek(0)
                        json.loads(stream.read())
            mixture = mixed({file: read[file]}, text) if builder == "json" else None
            if mixture:
                return mixture
            # What is still wrong shows when the file is read alone.
            alone = datasets.load_dataset(builder, data_files=glob.escape(str(read[file])), **options)
            schemas[file] = alone["train"].features.arrow_schema
        except UnicodeDecodeError as error:
            return (
                f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line).\n"
                "Convert it first, such as by iconv -f latin1 -t utf-8."
            )
        except json.JSONDecodeError as error:
            return (
                f"{file}, line {number + error.lineno - 1}: malformed JSON ({error.msg} at column {error.colno}).\n"
                "Mend that line, or leave the file out."
            )
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            return f"{file}: not a whole gzip file ({error}). Get it again, or leave it out."
        except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
            return f"{file}: {reason([*causes(error)][-1])} Mend it, or leave it out."
    return unlike(schemas, text)


def unlike(schemas: Mapping[Path, Any], text: str) -> str | None:
    """Between which files a column differs in its type, in words; that of the text before any other."""
    (first, wanted), *others = schemas.items()
    for file, found in others:
        columns = [name for name in wanted.names if name in found.names]
        for name in sorted(columns, key=lambda name: name not in (text, text.split(".")[0])):
            here, there = (shorten(str(schema.field(name).type), 60) for schema in (found, wanted))
            if here != there:
                return (
                    f'the data files differ in the column "{name}": {there} in {first}, {here} in {file}.\n'
                    "Write all of them alike, or leave one of the files out."
                )
    return None


def mixed(read: Mapping[Path, Path], text: str) -> str | None:
    """Where json files have something else for the text than they had before, in words."""
    form = where = ""
    for file, path in read.items():
        for here, record in json_records(file, path):
            if not isinstance(record, dict):
                continue
            top, *rest = [text] if text in record else text.split(".")
            for other in forms(record.get(top), rest):
                if form and other != form:
                    found = shorten(json.dumps(record[top], ensure_ascii=False), 40, placeholder=" …")
                    return (
                        f"{here}: data.text={text} is {other} ({found}), and {form} in {where}.\n"
                        "Write all of them alike, or leave that record out."
                    )
                form, where = other, here
    return None


def json_records(file: Path, path: Path) -> Iterator[tuple[str, Any]]:
    """What a json file holds, each with where it is; `path` is what is read for it."""
    with opened(path) as stream:
        if ending(file) == ".json":
            with suppress(ValueError):
                whole = json.loads(stream.read())
                records = whole if isinstance(whole, list) else [whole]
                yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))
                return
            stream.seek(0)
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{file}, line {number}", json.loads(line)


def reason(error: BaseException) -> str:
    """Why files could not be read, in words."""
    import datasets

    if isinstance(error, datasets.table.CastError):
        here, there = (", ".join(sorted(names)) for names in (error.table_column_names, error.requested_column_names))
        return f"the data files differ in their columns: {here} in one, {there} in another. Name files of one form."
    return "no record." if isinstance(error, StopIteration) else f"could not be read: {first_line(error).rstrip('.!')}."
