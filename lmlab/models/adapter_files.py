"""Adapters as files, in the form of peft: they are written beside the model of a run, and read with their bases."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError, check_installed, first_line
from lmlab.hub import ADAPTER, from_hub, is_adapter, is_gguf
from lmlab.io import read_json, replaced, write_json
from lmlab.models.adapters import NAME, adapted_layers, inject, merged_state, remove
from lmlab.models.hashing import layers_hash
from lmlab.models.quantized import Quantized, quantization_config, round_weights

WEIGHTS = "adapter_model.safetensors"
QUANTIZATION = "quantization_config.json"
"""The file beside an adapter that says how its base was quantized: a `BitsAndBytesConfig` of transformers."""
BASE = "base.json"
"""The file beside an adapter that holds the hash of its base's layers."""
PREFIX = "base_model.model."
"""Stands before the name of each weight in the files of peft."""
READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
"""The keys of an adapter's config that its merged weights depend on."""
IGNORED = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "peft_version"),
)
"""The keys of an adapter's config that say what it is, where it comes from and how it was trained."""
BASE_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` with which peft leaves the weights of the base as they are."""
LET_PEFT_MERGE = "Let peft merge it into its base, by merge_and_unload, and name the merged model."
"""What to do with an adapter that lmlab does not read."""


def take_out(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    base_hash: str | None = None,
) -> dict[str, Tensor]:
    """Takes the adapter out of a model, writes it in the form of peft, and returns the model's merged state dict.

    Args:
        state: the state dict of the model with its adapter.
        tokenizer: is saved with the adapter, as it may differ from that of the base.
        path: the directory to write.
        base_hash: the hash of the layers of its base; None where it is not known.
    """
    from peft import get_peft_model_state_dict

    merged, config = merged_state(model, state), copy.copy(model.peft_config[NAME])
    own = get_peft_model_state_dict(model, dict(state), save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in own.items()}
    rounded = any(isinstance(module, Quantized) for module in model.modules())
    remove(model, merged)
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        if rounded:
            write_json(folder / QUANTIZATION, quantization_config(model))
        if base_hash is not None:
            write_json(folder / BASE, {"layers_hash": base_hash})
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        tokenizer.save_pretrained(folder)

    replaced(path, write)
    return merged


def adapter_directory(name: str, revision: str | None = None) -> str | None:
    """Returns the directory of an adapter, which is downloaded if it is on the hub; None if there is no such adapter.

    Args:
        name: hub id or directory, of an adapter or of a model, or `.gguf` file.
        revision: branch, tag or commit of a hub id.
    """
    if is_adapter(name):
        return name
    if Path(name).exists() or is_gguf(name):
        return None
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return download_adapter(name, revision)
    except LocalEntryNotFoundError:  # loading the model itself says so
        return None


@cache
def download_adapter(name: str, revision: str | None) -> str | None:
    """Downloads what is read of an adapter on the hub, once, and returns its directory; None if it is no adapter.

    Config, tokenizer and weights of a model are loaded one by one, and each load asks whether it is an adapter.

    Raises:
        LocalEntryNotFoundError: the hub can't be reached, and the cache does not say. This answer is not kept.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(name, ADAPTER, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    for file in (WEIGHTS, QUANTIZATION, BASE, "tokenizer_config.json"):
        with suppress(EntryNotFoundError):
            hf_hub_download(name, file, revision=revision)
    return str(Path(config).parent)


@contextmanager
def base_of(adapter: str, name: str) -> Iterator[tuple[str, str | None]]:
    """Yields the hub id or path of the base of an adapter, and its revision; a failure to load inside names that base.

    A relative path begins at the directory of the adapter or, as for peft, at the working directory.

    Args:
        adapter: the directory of the adapter.
        name: that directory or the hub id of the adapter.

    Raises:
        UserError: its config names no base, or the adapter itself, or an adapter that is not LoRA.
    """
    config = read_adapter(adapter)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise UserError(f"{name} is an adapter that names no base: add base_model_name_or_path to its {ADAPTER}.")
    beside = Path(adapter, base)
    base = str(beside) if beside.exists() else base
    if Path(base) in (Path(adapter), Path(name)):
        raise UserError(f"{name} is an adapter whose base is itself: change base_model_name_or_path in its {ADAPTER}.")
    with from_hub("the base of an adapter, model", base, f"base_model_name_or_path in {Path(adapter, ADAPTER)}"):
        yield base, revision


def read_adapter(name: str) -> dict[str, Any]:
    """Returns the config of the adapter in a directory.

    Raises:
        UserError: it is not LoRA, or was initialised with a change of its base.
    """
    config = read_json(Path(name, ADAPTER))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{name} is an adapter of the type {kind}, and lmlab reads those of the type LORA alone.\n{LET_PEFT_MERGE}"
        )
    if config.get("init_lora_weights", True) not in BASE_UNCHANGED:
        raise UserError(
            f"{name} was initialised with a change of its base, which lmlab does not make (init_lora_weights="
            f"{config['init_lora_weights']}).\nLet peft convert it to plain LoRA, by save_pretrained and its "
            "path_initial_model_for_weight_conversion."
        )
    return config


def merge_adapter(model: PreTrainedModel, name: str) -> None:
    """Merges the adapter in a directory into its base, in place.

    Only the keys of its config that LoRA and DoRA are made of go to peft: others can name code.

    Raises:
        UserError: it is of a kind that lmlab does not read, is damaged, or does not fit the base; says why.
    """
    check_installed(f"the adapter {name}", "adapters", "peft")
    from peft import LoraConfig, set_peft_model_state_dict

    config, defaults = read_adapter(name), LoraConfig().to_dict()
    for key, value in config.items():
        if key not in (*READ, *IGNORED) and value and value != defaults.get(key):
            raise UserError(
                f"{name} has {key}={value}, which lmlab does not read in an adapter of LoRA or DoRA.\n{LET_PEFT_MERGE}"
            )
    if not Path(name, WEIGHTS).is_file():
        raise UserError(
            f"{name} has no {WEIGHTS}, and weights in another form are not read: they may hold code.\n"
            "Let peft load it and write it again, by save_pretrained."
        )
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(Path(name, WEIGHTS)).items()}
    if Path(name, BASE).is_file() and read_json(Path(name, BASE)).get("layers_hash") != layers_hash(model):
        raise UserError(
            f"the base of the adapter {name} is not what it was trained beside: its weights differ.\n"
            f"Bring it back, or name where it is now, as base_model_name_or_path in {Path(name, ADAPTER)}.\n"
            f"To merge the adapter all the same, delete {Path(name, BASE)}."
        )
    if Path(name, QUANTIZATION).is_file():
        check_installed(f"the adapter {name}", "qlora", "bitsandbytes")
        if read_json(Path(name, QUANTIZATION)) != quantization_config(model):
            raise UserError(
                f"{name} was trained beside a base that is quantized in another way than lmlab's: {QUANTIZATION}.\n"
                f"{LET_PEFT_MERGE}"
            )
        round_weights(model)
    try:
        inject(LoraConfig(**{key: config[key] for key in READ if key in config}), model)
        result = set_peft_model_state_dict(model, tensors)
        missing = [key for key in result.missing_keys if ".lora_" in key]
        wrong = [*result.unexpected_keys, *missing]
        if wrong:
            raise ValueError(f"{len(wrong)} weights, such as {wrong[0]}, are in one of them alone")
        for _, layer in adapted_layers(model):
            layer.merge(safe_merge=True)
    except (ValueError, RuntimeError, TypeError, KeyError, re.error) as error:
        first, *others = str(error).splitlines() or [""]
        reason = others[0].strip() if others and first.startswith("Error(s) in loading") else first_line(error)
        raise UserError(
            f"the adapter {name} does not fit its base: {reason.rstrip('.')}.\n"
            f"Name the base that it was trained beside, as base_model_name_or_path in {Path(name, ADAPTER)}."
        ) from error
    remove(model, {})
    model.merged_here = True
