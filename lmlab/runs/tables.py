"""Tables as files: CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from typing import Any

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same keys, with these on top, and all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else [])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def as_latex(columns: Sequence[str], rows: Sequence[Sequence[str]], layout: str | None = None) -> str:
    """A `tabular` for the booktabs package. Its `layout` is words to the left, then figures, if none is given."""
    lines = [" & ".join("".join(LATEX.get(sign, sign) for sign in cell) for cell in row) for row in [columns, *rows]]
    head, *body = (f"{line} \\\\" for line in lines)
    layout = layout or "l" + "r" * (len(columns) - 1)
    return "\n".join(
        [f"\\begin{{tabular}}{{{layout}}}", "\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}", ""]
    )
