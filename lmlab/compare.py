"""The command `python -m lmlab.compare DIR_A DIR_B [DIR_C …]`, which says whether a difference between models is real.

Takes ordinary arguments. Each directory is a run or an evaluation, or holds several.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from lmlab.console import counted, show_rows
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, shown_plainly
from lmlab.evaluation import comparison, power
from lmlab.evaluation.metrics import DETECTION, OF_GENERATORS
from lmlab.evaluation.records import AT_MOST, Records
from lmlab.evaluation.sides import (
    Side,
    align,
    check_comparable,
    differing_choices,
    find_side,
    make_sides,
    read_evaluations,
    row_unit,
)
from lmlab.evaluation.suites.suite import SuiteRecords
from lmlab.io import from_here, write_out
from lmlab.reporting.text import interval_text, latex, p_text
from lmlab.runs.choices import as_typed

OF_COMPARISONS = ("pairs.csv", "pairs.tex", "domains.csv", "domains.tex", "documents.csv", "power.csv")
"""The files that not every comparison writes."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.compare",
        description="Compare evaluations document by document: each with the first, or with another of them. "
        "Runs that differ only in their seed, and in where and how they ran, are taken together.",
    )
    p.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, an evaluation, or a directory of them"
    )
    p.add_argument(
        "--against", default="1", metavar="ROW", help="what the others are compared with, by its number or name (1)"
    )
    p.add_argument("--pairs", action="store_true", help="also compare all rows with each other, p corrected for that")
    p.add_argument(
        "--power", metavar="DIFFERENCE", help="how many documents and seeds would show such a difference: 0.5%% or 0.01"
    )
    p.add_argument("--documents", type=count, default=5, help="how many of those that differ most are shown (5)")
    p.add_argument("--out", type=Path, help="where the CSV and LaTeX files go (comparisons/DATE/TIME)")
    return p


def count(text: str) -> int:
    """Returns an argument that counts, or refuses it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number, 0 or more, not {text}")
    return int(text)


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        compare(parser().parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Prints the comparison, and writes it as CSV and LaTeX."""
    runs = read_evaluations(arguments.directories)
    check_comparable(runs)
    if runs[0].certificate.get("suite"):
        compare_suite(runs, arguments)
        return
    runs = align(runs)
    unit = row_unit(runs)
    sides = make_sides(runs)
    against = find_side(sides, arguments.against)
    reference = "the first row" if against == 0 else f"row {against + 1}"
    rows = comparison.compare_sides(sides, against)
    wanted = None if arguments.power is None else power.read_difference(arguments.power, sides[against])
    powers = power.power_rows(sides, against, wanted)
    domains = [
        {"domain": domain} | row
        for domain in runs[0].domains
        for row in comparison.compare_sides([side.of_domain(domain) for side in sides], against)
    ]
    pairs = comparison.compare_pairs(sides) if arguments.pairs else []
    documents = comparison.largest_differences(sides, arguments.documents, against)
    texts = {
        "comparison": [side_texts(row, unit) for row in rows],
        "pairs": [pair_texts(row, unit) for row in pairs],
        "documents": [document_texts(row, reference) for row in documents],
        "domains": [{"domain": row["domain"]} | side_texts(row, unit) for row in domains],
    }

    from pandas import DataFrame  # only here: what is refused need not wait for it

    files = {
        "comparison.csv": DataFrame(rows, dtype=object).to_csv(index=False),
        "comparison.tex": latex(DataFrame(texts["comparison"])),
        "documents.csv": DataFrame(documents, dtype=object).to_csv(index=False),
    }
    if wanted is not None:
        files["power.csv"] = DataFrame(powers, dtype=object).to_csv(index=False)
    if domains:
        files["domains.csv"] = DataFrame(domains, dtype=object).to_csv(index=False)
        files["domains.tex"] = latex(DataFrame(texts["domains"]))
    if pairs:
        files["pairs.csv"] = DataFrame(pairs, dtype=object).to_csv(index=False)
        files["pairs.tex"] = latex(DataFrame(texts["pairs"]), "llrrrr")
    out = write_tables(arguments, files)

    scored, of = int((runs[0].sums[1][:, 0] > 0).sum()), runs[0].certificate["totals"]["documents_scored"]
    whole = f" of {counted(of, 'document')}" if unit == "stretches" else ""
    show(f"Paired over {scored:,} {unit}{whole}", texts["comparison"])
    print("\n".join(notes(rows, runs, unit, reference)))
    show_power(powers, wanted, unit)
    if domains:
        show("By domain", texts["domains"], words=2)
    if pairs:
        show("All pairs", texts["pairs"], words=2)
        print("p (Holm) is corrected for the number of pairs (Holm 1979); p and the intervals are of each pair alone.")
    elif len(rows) > 2:
        print("Each p is of its row alone: of many, some are small by chance. Corrected for their number: --pairs")
    show_choices(sides)
    show(f"{unit.capitalize()} that differ most from {reference}", texts["documents"])
    print(f"Written to {from_here(out.resolve())}: {', '.join(files)}")


