"""`python -m lmlab.compare DIR_A DIR_B [DIR_C …]`: is the difference real?

Takes ordinary arguments. Each directory is a run or an evaluation, or holds several.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, shown_plainly

DIFFERENCE = ["difference", "95 % interval", "p"]  # columns


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        prog="python -m lmlab.compare",
        description="Compare evaluations document by document: each with the first, or with another of them. "
        "Runs that differ only in their seed, and in where and how they ran, are taken together.",
    )
    p.add_argument("places", nargs="+", type=Path, metavar="DIR", help="a run, an evaluation, or a directory of them")
    p.add_argument(
        "--against", default="1", metavar="ROW", help="what the others are compared with, by its number or name (1)"
    )
    p.add_argument("--pairs", action="store_true", help="also compare all rows with each other, p corrected for that")
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
    from lmlab.console import show_rows
    from lmlab.evaluation import comparison
    from lmlab.evaluation.records import BOUND
    from lmlab.io import from_here, write_out
    from lmlab.runs.choices import as_typed
    from lmlab.runs.tables import as_csv, as_latex

    runs = comparison.evaluations(arguments.places)
    comparison.check_comparable(runs)
    runs = comparison.aligned(runs)
    paired = comparison.paired(runs)
    sides = comparison.sides_of(runs)
    against = comparison.row_of(sides, arguments.against)
    reference = "the first row" if against == 0 else f"row {against + 1}"
    rows = comparison.table(sides, against)
    pairs = comparison.pairs(sides) if arguments.pairs else []
    furthest = comparison.furthest(sides, arguments.documents, against)
    columns = ["", "runs", "bytes", rows[0]["figure"], *DIFFERENCE]
    of_pairs = ["", "from", *DIFFERENCE, "p (Holm)"]
    files = {
        "comparison.csv": as_csv(rows),
        "comparison.tex": as_latex(columns, [shown(row, paired) for row in rows]),
        "documents.csv": as_csv(furthest),
    }
    if pairs:
        files |= {
            "pairs.csv": as_csv(pairs),
            "pairs.tex": as_latex(of_pairs, [shown_pair(row, paired) for row in pairs], "llrrrr"),
        }
    place = arguments.out or Path("comparisons") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    write_out(place, files.items(), instead_of=("pairs.csv", "pairs.tex"))

    several = any(len(side.runs) > 1 for side in sides)
    totals = runs[0].certificate["totals"]
    scored = int((runs[0].sums[1][:, 0] > 0).sum())
    of = totals["documents_scored"]
    whole = f" of {of:,} document{'s' if of != 1 else ''}" if paired == "stretches" else ""
    show_rows(f"Paired over {scored:,} {paired}{whole}", columns, [shown(row, paired) for row in rows])
    if whole:
        print("So few documents are cut into stretches, which end with paragraphs, and these are taken for documents.")
    for number, row in enumerate(rows, 1):
        if row["unknown_bytes"]:
            print(
                f"{BOUND}Row {number} is an upper bound: its tokenizer has no token for {row['unknown_bytes']:,} of "
                f"{row['bytes']:,.0f} bytes, which are charged 8 bits each."
            )
    bytes_of = [row["bytes"] for row in rows]
    if min(bytes_of) < 0.9 * max(bytes_of):
        print(
            f"Row {bytes_of.index(min(bytes_of)) + 1} was scored on {min(bytes_of):,.0f} bytes of the text, and row "
            f"{bytes_of.index(max(bytes_of)) + 1} on {max(bytes_of):,.0f}: their difference is also one of text."
        )
    uncounted = [str(run.place) for run in runs if run.certificate["format"] == 1]
    if uncounted and len({run.certificate["tokenizer_hash"] for run in runs}) > 1:
        print(f"Unknown tokens were not counted yet in {', '.join(uncounted)}: evaluate again to have them charged.")
    print(f"A difference is from {reference}, and below 0 better. The interval holds what other {paired}", end=" ")
    print("and seeds would give." if several else "would give;\none run a side cannot say what another seed would.")
    if len(rows) > 2 and not pairs:
        print("Each p is of its row alone: of many, some are small by chance. Corrected for their number: --pairs")
    if pairs:
        show_rows("All pairs", of_pairs, [shown_pair(row, paired) for row in pairs], words=2)
        print("p (Holm) is corrected for the number of pairs (Holm 1979); p and the intervals are of each pair alone.")
    keys = comparison.differing(sides)
    if keys:
        sided = ["key", *(f"row {number}" for number in range(1, len(sides) + 1))]
        show_rows("Configs differ in", sided, ([key, *map(as_typed, found)] for key, found in keys.items()))
    headings = ["begins", "row", "bits more", "per byte", f"of {reference.removesuffix(' row')}", "bytes"]
    show_rows(f"{paired.capitalize()} that differ most from {reference}", headings, map(shown_document, furthest))
    print(f"Written to {from_here(place.resolve())}: {', '.join(files)}")


def shown(row: dict[str, Any], paired: str) -> list[str]:
    """A row of the comparison for people; `paired` is what its rows of records are."""
    from lmlab.evaluation.records import BOUND

    bound = BOUND if row["unknown_bytes"] else ""
    spread = f" ± {row['deviation_of_seeds']:.4f}" if row["deviation_of_seeds"] is not None else ""
    return [
        row["side"],
        str(row["runs"]),
        f"{row['bytes']:,.0f}",
        f"{bound}{row['value']:.4f}{spread}",
        *shown_difference(row, paired),
    ]


def shown_pair(row: dict[str, Any], paired: str) -> list[str]:
    """A row of the table of pairs for people."""
    from lmlab.evaluation.comparison import shown_p

    return [row["side"], row["from_side"], *shown_difference(row, paired), shown_p(row["p_holm"])]


def shown_difference(row: dict[str, Any], paired: str) -> list[str]:
    """The part of a row that says how two sides differ, for people."""
    from lmlab.evaluation.comparison import shown_p

    if row["difference"] is None:
        return ["", "", ""]
    interval = f"too few {paired}" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
    return [f"{row['difference']:+.4f}", interval, shown_p(row["p"])]


def shown_document(row: dict[str, Any]) -> list[str]:
    per_byte = ("" if value is None else f"{value:.4f}" for value in (row["bits_per_byte"], row["of_the_other"]))
    return [row["begins"], str(row["row"]), f"{row['bits_more']:+,.1f}", *per_byte, f"{row['bytes']:,}"]


if __name__ == "__main__":
    main()
