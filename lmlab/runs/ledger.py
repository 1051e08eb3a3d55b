"""The ledger of a run on the terminal, and its warnings."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lmlab.console import show_rows

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
