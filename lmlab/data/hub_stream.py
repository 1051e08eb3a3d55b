"""Data sets of the hub that are read over the network in a stream: only the texts of their records are kept.

The libraries mend what goes wrong on the way. A request that is refused for now (429, 5xx), or whose answer breaks off,
is made again by huggingface_hub, after as long as the hub asks to wait (`Retry-After`), for the same range of bytes, so
that no record comes twice and none is lost (`http_backoff`, which `HfFileSystemFile` calls). It does so five times, and
`datasets` repeats that twenty times (`xopen`). What they ask of a repository before that is repeated here alone.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lmlab.data.compressed import read_long_windows
from lmlab.data.filters import check_filter, passing
from lmlab.data.texts import missing_text, paths_in, split_path
from lmlab.errors import UserError
from lmlab.hub import from_hub, retry
from lmlab.io import locked, replaced

if TYPE_CHECKING:
    import datasets  # see sources.py

ROWS = 1000
"""The number of records that are written at once."""
SLICE = re.compile(r"(?P<name>[\w.+-]+)(\[(?P<first>\d*):(?P<last>\d*)\])?")


def commit_of(path: str, revision: str | None) -> str:
    """Returns the commit that a branch or tag of a data set is at; a commit is one already, and asks for no network."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    with from_hub("data set", path, "data.path"):
        commit = retry(lambda: HfApi().dataset_info(path, revision=revision)).sha
    assert commit is not None
    return commit


def read_stream(
    path: str,
    name: str | None,
    commit: str,
    splits: Mapping[str, str],
    text: str,
    filter: Mapping[str, Any],
    folder: Path,
) -> "dict[str, datasets.Dataset]":
    """Returns the texts of the records that pass a filter, from a folder where they are kept once they have been read.

    Args:
        splits: the split, or the slice of one, of each part.
        folder: its name stands for all that it depends on.
    """
    import datasets

    def write(beside: Path) -> None:
        beside.mkdir()
        datasets.logging.set_verbosity(datasets.logging.ERROR)  # huggingface_hub says what is waited for
        read_long_windows()
        with from_hub("data set", path, "data.path"):
            for part, split in splits.items():
                base, first, last = sliced(split, part)
                given = retry(partial(datasets.load_dataset, path, name, split=base, revision=commit, streaming=True))
                given = given if given.column_names else given._resolve_features()
                check_filter(filter, given.column_names)
                columns = []
                for field in paths_in(text):
                    columns.append(split_path(field, given.column_names)[0])
                    if columns[-1] not in given.column_names:
                        raise missing_text(given, text, field)
                columns = list(dict.fromkeys(columns))
                given = given.select_columns([*dict.fromkeys([*columns, *filter])])
                given = given.skip(first) if first else given
                given = given if last is None else given.take(max(last - first, 0))
                write_records(beside / f"{part}.arrow", given, columns, filter)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            replaced(folder, write)
    return {part: datasets.Dataset.from_file(str(folder / f"{part}.arrow"), split=part) for part in splits}


def sliced(split: str, part: str) -> tuple[str, int, int | None]:
    """Returns the split that a slice such as `train[:5000]` is of, its first record and the one past its last."""
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(
            f"data.{part}={split} can't be read in a stream, whose length is not known before its end.\n"
            'Name a split, or records of it by numbers, such as "train[:5000]"; or set data.keep_raw=true.'
        )
    return match["name"], int(match["first"] or 0), int(match["last"]) if match["last"] else None


def write_records(path: Path, given: "datasets.IterableDataset", columns: list[str], filter: Mapping[str, Any]) -> None:
    """Writes columns of the records that pass a filter, as `datasets` keeps them."""
    import datasets

    features = datasets.Features({column: given.features[column] for column in columns})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as stream:
        for table in given.with_format("arrow").iter(batch_size=ROWS):
            passes = passing(filter, {column: table[column].to_pylist() for column in filter}, len(table))
            stream.write_table(table.select(columns).filter(pa.array(passes)).cast(features.arrow_schema))
