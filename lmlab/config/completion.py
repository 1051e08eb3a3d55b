"""Completes command lines in a shell: the script for its start file, and values of keys that Hydra only has by name."""

import os
import sys
from pathlib import Path

INSTALL = (["install=bash"], ["install=zsh"], ["install=fish"])


def answer(name: str) -> bool:
    """Prints the answer to what a shell asks of a command; returns False for what is Hydra's to answer."""
    if sys.argv[2:] in INSTALL:
        # Hydra's own scripts complete files and entry points, and no `python -m`; what they ask of it serves here too.
        print(Path(__file__).with_name(f"completion.{sys.argv[2].partition('=')[2]}").read_text(), end="")
        return True
    word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
    key, is_value, begun = word.partition("=")
    values = known_values(name, key.lstrip("+")) if is_value else ()
    if values:
        print("\n".join(f"{key}={value}" for value in values if value.startswith(begun)))
    return bool(values)


def known_values(name: str, key: str) -> list[str]:
    """Returns all values of a key of a command; none where there is no end of them."""
    from lmlab.config import schema, signatures, targets

    block, _, leaf = key.rpartition(".")
    declared = schema.DECLARED.get(block or name)
    parameter = signatures.parameters(declared).get(leaf) if declared else None
    return targets.choices(parameter.annotation) if parameter else []
