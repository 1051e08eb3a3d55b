"""Models of Hugging Face: with trained weights, or from scratch; checked before use."""

import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from lmlab.errors import UserError, first_line, nearest, out_of_memory
from lmlab.hub import from_hub
from lmlab.models.loss import check_scoring
from lmlab.models.memory import check_weights
from lmlab.models.probe import find_out, probe


def pretrained(
    causal: bool,
    name: str,
    revision: str | None = None,
    config: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A trained model by hub id or directory, in float32; `config` changes single values of its config."""
    with from_hub("model", name, "model.name"):
        config = fitted(config, AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False))
        try:
            settings = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **config)
            auto = auto_for(settings, causal)
            check_weights(auto, settings)
            # Checkpoints of today carry a dtype of their own; how to compute is the trainer's to say.
            model, loaded = auto.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=False,
                config=settings,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (RuntimeError, StrictDataclassError, LookupError, TypeError, ArithmeticError) as error:
            if not config or out_of_memory(error):
                raise
            cause = first_line(error.__cause__ or error)
            raise UserError(f"model.config={config} does not fit the trained weights of {name}: {cause}") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        logging.getLogger(__name__).warning("%s holds no weights for %s: they start at random", name, missing)
    return model


def is_causal(name: str, revision: str | None = None) -> bool:
    """Whether a trained model goes on with a text, rather than filling masks in it.

    Raises:
        UserError: it does neither.
    """
    settings = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    trained_as = (settings.architectures or [""])[0]
    if trained_as.endswith("ForMaskedLM"):
        return False
    if trained_as in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    raise UserError(f'{name} is a "{trained_as or "model of unknown task"}": no causal or masked language model.')


def auto_for(settings: PreTrainedConfig, causal: bool) -> Any:
    """The class that makes a model of this config, for the objective."""
    if type(settings) not in (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_MASKED_LM_MAPPING):
        kind = "causal" if causal else "masked"
        raise UserError(f"transformers has no {kind} {settings.model_type}.\n{instead(settings, causal)}")
    return AutoModelForCausalLM if causal else AutoModelForMaskedLM


def instead(settings: PreTrainedConfig, causal: bool) -> str:
    """What to do where an architecture can't have the objective that was chosen."""
    if type(settings) in (MODEL_FOR_MASKED_LM_MAPPING if causal else MODEL_FOR_CAUSAL_LM_MAPPING):
        return f"Use objective={'mlm' if causal else 'clm'}, or another architecture."
    if getattr(settings, "is_encoder_decoder", False):
        return "It is an encoder-decoder, and lmlab trains decoders and encoders: use another architecture."
    return "Use another architecture."


def from_scratch(
    tokenizer: PreTrainedTokenizerBase,
    causal: bool,
    architecture: str,
    config: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A model with random weights, drawn from torch's current seed.

    Args:
        architecture: a `model_type` of transformers, such as gpt2 or roberta.
        config: values of its config; vocabulary size and special tokens are the tokenizer's.
    """
    if architecture not in CONFIG_MAPPING:
        raise UserError(
            f'model.architecture: transformers knows no "{architecture}".{nearest(architecture, CONFIG_MAPPING)}'
        )
    try:
        defaults = AutoConfig.for_model(architecture)
        auto = auto_for(defaults, causal)
        config = fitted(config, defaults)
        values = {"vocab_size": len(tokenizer)} | {
            f"{token}_token_id": getattr(tokenizer, f"{token}_token_id")
            for token in ("bos", "eos", "pad", "cls", "sep")
        }
        # An encoder built for causal modelling has to be told to hide the future.
        values["is_decoder"] = causal
        values = {key: value for key, value in values.items() if hasattr(defaults, key)} | config
        settings = AutoConfig.for_model(architecture, **values)
        check_weights(auto, settings)
        model = auto.from_config(settings)
        find_out(model)  # some configs make a model that can't take any tokens
    except UserError:
        raise
    except Exception as error:  # what transformers' code makes of values that it was not written for has no bounds
        if out_of_memory(error):
            raise
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"model.config makes no {'causal' if causal else 'masked'} {architecture} that works: {cause}\n"
            f"Its keys are those of transformers' {CONFIG_MAPPING[architecture].__name__}."
        ) from error
    return model


def fitted(values: dict[str, Any] | None, settings: PreTrainedConfig) -> dict[str, Any]:
    """Values for a model config, a whole number as a float where its own value is one.

    Raises:
        UserError: a key that the config does not have; transformers would take it in silence.
    """
    values = values or {}
    for key in values:
        if not hasattr(settings, key):
            known = [*settings.to_dict(), *settings.attribute_map]
            raise UserError(f'model.config: {settings.model_type} has no "{key}".{nearest(key, known)}')
    return {k: float(v) if type(v) is int and type(getattr(settings, k)) is float else v for k, v in values.items()}


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int, causal: bool) -> None:
    """Refuse a model that cannot score this tokenizer's blocks as the objective means it."""
    rows = len(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding only {rows} rows.\n"
            "Use the tokenizer the model was trained with: tokenizer=pretrained, and no other tokenizer.name."
        )
    longest = positions(model)
    if longest is not None and block_size > longest:
        raise UserError(
            f"preprocess.block_size={block_size} is more than the {longest} positions of the model.\n"
            f"Set preprocess.block_size={longest} or less, or make a model from scratch with more positions."
        )
    if getattr(model.config, "attention_type", None) == "block_sparse":  # BigBird's
        raise UserError(
            f"{model.config.model_type} gives up its block-sparse attention for good at the first short row, so that "
            "its metrics would depend on what it has read before.\nSet model.config.attention_type=original_full."
        )
    if causal and probe(model).sees_ahead:
        raise UserError(
            f"{model.config.model_type} sees the tokens it should predict, so its causal perplexity means nothing.\n"
            f"{instead(model.config, causal)}"
        )
    check_scoring(model)


def check_belongs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a trained model whose tokens plainly are not those of the tokenizer."""
    rows = len(model.get_input_embeddings().weight)
    other = "Use the tokenizer that the model was trained with: leave tokenizer.name out."
    # Models pad their embeddings to round numbers; DeepSeek's has 2.3 % of rows that no token has.
    if rows - len(tokenizer) > max(256, 0.04 * rows):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they don't belong "
            f"together.\n{other}"
        )
    for name in ("bos", "eos", "cls", "sep"):
        ours, theirs = (getattr(owner, f"{name}_token_id", None) for owner in (tokenizer, model.config))
        if None not in (ours, theirs) and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise UserError(
                f"the tokenizer's {name} token is {ours} and the model's {theirs}: they don't belong together.\n"
                f"{other} If only the model's config is wrong: model.config.{name}_token_id={ours}"
            )


def positions(model: PreTrainedModel) -> int | None:
    """The longest input the model has positions for; None where there is no limit."""
    longest = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from behind the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            longest = module.num_embeddings - first
    return longest if longest and longest > 0 else None  # XLNet says -1
