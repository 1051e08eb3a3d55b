"""Masking against its own statistics (as ModernBERT's `test_mlm_masking.py`), and as a pure function of its key."""

import math

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lmlab.data.sampler import EVALUATION
from lmlab.data.tokenizers import bpe, char
from lmlab.errors import UserError
from lmlab.objectives.mlm import MaskedLM

LENGTH, SAMPLES = 512, 400


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe(["some words to make a few merges of, and some more of the same words"], vocab_size=280)


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[samples, T] ids, every one of the vocabulary among them; no original is the mask, to tell them apart."""
    ids = np.random.default_rng(0).integers(len(tokenizer), size=(SAMPLES, LENGTH), dtype=np.int32)
    ids[ids == tokenizer.mask_token_id] = tokenizer.eos_token_id
    ids.setflags(write=False)  # As the blocks that are mapped from a file.
    return ids


def about(count: int, trials: int, probability: float) -> bool:
    """Whether a count lies within 4.5 standard deviations of its mean: a chance of 7 in a million not to."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) <= 4.5 * deviation


@pytest.mark.parametrize(
    ("chosen", "mask", "random"),
    [(0.15, 0.8, 0.1), (0.3, 0.5, 0.25), (0.15, 1.0, 0.0), (0.15, 0.0, 1.0), (0.4, 0.0, 0.0), (1.0, 0.9, 0.1)],
)
def test_shares(
    tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray, chosen: float, mask: float, random: float
) -> None:
    """Tokens chosen, and of these masked, replaced and kept, in the shares asked for."""
    objective = MaskedLM(tokenizer, mask_probability=chosen, replace_mask=mask, replace_random=random)
    words = targets_in_all = masked = kept = 0
    replacements = np.zeros(len(tokenizer), np.int64)
    for sample, ids in enumerate(blocks):
        inputs, positions, targets = objective(ids, (0, 0, sample))
        is_special = np.isin(ids, tokenizer.all_special_ids)
        assert inputs.dtype == ids.dtype
        np.testing.assert_array_equal(targets, ids[positions])
        # Special tokens are never chosen, and what is not chosen is not touched.
        assert not is_special[positions].any()
        untouched = np.delete(np.arange(LENGTH), positions)
        np.testing.assert_array_equal(inputs[untouched], ids[untouched])
        words += int((~is_special).sum())
        targets_in_all += len(positions)
        masked += int((inputs[positions] == tokenizer.mask_token_id).sum())
        kept += int((inputs[positions] == targets).sum())
        others = inputs[positions][inputs[positions] != targets]
        replacements += np.bincount(others, minlength=len(tokenizer))
    # A random token may happen to be the mask, or the one that was there.
    by_chance = random / len(tokenizer)
    assert about(targets_in_all, words, chosen)
    assert about(masked, targets_in_all, mask + by_chance)
    assert about(kept, targets_in_all, 1 - mask - random + by_chance)
    # Every token of the vocabulary is drawn alike (chi-squared, within 5 standard deviations).
    replacements = np.delete(replacements, tokenizer.mask_token_id)
    if random:
        expected = replacements.sum() / len(replacements)
        statistic = ((replacements - expected) ** 2 / expected).sum()
        freedom = len(replacements) - 1
        assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
    else:
        assert replacements.sum() == 0


def test_every_kind_of_special_token_is_spared() -> None:
    """The unknown token and padding as well as end-of-text, though all that can be is chosen."""
    tokenizer = char(["abc"])
    text = "a<|endoftext|>b<pad>?c<mask>"
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    assert tokenizer.unk_token_id in ids
    _, positions, targets = MaskedLM(tokenizer, mask_probability=1.0)(ids, (0, 0, 0))
    assert positions.tolist() == [0, 2, 5]
    assert tokenizer.decode(targets) == "abc"


def test_pure_function_of_the_key(tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray) -> None:
    """The order of calls, other draws and other objects do not move a mask."""
    keys = [(0, 0, 0), (0, 0, 1), (5, 3, 2), (0, EVALUATION, 7)]
    one, other = MaskedLM(tokenizer), MaskedLM(tokenizer)
    first = {key: one(blocks[0], key) for key in keys}
    for key in reversed(keys):
        np.random.seed(1)
        again = other(blocks[0].copy(), key)
        for ours, theirs in zip(first[key], again, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_each_key_has_its_own_mask(tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray) -> None:
    """Another seed, epoch or sample, near or far, masks the same block independently."""
    objective = MaskedLM(tokenizer)
    ids = blocks[0]
    keys = [(seed, epoch, sample) for seed in (0, 1, 2) for epoch in (0, 1, 2) for sample in (0, 1, 2)]
    # Large ones that are the same number in float64.
    keys += [(2**53, EVALUATION, 0), (2**53 + 1, EVALUATION, 0), (2**63, 0, 0), (2**63 + 1, 0, 0)]
    keys += [(0, EVALUATION, sample) for sample in (0, 1, 2**40, 2**40 + 1)]
    masks = np.array([np.isin(np.arange(LENGTH), objective(ids, key)[1]) for key in keys])
    assert len({mask.tobytes() for mask in masks}) == len(keys)
    # Also under a shift of the positions: no stream is a piece of another.
    words = int((~np.isin(ids, tokenizer.all_special_ids)).sum())
    for shift in (0, 1, 2, 4):
        for i, mask in enumerate(masks):
            for other in masks[:i]:
                assert (mask & np.roll(other, shift)).sum() < 0.15**2 * words + 6 * math.sqrt(0.15**2 * words)


@pytest.mark.parametrize(
    "choices",
    [
        {"mask_probability": 0},
        {"mask_probability": 1.1},
        {"replace_mask": 0.8, "replace_random": 0.3},
        {"replace_mask": -0.1},
        {"replace_random": -0.1},
    ],
)
def test_senseless_shares(tokenizer: PreTrainedTokenizerBase, choices: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"objective.{next(iter(choices))}"):
        MaskedLM(tokenizer, **choices)


def test_tokenizer_without_a_mask() -> None:
    tokenizer = bpe(["a"], vocab_size=259)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        MaskedLM(tokenizer)
