"""From records to the texts in them (guide, `flatten`)."""

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lmlab.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py

RECORDS_AT_ONCE = 100
BYTES_AT_ONCE = 2**22  # Fewer records where each is long.
KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
VIEWS = {"replace_schema_metadata", "select", "slice"}  # What leaves a table in its file.


def encoded(text: str) -> bytes:
    """UTF-8, also of half of a surrogate pair, which JSON can hold."""
    return text.encode("utf-8", "surrogatepass")


def flatten(records: "Dataset", path: str) -> Iterator[list[str]]:
    """The texts of each record, by the dotted path of the text (guide, `flatten`).

    Works for a struct of lists (`answers: {text: [...]}`) and for a list of structs
    (`answers: [{text: ...}]`) alike.
    """
    # A column may have the whole path as its name: so `Dataset.flatten` calls them.
    top, *rest = [path] if path in records.column_names else path.split(".")
    if top not in records.column_names:
        raise no_such_text(records, path)
    records, mappings = mapped(records)
    column = records.select_columns([top])
    size = max(column.data.nbytes, 1)
    step = max(1, min(RECORDS_AT_ONCE, len(column.data) * BYTES_AT_ONCE // size))
    for start in range(0, len(column), step):
        for value in column[start : start + step][top]:
            try:
                yield list(texts_at(value, rest))
            except (KeyError, TypeError):
                raise no_such_text(records, path) from None
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def mapped(records: "Dataset") -> "tuple[Dataset, list[mmap.mmap]]":
    """The same records, and the mappings of their files, by which what was read can be let go.

    Else it would count as memory of this process: records are shuffled, so soon all of the file.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable, MemoryMappedTable

    rows = getattr(records.data, "blocks", [[records.data]])
    tables = [table for row in rows for table in row]
    in_files = all(isinstance(table, MemoryMappedTable) for table in tables)
    if not in_files or len(tables) > len(rows) or not all(step[0] in VIEWS for t in tables for step in t.replays):
        return records, []
    opened, mappings = [], []
    for table in tables:
        with open(table.path, "rb") as stream:
            mappings.append(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        view = pa.ipc.open_stream(pa.py_buffer(mappings[-1])).read_all()
        for name, arguments, options in table.replays:
            view = getattr(view, name)(*arguments, **options)
        opened.append(view)
    table = InMemoryTable(pa.concat_tables(opened))
    # A fingerprint of its own would be a hash of all the bytes.
    return Dataset(table, indices_table=records._indices, fingerprint=records._fingerprint), mappings


def in_file_order(records: "Dataset") -> "tuple[Dataset, np.ndarray | None]":
    """The same records as they follow one another in their file, and of each which of `records` it is.

    A split that was drawn at random would be read at random too, which takes a network disk hours.
    None where they come in that order already.
    """
    if records._indices is None:
        return records, None
    order = np.argsort(records._indices.column(0).to_numpy(), kind="stable")
    return records.select(order), order


def texts_at(value: Any, path: list[str]) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from texts_at(item, path)
    elif path:
        yield from texts_at(value[path[0]], path[1:])
    elif isinstance(value, str):
        yield value
    else:
        raise TypeError


def forms(value: Any, path: list[str]) -> Iterator[str]:
    """What is found where `texts_at` looks for texts, in words; nothing for what is missing or empty."""
    if isinstance(value, list):
        for item in value:
            yield from (f"{form} in a list" for form in forms(item, path))
    elif path and isinstance(value, dict):
        yield from forms(value.get(path[0]), path[1:])
    elif value is not None:
        yield KINDS[type(value)] + (" in place of an object" if path else "")


def no_such_text(records: "Dataset", path: str) -> UserError:
    found = sorted(set(text_paths("", records.features)))
    return UserError(
        f"data.text={path}: no text there.{nearest(path, found)} Texts are at: {', '.join(found) or 'nowhere'}."
    )


def text_paths(prefix: str, feature: Any) -> Iterator[str]:
    """The dotted paths of all strings in a data set's features."""
    if isinstance(feature, dict):
        for name, inner in feature.items():
            yield from text_paths(f"{prefix}.{name}" if prefix else name, inner)
    elif isinstance(feature, (list, tuple)):
        yield from text_paths(prefix, feature[0])
    elif hasattr(feature, "feature"):
        yield from text_paths(prefix, feature.feature)
    elif getattr(feature, "dtype", None) in ("string", "large_string"):
        yield prefix
