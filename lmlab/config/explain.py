"""Explains in words what Hydra finds wrong with a command line."""

import sys
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lmlab.config.files import CONF, files_of
from lmlab.config.overrides import explain_override, suggest
from lmlab.errors import first_line, nearest
from lmlab.runs.choices import as_typed

LIMITS = (
    "a share of the batches would give a metric over an arbitrary part of the text.\n"
    "For cheaper validations: validation.max_documents=N. For a shorter run: trainer.max_steps=N."
)
"""The reason why Lightning's keys that leave batches out are refused."""
NO_FOLDER = "--config-dir {}: there is no such folder."


def explain(error: Exception, name: str) -> str:
    """Returns the message for an error of Hydra's, with the nearest right name.

    Args:
        name: of the root config, train or evaluate.
    """
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # a missing option is both
        path, why = error.filename, error.strerror
        return f"the run directory {path} can't be made: {why}.\nChoose another: hydra.run.dir=DIR"
    override = getattr(error, "override", None)
    if override:
        return explain_override(override, error)
    missing = str(getattr(error, "missing_cfg_file", None) or "")
    if "hydra/launcher/submitit" in missing:
        return "submitting jobs to SLURM takes a plugin of Hydra's that is not installed:\npip install 'lmlab[slurm]'"
    if "/" in missing:
        return no_option(missing, getattr(error, "options", None), name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    _, quoted, *_ = [*first.split("'"), ""]
    if first.startswith("Ambiguous value"):
        return f"{first}.\nTo run the command for each value add -m; a list is KEY=[a,b]."
    if first.startswith("Config group override"):
        return no_name(name) or first
    if first.startswith("Additional config directory"):
        return NO_FOLDER.format(quoted)
    if first.startswith(("Could not override", "Key '")):
        # Of a mapping that was given as one, the key that is not in it.
        inner = str(getattr(error.__cause__, "full_key", ""))
        return no_key(inner if inner.startswith(f"{quoted}.") else quoted, name)
    if first.startswith("Error merging override") and error.__cause__:
        return f"{first}: {first_line(error.__cause__)}"
    return "\n".join(lines[:3]) or first_line(error.__cause__ or error)


def no_key(key: str, name: str) -> str:
    """Returns the message for a key that a command does not have: where it has it otherwise, or the nearest one."""
    if key.startswith("trainer.limit_"):
        return f"{key}: {LIMITS}"
    hint, known = in_other_option(key, name), known_keys(name)
    block = [other for other in known if other.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = hint or nearest(key, known)
    if not hint and block and "." in key:
        names = sorted(other.rpartition(".")[2] for other in block if not other.endswith("._target_"))
        hint = f" Keys there: {', '.join(names) or 'none'}.\nOne that its target takes besides is added: +{key}=…"
    return f'there is no key "{key}".{hint or f" For those there are: python -m lmlab.{name} --help"}'


def no_option(missing: str, options: list[str] | None, name: str) -> str:
    """Returns the message for an option that a group does not have; `missing` is GROUP/OPTION."""
    given = (word.lstrip("+").partition("=") for word in sys.argv[1:])
    group, option = next(
        ((key, value) for key, _, value in given if f"{key}/{value}" == missing),
        (missing.rpartition("/")[0], missing.rpartition("/")[2]),
    )
    options = options or files_of(group)
    message = f"{group}={option}: no such option.{nearest(option, options)} Options: {', '.join(sorted(options))}."
    hint = suggest(group, option, "data.validation" if name == "evaluate" else "data.train") or ""
    if group == "optim":
        hint = "Another optimizer is a class of yours, optim._target_=…: see lmlab/optim/adamw.py."
    return f"{message}\n{hint}".rstrip()


def no_name(name: str) -> str | None:
    """Returns the message for a group that the command gives a number or null; None where there is no such group."""
    groups = groups_of(name)
    for word in sys.argv[1:]:
        group = word.partition("=")[0]
        if group not in groups:
            continue
        override = OverridesParser.create().parse_override(word)
        for value in override.sweep_iterator() if override.is_discrete_sweep() else [override.value()]:
            if value is None or isinstance(value, int | float):
                options = ", ".join(files_of(group))
                return f"{group}={as_typed(value)}: it has to be the name of an option. Options: {options}."
    return None


def in_other_option(key: str, name: str) -> str | None:
    """Returns which options of its group have a key, and how they are chosen; None where no option has it."""
    group, *path = key.split(".")
    leaf = path.pop() if path else ""
    having = []
    if not leaf and "suite" in groups_of(name):  # whose options have their keys at the top
        keys = {option: OmegaConf.load(CONF / "suite" / f"{option}.yaml").keys() for option in files_of("suite")}
        having = [f"suite={option}" for option in keys if key in keys[option]]
    for option in files_of(group) if group in groups_of(name) else ():
        block: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
        for part in path:
            block = block.get(part) if isinstance(block, dict) else None
        if isinstance(block, dict) and {"_target_", leaf} <= block.keys():
            having.append(f"{group}={option}")
    if not having:
        return None
    value = next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"{key}=")), "")
    hint = suggest(group, value, key) or "Choose that in the command."
    return f" It is one of {' and of '.join(having)}.\n{hint}"


def groups_of(name: str) -> set[str]:
    """Returns the groups of which a command chooses options."""
    groups: set[str] = set()
    for entry in OmegaConf.load(CONF / f"{name}.yaml").defaults:
        if isinstance(entry, DictConfig):
            groups |= set(map(str, entry))
        elif entry != "_self_":  # another root config
            groups |= groups_of(entry)
    return groups


def known_keys(name: str) -> set[str]:
    """Returns the groups, and the dotted keys of the config that the group choices of the command line compose."""
    groups = groups_of(name)
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, chosen)
    return groups | set(dotted(cfg))


def dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all keys in a config."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from dotted(value, f"{prefix}{key}.")
