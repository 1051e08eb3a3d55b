"""`python -m lmlab.compare DIR_A DIR_B [DIR_C …]`: is the difference real?

Takes ordinary arguments. Each directory is a run or an evaluation, or holds several.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from lmlab.errors import Arguments, UserError, shown_plainly
from lmlab.runs.stopping import SIGNALS


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        prog="python -m lmlab.compare",
        description="Compare evaluations document by document: each with the first. "
        "Runs that differ in their seed only are taken together.",
    )
    p.add_argument("places", nargs="+", type=Path, metavar="DIR", help="a run, an evaluation, or a directory of them")
    p.add_argument("--documents", type=count, default=5, help="how many of those that differ most are shown (5)")
    p.add_argument("--out", type=Path, help="where the CSV and LaTeX files go (comparisons/DATE/TIME)")
    return p


def count(text: str) -> int:
    """An argument that counts."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number, 0 or more, not {text}")
    return int(text)


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        compare(parser().parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Print the comparison, and write it as CSV and LaTeX."""
    from lmlab.evaluation import comparing
    from lmlab.runs.files import from_here, write_text
    from lmlab.runs.summary import show_rows
    from lmlab.runs.tables import as_csv, as_latex

    runs = comparing.evaluations(arguments.places)
    comparing.check_comparable(runs)
    sides = comparing.sides_of(runs)
    rows = comparing.table(sides)
    furthest = comparing.furthest(sides, arguments.documents)
    columns = ["", "runs", "bytes", rows[0]["figure"], "difference", "95 % interval", "p"]
    place = arguments.out or Path("comparisons") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "comparison.csv", as_csv(rows))
        write_text(place / "documents.csv", as_csv(furthest))
        write_text(place / "comparison.tex", as_latex(columns, [shown(row) for row in rows]))
    except OSError as error:
        raise UserError(f"{place} can't be written: {error.strerror}.\nChoose another by --out DIR.") from error

    several = any(len(side.runs) > 1 for side in sides)
    documents = runs[0].certificate["totals"]["documents_scored"]
    show_rows(f"Paired over {documents:,} documents", columns, map(shown, rows))
    print("A difference is from the first row, and below 0 better. The interval holds what other documents", end=" ")
    print("and seeds would give." if several else "would give;\none run a side cannot say what another seed would.")
    keys = comparing.differing(sides)
    if keys:
        sided = ["key", *(f"row {number}" for number in range(1, len(sides) + 1))]
        show_rows("Configs differ in", sided, ([key, *map(str, found)] for key, found in keys.items()))
    headings = ["begins", "row", "bits more", "per byte", "of the first", "bytes"]
    show_rows("Documents that differ most from the first row", headings, map(shown_document, furthest))
    print(f"Written to {from_here(place.resolve())}: comparison.csv, comparison.tex, documents.csv")


def shown(row: dict[str, Any]) -> list[str]:
    """A row of the comparison for people."""
    spread = f" ± {row['deviation_of_seeds']:.4f}" if row["deviation_of_seeds"] is not None else ""
    cells = [row["side"], str(row["runs"]), f"{row['bytes']:,.0f}", f"{row['value']:.4f}{spread}"]
    if row["difference"] is None:
        return [*cells, "", "", ""]
    difference = f"{row['difference']:+.4f}"
    if row["p"] is None:
        return [*cells, difference, "too few documents", ""]
    # Of so many replicates none went as far.
    p = "< 0.0001" if row["p"] < 0.0001 else f"{row['p']:.4f}"
    return [*cells, difference, f"{row['low']:+.4f} to {row['high']:+.4f}", p]


def shown_document(row: dict[str, Any]) -> list[str]:
    per_byte = ("" if value is None else f"{value:.4f}" for value in (row["bits_per_byte"], row["of_the_first"]))
    return [row["begins"], str(row["row"]), f"{row['bits_more']:+,.1f}", *per_byte, f"{row['bytes']:,}"]


if __name__ == "__main__":
    main()
