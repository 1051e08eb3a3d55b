"""Reads and describes evaluations of all kinds: of held-out text, and of suites, which their certificates name."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmlab.evaluation import records
from lmlab.evaluation.records import Records
from lmlab.evaluation.suites import generation, harness, memorization, minimal_pairs
from lmlab.evaluation.suites.suite import read_suite
from lmlab.runs.directory import RunDirectory

SUITES: dict[str, tuple[Any, Any]] = {
    minimal_pairs.NAME: (minimal_pairs, minimal_pairs.PairRecords),
    memorization.NAME: (memorization, memorization.MemorizationRecords),
    generation.NAME: (generation, generation.GenerationRecords),
    harness.NAME: (harness, harness.TaskRecords),
}
"""The module of each suite by its name, with `figures_and_totals` and `describe`, and the class of its records."""


def suite_in(path: Path) -> str | None:
    """Returns the name of the suite whose certificate lies in a directory; None for one of held-out text, or none."""
    with suppress(OSError, ValueError):
        certificate = json.loads(RunDirectory(path).certificate.read_text("utf-8"))
        return certificate.get("suite") if isinstance(certificate, dict) else None
    return None


def read(path: Path) -> Records:
    """Reads the evaluation in a directory, of held-out text or of a suite, and adds it up again.

    Raises:
        UserError: there is none, it is of another version, damaged, or does not add up.
    """
    suite = suite_in(path)
    if suite not in SUITES:
        return records.read(path)
    module, kind = SUITES[suite]
    return read_suite(path, kind, module.figures_and_totals)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate and on what was scored, by titles."""
    module = SUITES[certificate["suite"]][0] if certificate.get("suite") in SUITES else records
    lines: dict[str, str] = module.describe(certificate)
    return lines
