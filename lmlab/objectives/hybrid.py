"""Hybrid language modelling: one decoder learns to predict the next token, and hidden tokens from both sides.

Shapes: T positions of one text, N scored positions in it.
"""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from transformers import PreTrainedTokenizerBase

from lmlab.errors import UserError
from lmlab.objectives import Example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM, random_words, uniform


class HybridLM(CausalLM):
    """GPT-BERT's objective (Charpentier and Samuel 2024, section 2): causal and masked samples for one set of weights.

    A masked sample is hidden as BERT hides it, and seen in both directions, but a hidden token is predicted one
    position earlier, where a causal model predicts it too (masked next-token prediction, BehnamGhader et al. 2024):

    ```
                 causal                       masked
    tokens       The   cat   sat   on         The    cat     sat    on
    inputs       The   cat   sat   on         The   <mask>   sat    on
    positions     0     1     2                0
    targets      cat   sat   on               cat
    prefix       0                            4
    ```

    All samples of one length weigh the same in the loss, however many of their tokens are targets. So its expected
    value is `causal_share` times the mean nll of causal samples, plus the rest times that of masked ones. The authors
    get the same by devices that have samples of one kind each, and average the means of the devices. Whether a sample
    is causal is a pure function of its key.
    """

    prefixes = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        causal_share: Annotated[float, Ge(0), Le(1)] = 0.0625,
        validation_causal_share: Annotated[float, Ge(0), Le(1)] | None = None,
        mask_probability: Annotated[float, Gt(0), Le(1)] = 0.15,
        replace_mask: float = 0.8,
        replace_random: float = 0.1,
        validation_mask_probability: Annotated[float, Gt(0), Le(1)] | None = None,
        mask_schedule: Literal["constant", "linear", "cosine"] = "constant",
        final_mask_probability: Annotated[float, Gt(0), Le(1)] | None = None,
    ):
        """Checks the shares and the tokenizer.

        Args:
            tokenizer: has a mask token.
            causal_share: share of the samples that are causal; the others are masked. The authors' is 1 of 16.
            validation_causal_share: 1 to score held-out text by next-token prediction, which gives its perplexity, and
                0 to score it by masked next-token prediction. None: `causal_share`, if that is one of the two.
            mask_probability: as of `MaskedLM`, for the masked samples, and so are all other arguments.
        """
        held_out = causal_share if validation_causal_share is None else validation_causal_share
        if held_out not in (0, 1):
            raise UserError(
                f"held-out text is scored in one way, and not by a mixture (causal share {held_out}).\n"
                "Set objective.validation_causal_share=1 for next-token prediction, or 0 for masked tokens."
            )
        self.causal_share = causal_share
        self.masked = MaskedLM(
            tokenizer,
            mask_probability,
            replace_mask,
            replace_random,
            mask_schedule=mask_schedule,
            final_mask_probability=final_mask_probability,
        )
        if held_out == 0:
            self.metric, self.bidirectional = "mntp_perplexity", True

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0, progress: float = 1.0) -> Example:
        """Returns the example of a text: see `Objective` and `make_example`."""
        # The last of the words of the first position: those before it decide what is hidden.
        if uniform(random_words(key, 0, 1)[3])[0] < self.causal_share:
            return super().__call__(ids, key, first)
        inputs, positions, targets, *_ = self.masked(ids, key, first, progress)
        inputs[:1] = ids[:1]  # there is no position before it that could predict it, so it is not hidden
        positions, targets = positions[positions > 0] - 1, targets[positions > 0]
        count, possible = len(targets), len(ids) - 1
        weights = np.full(count, possible / max(1, count))
        return Example(inputs, positions, targets, weights, possible if count else 0, prefix=len(ids))
