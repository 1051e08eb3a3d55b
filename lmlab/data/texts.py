"""The texts in records (guide, `flatten`)."""

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from lmlab.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

Text = TypeVar("Text", bound=Sized)
RECORDS_AT_ONCE = 100
"""The number of records that are read at once, unless they are longer than `BYTES_AT_ONCE` together."""
BYTES_AT_ONCE = 2**22
KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
VIEWS = {"replace_schema_metadata", "select", "slice"}
"""The operations that `datasets` records for a table in a file and that copy none of it."""


def utf8(text: str) -> bytes:
    """Returns the UTF-8 bytes of a text; half of a surrogate pair, which JSON can hold, gives three."""
    return text.encode("utf-8", "surrogatepass")


def split_path(path: str, columns: list[str]) -> tuple[str, list[str]]:
    """Splits the dotted path of a text into its column and the path within.

    A column may have the whole path as its name: `Dataset.flatten` calls them so.
    """
    column, *within = [path] if path in columns else path.split(".")
    return column, within


@cache
def template(text: str) -> list[tuple[str, str | None]] | None:
    r"""Returns the pieces of a template, each a string and the dotted path of the field after it; None for a mere path.

    A template has its fields in braces, as `{title}\n\n{answers.text}`. `{{` and `}}` are braces, and a backslash
    before n or t is a line feed or a tab, as it can be typed in a shell.

    Raises:
        UserError: the braces do not match, or hold no path.
    """
    if not {"{", "}"} & {*text}:
        return None
    try:
        pieces = [*Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t"))]
    except ValueError as error:
        raise UserError(f"data.text={text}: {error}. Write a field as {{title}}, a brace as {{{{ or }}}}.") from None
    if any(path == "" or spec or conversion for _, path, spec, conversion in pieces):
        raise UserError(f"data.text={text}: between braces stands the path of a text, such as {{title}}.")
    if all(path is None for _, path, _, _ in pieces):
        raise UserError(f"data.text={text}: a template without a field. Name one in braces, such as {{title}}.")
    return [(string, path) for string, path, _, _ in pieces]


def paths_in(text: str) -> list[str]:
    """Returns the dotted paths that `data.text` names: those of a template, or the one that it is."""
    pieces = template(text)
    return [text] if pieces is None else [*dict.fromkeys(path for _, path in pieces if path is not None)]


def columns_in(text: str) -> set[str]:
    """Returns the names by which a record has the texts that `data.text` names: whole paths, and their first parts."""
    return {name for path in paths_in(text) for name in (path, path.split(".")[0])}


def flatten(records: "Dataset", text: str) -> Iterator[list[str]]:
    """Yields the list of texts of each record.

    A missing text gives none; an empty one is a text. A struct of lists and a list of structs give the same. A template
    gives one text, or none if one of its fields is missing:

        text              record                                        texts
        text              {"text": "x"}                                 ["x"]
        answers.text      {"answers": {"text": ["x", "", None]}}        ["x", ""]
        answers.text      {"answers": [{"text": "x"}, {"text": ""}]}    ["x", ""]
        {title}: {body}   {"title": "x", "body": "y"}                   ["x: y"]
        {title}: {body}   {"title": "x", "body": None}                  []

    Args:
        text: the dotted path of the text in a record, or a template.

    Raises:
        UserError: there is no text at a path, and names the paths of texts; or a field of a template is a list.
    """
    places = {}
    for path in paths_in(text):
        places[path] = split_path(path, records.column_names)
        if places[path][0] not in records.column_names:
            raise missing_text(records, text, path)
    records, mappings = map_files(records)
    values = records.select_columns([*dict.fromkeys(column for column, _ in places.values())])
    step = max(1, min(RECORDS_AT_ONCE, len(values.data) * BYTES_AT_ONCE // max(values.data.nbytes, 1)))
    for columns in columns_of(values, step):
        found = {}
        for path, (column, within) in places.items():
            try:
                found[path] = [list(texts_at(value, within)) for value in columns[column]]
            except (KeyError, TypeError):
                raise missing_text(records, text, path) from None
            if template(text) is not None:
                for value in columns[column]:
                    refuse_list(value, within, text, path)
        yield from found[text] if template(text) is None else joined(text, found)
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def columns_of(records: "Dataset", step: int) -> Iterator[Mapping[str, list[Any]]]:
    """Yields the values of each column of `step` records at a time.

    `datasets` reads the records of a selection one by one. Where it leaves out few of those in the file, all of them
    are read at once, and the chosen ones are taken.
    """
    from datasets import Dataset

    rows, whole = None, records
    if records._indices is not None:
        rows = records._indices.column(0).to_numpy()
        whole = Dataset(records.data, records.info, fingerprint=records._fingerprint)
    for start in range(0, len(records), step):
        chosen = None if rows is None else rows[start : start + step].astype(np.int64)
        if chosen is not None and (np.diff(chosen) > 0).all() and chosen[-1] - chosen[0] < 2 * len(chosen):
            columns = whole[int(chosen[0]) : int(chosen[-1]) + 1]
            taken = (chosen - chosen[0]).tolist()
            yield {name: [values[number] for number in taken] for name, values in columns.items()}
        else:
            yield records[start : start + step]


def joined(text: str, found: dict[str, list[list[str]]]) -> Iterator[list[str]]:
    """Yields the text of each record by a template: none where a field is missing.

    Args:
        found: the text of each field in each record, as a list of one or none.
    """
    pieces = template(text) or []
    for texts in zip(*found.values(), strict=True):
        if all(texts):
            values = {path: one for path, (one,) in zip(found, texts, strict=True)}
            yield ["".join(string + ("" if path is None else values[path]) for string, path in pieces)]
        else:
            yield []


def refuse_list(value: Any, within: list[str], text: str, path: str) -> None:
    """Refuses a field of a template that is a list in a record, as it does not say which of its texts is meant.

    Raises:
        UserError: names the field, and what can be done.
    """
    for name in [*within, None]:
        if isinstance(value, list):
            raise UserError(
                f"data.text={text}: {path} is a list in a record, and a template takes one text for each field.\n"
                f"Name it alone: data.text={path} makes each of its texts a document, preprocess.join joins them."
            )
        value = value.get(name) if isinstance(value, dict) and name is not None else None


def texts_at(value: Any, path: list[str]) -> Iterator[str]:
    """Yields the texts at a path below a value; raises a KeyError or TypeError where there is something else."""
    if isinstance(value, list):
        for item in value:
            yield from texts_at(item, path)
    elif path and value is not None:
        yield from texts_at(value[path[0]], path[1:])
    elif isinstance(value, str):
        yield value
    elif value is not None:
        raise TypeError


def kinds_at(value: Any, path: list[str]) -> Iterator[str]:
    """Yields the kinds of the values at a path, in words such as "a number in a list"; none for a null."""
    if isinstance(value, list):
        for item in value:
            yield from (f"{kind} in a list" for kind in kinds_at(item, path))
    elif path and isinstance(value, dict):
        yield from kinds_at(value.get(path[0]), path[1:])
    elif value is not None:
        yield KINDS[type(value)] + (" in place of an object" if path else "")


def missing_text(records: "Dataset", text: str, path: str) -> UserError:
    """Returns the error for a path of `data.text` that leads to no text."""
    found = sorted(set(text_paths("", records.features)))
    where = "there" if path == text else f"at {path}"
    return UserError(
        f"data.text={text}: no text {where}.{nearest(path, found)} Texts are at: {', '.join(found) or 'nowhere'}."
    )


def text_paths(prefix: str, feature: Any) -> Iterator[str]:
    """Yields the dotted paths of all strings in the features of a data set."""
    if isinstance(feature, dict):
        for name, inner in feature.items():
            yield from text_paths(f"{prefix}.{name}" if prefix else name, inner)
    elif isinstance(feature, (list, tuple)):
        yield from text_paths(prefix, feature[0])
    elif hasattr(feature, "feature"):
        yield from text_paths(prefix, feature.feature)
    elif getattr(feature, "dtype", None) in ("string", "large_string"):
        yield prefix


def batches(texts: Iterable[Text], count: int, length: int) -> Iterator[list[Text]]:
    """Yields texts in lists of `count`, or of fewer that are as long as `length` or longer together."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= count or size >= length:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_files(records: "Dataset") -> "tuple[Dataset, list[mmap.mmap]]":
    """Maps the files of a data set into memory again, by mappings whose pages can be released after reading.

    Otherwise they would count as memory of this process: records are shuffled, so that is soon all of the file.

    Returns:
        the same records, and their mappings; the given records and no mapping if not all of them lie in files.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable, MemoryMappedTable

    rows = getattr(records.data, "blocks", [[records.data]])
    tables = [table for row in rows for table in row]
    in_files = all(isinstance(table, MemoryMappedTable) for table in tables)
    if not in_files or len(tables) > len(rows) or not all(step[0] in VIEWS for t in tables for step in t.replays):
        return records, []
    views, mappings = [], []
    for table in tables:
        with open(table.path, "rb") as stream:
            mappings.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        view = pa.ipc.open_stream(pa.py_buffer(mappings[-1])).read_all()
        for name, arguments, options in table.replays:
            view = getattr(view, name)(*arguments, **options)
        views.append(view)
    # A fingerprint of its own would be a hash of all the bytes.
    table = InMemoryTable(pa.concat_tables(views))
    return Dataset(table, indices_table=records._indices, fingerprint=records._fingerprint), mappings


def sort_by_file(records: "Dataset") -> "tuple[Dataset, np.ndarray | None]":
    """Sorts records as they lie in their file: reading a drawn split at random takes a network disk hours.

    Returns:
        the sorted records, and [records] the index of each in `records`; None if they are sorted already.
    """
    if records._indices is None:
        return records, None
    rows = records._indices.column(0).to_numpy()
    if (rows[1:] >= rows[:-1]).all():
        return records, None
    order = np.argsort(rows, kind="stable")
    return records.select(order), order
