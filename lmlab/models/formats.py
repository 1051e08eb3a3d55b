"""Loads config, tokenizer and weights of a model: in Hugging Face form, in GGUF, or an adapter beside its base.

Adapters are merged into their base. The weights of GGUF files, the format of llama.cpp, are dequantized.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lmlab.errors import UserError, check_installed
from lmlab.hub import is_gguf
from lmlab.models.adapter_files import adapter_directory, base_of, merge_adapter


def located(name: str) -> dict[str, str]:
    """Returns the arguments by which `from_pretrained` finds the config or the tokenizer of a model.

    Args:
        name: hub id, directory, or `.gguf` file.

    Raises:
        UserError: the file is none in GGUF, or a package that reads it is missing.
    """
    if not is_gguf(name):
        return {"pretrained_model_name_or_path": name}
    with open(name, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{name} is no GGUF file: it does not begin as one does. Name another.")
    check_installed(f"reading {name}", "gguf", "gguf", "accelerate")
    return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}


def located_weights(name: str) -> dict[str, Any]:
    """Returns the arguments by which `from_pretrained` finds a model and makes its weights dense, so that it saves."""
    if not is_gguf(name):
        return located(name)
    from transformers import GgufConfig

    return {**located(name), "quantization_config": GgufConfig(dequantize=True)}


def load_model(
    auto: Any, name: str, revision: str | None, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Loads a model with dense weights; returns it and the names of the weights that the files lack, sorted.

    An adapter and its base are loaded in float32.

    Args:
        auto: the `AutoModel` class.
        name: hub id or directory, of a model or of an adapter, or `.gguf` file.
        revision: branch, tag or commit of a hub id.
        config: what `load_config` returned for the name.
        options: more arguments of `from_pretrained`.

    Raises:
        UserError: an adapter can't be merged.
    """
    if adapter := adapter_directory(name, revision):
        options["dtype"] = torch.float32  # as it was trained: files in bf16 would round what is merged
        with base_of(adapter, name) as (base, revision):
            model, missing = load_model(auto, base, revision, config, **options)
        merge_adapter(model, adapter)
        return model, missing
    options |= {"revision": revision, "config": config, "trust_remote_code": False, "output_loading_info": True}
    model, loaded = auto.from_pretrained(**located_weights(name), **options)
    return model, sorted(loaded["missing_keys"])


def load_config(name: str, revision: str | None = None, **changes: Any) -> PreTrainedConfig:
    """Loads the config of a model.

    Args:
        name: hub id or directory, of a model or of an adapter, or `.gguf` file.
        revision: branch, tag or commit of a hub id.
        changes: new values for some of its keys.

    Raises:
        UserError: a GGUF file can't be read, or an adapter names no base.
    """
    if adapter := adapter_directory(name, revision):
        with base_of(adapter, name) as (base, revision):
            return load_config(base, revision, **changes)
    config = AutoConfig.from_pretrained(**located(name), revision=revision, trust_remote_code=False, **changes)
    if is_gguf(name):
        from transformers.integrations.gguf import read_gguf_metadata

        # A file says which architecture it holds, and not for which task: its tensors are those of a language model.
        decodes = config.is_encoder_decoder
        tasks = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if decodes else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config.architectures = [tasks[config.model_type]] if config.model_type in tasks else None
        # What transformers reads under another name, or not at all.
        if config.model_type == "gpt2":
            config.n_positions = changes.get("n_positions", config.n_ctx)
        metadata, _ = read_gguf_metadata(name)
        width = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
        if width and hasattr(config, "head_dim"):
            config.head_dim = changes.get("head_dim", width)
    return config


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; the arguments are those of `load_config`.

    Raises:
        UserError: there is none. Of some kinds, transformers then makes one that has special tokens alone.
    """
    adapter = adapter_directory(name, revision)
    if adapter and not Path(adapter, "tokenizer_config.json").is_file():
        with base_of(adapter, name) as (base, revision):
            return load_tokenizer(base, revision)
    tokenizer = AutoTokenizer.from_pretrained(**located(name), revision=revision, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{name} has no tokenizer, such as a directory of the whole model has.\n"
            "For train and evaluate, name another: tokenizer=pretrained tokenizer.name=…"
        )
    return tokenizer