def compare_suite(runs: list[Records], arguments: argparse.Namespace) -> None:
    """Prints the comparison of evaluations by a suite, and writes it as CSV and LaTeX."""
    kind = runs[0]
    assert isinstance(kind, SuiteRecords)
    sides = make_sides(runs)
    against = find_side(sides, arguments.against)
    rows = comparison.compare_groups(sides, against)
    wanted = None if arguments.power is None else power.read_difference(arguments.power, sides[against])
    powers = power.power_rows(sides, against, wanted)
    pairs = comparison.compare_pairs(sides) if arguments.pairs else []
    texts = [score_texts(row, kind) for row in rows]
    pairs_texts = [pair_texts(row, kind.rows) for row in pairs]

    from pandas import DataFrame  # only here: what is refused need not wait for it

    files = {
        "comparison.csv": DataFrame(rows, dtype=object).drop(columns="decides").to_csv(index=False),
        "comparison.tex": latex(DataFrame(texts), "llrrrrr"),
    }
    if wanted is not None:
        files["power.csv"] = DataFrame(powers, dtype=object).to_csv(index=False)
    if pairs:
        files["pairs.csv"] = DataFrame(pairs, dtype=object).drop(columns="decides").to_csv(index=False)
        files["pairs.tex"] = latex(DataFrame(pairs_texts), "llrrrr")
    out = write_tables(arguments, files)
    show(f"{kind.measure.capitalize()} on {rows[0][kind.rows]:,} {kind.rows}", texts, words=2)
    several = any(row["runs"] > 1 for row in rows)
    reference = "the first row" if against == 0 else f"row {against + 1}"
    also = " and seeds" if several else ""
    print(f"A difference is from {reference} of its {kind.group}, and above 0 {kind.better}.")
    print(f"The interval holds what other {kind.rows}{also} would give; each p is of its row alone.")
    show_power(powers, wanted, kind.rows)
    tokenizers = {run.certificate["tokenizer_hash"] for run in runs}
    if "prefix" in kind.certificate.get("settings", {}) and len(tokenizers) > 1:
        print("The tokenizers differ: as many tokens of prefix and continuation are not the same text.")
    if pairs:
        show("All pairs of rows", pairs_texts, words=2)
    show_choices(sides)
    print(f"Written to {from_here(out.resolve())}: {', '.join(files)}")


def score_texts(row: dict[str, Any], kind: SuiteRecords) -> dict[str, str]:
    """Returns a row of the table of scores for a person, by its columns."""
    return {
        kind.group: row[kind.group],
        "": row["side"],
        "runs": str(row["runs"]),
        kind.rows: f"{row[kind.rows]:,}",
        kind.measure: value_text(row),
        **difference_texts(row, kind.rows),
    }


def value_text(row: dict[str, Any]) -> str:
    """Returns the value of a row with its deviation over seeds."""
    return f"{row['value']:.4f}" + ("" if row["deviation_of_seeds"] is None else f" ± {row['deviation_of_seeds']:.4f}")


