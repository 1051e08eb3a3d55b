"""What was chosen for a run: its config by dotted keys, without what says only where and how it ran."""

from collections.abc import Iterable
from typing import Any

from lmlab import errors

MACHINERY = (
    "run_dir",
    "cache_dir",
    "debug",
    "profile",
    "num_workers",
    "compile",
    "activation_checkpointing",
    "logits_chunk_size",
    "attention",
    "logger",
    "callbacks.progress",
    "callbacks.samples",
    "callbacks.pruning",
    "callbacks.checkpoints.every_steps",
    "callbacks.checkpoints.every_minutes",
    "callbacks.checkpoints.background",
    "callbacks.checkpoints.max_requeues",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
    "trainer.strategy",
)
"""Keys and blocks of a config that say where and how a run ran, not what was trained.

Runs that differ in them alone train the same model, up to rounding and the draws of dropout. They are compared as
runs of one thing, and a run that goes on may change them. The precision is none of them: it changes what is trained.
"""


RENAMED = errors.RENAMED | {
    "lmlab.training.optim.": "lmlab.optim.",
    "lmlab.training.pruning.": "lmlab.sweeps.pruning.",
}
"""Keys and targets of configs that lmlab 0.1 wrote, and their names since."""


def current(config: Any) -> Any:
    """A composed config with keys and targets under their present names, whichever version wrote it."""
    if isinstance(config, dict):
        return {RENAMED.get(key, key): current(value) for key, value in config.items()}
    if isinstance(config, list):
        return [current(value) for value in config]
    if isinstance(config, str):
        before = next((name for name in RENAMED if name.endswith(".") and config.startswith(name)), "")
        return RENAMED.get(before, "") + config.removeprefix(before)
    return config


def under(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of some, or lies in a block that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        name: value
        for key, inner in config.items()
        for name, value in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """What was chosen for a run, by dotted keys; a path inside its directory by what follows that."""
    directory, config = config["run_dir"], current(config)
    return {
        key: value.removeprefix(directory) if f"{value}/".startswith(f"{directory}/") else value
        for key, value in flat(config).items()
        if not under(key, MACHINERY)
    }


def said(value: Any) -> str:
    """A value of a config as a person would type it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
