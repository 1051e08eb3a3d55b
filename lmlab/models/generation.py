"""Let a model speak (guide, "Inference"): go on with a text, or fill its masks."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lmlab.errors import UserError
from lmlab.hub import from_hub
from lmlab.models.loading import is_causal, positions

# The guide's sampling.
SAMPLING = {"max_new_tokens": 100, "do_sample": True, "top_k": 50, "top_p": 0.95}
# Masks people write, whatever the tokenizer calls its own.
MASKS = ("<mask>", "[MASK]", "<|mask|>")


def load(name: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, of the task it was trained for, by hub id or directory."""
    with from_hub("model", name, "the first argument"):
        auto: Any = AutoModelForCausalLM if is_causal(name, revision) else AutoModelForMaskedLM
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        return auto.from_pretrained(name, revision=revision, trust_remote_code=False).eval(), tokenizer


def fills_masks(model: PreTrainedModel) -> bool:
    """Whether the model fills masks rather than going on with a text."""
    return type(model).__name__.endswith("ForMaskedLM")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Ids [1, T] of a text."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids.long()


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int, /, **options: Any
) -> list[str]:
    """The text and what the model goes on with; as many as `num_return_sequences` (1).

    Args:
        seed: decides what is sampled; equal for equal text and options.
        options: of transformers' `generate`, over the guide's sampling.
    """
    ids = encode(tokenizer, text)
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UserError("an empty text, and the tokenizer has no token to begin with: give some words.")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = SAMPLING | {"pad_token_id": pad} | options
    if "max_length" in options:
        options["max_new_tokens"] = options.pop("max_length") - ids.shape[1]
    if not isinstance(options["max_new_tokens"], int) or options["max_new_tokens"] < 1:
        raise UserError(f"max_new_tokens is a whole number, 1 or more, not {options['max_new_tokens']}.")
    room = (positions(model) or ids.shape[1] + options["max_new_tokens"]) - ids.shape[1]
    if room < 1:
        raise UserError(f"the text has {ids.shape[1]} tokens and the model only {positions(model)} positions.")
    options["max_new_tokens"] = min(options["max_new_tokens"], room)
    if not options["do_sample"]:
        options = {key: value for key, value in options.items() if key not in ("top_k", "top_p", "temperature")}
    torch.manual_seed(seed)
    ids = ids.to(model.device)
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **options)
    except (ValueError, TypeError) as error:
        # transformers checks the options' names and values itself.
        raise UserError(f"generate refused its options: {error}") from error
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return [tokenizer.decode(sequence, skip_special_tokens=True) for sequence in sequences]


@torch.no_grad()
def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[list[dict[str, Any]]]:
    """The most likely words for each mask of a text, best first (guide, "Inference").

    The mask may be written as any tokenizer's. With several masks each is filled on its
    own, the others left as they are.

    Returns:
        per mask, per candidate: `score` (probability), `token` (id), `token_str`, `sequence`.
    """
    if tokenizer.mask_token is None:
        raise UserError("the model fills masks, but its tokenizer has no mask token.")
    for mask in MASKS:
        text = text.replace(mask, tokenizer.mask_token)
    ids = encode(tokenizer, text).to(model.device)
    places = (ids[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not places:
        raise UserError(f'no mask in "{text}".\nWrite {tokenizer.mask_token} where a word is to be filled in.')
    longest = positions(model)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(f"the text has {ids.shape[1]} tokens and the model only {longest} positions.")
    probabilities = model(input_ids=ids).logits[0, places].float().softmax(-1)
    # The vocabulary may be padded beyond the tokenizer.
    scores, tokens = probabilities[:, : len(tokenizer)].topk(min(top_k, len(tokenizer)))
    filled = []
    for place, row_scores, row_tokens in zip(places, scores.tolist(), tokens.tolist(), strict=True):
        candidates = []
        for score, token in zip(row_scores, row_tokens, strict=True):
            sequence = ids[0].clone()
            sequence[place] = token
            candidates.append(
                {
                    "score": score,
                    "token": token,
                    "token_str": tokenizer.decode([token]),
                    "sequence": readable(tokenizer, sequence, keep=len(places) > 1),
                }
            )
        filled.append(candidates)
    return filled


def readable(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, keep: bool) -> str:
    """The text of ids; `keep` leaves masks in it, and drops other special tokens all the same."""
    hidden = set(tokenizer.all_special_ids) - ({tokenizer.mask_token_id} if keep else set())
    return tokenizer.decode([token for token in ids.tolist() if token not in hidden]).strip()


def speak(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, str]:
    """A line of text made from the ids of a block, and what the model makes of it."""
    model.eval()
    # At most half of what the model has room for.
    words = [token for token in ids if token not in tokenizer.all_special_ids][: min(24, (positions(model) or 48) // 2)]
    half = len(words) // 2
    if not fills_masks(model):
        text = " ".join(tokenizer.decode(words[:half]).split())
        return text, generate(model, tokenizer, text, 0, max_new_tokens=40)[0]
    before, hidden, after = (
        tokenizer.decode(part) for part in (words[:half], words[half : half + 1], words[half + 1 :])
    )
    gap = " " if hidden.startswith(" ") else ""
    text = " ".join(f"{before}{gap}{tokenizer.mask_token}{after}".split())
    candidates = fill_mask(model, tokenizer, text, top_k=3)[0]
    return text, "\n".join([text, *(f"  {c['score']:.3f}  {c['token_str'].strip()}" for c in candidates)])
