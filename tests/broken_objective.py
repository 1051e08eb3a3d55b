"""Objectives whose targets are not where lmlab looks for them."""

import numpy as np

from lmlab.objectives import Example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM


class SecondNext(CausalLM):
    """The label of position t is token t + 2."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        return Example(ids, np.arange(len(ids) - 2), ids[2:])


class Parity(MaskedLM):
    """The label of a hidden token is whether its id is even."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        inputs, positions, targets = super().__call__(ids, key, first)
        return Example(inputs, positions, targets % 2)
