"""The records of a source that pass `data.filter`: those whose columns have a value, or one of several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmlab.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset  # see sources.py


def check_filter(filter: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuses a filter that names a column which the records do not have."""
    for column in filter:
        if column not in columns:
            raise UserError(
                f'data.filter names the column "{column}", which is not there.'
                f"{nearest(column, columns)} Columns: {', '.join(columns)}."
            )


def passing(filter: Mapping[str, Any], columns: Mapping[str, Iterable[Any]], count: int) -> np.ndarray:
    """Returns which records pass a filter: [count] bool.

    Args:
        filter: the value, or the list of values, of each named column.
        columns: the values that the records have in these columns.
    """
    passes = np.ones(count, bool)
    for column, value in filter.items():
        values = value if isinstance(value, list) else [value]
        passes &= [each in values for each in columns[column]]
    return passes


def filter_records(records: "Dataset", filter: Mapping[str, Any]) -> "Dataset":
    """Returns the records that pass a filter."""
    columns = {column: records[column] for column in filter}  # which are read as they are gone through
    return records.select(np.flatnonzero(passing(filter, columns, len(records)))) if filter else records
