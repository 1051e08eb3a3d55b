"""Checks what the config of a directory names: the directory may come from elsewhere, and what it names is called.

A config that a command has just composed is the user's own, and so are the names on the command line and in the
files of its --config-dir.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from lmlab.config.changes import parse_override
from lmlab.errors import UserError
from lmlab.io import read_json

# What a block may name, out of these modules: a subclass of one of these classes, or a function that is annotated to
# return one.
OWN = {
    "data": (
        "lmlab.data.sources.Corpus | lmlab.data.prepared.Tokenized | lmlab.data.mixture.Mixture",
        ["lmlab.data.sources", "lmlab.data.pairs", "lmlab.data.shards", "lmlab.data.token_files", "lmlab.data.mixture"],
    ),
    "tokenizer": ("transformers.PreTrainedTokenizerBase", ["lmlab.data.tokenizers"]),
    "model": ("transformers.PreTrainedModel", ["lmlab.models.loading"]),
    "objective": ("builtins.object", ["lmlab.objectives"]),
    "distill": ("lmlab.models.teacher.Teacher", ["lmlab.models.teacher"]),
    "adapter": ("transformers.PreTrainedModel", ["lmlab.models.adapters"]),
    "optim": ("builtins.object", ["lmlab.optim"]),
    "trainer": ("lightning.Trainer", ["lightning.pytorch.trainer"]),
    "callbacks": ("lightning.Callback", ["lmlab.training", "lmlab.sweeps.pruning", "lightning.pytorch.callbacks"]),
    "logger": ("lightning.pytorch.loggers.Logger", ["lmlab.training.loggers"]),
}
SCHEDULE = "optim.schedule"  # a name of lmlab's, or an import path
NAMED = re.compile(r"\b(?:_target_|schedule)\b['\"]?\s*[:=]\s*['\"]?([\w.]+)")


def check_trusted(cfg: DictConfig, trusted: Collection[str]) -> None:
    """Refuses a config, read from a directory, that names what is neither lmlab's own for that block nor trusted.

    Args:
        trusted: dotted names of packages, of modules, or of what is in them.
    """
    for key, name in strings(OmegaConf.to_container(cfg)):
        if "${" in name:  # it could become anything
            raise UserError(f"the config of the run has an interpolation, which lmlab never keeps: {key}={name}.")
        if key != SCHEDULE and key.rpartition(".")[2] != "_target_":
            continue
        if not (is_own(key, name) or is_trusted(name, trusted)):
            package = name.partition(".")[0]
            package = name if package in trusted else package
            raise UserError(
                f"the config of the run names {key}={name}, which lmlab itself does not use there.\n"
                f"If you trust its code: add trust={package} (of predict and export: --trust {package}) to the command."
            )


def exported_module(folder: Path) -> dict[str, Any] | None:
    """Returns the block by which the torch module in an exported directory was made; None if it holds another model."""
    file = folder / "config.json"
    try:
        config = read_json(file) if file.is_file() else {}
    except UserError:  # as what loads the model will say
        return None
    module = config.get("module") if config.get("model_type") == "torch_module" else None
    return module if isinstance(module, dict) else None


def strings(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the strings in a config of plain values, with their dotted keys."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from strings(value, f"{key}.{name}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            yield from strings(value, key)
    elif isinstance(config, str):
        yield key, config


def is_own(key: str, name: str) -> bool:
    """Returns whether lmlab itself uses what a key names for that block."""
    if key == SCHEDULE:
        from lmlab.optim import SCHEDULES

        return name in SCHEDULES
    block = key.partition(".")[0]
    if block not in OWN or not name.startswith(("lmlab.", "lightning.")):  # else looking for it could run it
        return False
    kinds, modules = OWN[block]
    try:
        named, bases = _locate(name), tuple(map(_locate, kinds.split(" | ")))
    except (ImportError, AttributeError, ValueError):
        return True  # there is nothing to run, as the error of whatever needs it will say
    if not any(f"{getattr(named, '__module__', '')}.".startswith(f"{module}.") for module in modules):
        return False
    if inspect.isfunction(named) and object not in bases:
        named = inspect.signature(named).return_annotation
    return inspect.isclass(named) and issubclass(named, bases)


def is_trusted(name: str, trusted: Collection[str]) -> bool:
    """Returns whether a name is trusted, or lies in what is, and is not only imported there, as `mine.os.system` is."""
    if name in trusted:
        return True
    if not any(name.startswith(f"{package}.") for package in trusted):
        return False
    try:
        home = getattr(_locate(name), "__module__", "")
    except (ImportError, AttributeError, ValueError):
        return True  # there is nothing to run
    return any(f"{home}.".startswith(f"{package.partition('.')[0]}.") for package in trusted)


def named_by_command(words: Iterable[str], folder: Path | None = None) -> list[str]:
    """Returns what the words of a command, and the files of its --config-dir, name to be imported."""
    files = folder.rglob("*.yaml") if folder else ()
    texts = [*words, *(file.read_text(errors="replace") for file in files)]
    return [name for text in texts for name in NAMED.findall(text)]


def split(words: Sequence[str], folder: Path | None) -> tuple[list[str], list[str]]:
    """Splits the words of a command into what they, or the files of its --config-dir, trust, and the other words.

    Trusted is what `trust=…` says, and what is named to be imported.
    """
    others = [word for word in words if not word.startswith("trust=")]
    given = [name for word in words if word not in others for name in packages(parse_override(word).value())]
    return [*given, *named_by_command(others, folder)], others


def packages(value: Any) -> list[str]:
    """Returns the names in the value of `trust`, which is one or a list."""
    names = list(value) if isinstance(value, list | ListConfig) else [] if value is None else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"trust={value}: it is the name of a package, or a list of them, [a,b].")
    return names
