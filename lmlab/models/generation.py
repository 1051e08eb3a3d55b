"""Makes a trained model write (guide, "Inference"): continue a text, fill masks or spans, or find replaced tokens.

Shapes: T tokens of a text, M masks in it, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmlab.errors import UserError, first_line, out_of_memory
from lmlab.hub import from_hub, split_revision
from lmlab.models import torch_module
from lmlab.models.checks import max_positions
from lmlab.models.formats import load_config, load_model, load_tokenizer
from lmlab.models.loading import auto_class_of
from lmlab.models.torch_module import TorchModule, TorchModuleConfig
from lmlab.objectives import sentinel, sentinel_ids

SAMPLING = {"max_new_tokens": 100, "do_sample": True, "top_k": 50, "top_p": 0.95}
"""The guide's options for `generate`."""
MASKS = ("<mask>", "[MASK]", "<|mask|>")
"""The masks that people write, whatever the tokenizer calls its own."""


def load(
    name: str, revision: str | None = None, make_module: Callable[..., Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer, for the task that the model was trained for.

    Args:
        name: hub id, ID@REVISION, directory, or `.gguf` file.
        revision: branch, tag or commit of a hub id.
        make_module: called with `tokenizer` and `auto_class`, makes an exported torch module as it was.
    """
    name, revision = split_revision(name, revision)
    with from_hub("model", name, "the first argument"):
        config = load_config(name, revision)
        auto_class = auto_class_of(config, name)
        auto = getattr(transformers, auto_class)
        tokenizer = load_tokenizer(name, revision)
        if isinstance(config, TorchModuleConfig):
            module = make_module and make_module(tokenizer=tokenizer, auto_class=auto_class)
            return torch_module.load(name, revision, config, module, tokenizer, auto_class), tokenizer
        return load_model(auto, name, revision, config)[0].eval(), tokenizer


def way_of_writing(model: PreTrainedModel) -> Literal["generate", "fill_mask", "infill", "detect"]:
    """Returns the name of the function of this file that suits a model, where nothing is known but its class."""
    if model.config.is_encoder_decoder:
        return "infill"
    if type(model).__name__.endswith("ForPreTraining"):
        return "detect"
    return "fill_mask" if type(model).__name__.endswith("ForMaskedLM") else "generate"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Returns the ids [1, T] of a text."""
    return torch.tensor([tokenizer(text, verbose=False).input_ids], dtype=torch.long)


def with_own_masks(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns a text with its masks, which may be written as any tokenizer's (`MASKS`), as this tokenizer's."""
    if tokenizer.mask_token is None:
        raise UserError("the model fills masks, but its tokenizer has no mask token.")
    for mask in MASKS:
        text = text.replace(mask, tokenizer.mask_token)
    return text


def check_length(model: PreTrainedModel, length: int, more: int = 0) -> None:
    """Refuses a text of so many tokens if the model has no positions for them, and for some more."""
    longest = max_positions(model)
    if longest is not None and length + more > longest:
        raise UserError(f"the text has {length} tokens and the model only {longest} positions.")


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
    sequences = generated(model, tokenizer, ids, seed, options)
    spelled = set(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) & set(tokenizer.all_special_ids)
    hidden = set(tokenizer.all_special_ids) - spelled
    return [
        tokenizer.decode([token for token in sequence if token not in hidden], skip_special_tokens=not spelled)
        for sequence in sequences
    ]


def generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, seed: int, options: dict[str, Any]
) -> list[list[int]]:
    """Returns what transformers' `generate` makes of ids [1, T]; arguments and errors are those of `generate` above."""
    length, longest = ids.shape[1], max_positions(model)
    written = 1 if model.config.is_encoder_decoder else length  # a decoder beside an encoder begins with one token
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = SAMPLING | {"pad_token_id": pad} | options
    if "max_length" in options:
        options["max_new_tokens"] = options.pop("max_length") - written
    if not isinstance(options["max_new_tokens"], int) or options["max_new_tokens"] < 1:
        raise UserError(f"max_new_tokens is a whole number, 1 or more, not {options['max_new_tokens']}.")
    check_length(model, length, 1)
    if longest is not None:
        options["max_new_tokens"] = min(options["max_new_tokens"], longest - written)
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
    sequences: list[list[int]] = (out if isinstance(out, torch.Tensor) else out.sequences).tolist()
    return sequences


@torch.no_grad()
def infill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int, /, **options: Any
) -> list[str]:
    """Writes the spans that are missing in a text, by an encoder-decoder that was trained to (T5's pretraining).

    A missing span is written as `<extra_id_0>`, the next as `<extra_id_1>` and so on, or each as a mask (`MASKS`).

    Args:
        seed: decides what is sampled; the result is the same for the same text and options.
        options: of transformers' `generate`, over `SAMPLING`.

    Returns:
        the text with the spans that the model wrote, `num_return_sequences` (1) times. A span is empty where it wrote
        none.

    Raises:
        UserError: the text is too long or misses no span, or `generate` refuses an option.
    """
    sentinels = sentinel_ids(tokenizer)
    for mask in MASKS:
        text = text.replace(mask, MASKS[0])
    first, *others = text.split(MASKS[0])
    missing = sum(sentinel(number) in text for number in range(len(sentinels)))
    if missing and others:
        raise UserError(f"{MASKS[0]} and {sentinel(0)} in one text: write all missing spans in one way.")
    missing = missing or len(others)
    if not 0 < missing < len(sentinels):
        raise UserError(
            f'{missing or "no"} missing spans in "{text}", and the tokenizer has {len(sentinels)} sentinels, one of '
            f"which ends the last span.\nWrite {sentinel(0)}, {sentinel(1)} and so on where spans are to be filled in."
        )
    text = "".join([first, *(f"{sentinel(number)}{part}" for number, part in enumerate(others))])
    ids = encode(tokenizer, text)
    # The last sentinel, or the end of the text, which ends what a model wrote that has seen no such sentinel.
    ends = [sentinels[missing], *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    texts = []
    for sequence in generated(model, tokenizer, ids, seed, {"eos_token_id": ends} | options):
        spans, span = dict[int, list[int]](), list[int]()
        for token in sequence:
            if token in sentinels:
                span = spans.setdefault(token, [])
            elif token not in tokenizer.all_special_ids:
                span.append(token)
        filled = [token for place in ids[0].tolist() for token in spans.get(place, [place])]
        texts.append(tokenizer.decode(filled, skip_special_tokens=True).strip())
    return texts


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
    text = with_own_masks(tokenizer, text)
    ids = encode(tokenizer, text).to(model.device)
    positions = (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not positions:
        raise UserError(f'no mask in "{text}".\nWrite {tokenizer.mask_token} where a word is to be filled in.')
    check_length(model, ids.shape[1])
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
def detect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[dict[str, Any]]:
    """Returns for each token of a text how probably it is not the token that stood there, by a discriminator (ELECTRA).

    Returns:
        for each token, special ones left out: `score` (probability), `token` (id), `token_str`; none if there is no
        token.

    Raises:
        UserError: the text is too long.
    """
    ids = encode(tokenizer, text).to(model.device)
    if ids.shape[1] == 0:
        return []
    check_length(model, ids.shape[1])
    scores = model(input_ids=ids).logits[0].float().sigmoid().tolist()
    return [
        {"score": score, "token": token, "token_str": tokenizer.decode([token])}
        for score, token in zip(scores, ids[0].tolist(), strict=True)
        if token not in tokenizer.all_special_ids
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
    text = with_own_masks(tokenizer, text)
    continues, longest = tokenizer.mask_token not in text, max_positions(model)
    if continues:
        length = encode(tokenizer, text).shape[1]
        check_length(model, length, 1)
        text += tokenizer.mask_token * (max_new_tokens if longest is None else min(max_new_tokens, longest - length))
    ids = encode(tokenizer, text).to(model.device)  # [1, T]
    masks = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]  # [M]
    check_length(model, ids.shape[1])
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


def first_half(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns the first half of a block's beginning as text, on one line."""
    tokens = beginning(model, tokenizer, ids)
    return " ".join(tokenizer.decode(tokens[: len(tokens) // 2]).split())


def beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Returns the first 24 tokens of a block, special ones left out; fewer if a model has under 48 positions."""
    limit = min(24, (max_positions(model) or 48) // 2)
    return [token for token in ids if token not in tokenizer.all_special_ids][:limit]
