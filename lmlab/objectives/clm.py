"""Causal language modelling: each token is predicted from those before it.

Shapes: T positions of one text, N = T - 1 scored positions.
"""

from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge

from lmlab.objectives import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalLM:
    """Next-token prediction (guide, "Causal language modeling").

    The target at position t is token t + 1. It is taken before any padding, so a real end-of-text token is a target
    even where the tokenizer pads with the same id.
    """

    metric = "perplexity"
    auto_class = "AutoModelForCausalLM"
    bidirectional = False
    target_shift = 1
    z_loss = 0.0

    def __init__(self, z_loss: Annotated[float, Ge(0)] = 0.0):
        """Takes the coefficient of the z-loss (`lmlab.models.loss.score`), which is added to the loss of training."""
        self.z_loss = z_loss

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        """Returns the example of a text: see `Objective`. Nothing is drawn at random."""
        return Example(ids, np.arange(len(ids) - 1), ids[1:])

    def sample(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> tuple[str, str]:
        """Returns the first half of a block's beginning as text, and that text as the model continues it."""
        from lmlab.models.generation import first_half, generate

        text = first_half(model, tokenizer, ids)
        return text, generate(model, tokenizer, text, 0, max_new_tokens=40)[0]
