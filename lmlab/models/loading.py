"""Loads Hugging Face models with trained weights, makes them from scratch, and checks them before use."""

import logging
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lmlab.errors import UserError, first_line, nearest, out_of_memory
from lmlab.hub import from_hub, is_gguf, split_revision
from lmlab.models.electra import GENERATOR, GeneratorAndDiscriminator, embeddings_fit
from lmlab.models.gguf import load_config, located_weights
from lmlab.models.loss import check_scoring, score
from lmlab.models.memory import check_weights, meta_model
from lmlab.models.probe import TOKENS, differ, evaluation_mode, probe, run_probe, vocabulary
from lmlab.models.torch_module import TorchModule, TorchModuleConfig, TorchModuleForCausalLM, check_length, load
from lmlab.objectives import OBJECTIVE_OF, Objective, make_example


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
        name: hub id, ID@REVISION, directory, or `.gguf` file.
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
            model, loaded = auto.from_pretrained(
                **located_weights(name),
                revision=revision,
                trust_remote_code=False,
                config=settings,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (RuntimeError, StrictDataclassError, LookupError, TypeError, ArithmeticError) as error:
            if not changes or out_of_memory(error):
                raise
            cause = first_line(error.__cause__ or error)
            raise UserError(f"model.config={changes} does not fit the trained weights of {name}: {cause}") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        if is_gguf(name):  # which holds all of a model
            raise UserError(f"{name} is damaged: it holds no weights for {missing}. Name another as model.name.")
        logging.getLogger(__name__).warning("%s holds no weights for %s: they start at random", name, missing)
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
    beside = {"subfolder": GENERATOR} if generator is None else {}
    source, revision = (name, revision) if generator is None else split_revision(generator)
    try:
        with from_hub("generator", source, "model.generator"):
            made = AutoModelForMaskedLM.from_pretrained(source, revision=revision, dtype=torch.float32, **beside)
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


def check_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int, objective: Objective
) -> None:
    """Refuses a model that cannot score this tokenizer's blocks as the objective requires.

    Raises:
        UserError: its embedding, its positions or its attention don't fit, or its head can't be scored.
    """
    rows = vocabulary(model)
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding only {rows} rows.\n"
            "Use the tokenizer the model was trained with: tokenizer=pretrained, and no other tokenizer.name."
        )
    longest = max_positions(model)
    if longest is not None and block_size > longest:
        raise UserError(
            f"preprocess.block_size={block_size} is more than the {longest} positions of the model.\n"
            f"Set preprocess.block_size={longest} or less, or make a model from scratch with more positions."
        )
    if objective.auto_class == "AutoModelForPreTraining" and not isinstance(model, GeneratorAndDiscriminator):
        raise UserError(
            f"{type(objective).__name__} trains a discriminator with a generator, and the model has none.\n"
            "Use model=electra_small, or another model of lmlab.models.loading."
        )
    if isinstance(model, TorchModule):
        check_length(model, block_size)
    if getattr(model.config, "attention_type", None) == "block_sparse":  # BigBird's
        raise UserError(
            f"{model.config.model_type} gives up its block-sparse attention for good at the first short row, so that "
            "its metrics would depend on what it has read before.\nSet model.config.attention_type=original_full."
        )
    decodes = objective.auto_class == "AutoModelForSeq2SeqLM"
    if (decodes or not objective.bidirectional) and probe(model).sees_ahead:
        raise UserError(
            f"{model.config.model_type} sees the tokens it should predict, so its "
            f"{objective.metric.replace('_', ' ')} means nothing.\n{alternative(model.config, objective.auto_class)}"
        )
    check_scoring(model)
    if getattr(objective, "prefixes", False):
        check_prefixes(model, block_size)
    if decodes:
        check_decoder(model, tokenizer, block_size, objective)


