"""Masked language modelling: hidden tokens are predicted from both sides.

Shapes: T positions of one text, N scored positions in it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.errors import UserError
from lmlab.objectives import Example

LONGEST_SPAN = 10
"""The number of tokens, or words, of the longest span: SpanBERT's."""


class MaskedLM:
    """BERT's masking (Devlin et al. 2019, section 3.1; guide, "Masked language modeling").

    Of the tokens that are not special, each is chosen with `mask_probability`. A chosen token becomes the mask token
    (`replace_mask`), a random token of the vocabulary (`replace_random`) or stays as it is (the rest), and is a target
    in each case. With `whole_word`, words are chosen instead of tokens, with the same probability, and all tokens of a
    chosen word are (as in the whole-word models that Devlin et al. released in 2019).

    With `span_length`, spans of tokens are chosen, or of words with `whole_word` (SpanBERT, Joshi et al. 2020, section
    3.1). Their lengths have a geometric distribution over 1 to `LONGEST_SPAN`, and all tokens of a span are replaced in
    the same way. A span begins at each token with a probability by which `mask_probability` of the tokens are in one.

    What happens to a token is a pure function of the key, of its position (of a whole word, that of its first token;
    of a span, also those before it) and of the progress of the run. So masks are the same for any number of workers and
    devices, and wherever a text is cut, but that a word which is cut into two is two words, and that spans of words end
    where a text is cut.
    """

    metric = "masked_perplexity"  # it is no measure of a causal model's perplexity, so it has another name
    auto_class = "AutoModelForMaskedLM"
    bidirectional = True
    target_shift = 0

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_probability: Annotated[float, Gt(0), Le(1)] = 0.15,
        replace_mask: float = 0.8,
        replace_random: float = 0.1,
        validation_mask_probability: Annotated[float, Gt(0), Le(1)] | None = None,
        mask_schedule: Literal["constant", "linear", "cosine"] = "constant",
        final_mask_probability: Annotated[float, Gt(0), Le(1)] | None = None,
        whole_word: bool = False,
        span_length: Annotated[float, Gt(1), Lt(5.5)] | None = None,
        z_loss: Annotated[float, Ge(0)] = 0.0,
    ):
        """Checks the shares and the tokenizer.

        Args:
            tokenizer: has a mask token.
            mask_probability: share of the tokens that are targets, at the beginning of a run.
            replace_mask: share of the targets that become the mask token.
            replace_random: share of the targets that become a random token.
            validation_mask_probability: the share of held-out text that is a target (config/held_out.py builds another
                objective with it), so that runs which train with different ones can be compared. None: that of the end
                of training.
            mask_schedule: the way from `mask_probability` to `final_mask_probability` over the steps of a run: constant
                stays, linear is a straight line (Ankner et al. 2024), cosine half a cosine.
            final_mask_probability: share of the tokens that are targets at the end of a run, for a schedule.
            whole_word: True to choose whole words; words are what the tokenizer's own pre-tokenizer cuts a text into.
            span_length: mean number of tokens, or words, of the spans that are chosen; SpanBERT's is 3.8. None: no
                spans.
            z_loss: the coefficient of the z-loss (`lmlab.models.loss.score`), which is added to the loss of training.
        """
        if min(replace_mask, replace_random) < 0 or replace_mask + replace_random > 1:
            raise UserError(
                "objective.replace_mask and objective.replace_random are shares of the masked tokens: "
                f"at least 0, together at most 1, not {replace_mask} and {replace_random}."
            )
        if (mask_schedule == "constant") is not (final_mask_probability is None):
            raise UserError(
                f"objective.mask_schedule={mask_schedule} "
                + (
                    "needs an end: objective.final_mask_probability=…"
                    if final_mask_probability is None
                    else "has no objective.final_mask_probability: leave that out, or choose linear or cosine."
                )
            )
        if whole_word and not tokenizer.is_fast:
            raise UserError(
                "objective.whole_word=true needs a fast tokenizer, which knows the word of a token, and this is a slow "
                "one.\nLeave it out, or name a tokenizer that has a tokenizer.json."
            )
        self.mask_probability = mask_probability
        self.final_mask_probability = mask_probability if final_mask_probability is None else final_mask_probability
        self.mask_schedule = mask_schedule
        self.whole_word, self.span_length = whole_word, span_length
        self.z_loss, self.replace_mask = z_loss, replace_mask
        self.replace_random = replace_random
        self.mask_id = mask_id(tokenizer)
        self.vocab_size = len(tokenizer)
        self.special = np.isin(np.arange(self.vocab_size), tokenizer.all_special_ids)
        """[V] bool: the special tokens, which are no targets."""

    def probability(self, progress: float) -> float:
        """Returns the share of the tokens that are targets after a share of the steps of a run."""
        done = (1 - math.cos(math.pi * progress)) / 2 if self.mask_schedule == "cosine" else progress
        return self.mask_probability + done * (self.final_mask_probability - self.mask_probability)

    def __call__(
        self,
        ids: np.ndarray,
        key: tuple[int, int, int],
        first: int = 0,
        progress: float = 1.0,
        continues: np.ndarray | None = None,
    ) -> Example:
        """Returns the example of a text: see `Objective` and `make_example`."""
        # A span may begin before the text, where that is cut.
        before = min(first, LONGEST_SPAN - 1) if self.span_length and not self.whole_word else 0
        words = random_words(key, first - before, before + len(ids))
        begins = np.arange(words.shape[1])  # the first token of the word of each token
        if self.whole_word:
            assert continues is not None
            begins = np.maximum.accumulate(np.where(continues, 0, begins))
        if self.span_length:
            chosen, leader = self.spans(words, begins, self.probability(progress))
        else:
            chosen, leader = uniform(words[0, begins]) < self.probability(progress), np.arange(words.shape[1])
        chosen, leader, token = chosen[before:], leader[before:], words[2, before:]
        positions = np.flatnonzero(chosen & ~self.special[ids])
        share = uniform(words[1, leader[positions]])
        tokens = (token[positions] % np.uint64(self.vocab_size)).astype(ids.dtype)
        inputs = ids.copy()
        inputs[positions] = np.where(
            share < self.replace_mask,
            self.mask_id,
            np.where(share < self.replace_mask + self.replace_random, tokens, ids[positions]),
        )
        return Example(inputs, positions, ids[positions])

    def spans(self, words: np.ndarray, begins: np.ndarray, probability: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns which tokens are in a span [T] bool, and the token that each one's span begins with [T].

        Args:
            words: [4, T] random words.
            begins: [T] the first token of the word of each token.
            probability: the share of the tokens, or words, that are in a span.
        """
        assert self.span_length is not None
        start, lengths = span_distribution(self.span_length, probability)
        firsts, word = np.unique(begins, return_inverse=True)  # [words], and the word of each token
        numbers = np.arange(len(firsts))
        length = 1 + np.searchsorted(lengths, uniform(words[3, firsts]), side="right")
        ends = np.where(uniform(words[0, firsts]) < start, numbers + length, 0)
        reach = np.maximum.accumulate(ends)
        longer = np.diff(reach, prepend=0) > 0  # of spans that overlap, the one that reaches furthest leads
        leader = np.maximum.accumulate(np.where(longer, numbers, 0))
        return (reach > numbers)[word], firsts[leader][word]

    def sample(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, str]:
        """Returns a block's beginning as text with a mask in its middle, and the three best tokens for it, on lines."""
        from lmlab.models.generation import beginning, fill_mask

        tokens = beginning(model, tokenizer, ids)
        half = len(tokens) // 2
        before, hidden, after = map(tokenizer.decode, (tokens[:half], tokens[half : half + 1], tokens[half + 1 :]))
        space = " " if hidden.startswith(" ") else ""
        text = " ".join(f"{before}{space}{tokenizer.mask_token}{after}".split())
        candidates = fill_mask(model, tokenizer, text, top_k=3)[0]
        return text, "\n".join([text, *(f"  {c['score']:.3f}  {c['token_str'].strip()}" for c in candidates)])


@cache
def span_distribution(mean: float, probability: float) -> tuple[float, np.ndarray]:
    """Returns the probability with which a span begins at a token, and the distribution of its length.

    Args:
        mean: the mean length.
        probability: the share of the tokens that are to be in a span.

    Returns:
        The probability, and the cumulative distribution of the lengths 1 to `LONGEST_SPAN` without its last entry.
    """
    numbers = np.arange(1, LONGEST_SPAN + 1)

    def shares(ratio: float) -> np.ndarray:
        powers = ratio ** (numbers - 1)
        return np.asarray(powers / powers.sum())

    def outside(start: float) -> float:  # of the spans that could reach a token, none begins
        return float(np.prod(1 - start * longer))

    ratio = bisect(lambda ratio: float(shares(ratio) @ numbers) - mean)
    longer = shares(ratio)[::-1].cumsum()[::-1]  # the share of spans of at least each length
    return bisect(lambda start: 1 - outside(start) - probability), shares(ratio).cumsum()[:-1]


def bisect(function: Callable[[float], float]) -> float:
    """Returns the zero of an increasing function in 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return high


def mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the tokenizer's mask token.

    Raises:
        UserError: it has none.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            "this objective needs a tokenizer with a mask token, and this one has none.\n"
            "Choose a masked model's tokenizer (such as tokenizer.name=distilroberta-base), or tokenizer=bpe."
        )
    return int(tokenizer.mask_token_id)


def random_words(key: tuple[int, int, int], first: int, count: int) -> np.ndarray:
    """Returns four random 64-bit words for each of `count` positions from `first` on: [4, count] uint64.

    Philox (Salmon et al. 2011) makes four words from a key, here (seed, epoch), and a counter, here (position, sample).
    Nothing is carried over, so any part of a sample gets the words that it gets as a part of the whole.
    """
    seed, epoch, sample = key
    # A list with a number past 2^63 in it, such as evaluation's epoch, would pass through float64.
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[first, 0, 0, sample])
    return generator.random_raw(4 * count).reshape(count, 4).T


def some(words: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` of the indices of random words [n], ascending; each choice is equally likely."""
    chosen: np.ndarray = np.sort(np.argsort(words, kind="stable")[:count])
    return chosen


def uniform(words: np.ndarray) -> np.ndarray:
    """Turns random 64-bit words into float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53