def write_tables(arguments: argparse.Namespace, files: dict[str, str]) -> Path:
    """Writes the files of a comparison, in place of those of an earlier one, and returns their directory."""
    out: Path = arguments.out or Path(f"comparisons/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    write_out(out, files.items(), instead_of=OF_COMPARISONS)
    return out


def show_choices(sides: list[Side]) -> None:
    """Prints the keys in which the configs of the sides differ, if they do."""
    if keys := differing_choices(sides):
        by_row = ({f"row {i}": as_typed(value) for i, value in enumerate(values, 1)} for values in keys.values())
        show("Configs differ in", [{"key": key} | values for key, values in zip(keys, by_row, strict=True)])


def show(title: str, rows: list[dict[str, str]], words: int = 1) -> None:
    """Prints a table of texts by their columns, the first of which, so many, are of words."""
    show_rows(title, [*rows[0]] if rows else [], ([*row.values()] for row in rows), words)


def notes(rows: list[dict[str, Any]], runs: list[Records], unit: str, reference: str) -> list[str]:
    """Returns the lines that say how the table of sides is to be read, and where it misleads."""
    lines = []
    if unit == "stretches":
        lines += ["So few documents are cut into stretches, which end with paragraphs, and are taken for documents."]
    for number, row in enumerate(rows, 1):
        if not row["exact"]:
            lines.append(
                f"{AT_MOST}Row {number} is an upper bound: its model writes in any order, and the exact value "
                "may be lower."
            )
        if row["unknown_bytes"]:
            lines.append(
                f"{AT_MOST}Row {number} is an upper bound: its tokenizer has no token for {row['unknown_bytes']:,} of "
                f"{row['bytes']:,.0f} bytes, which are charged 8 bits each."
            )
    if not all(row["decides"] for row in rows if row["decides"] is not None):
        lines.append("A bound that is higher than an exact value does not say which of the two models is better.")
    if runs[0].certificate["figure"] == DETECTION:
        lines.append(OF_GENERATORS)
    ends = [row["ends"] for row in rows]
    if None not in ends and min(ends) < 0.9 * max(ends):
        lines.append(
            f"Row {ends.index(min(ends)) + 1} was scored on {min(ends):,} ends of documents, and row "
            f"{ends.index(max(ends)) + 1} on {max(ends):,}: the nll of the others is missing in their difference."
        )
    sizes = [row["bytes"] for row in rows]
    if min(sizes) < 0.9 * max(sizes):
        lines.append(
            f"Row {sizes.index(min(sizes)) + 1} was scored on {min(sizes):,.0f} bytes of the text, and row "
            f"{sizes.index(max(sizes)) + 1} on {max(sizes):,.0f}: their difference is also one of text."
        )
    uncounted = [str(run.path) for run in runs if run.certificate["format"] == 1]
    if uncounted and len({run.certificate["tokenizer_hash"] for run in runs}) > 1:
        lines.append(f"Unknown tokens were not counted yet in {', '.join(uncounted)}: evaluate again to charge them.")
    several = any(row["runs"] > 1 for row in rows)
    seeds = "and seeds would give." if several else "would give;\none run a side cannot say what another seed would."
    lines.append(f"A difference is from {reference}, and below 0 better. The interval holds what other {unit} {seeds}")
    return lines


def side_texts(row: dict[str, Any], unit: str) -> dict[str, str]:
    """Returns a row of the table of sides for a person, by its columns."""
    return {
        "": row["side"],
        "runs": str(row["runs"]),
        "bytes": f"{row['bytes']:,.0f}",
        row["figure"]: f"{AT_MOST if row['unknown_bytes'] or not row['exact'] else ''}{value_text(row)}",
        **difference_texts(row, unit),
    }


def pair_texts(row: dict[str, Any], unit: str) -> dict[str, str]:
    """Returns a row of the table of pairs for a person, by its columns."""
    holm = p_text(row["p_holm"]) if row["decides"] else "undecided"
    return {"": row["side"], "from": row["from_side"], **difference_texts(row, unit), "p (Holm)": holm}


def difference_texts(row: dict[str, Any], unit: str) -> dict[str, str]:
    """Returns the difference of two sides in a row for a person, by its columns."""
    if row["difference"] is None:
        return {"difference": "", "95 % interval": "", "p": ""}
    interval = interval_text(row["low"], row["high"]) or f"too few {unit}"
    p = p_text(row["p"]) if row["decides"] else "undecided"
    return {"difference": f"{row['difference']:+.4f}", "95 % interval": interval, "p": p}


def show_power(rows: list[dict[str, Any]], wanted: float | None, unit: str) -> None:
    """Prints the differences that a comparison could have shown, and what would show a wanted one, if there is one."""
    print(power_text(rows, unit))
    if wanted is not None:
        show(f"What would show a difference of {wanted:.4f}", [power_texts(row, unit) for row in rows])


def power_text(rows: list[dict[str, Any]], unit: str) -> str:
    """Returns the line on the differences that a comparison could have shown."""
    known = [row["shows"] for row in rows if row["shows"] > 0]  # nor nan, of a single document
    if not known:
        return f"What difference would be found is not known: {unit} are too few, or differ all alike."
    least, most = f"{min(known):.4f}", f"{max(known):.4f}"
    values = least if least == most else f"{least} to {most}"
    seeds = " and seeds" if any(row["error_of_seeds"] for row in rows) else ""
    return f"With these {unit}{seeds} a difference of {values} would be found 8 times in 10 (p < 0.05)."


def power_texts(row: dict[str, Any], unit: str) -> dict[str, str]:
    """Returns a row of the table of what would show a difference for a person, by its columns."""
    documents, runs = (f"{row[key]:,}" if row[key] else "no number" for key in ("documents", "runs_a_side"))
    if not row["error_of_documents"] > 0:
        documents = f"not known from these {unit}"
    if row["error_of_seeds"] is None:
        runs = "not known from one run a side"
    return {"": row["side"], f"{unit}, with these runs": documents, f"runs a side, with these {unit}": runs}


def document_texts(row: dict[str, Any], reference: str) -> dict[str, str]:
    """Returns a row of the table of documents for a person, by its columns."""
    own, other = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("bits_per_byte", "of_the_other"))
    return {
        "begins": row["begins"],
        "row": str(row["row"]),
        "bits more": f"{row['bits_more']:+,.1f}",
        "per byte": own,
        f"of {reference.removesuffix(' row')}": other,
        "bytes": f"{row['bytes']:,}",
    }


if __name__ == "__main__":
    main()