def check_decoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int, objective: Objective
) -> None:
    """Refuses an encoder-decoder whose decoder can't read what the objective gives it.

    Raises:
        UserError: it begins with another token, or has fewer positions; or the objective gives it nothing to read.
    """
    read = make_example(objective, np.arange(block_size, dtype=np.int32), (0, 0, 0)).decoder_inputs
    if read is None:
        raise UserError(
            f"{type(objective).__name__} trains encoder-decoders, and returns no decoder_inputs.\n"
            "See lmlab.objectives.Example."
        )
    start, longest = getattr(model.config, "decoder_start_token_id", None), max_positions(model)
    if start is not None and start != read[0]:
        raise UserError(
            f"the decoder of {model.config.model_type} begins with token {start}, and the objective with {read[0]}.\n"
            f"Set objective.decoder_start='{tokenizer.convert_ids_to_tokens(start)}'"
        )
    if longest is not None and len(read) > longest:
        raise UserError(
            f"the decoder reads {len(read)} tokens of a block of preprocess.block_size={block_size}, and the model has "
            f"{longest} positions.\nLower preprocess.block_size, or hide fewer tokens."
        )


@torch.no_grad()
def check_prefixes(model: PreTrainedModel, block_size: int) -> None:
    """Refuses a model that does not attend as an `Example.prefix` says.

    Some models take no mask but their own. Others have layers that see a window of the positions before a token: given
    any mask, they see what that shows, so a prefix of 0 would not be their causal attention in a longer text.

    Raises:
        UserError: says which of the two.
    """
    kind, device = model.config.model_type, model.device
    vocabulary, few = len(model.get_input_embeddings().weight), min(TOKENS, block_size)
    text = torch.arange(2, 2 + block_size, device=device)[None] % vocabulary  # [1, T]
    changed = torch.cat([text[:, : few - 1], text[:, :1]], dim=1)  # in the last of a few tokens
    targets = torch.arange(min(vocabulary, 64), device=device)

    def logits(ids: torch.Tensor, prefix: int | None, position: int) -> torch.Tensor:
        """Returns the logits of some tokens at one position, less their mean."""
        seen = None if prefix is None else torch.tensor([prefix], device=device)
        nll = score(model, ids, None, torch.full_like(targets, position), targets, prefix=seen).nll
        return nll.mean() - nll

    def is_causal(length: int) -> bool:
        """Returns whether a prefix of 0 changes nothing at the last position of a text."""
        return not differ(logits(text[:, :length], None, length - 1), logits(text[:, :length], 0, length - 1))

    with evaluation_mode(model):
        try:
            # At the first position: with all of the prefix the change is seen, without its last token it is not.
            sees, leaks = (differ(logits(text[:, :few], n, 0), logits(changed, n, 0)) for n in (few, few - 1))
            follows = sees and not leaks and is_causal(few)
        except Exception as error:  # transformers' code may raise anything for a mask that it was not written for
            if out_of_memory(error):
                raise
            follows = False
        everywhere = follows and is_causal(block_size)
    if not follows:
        raise UserError(
            f"{kind} takes no mask that lets it see the tokens after a position, as this objective needs.\n"
            "Use another decoder, such as model.architecture=gpt2, llama or gpt_neox."
        )
    if not everywhere:
        raise UserError(
            f"{kind} has layers that see fewer than preprocess.block_size={block_size} positions, and a prefix would "
            "let them see all.\nMake it without (such as model.config.sliding_window=null), or lower "
            "preprocess.block_size."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a trained model whose vocabulary plainly is not that of the tokenizer.

    Raises:
        UserError: says how they differ.
    """
    rows = vocabulary(model)
    advice = "Use the tokenizer that the model was trained with: leave tokenizer.name out."
    # Models pad their embeddings to round numbers; in DeepSeek's 2.3 % of the rows have no token.
    if rows - len(tokenizer) > max(256, 0.04 * rows):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they don't belong "
            f"together.\n{advice}"
        )
    for name in ("bos", "eos", "cls", "sep"):
        ours, theirs = (getattr(owner, f"{name}_token_id", None) for owner in (tokenizer, model.config))
        if None not in (ours, theirs) and ours not in (theirs if isinstance(theirs, list) else [theirs]):
            raise UserError(
                f"the tokenizer's {name} token is {ours} and the model's {theirs}: they don't belong together.\n"
                f"{advice} If only the model's config is wrong: model.config.{name}_token_id={ours}"
            )


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns the number of tokens of the longest input the model has positions for; None if there is no limit."""
    longest = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            longest = module.num_embeddings - first
    return longest if longest and longest > 0 else None  # XLNet's config says -1
