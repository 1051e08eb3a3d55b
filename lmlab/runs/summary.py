"""What a run says on the terminal: the ledger before it, a short table after it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG = logging.getLogger(__name__)


def show_ledger(ledger: Mapping[str, Any]) -> None:
    """Print a row per count and a column per split, and what in them gives reason to doubt a metric."""
    counts = [asdict(of_split) for of_split in ledger.values()]
    names = {name: name.replace("_", " ") for name in counts[0]}
    rows = ([said, *(shown(of_split[name]) for of_split in counts)] for name, said in names.items())
    show_rows("Ledger", ["", *ledger], rows)
    warn_of(ledger)


def shown(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def warn_of(ledger: Mapping[str, Any]) -> None:
    """Say what in a `Ledger` of each split gives reason to doubt a metric."""
    for split, counts in ledger.items():
        for doubt in counts.doubts(split):
            LOG.warning("%s", doubt)


def show_result(rows: Mapping[str, str], title: str = "Result") -> None:
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))  # generated text may look like rich's markup
    console().print(table)


def show_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
    """Print a table: the first columns, so many, of words, the others of figures."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= words else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def console() -> Console:
    # Off a terminal rich would fold at 80 columns, in the middle of paths.
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)
