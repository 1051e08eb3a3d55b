"""Finds the YAML files that come with lmlab."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# Beside the package in a checkout, inside it when installed.
INSTALLED = (PACKAGE / "conf").is_dir()
CONF = PACKAGE / "conf" if INSTALLED else PACKAGE.parent / "conf"
"""The root configs and the options of their groups."""
SWEEPS = PACKAGE / "sweep_files" if INSTALLED else PACKAGE.parent / "sweeps"
"""The sweeps and the batch file."""


def files_of(group: str) -> list[str]:
    """Returns the options of a group that come with lmlab."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
