"""Reads and describes evaluations of all kinds: of held-out text, and of suites, which their certificates name."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmlab.evaluation import records
from lmlab.evaluation.records import Records
from lmlab.evaluation.suites import minimal_pairs
from lmlab.runs.directory import RunDirectory


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
    return minimal_pairs.read(path) if suite_in(path) == minimal_pairs.NAME else records.read(path)


def describe(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Returns texts on the metrics of a certificate and on what was scored, by titles."""
    suite = certificate.get("suite")
    return minimal_pairs.describe(certificate) if suite == minimal_pairs.NAME else records.describe(certificate)
