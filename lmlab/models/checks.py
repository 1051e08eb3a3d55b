"""Checks before training and evaluation that a model can score what it is to be shown.

Shapes: T positions.
"""

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError, out_of_memory
from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.models.loading import alternative
from lmlab.models.loss import check_scoring, score
from lmlab.models.probe import (
    TOKENS,
    differ,
    evaluation_mode,
    first_position,
    forward,
    position_embedding,
    probe,
    vocabulary,
)
from lmlab.models.torch_module import TorchModule, check_length
from lmlab.objectives import Objective, make_example


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    objective: Objective,
    document_attention: bool = False,
) -> None:
    """Refuses a model that cannot score this tokenizer's blocks as the objective requires.

    Args:
        document_attention: whether the documents of a block do not see one another.

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
    if document_attention:
        check_document_attention(model, block_size, objective)


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


@torch.no_grad()
def check_document_attention(model: PreTrainedModel, block_size: int, objective: Objective) -> None:
    """Refuses a model that does not make of two documents in a row what it makes of each alone.

    Raises:
        UserError: it does not, or the objective needs another mask.
    """
    if getattr(objective, "prefixes", False) or objective.auto_class == "AutoModelForSeq2SeqLM":
        needs = "trains encoder-decoders" if objective.auto_class == "AutoModelForSeq2SeqLM" else "needs another mask"
        raise UserError(
            f"{type(objective).__name__} {needs}: preprocess.document_attention=true is not for it.\nLeave that out."
        )
    parts = [model.generator, model.discriminator] if isinstance(model, GeneratorAndDiscriminator) else [model]
    for part in parts:
        first = max(1, block_size // 3)
        lengths = [first, block_size - first]  # of a whole block, so that layers which see a window show what they do
        ids = (torch.arange(block_size, device=part.device) * 7 + 3)[None] % vocabulary(part)
        positions = torch.cat([torch.arange(length, device=part.device) for length in lengths])[None]
        with evaluation_mode(part):
            try:
                together = forward(part, ids, None, None, positions).logits[0]
                alone = torch.cat([forward(part, text).logits[0] for text in torch.split(ids, lengths, dim=1)])
                apart = not differ(together, alone)
            except Exception as error:  # transformers' code may raise anything for what it was not written for
                if out_of_memory(error):
                    raise
                apart = False
        if not apart:
            raise UserError(
                f"{part.config.model_type} does not keep the documents of a block apart: what it makes of one depends "
                "on the others.\nLeave preprocess.document_attention=true out, or use another architecture, such as "
                "gpt2, llama, roberta or modernbert."
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
    longest, table = getattr(model.config, "max_position_embeddings", None), position_embedding(model)
    if table is not None:
        longest = table.num_embeddings - first_position(model)
    return longest if longest and longest > 0 else None  # XLNet's config says -1
