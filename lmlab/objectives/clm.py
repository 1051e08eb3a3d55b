"""Causal language modelling: each token is predicted from those before it.

Shapes: T positions of one block, N scored positions.
"""

import numpy as np


class CausalLM:
    """Next-token prediction (guide, "Causal language modeling").

    The label of position t is token t + 1, decided here, before any padding: a real
    end-of-text token is a target even where the tokenizer pads with the same id.
    """

    causal = True
    figure = "perplexity"

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`ids` [T] to (inputs [T], scored positions [N], targets [N]), N = T - 1; `key` is not needed."""
        return ids, np.arange(len(ids) - 1), ids[1:]
