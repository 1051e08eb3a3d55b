"""Numbers, values of a config and tables, as a report and a comparison write them for a person."""

import math
import numbers
from typing import TYPE_CHECKING, Any

from lmlab.runs.choices import as_typed

if TYPE_CHECKING:
    from pandas import DataFrame

SIGNS = {"±": r"$\pm$", "−": "$-$", "≤": r"$\le$"}
"""Signs that LaTeX does not know, and what it knows for them."""
FORMATS = {
    "perplexity": ",.2f",
    "per byte": ".4f",
    "difference": "+.4f",
    "FLOPs": ".3g",
    "per s": ",.0f",
    "time": ",.2f",
}
"""The format of a column's numbers that are not whole, by a part of its head; other columns have five digits."""


def latex(table: "DataFrame", layout: str | None = None) -> str:
    """Returns a table as a `tabular` for the booktabs package; its first column is of words if no other is."""
    texts = table.apply(lambda column: column.map(lambda value: " ".join(as_text(value, str(column.name)).split())))
    text = texts.to_latex(index=False, escape=True, column_format=layout or "l" + "r" * (table.shape[1] - 1))
    for sign, macro in SIGNS.items():
        text = text.replace(sign, macro)
    return text


def as_text(value: Any, head: str = "") -> str:
    """Returns a value of a table for a person, formatted by the head of its column; empty for None and NaN.

    A float of a million and more has three digits.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    value = int(value) if isinstance(value, numbers.Integral) else float(value)  # of Python, also where it is numpy's
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e12 else f"{value:.3g}"
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return format(value, next((form for part, form in FORMATS.items() if part in head), ",.5g"))


def number_text(value: Any) -> str:
    """Returns a value of a table over many orders of magnitude: very large and very small numbers as 1.23e9.

    >>> [number_text(value) for value in (3e10, 244_704, 12_345, 0.45, 0.00012, None)]
    ['3e10', '2.45e5', '12,345', '0.4500', '1.2e-4', '']
    """
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return as_text(value)
    value = float(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e3 else f"{value:#.4g}"


def p_text(p: float | None) -> str:
    """Returns a p value with four digits; of 10,000 replicates none may have gone as far, which is no p of 0."""
    return "" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def interval_text(low: float | None, high: float | None) -> str:
    """Returns the ends of the interval of a difference; the empty string if there is none."""
    return "" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def brief(value: Any, most: int = 40) -> str:
    """Returns a value of a config: four digits of a number, and long text without its middle."""
    return f"{value:.4g}" if isinstance(value, float) else shorten(" ".join(as_typed(value).split()), most)


def shorten(text: str, most: int) -> str:
    """Returns text without its middle, as either end may be what tells it from others."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def letter(number: int) -> str:
    """Returns the name of a kind of evaluation: A, B and so on."""
    return chr(65 + number) if number < 26 else f"E{number + 1}"
