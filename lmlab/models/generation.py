"""Makes a trained model write (guide, "Inference"): continue a text, or fill the masks in it.

Shapes: T tokens of a text, M masks in it, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmlab.errors import UserError, first_line, out_of_memory
from lmlab.hub import from_hub
from lmlab.models import torch_module
from lmlab.models.loading import auto_class_of, max_positions
from lmlab.models.torch_module import TorchModule, TorchModuleConfig

SAMPLING = {"max_new_tokens": 100, "do_sample": True, "top_k": 50, "top_p": 0.95}
"""The guide's options for `generate`."""
MASKS = ("<mask>", "[MASK]", "<|mask|>")
"""The masks that people write, whatever the tokenizer calls its own."""


def load(
    name: str, revision: str | None = None, make_module: Callable[..., Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, for the task that the model was trained for.

    Args:
        name: hub id or directory.
        revision: branch, tag or commit of a hub id.
        make_module: called with `tokenizer` and `auto_class`, makes an exported torch module as it was.
    """
    with from_hub("model", name, "the first argument"):
        auto_class = auto_class_of(name, revision)
        auto = getattr(transformers, auto_class)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        if isinstance(config, TorchModuleConfig):
            module = make_module and make_module(tokenizer=tokenizer, auto_class=auto_class)
            return torch_module.load(name, revision, config, module, tokenizer, auto_class), tokenizer
        return auto.from_pretrained(name, revision=revision, trust_remote_code=False).eval(), tokenizer


def way_of_writing(model: PreTrainedModel) -> Literal["generate", "fill_mask"]:
    """Returns the name of the function of this file that suits a model, where nothing is known but its class."""
    return "fill_mask" if type(model).__name__.endswith("ForMaskedLM") else "generate"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Returns the ids [1, T] of a text."""
    return torch.tensor([tokenizer(text, verbose=False).input_ids], dtype=torch.long)


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int, /, **options: Any
) -> list[str]:
    """Continues a text.

    Args:
        seed: decides what is sampled; the result is the same for the same text and options.
        options: of transformers' `generate`, over `SAMPLING`.

    Returns:
        the text with its continuation, `num_return_sequences` (1) times. Special tokens are left out, but for those
        that the text itself spells out, as a prompt to fill in the middle does.

    Raises:
        UserError: the text is too long or has no token, or `generate` refuses an option.
    """
    ids = encode(tokenizer, text)
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UserError("an empty text, and the tokenizer has no token to begin with: give some words.")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    length, longest = ids.shape[1], max_positions(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = SAMPLING | {"pad_token_id": pad} | options
    if "max_length" in options:
        options["max_new_tokens"] = options.pop("max_length") - length
    if not isinstance(options["max_new_tokens"], int) or options["max_new_tokens"] < 1:
        raise UserError(f"max_new_tokens is a whole number, 1 or more, not {options['max_new_tokens']}.")
    if longest is not None:
        if length >= longest:
            raise UserError(f"the text has {length} tokens and the model only {longest} positions.")
        options["max_new_tokens"] = min(options["max_new_tokens"], longest - length)
    if not options["do_sample"]:
        options = {key: value for key, value in options.items() if key not in ("top_k", "top_p", "temperature")}
    torch.manual_seed(seed)
    ids = ids.to(model.device)
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **options)
    except (ValueError, TypeError) as error:  # transformers checks the names and values of the options itself
        raise UserError(f"generate refused its options: {error}") from error
    except (IndexError, AssertionError, RuntimeError) as error:
        if not isinstance(model, TorchModule) or out_of_memory(error):
            raise
        raise UserError(
            f"the model can't go on with a text of {length} tokens ({type(error).__name__}: {first_line(error)}).\n"
            "Generate fewer (max_new_tokens). A module that reads only so many says it by an attribute max_positions."
        ) from error
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    spelled = set(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) & set(tokenizer.all_special_ids)
    hidden = set(tokenizer.all_special_ids) - spelled
    return [
        tokenizer.decode([token for token in sequence if token not in hidden], skip_special_tokens=not spelled)
        for sequence in sequences.tolist()
    ]


@torch.no_grad()
def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[list[dict[str, Any]]]:
    """Returns the most likely tokens for each mask of a text, best first.

    The mask may be written as any tokenizer's (`MASKS`). With several masks each is filled on its own, and the others
    stay as they are.

    Returns:
        for each mask, for each of `top_k` candidates: `score` (probability), `token` (id), `token_str`, `sequence`.

    Raises:
        UserError: there is no mask in the text, or it is too long.
    """
    if tokenizer.mask_token is None:
        raise UserError("the model fills masks, but its tokenizer has no mask token.")
    for mask in MASKS:
        text = text.replace(mask, tokenizer.mask_token)
    ids = encode(tokenizer, text).to(model.device)
    positions = (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not positions:
        raise UserError(f'no mask in "{text}".\nWrite {tokenizer.mask_token} where a word is to be filled in.')
    longest = max_positions(model)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(f"the text has {ids.shape[1]} tokens and the model only {longest} positions.")
    probabilities = model(input_ids=ids).logits[0, positions].float().softmax(-1)  # [M, V]
    # The vocabulary of the model may be padded beyond the tokenizer's.
    scores, tokens = probabilities[:, : len(tokenizer)].topk(min(top_k, len(tokenizer)))
    # Special tokens are left out of the text, but for the other masks.
    hidden = set(tokenizer.all_special_ids) - ({tokenizer.mask_token_id} if len(positions) > 1 else set())

    def candidate(position: int, score: float, token: int) -> dict[str, Any]:
        sequence = ids[0].tolist()
        sequence[position] = token
        text = tokenizer.decode([other for other in sequence if other not in hidden]).strip()
        return {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": text}

    return [
        [candidate(position, score, token) for score, token in zip(*row, strict=True)]
        for position, *row in zip(positions, scores.tolist(), tokens.tolist(), strict=True)
    ]


@torch.no_grad()
def unmask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seed: int,
    /,
    *,
    max_new_tokens: int = 100,
    steps: int | None = None,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.95,
) -> list[str]:
    """Fills the masks of a text, or continues one without masks, by unmasking some tokens in each step.

    Each step is a forward pass over all tokens. If tokens are sampled, a random part of the masks is replaced (Sahoo
    et al. 2024); otherwise those of which the model is most certain, by their most likely tokens (Nie
    et al. 2025, section 2.4).

    Args:
        seed: decides what is sampled.
        max_new_tokens: the number of masks behind a text that has none.
        steps: the number of forward passes; by default one for each mask.
        do_sample: False takes the most likely tokens; temperature, top_k and top_p are of sampling.

    Returns:
        the whole text, in a list; a continuation ends where the model ends the text.

    Raises:
        UserError: the text is too long.
    """
    if tokenizer.mask_token is None:
        raise UserError("the model replaces masks, but its tokenizer has no mask token.")
    for mask in MASKS:
        text = text.replace(mask, tokenizer.mask_token)
    continues, longest = tokenizer.mask_token not in text, max_positions(model)
    if continues:
        length = encode(tokenizer, text).shape[1]
        if longest is not None and length >= longest:
            raise UserError(f"the text has {length} tokens and the model only {longest} positions.")
        text += tokenizer.mask_token * (max_new_tokens if longest is None else min(max_new_tokens, longest - length))
    ids = encode(tokenizer, text).to(model.device)  # [1, T]
    masks = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]  # [M]
    if longest is not None and ids.shape[1] > longest:
        raise UserError(f"the text has {ids.shape[1]} tokens and the model only {longest} positions.")
    began, count = int(masks[0]), min(steps or len(masks), len(masks))
    warpers = [TemperatureLogitsWarper(float(temperature)), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    random = torch.Generator().manual_seed(seed)
    for left in range(count, 0, -1):
        scores = model(input_ids=ids).logits[0, masks, : len(tokenizer)].float()  # [M, V]
        scores[:, tokenizer.mask_token_id] = -torch.inf
        if do_sample:
            for warper in warpers:
                scores = warper(ids, scores)
            tokens = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=random)[:, 0].to(ids.device)
            certainty = torch.rand(len(masks), generator=random).to(ids.device)
        else:
            certainty, tokens = scores.softmax(-1).max(-1)
        chosen = certainty.topk(-(-len(masks) // left)).indices
        ids[0, masks[chosen]] = tokens[chosen]
        masks = masks[(ids[0, masks] == tokenizer.mask_token_id).nonzero()[:, 0]]
    written = ids[0].tolist()
    if continues and tokenizer.eos_token_id in written[began:]:
        written = written[: written.index(tokenizer.eos_token_id, began)]
    return [tokenizer.decode(written, skip_special_tokens=True)]


def beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Returns the first 24 tokens of a block, special ones left out; fewer if a model has under 48 positions."""
    limit = min(24, (max_positions(model) or 48) // 2)
    return [token for token in ids if token not in tokenizer.all_special_ids][:limit]
