"""Loads Hugging Face models with trained weights, and makes them from scratch."""

import logging
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lmlab.errors import UserError, first_line, nearest, out_of_memory
from lmlab.hub import from_hub, is_gguf, split_revision
from lmlab.models.electra import GENERATOR, GeneratorAndDiscriminator, embeddings_fit
from lmlab.models.formats import load_config, load_model
from lmlab.models.memory import check_weights, meta_model
from lmlab.models.probe import run_probe
from lmlab.models.torch_module import TorchModuleConfig, TorchModuleForCausalLM, load
from lmlab.objectives import OBJECTIVE_OF


def pretrained(
    auto_class: str,
    name: str,
    revision: str | None = None,
    config: dict[str, Any] | None = None,
    module: Any = None,
    generator: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """Loads a trained model, in float32.

    Args:
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".
        name: hub id, ID@REVISION or directory, of a model or of an adapter, or `.gguf` file.
        revision: branch, tag or commit of a hub id.
        config: changes to single values of the model's config.
        module: of an exported torch module one that was made as it was; in a config the block that makes it.
        generator: hub id or directory of the generator of a discriminator; None for the one that lies beside it.
        tokenizer: of an exported torch module the tokenizer that it reads.
        empty: leave its weights out: they are on the meta device, to be sent by a rank that has them.
    """
    name, revision = split_revision(name, revision)
    with from_hub("model", name, "model.name"):
        settings = load_config(name, revision)
        changes = config_values(config, settings)
        try:
            settings = load_config(name, revision, **changes) if changes else settings
            if isinstance(settings, TorchModuleConfig):
                assert tokenizer is not None
                if changes:
                    raise UserError("model.config: a torch module has none. Its arguments are keys of model.module.")
                return load(name, revision, settings, module, tokenizer, auto_class)
            if module is not None:
                raise UserError(f"model.module is for an exported torch module, which {name} is not. Leave it out.")
            auto = auto_model(settings, auto_class)
            if empty:
                return meta_model(auto, settings)
            check_weights(auto, settings)
            # Exported models carry a dtype of their own; which one to compute in is the trainer's choice.
            model, lacking = load_model(auto, name, revision, settings, dtype=torch.float32)
        except (RuntimeError, StrictDataclassError, LookupError, TypeError, ArithmeticError) as error:
            if not changes or out_of_memory(error):
                raise
            cause = first_line(error.__cause__ or error)
            raise UserError(f"model.config={changes} does not fit the trained weights of {name}: {cause}") from error
    if lacking:
        missing = ", ".join(lacking)
        if is_gguf(name):  # which holds all of a model
            raise UserError(f"{name} is damaged: it holds no weights for {missing}. Name another as model.name.")
        logging.getLogger(__name__).warning("%s holds no weights for %s: they start at random", name, missing)
        model.began_at_random = missing
    if auto_class == "AutoModelForPreTraining":
        return with_generator(model, name, revision, generator)
    if generator is not None:
        raise UserError("model.generator is for objective=electra, which trains a discriminator. Leave it out.")
    return model


def with_generator(
    discriminator: PreTrainedModel, name: str, revision: str | None, generator: str | None
) -> GeneratorAndDiscriminator:
    """Returns a trained discriminator with its generator; arguments are those of `pretrained`.

    They share their embeddings if these have the same values.
    """
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    if generator is None:
        options["subfolder"] = GENERATOR
    source, revision = (name, revision) if generator is None else split_revision(generator)
    try:
        with from_hub("generator", source, "model.generator"):
            made = AutoModelForMaskedLM.from_pretrained(source, revision=revision, **options)
    except UserError as error:
        if generator is not None:
            raise
        raise UserError(
            f"{name} is a discriminator without a generator beside it, which objective=electra trains it with.\n"
            "Name one: +model.generator=ID_OR_DIRECTORY"
        ) from error
    return GeneratorAndDiscriminator(made, discriminator, embeddings_fit(made, discriminator, values=True))


def from_scratch(
    tokenizer: PreTrainedTokenizerBase,
    auto_class: str,
    architecture: str,
    config: dict[str, Any] | None = None,
    generator: dict[str, Any] | None = None,
    *,
    empty: bool = False,
) -> PreTrainedModel:
    """Makes a model with random weights, drawn from torch's current seed.

    Args:
        tokenizer: gives the vocabulary size and the special tokens.
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".
        architecture: a `model_type` of transformers, such as gpt2 or roberta.
        config: values of its config, over transformers' defaults and those of the tokenizer.
        generator: for a discriminator, values in which the config of the generator beside it differs. They share their
            embeddings if these have the same shapes.
        empty: leave its weights out: they are on the meta device, to be sent by a rank that has them.
    """
    if architecture not in CONFIG_MAPPING:
        raise UserError(
            f'model.architecture: transformers knows no "{architecture}".{nearest(architecture, CONFIG_MAPPING)}'
        )
    if auto_class == "AutoModelForPreTraining":
        ours = config or {}
        discriminator = from_scratch_alone(tokenizer, auto_class, architecture, ours, empty=empty)
        smaller = ours | (generator or {})
        made = from_scratch_alone(tokenizer, "AutoModelForMaskedLM", architecture, smaller, empty=empty)
        return GeneratorAndDiscriminator(made, discriminator, embeddings_fit(made, discriminator, values=False))
    if generator is not None:
        raise UserError("model.generator is for objective=electra, which trains a discriminator. Leave it out.")
    return from_scratch_alone(tokenizer, auto_class, architecture, config, empty=empty)


def from_scratch_alone(
    tokenizer: PreTrainedTokenizerBase, auto_class: str, architecture: str, config: dict[str, Any] | None, empty: bool
) -> PreTrainedModel:
    """Makes one model with random weights; arguments are those of `from_scratch`."""
    try:
        defaults = AutoConfig.for_model(architecture)
        auto = auto_model(defaults, auto_class)
        changes = config_values(config, defaults)
        if changes.get("vocab_size", len(tokenizer)) < len(tokenizer):
            raise UserError(
                f"model.config.vocab_size={changes['vocab_size']}: the tokenizer has {len(tokenizer)} tokens.\n"
                "Leave it out, as the tokenizer gives it. A tokenizer with fewer tokens: tokenizer.vocab_size=N."
            )
        values = {"vocab_size": len(tokenizer)} | {
            f"{token}_token_id": getattr(tokenizer, f"{token}_token_id")
            for token in ("bos", "eos", "pad", "cls", "sep")
        }
        # An encoder that is made for causal modelling has to be told to hide the future.
        values["is_decoder"] = auto_class == "AutoModelForCausalLM"
        if auto_class == "AutoModelForSeq2SeqLM":
            values["forced_eos_token_id"] = tokenizer.eos_token_id  # BART's
        values = {key: value for key, value in values.items() if hasattr(defaults, key)}
        if auto_class == "AutoModelForSeq2SeqLM":  # T5's config has no such key until it is set
            values["decoder_start_token_id"] = tokenizer.pad_token_id
        values |= changes
        settings = AutoConfig.for_model(architecture, **values)
        if empty:
            return meta_model(auto, settings)
        check_weights(auto, settings)
        model: PreTrainedModel = auto.from_config(settings)
        run_probe(model)  # some configs make a model that can't take any tokens
    except UserError:
        raise
    except Exception as error:  # transformers' code may raise anything for values that it was not written for
        if out_of_memory(error):
            raise
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"model.config makes no {task(auto_class)} {architecture} that works: {cause}\n"
            f"Its keys are those of transformers' {CONFIG_MAPPING[architecture].__name__}."
        ) from error
    return model


