"""JSON files, whose records are a line each or in a list: read as a stream, so that a file may be of any size.

`datasets` reads lines in a stream and all else as a whole, which takes several times its size of memory. A list of
records, whether it is the file or the one list in its object, is therefore copied to lines, which it then reads.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

from lmlab.data.compressed import damage_named, open_file, suffix_of, text_lines
from lmlab.data.texts import columns_in, kinds_at, paths_in, split_path
from lmlab.errors import UserError, reading
from lmlab.io import locked, write_beside

CHUNK = 2**20
"""The number of characters that are read at once; more where a value is longer."""
CUT_OFF = 16
"""The number of characters before the end of what was read, within which a value may only seem to end or to be wrong,
since the rest of it is not read yet."""


class JSONStream:
    """A JSON text that is read value by value; of the text only the value at hand is in memory.

    Args:
        file: the path of the file, for messages.
        stream: the file, open for reading.
    """

    def __init__(self, file: Path, stream: TextIO):
        self.file, self.stream = file, stream
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0
        """The line of the first character of `text`, from 1, and the number of characters before it in that line."""

    def read_more(self) -> None:
        """Reads on, at least as much as is held: a long value is then looked at a few times, not often."""
        read = self.text[: self.at]
        self.line += read.count("\n")
        self.column = len(read) - read.rfind("\n") - 1 if "\n" in read else self.column + len(read)
        more = self.stream.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more

    def malformed(self, message: str, at: int) -> UserError:
        """Returns the error for what stands at a position of `text`."""
        before = self.text[:at]
        column = at - before.rfind("\n") if "\n" in before else self.column + at + 1
        return UserError(
            f"{self.file}, line {self.line + before.count(chr(10))}: malformed JSON ({message} at column {column}).\n"
            "Fix that line, or leave the file out."
        )

    def next_sign(self) -> str:
        """Returns the next character that is not white space, which is not taken; none at the end of the file."""
        while True:
            rest = self.text[self.at : self.at + 100].lstrip(" \t\r\n")
            if rest:
                self.at = self.text.index(rest[0], self.at)
                return rest[0]
            self.at = min(self.at + 100, len(self.text))
            if self.at == len(self.text):
                if self.ended:
                    return ""
                self.read_more()

    def take(self, sign: str) -> None:
        """Takes a character that has to come next."""
        if self.next_sign() != sign:
            raise self.malformed(f"Expecting '{sign}'", self.at)
        self.at += 1

    def value(self) -> tuple[Any, str]:
        """Takes the next value; returns it, and the text that it was read from."""
        self.next_sign()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end + CUT_OFF < len(self.text) or self.ended:  # else a number may go on, such as 1 by .5
                    start, self.at = self.at, end
                    return value, self.text[start:end]
            except JSONDecodeError as error:
                cut_off = error.pos + CUT_OFF >= len(self.text) or error.msg.startswith("Unterminated string")
                if self.ended or not cut_off:
                    raise self.malformed(error.msg, error.pos) from error
            self.read_more()

    def items(self) -> Iterator[tuple[Any, str]]:
        """Takes a list; yields its values and their texts."""
        self.take("[")
        if self.next_sign() != "]":
            yield self.value()
            while self.next_sign() == ",":
                self.take(",")
                yield self.value()
        self.take("]")

    def keys(self) -> Iterator[str]:
        """Takes an object; yields its keys, each before its value, which is to be taken then."""
        self.take("{")
        if self.next_sign() != "}":
            yield self.key()
            while self.next_sign() == ",":
                self.take(",")
                yield self.key()
        self.take("}")

    def key(self) -> str:
        """Takes a key and the colon after it."""
        if self.next_sign() != '"':
            raise self.malformed("Expecting property name enclosed in double quotes", self.at)
        key: str = self.value()[0]
        self.take(":")
        return key


@contextmanager
def json_stream(file: Path) -> Iterator[JSONStream]:
    """Opens a json file.

    Raises:
        UserError: it is damaged, or not UTF-8.
    """
    try:
        with reading(file), damage_named(file), open_file(file) as stream:
            yield JSONStream(file, io.TextIOWrapper(stream, "utf-8-sig"))  # type: ignore[type-var]
    except UnicodeDecodeError:
        for _ in text_lines(file):  # which names the line
            pass
        raise


def unwrap_json(file: Path, text: str, copy: Path) -> Path:
    """Returns the path of a json file that `datasets` reads as records, in a stream if there are many.

    For a list of records or texts, and for an object with one list of records in it, this is a copy with a record a
    line. Any other file is read as it is, also an object that has the text and is thus a record.

    Args:
        copy: the path of the copy, whose name stands for the content of the file.
    """
    if suffix_of(file) == ".jsonl":
        return file
    with json_stream(file) as source:
        key = None
        if source.next_sign() == "{":
            key = list_in_object(source, text)
        if key is None and source.next_sign() != "[":
            return file

    def write(path: Path) -> None:
        with json_stream(file) as source, path.open("w", encoding="utf-8") as lines:
            for value, text in source.items() if key is None else items_at(source, key):
                line = text.replace("\n", " ").replace("\r", " ")  # which no string of JSON holds unescaped
                lines.write(f"{line}\n" if isinstance(value, dict) else f'{{"text": {line}}}\n')
            if source.next_sign():
                raise source.malformed("Extra data", source.at)

    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(copy.with_suffix(".lock")):
        if not copy.exists():  # else `datasets` would take it for another
            write_beside(copy, write)
    return copy


def list_in_object(source: JSONStream, text: str) -> str | None:
    """Returns the key of the one list of records in an object; None if the object is a record itself."""
    keys, lists = set(), []
    for key in source.keys():  # noqa: SIM118
        keys.add(key)
        if source.next_sign() != "[":
            source.value()
        elif {isinstance(item, dict) for item, _ in source.items()} == {True}:
            lists.append(key)
    if source.next_sign() or columns_in(text) & keys or not lists:  # the first is of lines with an object each
        return None
    if len(lists) > 1:
        raise UserError(
            f"{source.file}: one object, with {len(lists)} lists of records: {', '.join(lists)}.\n"
            f"Make a file of one of them, such as by jq .{lists[0]}."
        )
    return lists[0]


def items_at(source: JSONStream, wanted: str) -> Iterator[tuple[Any, str]]:
    """Takes an object; yields the values of the list at a key, and their texts."""
    for key in source.keys():  # noqa: SIM118
        if key == wanted:
            yield from source.items()
        elif source.next_sign() == "[":
            for _ in source.items():
                pass
        else:
            source.value()


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
        except JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number + error.lineno - 1}: malformed JSON ({error.msg} at column {error.colno}).\n"
                "Fix that line, or leave the file out."
            ) from error
        if suffix_of(path) == ".jsonl" and not isinstance(value, dict):
            raise UserError(f"{file}, line {number}: not a JSON object, as each line of a .jsonl file is.")
        yield f"{file}, {'line' if path == file else 'record'} {number}", value


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
