"""What Hydra finds wrong with a command line, in words."""

import sys
from collections.abc import Iterator
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lmlab.config.files import CONF, files_of
from lmlab.config.overrides import meant, unreadable
from lmlab.errors import first_line, nearest

LIMITS = (
    "a share of the batches would give a metric over an arbitrary part of the text.\n"
    "For cheaper validations: validation.max_documents=N. For a shorter run: trainer.max_steps=N."
)
"""What to say of the keys of Lightning's that leave batches out."""


NO_FOLDER = "--config-dir {}: there is no such folder."


def explain(error: Exception, name: str) -> str:
    """What Hydra found wrong, with the nearest right name."""
    if isinstance(error, OSError):
        return f"the run directory {error.filename} can't be made: {error.strerror}.\nChoose another: hydra.run.dir=DIR"
    override = getattr(error, "override", None)
    if override:
        return unreadable(override, error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}.\nTo run the command for each value add -m; a list is KEY=[a,b]."
    missing = getattr(error, "missing_cfg_file", None)
    if "hydra/launcher/submitit" in str(missing):
        return "submitting jobs to SLURM takes a plugin of Hydra's that is not installed:\npip install 'lmlab[slurm]'"
    if missing and "/" in str(missing):
        return no_option(str(missing), getattr(error, "options", None), name)
    if lines and lines[0].startswith("Additional config directory"):
        return NO_FOLDER.format(lines[0].split("'")[1])
    if lines and lines[0].startswith(("Could not override", "Key '")):
        # Of a mapping that was given as one, the key that is not in it.
        wrong, inner = lines[0].split("'")[1], str(getattr(error.__cause__, "full_key", ""))
        wrong = inner if inner.startswith(f"{wrong}.") else wrong
        if wrong.startswith("trainer.limit_"):
            return f"{wrong}: {LIMITS}"
        return f'there is no key "{wrong}".{chosen_otherwise(wrong, name) or nearest_key(wrong, name)}'
    if lines and lines[0].startswith("Error merging override") and error.__cause__:
        return f"{lines[0]}: {first_line(error.__cause__)}"
    return "\n".join(lines[:3]) or first_line(error.__cause__ or error)


def no_option(missing: str, options: list[str] | None, name: str) -> str:
    """What to say of an option that a group does not have, both in one path."""
    given = (word.lstrip("+").partition("=") for word in sys.argv[1:])
    group, option = next(
        ((key, value) for key, _, value in given if f"{key}/{value}" == missing),
        (missing.rpartition("/")[0], missing.rpartition("/")[2]),
    )
    options = options or files_of(group)
    said = f"{group}={option}: no such option.{nearest(option, options)} Options: {', '.join(sorted(options))}."
    if group == "optim":
        return f"{said}\nAnother optimizer is a class of yours, optim._target_=…: see lmlab/optim.py."
    hint = meant(group, option, "data.validation" if name == "evaluate" else "data.train")
    return f"{said}\n{hint}" if hint else said


def chosen_otherwise(key: str, verb: str) -> str | None:
    """Where a key is one of other options of a group that the command has: which, and how it is chosen."""
    group, *path = key.split(".")
    leaf = path.pop() if path else ""
    there = []
    for option in files_of(group) if group in groups_of(verb) else ():
        block: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
        for name in path:
            block = block.get(name) if isinstance(block, dict) else None
        if isinstance(block, dict) and {"_target_", leaf} <= block.keys():
            there.append(f"{group}={option}")
    if not there:
        return None
    value = next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"{key}=")), "")
    hint = meant(group, value, key) or "Choose that in the command."
    return f" It is one of {' and of '.join(there)}.\n{hint}"


def nearest_key(wrong: str, name: str) -> str:
    """The key of a config that is nearest to a wrong one, or how to see all."""
    return nearest(wrong, known_keys(name)) or f" For those there are: python -m lmlab.{name} --help"


def groups_of(name: str) -> set[str]:
    """The groups of which a command chooses options."""
    listed = OmegaConf.load(CONF / f"{name}.yaml").defaults
    return {group for entry in listed if isinstance(entry, DictConfig) for group in map(str, entry)}


def known_keys(name: str) -> set[str]:
    """Groups, and dotted keys of the config that the command line's group choices compose."""
    groups = groups_of(name)
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, chosen)
    return groups | set(dotted(cfg))


def dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys in a config."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from dotted(value, f"{prefix}{key}.")