def auto_class_of(config: PreTrainedConfig, name: str) -> str:
    """Returns the `AutoModel` class of the task that a model was trained for, by its config.

    Args:
        name: hub id or directory of the model, for a message.

    Raises:
        UserError: it is no causal, masked or encoder-decoder language model.
    """
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForMaskedLM"):
        return "AutoModelForMaskedLM"
    if architecture == "ElectraForPreTraining":
        return "AutoModelForPreTraining"
    if architecture in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), TorchModuleForCausalLM.__name__):
        return "AutoModelForCausalLM"
    if architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForSeq2SeqLM"
    raise UserError(
        f'{name} is a "{architecture or "model of unknown task"}": no causal, masked or encoder-decoder language model.'
    )


def auto_model(config: PreTrainedConfig, auto_class: str) -> Any:
    """Returns the `AutoModel` class of that name.

    Raises:
        UserError: it has no model for the config's architecture.
    """
    if not has_model(config, auto_class):
        raise UserError(
            f"transformers has no {task(auto_class)} {config.model_type}.\n{alternative(config, auto_class)}"
        )
    return getattr(transformers, auto_class)


def has_model(config: PreTrainedConfig, auto_class: str) -> bool:
    """Returns whether an `AutoModel` class has a model for the config's architecture.

    Of those for pretraining this is ELECTRA's alone: those of other architectures are for their own objectives.
    """
    if auto_class == "AutoModelForPreTraining" and config.model_type != "electra":
        return False
    return type(config) in getattr(transformers, auto_class)._model_mapping


def task(auto_class: str) -> str:
    """Returns what messages call the models of an `AutoModel` class, such as "causal" for AutoModelForCausalLM."""
    name = auto_class.removeprefix("AutoModelFor").removesuffix("LM").lower()
    return {"seq2seq": "encoder-decoder", "pretraining": "discriminator"}.get(name, name)


def alternative(config: PreTrainedConfig, auto_class: str) -> str:
    """Returns advice for an architecture that can't be trained by the objective that wants this `AutoModel` class."""
    if isinstance(config, TorchModuleConfig):
        return "Let it hide the tokens after a position, or use objective=mlm."
    if auto_class == "AutoModelForPreTraining":
        return "Use model=electra_small, or model=scratch model.architecture=electra."
    for other, objective in OBJECTIVE_OF.items():
        if other != auto_class and has_model(config, other):
            return f"Use objective={objective}, or another architecture."
    return "Use another architecture."


def config_values(values: dict[str, Any] | None, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns changes to a model's config, whole numbers as floats where the config has floats.

    Raises:
        UserError: a key that the config does not have; transformers would take it in silence.
    """
    values = values or {}
    for key in values:
        if not hasattr(config, key):
            known = [*config.to_dict(), *config.attribute_map]
            raise UserError(f'model.config: {config.model_type} has no "{key}".{nearest(key, known)}')
    return {k: float(v) if type(v) is int and type(getattr(config, k)) is float else v for k, v in values.items()}
