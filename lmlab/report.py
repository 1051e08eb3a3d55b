"""The command `python -m lmlab.report DIR [DIR …]`, which writes what runs came to as a page with charts and tables.

Takes ordinary arguments. Each directory is a run, or holds several: a sweep, or all of them.
"""

import argparse
from datetime import datetime
from pathlib import Path

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, shown_plainly, stopped_with

EXAMPLES = """\
  python -m lmlab.report multirun/2026-01-31/12-00-00       a sweep, also one that is going on
  python -m lmlab.report outputs multirun                   everything so far
  python -m lmlab.report outputs/2026-01-31/* --out study   some runs, into a folder of your choice
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.report",
        description="Write a page about runs (report.html, which needs no network), each chart as SVG, PNG and CSV "
        "beside it, and the table of runs as CSV and LaTeX. Runs of different objectives are shown apart.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, or a folder with runs in it")
    p.add_argument("--out", type=Path, help="where the report goes (reports/DATE/TIME)")
    return p


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        report(parser().parse_args())


def report(arguments: argparse.Namespace) -> None:
    """Writes the report, and prints what it decides and where it is."""
    from lmlab.console import counted, show_rows
    from lmlab.evaluation.suites.suite import SuiteRecords
    from lmlab.io import from_here, write_out
    from lmlab.reporting.load import load_runs
    from lmlab.reporting.text import letter

    runs, evaluations, unread = load_runs(arguments.directories)

    from lmlab.reporting import page
    from lmlab.reporting.section import make_sections
    from lmlab.reporting.suites import suites_table

    of_suites = {name: records for name, records in evaluations.items() if isinstance(records, SuiteRecords)}
    others = {name: records for name, records in evaluations.items() if name not in of_suites}
    sections, suites = make_sections(runs, others, page.POINTS), suites_table(of_suites, runs)
    out = arguments.out or Path(f"reports/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    with stopped_with("Nothing of the report is kept."):
        write_out(out, page.report_files(sections, suites, unread), page.earlier_files(out))
    rows = []
    for section in sections:
        statuses = ", ".join(f"{count} {status}" for status, count in section.statuses.most_common())
        apart = [f"{letter(number)} is not compared with A: {why}" for number, why in enumerate(section.apart, 1)]
        rows.append([section.title, statuses, "\n".join([*section.verdict, *apart])])
    if rows:
        show_rows("Runs", ["objective", "status", "verdict"], rows, words=3)
    for name, table in suites.groupby("suite", sort=False):
        print(f"suite={name}: {counted(table['evaluation'].nunique(), 'evaluation')}, in suites.csv.")
    for line in unread:
        print(f"not read: {line}")
    print(f"Written to {from_here((out / 'report.html').resolve())}, with charts and tables beside it.")


if __name__ == "__main__":
    main()
