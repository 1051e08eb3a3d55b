"""The ledger of a run on the terminal: where its data went, and what gives reason to doubt a metric."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from lmlab.console import show_rows

if TYPE_CHECKING:
    from lmlab.data.blocks import Ledger

LOG = logging.getLogger(__name__)


def show_ledger(ledger: Mapping[str, "Ledger"]) -> None:
    """Prints a row for each count and a column for each split, and logs the warnings of all splits."""
    splits = [asdict(counts) for counts in ledger.values()]
    rows = (
        [name.replace("_", " "), *(count_text(counts[name]) for counts in splits)]
        for name in splits[0]
        if any(counts[name] is not None for counts in splits)
    )
    show_rows("Ledger", ["", *ledger], rows)
    log_doubts(ledger)


def count_text(count: float | None) -> str:
    """Returns a count of the ledger for a person; empty for None."""
    return "" if count is None else f"{count:,}" if isinstance(count, int) else f"{count:,.4f}"


def log_doubts(ledger: Mapping[str, "Ledger"]) -> None:
    """Logs a warning for whatever in the data of a split gives reason to doubt a metric."""
    for split, counts in ledger.items():
        for doubt in counts.doubts(split):
            LOG.warning("%s", doubt)
