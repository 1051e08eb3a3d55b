"""The choices of a run: its config by dotted keys, without the keys that only say where and how it ran."""

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
    "callbacks.series",
    "callbacks.suites",
    "callbacks.pruning",
    "callbacks.checkpoints.every_steps",
    "callbacks.checkpoints.every_minutes",
    "callbacks.checkpoints.keep_every",
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

Runs that differ in them alone train the same model, up to rounding and the random numbers of dropout. They are
compared as runs of one configuration, and a run that goes on may change them. The precision is not among them: it
changes what is trained.
"""
RENAMED = errors.RENAMED | {
    "lmlab.training.optim.": "lmlab.optim.",
    "lmlab.training.pruning.": "lmlab.sweeps.pruning.",
}
"""Keys and targets in configs of lmlab 0.1, and their names since."""
ADDED: dict[str, dict[str, Any]] = {
    "": {"float32_matmul_precision": "highest"},
    "callbacks": {"averages": {"_target_": "lmlab.training.averages.Averages"}},
    "preprocess": {
        "split_by": "shuffle",
        "max_test_bytes": None,
        "similarity": 0.8,
        "packing": "concatenated",
        "document_attention": False,
    },
    "lmlab.optim.AdamW": {"final_ratio": 0.0, "groups": None},
    "lmlab.data.sources.load_hub": {"keep_raw": True},
    "lmlab.data.tokenizers.bpe": {"extra_tokens": None},
    "lmlab.data.tokenizers.char": {"extra_tokens": None},
    "lmlab.objectives.mlm.MaskedLM": {
        "mask_schedule": "constant",
        "final_mask_probability": None,
        "whole_word": False,
        "span_length": None,
    },
}
"""Keys that older configs lack, and the values by which they ran: at the top, and in blocks by their target or name."""


def of_this_version(config: dict[str, Any]) -> dict[str, Any]:
    """Copies a composed config of any version, with the keys and targets of this one."""
    config = ADDED[""] | with_present_names(config)
    blocks = {key: value for key, value in config.items() if isinstance(value, dict)}
    return config | {key: ADDED.get(block.get("_target_", key), {}) | block for key, block in blocks.items()}


def without_added(block: dict[str, Any]) -> dict[str, Any]:
    """Copies a block of a config without the keys that those of lmlab 0.1 lack, where they change nothing.

    What is named by a block, such as a cached tokenizer, has then the name that it had before.
    """
    added = ADDED.get(block.get("_target_", "-"), {}).items()
    return {key: value for key, value in block.items() if (key, value) not in added}


def with_present_names(config: Any) -> Any:
    """Copies a composed config, with the keys and targets of lmlab 0.1 under their present names."""
    if isinstance(config, dict):
        return {RENAMED.get(key, key): with_present_names(value) for key, value in config.items()}
    if isinstance(config, list):
        return [with_present_names(value) for value in config]
    if isinstance(config, str):
        old = next((name for name in RENAMED if name.endswith(".") and config.startswith(name)), "")
        return RENAMED.get(old, "") + config.removeprefix(old)
    return config


def is_in(key: str, names: Iterable[str]) -> bool:
    """Returns whether a dotted key is one of `names`, or lies in a block that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a config by their dotted keys; a list is one value."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        name: value
        for key, inner in config.items()
        for name, value in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def config_choices(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what was chosen for a run by dotted keys. A path inside its directory is relative to that."""
    directory = config["run_dir"]
    return {
        key: value.removeprefix(directory) if f"{value}/".startswith(f"{directory}/") else value
        for key, value in flatten(of_this_version(config)).items()
        if not is_in(key, MACHINERY)
    }


def as_typed(value: Any) -> str:
    """Returns a value of a config as a person would type it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
