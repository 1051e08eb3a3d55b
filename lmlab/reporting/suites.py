"""The table of a report on minimal pairs: accuracy by evaluation and phenomenon."""

from collections.abc import Mapping, Sequence

import pandas as pd

from lmlab.evaluation.records import Records
from lmlab.reporting.load import Run
from lmlab.reporting.names import name_evaluations

COLUMNS = ("pairs_hash", "evaluation", "phenomenon", "pairs", "accuracy", "low", "high")


def accuracy_table(evaluations: Mapping[str, Records], runs: Sequence[Run]) -> pd.DataFrame:
    """Returns a row for each evaluation by minimal pairs and each phenomenon, and one for all pairs of each.

    Args:
        evaluations: by their names in the report.
        runs: of the report; an evaluation of one of them goes by its name.
    """
    names = name_evaluations(evaluations, runs)
    rows = [
        (
            records.certificate["data_hash"],
            names[records.path],
            phenomenon,
            part["totals"]["pairs"],
            *(part["figures"][name] for name in ("pairs_accuracy", "pairs_accuracy_low", "pairs_accuracy_high")),
        )
        for records in evaluations.values()
        for phenomenon, part in {"all": records.certificate, **records.certificate["phenomena"]}.items()
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS])


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of one set of pairs for a person: a row for each phenomenon, a column for each evaluation."""
    wide = table.pivot_table(index=["phenomenon", "pairs"], columns="evaluation", values="accuracy", sort=False)
    return wide.rename_axis(columns=None).reset_index()
