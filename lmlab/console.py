"""Prints tables, and quotes commands to be copied into a shell.

rich is imported where a table is printed, as commands are quoted before that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN = re.compile(r"[\w@%+=:,./…-]+", re.ASCII)
# What means something between double quotes; ! does where a person types.
SPECIAL = re.compile(r'["$`\\!\n]')


def command(*words: object) -> str:
    """Returns words as one command of a POSIX shell, quoted no more than it needs.

    >>> print(command("python", "-m", "lmlab.predict", "outputs/run", "What's it?"))
    python -m lmlab.predict outputs/run "What's it?"
    """
    return " ".join(map(quoted, map(str, words)))


def quoted(word: str) -> str:
    """Returns a word as a POSIX shell reads it."""
    if PLAIN.fullmatch(word):
        return word
    if "'" in word and not SPECIAL.search(word):
        return f'"{word}"'
    return "'" + word.replace("'", r"'\''") + "'"


def show_result(rows: Mapping[str, str], title: str = "Result") -> None:
    """Prints a table of names and values."""
    show_rows(title, ["", ""], rows.items(), words=2)


def show_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
    """Prints a table, without a header if all its columns have empty names.

    Args:
        words: the number of first columns that hold words; the others hold numbers, and are aligned right.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= words else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # generated text may look like rich's markup
    console().print(table)


def console() -> "Console":
    """Returns the console to print on: the terminal, or a file as wide as tables need."""
    from rich.console import Console

    # Off a terminal rich would fold at 80 columns, in the middle of paths.
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def counted(number: int, noun: str) -> str:
    """Returns a number of things in words, such as "1 run" or "1,200 runs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Returns a time for people, in the largest units that say enough.

    >>> [duration(seconds) for seconds in (0.0123, 42, 3000, 7200, 300_000)]
    ['12.3 ms', '42.0 s', '50 min', '2 h 00 min', '3 d 11 h']
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
