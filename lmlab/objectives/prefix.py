"""Prefix language modelling: a text is continued, and its beginning is seen in both directions.

Shapes: T positions of one text, N scored positions in it.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le, Lt

from lmlab.errors import UserError
from lmlab.objectives import Example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import random_words, uniform


class PrefixLM(CausalLM):
    """The prefix language model of Raffel et al. 2020 (section 3.2), UL2's S-denoiser (Tay et al. 2022, section 3.1).

    The first tokens of a text, the prefix, are seen from all positions. Those after it are the targets, each predicted
    from the prefix and from what stands before it, as with a prefix of 2:

    ```
    tokens       The   cat   sat   on
    inputs       The   cat   sat   on
    positions           1     2
    targets            sat   on
    ```

    The length of a sample's prefix is a pure function of its key. One of 0 or 1 is plain next-token prediction.
    """

    prefixes = True

    def __init__(
        self,
        min_prefix_share: Annotated[float, Ge(0), Lt(1)] = 0.0,
        max_prefix_share: Annotated[float, Ge(0), Le(1)] = 1.0,
        prefix_share: Annotated[float, Ge(0), Lt(1)] | None = None,
        validation_prefix_share: Annotated[float, Ge(0), Lt(1)] | None = None,
    ):
        """Checks the shares.

        Args:
            min_prefix_share: the least share of a text that its prefix is.
            max_prefix_share: the largest; the share is drawn uniformly between the two.
            prefix_share: the share, instead of one that is drawn.
            validation_prefix_share: the share of held-out text. 0 gives its perplexity. None: `prefix_share`.
        """
        if min_prefix_share > max_prefix_share:
            raise UserError(
                f"objective.min_prefix_share={min_prefix_share} is more than "
                f"objective.max_prefix_share={max_prefix_share}: the share is drawn between the two."
            )
        held_out = prefix_share if validation_prefix_share is None else validation_prefix_share
        if held_out is None:
            raise UserError(
                "all of held-out text has a prefix of one share, and none is given.\n"
                "Set objective.validation_prefix_share=0 for plain next-token prediction."
            )
        self.min_prefix_share, self.max_prefix_share = min_prefix_share, max_prefix_share
        self.prefix_share = prefix_share
        if held_out > 0:
            self.metric = "prefix_perplexity"

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        """Returns the example of a text: see `Objective`."""
        share = self.prefix_share
        if share is None:
            drawn = uniform(random_words(key, 0, 1)[0])[0]
            share = self.min_prefix_share + drawn * (self.max_prefix_share - self.min_prefix_share)
        prefix = int(share * len(ids))  # a share below 1 leaves a token to predict
        positions = np.arange(max(0, prefix - 1), len(ids) - 1)
        return Example(ids, positions, ids[positions + 1], prefix=prefix)
