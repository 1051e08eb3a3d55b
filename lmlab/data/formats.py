"""The formats of data files: how each is read, and what is wrong with one that can't be read."""

import codecs
import csv
import glob
import io
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from lmlab.data.compressed import DAMAGED, damage_named, open_file, suffix_of, text_lines
from lmlab.data.json_files import check_kinds
from lmlab.data.options import BUILDERS, COMPRESSED
from lmlab.data.texts import columns_in
from lmlab.errors import UserError, causes, first_line, reading

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
UNREADABLE = (ValueError, OSError, *DAMAGED, StopIteration)
"""The errors of a file that is damaged, or is of another format than its suffix says."""
HEAD = 8000
"""The number of bytes by which a file is taken for text or not, as by git."""


def builder_for(files: list[Path]) -> str:
    """Returns the name of the `datasets` builder that reads files of this suffix."""
    for file in files:
        suffix = suffix_of(file)
        if suffix not in BUILDERS:
            raise UserError(
                f"{file}: files {f'that end in {suffix}' if suffix else 'without a suffix'} are not read. "
                f"Those that are: {', '.join(BUILDERS)} (also with {' or '.join(COMPRESSED)})."
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


def read_head(file: Path) -> bytes:
    """Reads the first bytes of a file, decompressed; none if it is compressed and damaged."""
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
            with damage_named(file):
                if builder == "json":
                    check_kinds({file: path}, text)
                elif builder != "parquet":
                    deque(text_lines(file), maxlen=0)
            # Any other fault shows when the file is read alone.
            alone = datasets.load_dataset(builder, data_files=glob.escape(str(path)), **options)
            schemas[file] = alone["train"].features.arrow_schema
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
