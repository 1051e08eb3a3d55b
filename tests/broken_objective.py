"""Objectives whose targets are not where lmlab looks for them, or that lack what lmlab asks for."""

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
        inputs, positions, targets, *_ = super().__call__(ids, key, first)
        return Example(inputs, positions, targets % 2)


class Causal:
    """An objective of lmlab 0.1."""

    causal, figure = True, "perplexity"

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int]) -> Example:
        return Example(ids, np.arange(len(ids) - 1), ids[1:])


class NewToken(CausalLM):
    """Begins each training text with a token that the tokenizer lacks."""

    held_out = CausalLM

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        return super().__call__(np.concatenate([[300], ids[1:]]), key)
