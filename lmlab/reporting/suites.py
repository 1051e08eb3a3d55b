"""The tables of a report on evaluations by suites: their metrics, by evaluation and group."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lmlab.evaluation.suites.suite import SuiteRecords
from lmlab.reporting.load import Run
from lmlab.reporting.names import name_evaluations

COLUMNS = ("suite", "data_hash", "evaluation", "group", "rows", "metric", "value")
OF_INTERVALS = ("_low", "_high", "_stderr")
"""The ends of the names of metrics that say how uncertain another one is."""


def suites_table(evaluations: Mapping[str, SuiteRecords], runs: Sequence[Run]) -> pd.DataFrame:
    """Returns a row for each metric of each evaluation by a suite, over all its records and for each group of them.

    Args:
        evaluations: by their names in the report.
        runs: of the report; an evaluation of one of them goes by its name.
    """
    names = name_evaluations(evaluations, runs)
    rows = [
        (records.suite, records.certificate["data_hash"], names[records.path], group, count, metric, value)
        for records in evaluations.values()
        for group, count, metrics in metrics_of(records)
        for metric, value in metrics.items()
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS])


def metrics_of(records: SuiteRecords) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yields name, number of rows and metrics of all records of an evaluation, and of each group of them."""
    certificate = records.certificate
    # lm-evaluation-harness names its metrics of a task "metric,filter of the answers", mostly "metric,none". It has
    # some of groups of tasks and of tasks without records too.
    groups, results = certificate.get(records.groups, {}), certificate.get("results", {})
    for group in ("all", *dict.fromkeys([*groups, *results])):
        part, own = certificate if group == "all" else groups.get(group), results.get(group, {})
        more = {name.removesuffix(",none"): value for name, value in own.items() if name != "sample_len"}
        if group == "all" and "mauve" in certificate:
            more["mauve"] = certificate["mauve"]["mauve"]
        found = {**(part["figures"] if part else {}), **more}
        metrics = {name: value for name, value in found.items() if type(value) in (int, float)}
        yield group, part["totals"][records.rows] if part else int(own["sample_len"]), metrics


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of one suite and one set of data as a person reads them.

    There is a row for each metric of a group, and a column for each evaluation.
    """
    some = table[~table["metric"].map(lambda name: name.partition(",")[0].endswith(OF_INTERVALS))]
    wide = some.pivot_table(index=["group", "rows", "metric"], columns="evaluation", values="value", sort=False)
    return wide.rename_axis(columns=None).reset_index()
