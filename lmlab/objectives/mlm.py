"""Masked language modelling: hidden tokens are predicted from both sides.

Shapes: T positions of one block, N scored positions.
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmlab.errors import UserError


class MaskedLM:
    """BERT's masking (Devlin et al. 2019, section 3.1; guide, "Masked language modeling").

    Of the tokens that are not special, each is chosen with `mask_probability`. A chosen
    one becomes the mask token (`replace_mask`), a random token of the vocabulary
    (`replace_random`) or stays as it is (the rest), and is a target in each case.

    The masks are a pure function of the key, so they are the same for any number of
    workers and devices.
    """

    causal = False
    # Not comparable with a causal model's perplexity, so never under the same name.
    figure = "masked_perplexity"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_probability: float = 0.15,
        replace_mask: float = 0.8,
        replace_random: float = 0.1,
    ):
        if not 0 < mask_probability <= 1:
            raise UserError(f"objective.mask_probability must be over 0 and at most 1, not {mask_probability}.")
        if min(replace_mask, replace_random) < 0 or replace_mask + replace_random > 1:
            raise UserError(
                "objective.replace_mask and objective.replace_random are shares of the masked tokens: "
                f"at least 0, together at most 1, not {replace_mask} and {replace_random}."
            )
        if tokenizer.mask_token_id is None:
            raise UserError(
                "objective=mlm needs a tokenizer with a mask token, and this one has none.\n"
                "Choose a masked model's tokenizer (such as tokenizer.name=distilroberta-base), or tokenizer=bpe."
            )
        self.mask_probability = mask_probability
        self.replace_mask = replace_mask
        self.replace_random = replace_random
        self.mask_id = tokenizer.mask_token_id
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))
        self.vocab_size = len(tokenizer)

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`ids` [T] and key (seed, epoch, sample) to (inputs [T], scored positions [N], targets [N])."""
        seed, epoch, sample = key
        # Philox is counter-based: a (key, counter) names its stream, nothing is carried over.
        # A list with a number past 2^63 in it, as evaluation's epoch, would pass through float64.
        stream = np.array([seed, epoch], np.uint64)
        draw = np.random.Generator(np.random.Philox(key=stream, counter=[0, 0, 0, sample]))
        chosen, fate = draw.random((2, len(ids)))
        words = draw.integers(self.vocab_size, size=len(ids), dtype=ids.dtype)
        positions = np.flatnonzero((chosen < self.mask_probability) & ~np.isin(ids, self.special_ids))
        fate, words = fate[positions], words[positions]
        inputs = ids.copy()
        inputs[positions] = np.where(
            fate < self.replace_mask,
            self.mask_id,
            np.where(fate < self.replace_mask + self.replace_random, words, ids[positions]),
        )
        return inputs, positions, ids[positions]
