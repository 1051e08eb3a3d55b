"""Compares an exported model with the one that it came from, on ten texts.

Shapes: B texts, T tokens of the longest of them, V vocabulary.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.data.sources import SAMPLE
from lmlab.errors import UserError
from lmlab.models.checks import max_positions

LONGEST = 256
"""The greatest number of tokens of a text that are compared."""
TOLERANCE, SHARE = 1e-4, 1e-5
"""The largest difference between logits that is taken for rounding in float32: absolute, and as a share of the largest
logit. The larger of the two counts."""

Inputs = dict[str, Tensor]
"""Arguments of a model by their names, each [B, T]."""


def sample_texts() -> list[str]:
    """Returns ten texts of the corpus that comes with lmlab: five questions, each with its first answer."""
    records = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()[:5]]
    return [text for record in records for text in (record["title"], record["answers"]["text"][0])]


def model_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Inputs:
    """Returns texts as a model reads them, each cut at its longest input, with padding behind those that are shorter.

    The decoder of an encoder-decoder reads the same tokens as its encoder.
    """
    longest = min(max_positions(model) or LONGEST, LONGEST)
    rows = [tokenizer(text, verbose=False).input_ids[:longest] for text in texts]
    width, padding = max(map(len, rows)), tokenizer.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


@torch.no_grad()
def largest_difference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exported: Callable[[Inputs], Tensor]
) -> float:
    """Returns the largest difference between the logits of a model and of its export.

    It is taken over all tokens of ten texts, each by itself and all in one batch.

    Args:
        exported: returns the logits [B, T, V] of the exported model.

    Raises:
        UserError: the difference is more than rounding makes.
    """
    texts, largest, allowed = sample_texts(), 0.0, TOLERANCE
    for read in [*([text] for text in texts), texts]:
        inputs = model_inputs(model, tokenizer, read)
        logits, seen = model(**inputs).logits, inputs["attention_mask"].bool()
        difference = (logits - exported(inputs)).abs()[seen]
        allowed = max(allowed, SHARE * logits[seen].abs().max().item())
        largest = max(largest, difference.max().item()) if difference.isfinite().all() else float("inf")
    if largest > allowed:
        raise UserError(
            f"the exported {model.config.model_type} is not the model: its logits differ by up to {largest:.2g}, and "
            f"rounding makes {allowed:.2g} at most.\nNothing was written, as the exporter can't write this model."
        )
    return largest
