"""Masked diffusion: tokens are hidden at a random rate and predicted from both sides, which bounds the likelihood.

Shapes: T positions of one text, N scored positions in it.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Lt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.objectives import Example
from lmlab.objectives.mlm import mask_id, random_words, uniform

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: its multiples modulo 2^64 fill the numbers below 2^64 evenly."""


class MaskedDiffusion:
    """Masked diffusion language modelling (Sahoo et al. 2024; Nie et al. 2025).

    For each sample a rate is drawn uniformly from `min_rate` to 1, and each of its tokens becomes the mask token with
    this probability. The loss of a sample is the sum of the nll of its hidden tokens, divided by the rate and by the
    number of all its tokens. Its expected value is an upper bound of the nll per token of a model that writes a text by
    unmasking one token after the other, in random order. An evaluation estimates this bound with less variance: see
    `lmlab.evaluation.rows.ElboRows`.

    The rates of consecutive samples are a low-discrepancy sequence (the Kronecker sequence of the golden ratio), so
    that those of a global batch are spread evenly, whatever its size, and the loss has less variance than with
    independent rates. The rate of a sample is a function of the seed and of its number in the run, and its mask is a
    function of the rate and the key.
    """

    metric = "bound_perplexity"
    auto_class = "AutoModelForMaskedLM"
    bidirectional = True
    target_shift = 0
    score = "elbo"
    writes = "unmask"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        min_rate: Annotated[float, Gt(0), Lt(1)] = 0.001,
        draws: Annotated[int, Ge(2)] = 8,
    ):
        """Checks that the tokenizer has a mask token.

        Args:
            min_rate: the least rate; at lower ones hardly a token is hidden, and its weight is 1 / rate.
            draws: the random masks of each held-out window, from which its bound is estimated; an even number.
        """
        self.mask_id = mask_id(tokenizer)
        self.min_rate, self.draws = min_rate, draws

    def rate(self, seed: int, number: int) -> float:
        """Returns the probability with which the tokens of a sample are hidden, by its number in the run."""
        first = int(random_words((seed, 0, 0), 0, 1)[3, 0])  # a word that decides no mask
        even = uniform(np.array([(first + number * GOLDEN) % 2**64], np.uint64))
        return self.min_rate + (1 - self.min_rate) * float(even[0])

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0, number: int = 0) -> Example:
        """Returns the example of a text: see `Objective` and `make_example`."""
        rate = self.rate(key[0], number)
        positions = np.flatnonzero(uniform(random_words(key, first, len(ids))[0]) < rate)
        inputs = ids.copy()
        inputs[positions] = self.mask_id
        return Example(inputs, positions, ids[positions], np.full(len(positions), 1 / rate), len(ids))

    def sample(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, str]:
        """Returns the first half of a block's beginning as text, and that text as the model continues it."""
        from lmlab.models.generation import first_half, unmask

        text = first_half(model, tokenizer, ids)
        return text, unmask(model, tokenizer, text, 0, max_new_tokens=40)[0]
