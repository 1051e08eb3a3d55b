"""Masking against its own statistics (as ModernBERT's `test_mlm_masking.py`), and as a pure function of its key."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import Batches
from lmlab.data.documents import continued, numbered
from lmlab.data.preprocess import Slices
from lmlab.data.sampler import EVALUATION, draws
from lmlab.data.tokenizers import bpe, char
from lmlab.data.tokens import FlatFile, FlatFiles
from lmlab.errors import UserError
from lmlab.objectives import make_example
from lmlab.objectives.mlm import MaskedLM, random_words, span_distribution, uniform

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
        inputs, positions, targets, *_ = objective(ids, (0, 0, sample))
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
    _, positions, targets, *_ = MaskedLM(tokenizer, mask_probability=1.0)(ids, (0, 0, 0))
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


@pytest.mark.parametrize("key", [(0, 0, 0), (3, EVALUATION, 2**40 + 1)])
@pytest.mark.parametrize("edges", [[0, 512], [0, 1, 2, 3, 512], [0, 128, 256, 384, 512], [0, 7, 300, 301, 511, 512]])
def test_masks_do_not_depend_on_the_cut(
    tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray, key: tuple[int, int, int], edges: list[int]
) -> None:
    """A piece that begins at `first` is masked as it is within the whole: which, by what, and with which targets."""
    objective, ids = MaskedLM(tokenizer, replace_mask=0.5, replace_random=0.3), blocks[1]
    inputs, positions, targets, *_ = objective(ids, key)
    assert {"masked", "replaced", "kept"} == {
        "masked" if word == tokenizer.mask_token_id else "kept" if word == target else "replaced"
        for word, target in zip(inputs[positions], targets, strict=True)
    }
    pieces = [(first, objective(ids[first:end], key, first)) for first, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate([piece.inputs for _, piece in pieces]), inputs)
    np.testing.assert_array_equal(np.concatenate([first + piece.positions for first, piece in pieces]), positions)
    np.testing.assert_array_equal(np.concatenate([piece.targets for _, piece in pieces]), targets)


def test_the_position_moves_the_mask(tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray) -> None:
    """The same words at another place of the sample are masked on their own terms."""
    objective, ids, key = MaskedLM(tokenizer), blocks[2], (0, 0, 0)
    masks = {objective(ids, key, first)[1].tobytes() for first in (0, 1, 2, 511, 512, 2**20)}
    assert len(masks) == 6


def test_what_stands_around_a_token_does_not_move_its_mask(
    tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray
) -> None:
    """Another text has its masks at the same places, but for special tokens."""
    objective, key = MaskedLM(tokenizer), (0, EVALUATION, 5)
    special = np.isin(blocks[3], tokenizer.all_special_ids) | np.isin(blocks[4], tokenizer.all_special_ids)
    one, other = (np.setdiff1d(objective(blocks[i], key)[1], np.flatnonzero(special)) for i in (3, 4))
    np.testing.assert_array_equal(one, other)


def test_random_words() -> None:
    """Any stretch is that of the whole; the words of a position are alike and apart (chi-squared, correlation)."""
    key = (1, EVALUATION, 9)
    whole = random_words(key, 0, 4000)
    assert (whole.shape, whole.dtype) == ((4, 4000), np.uint64)
    for first, count in ((0, 0), (0, 1), (1, 1), (3, 10), (3999, 1), (17, 2000)):
        np.testing.assert_array_equal(random_words(key, first, count), whole[:, first : first + count])
    shares = uniform(whole)
    assert shares.min() >= 0
    assert shares.max() < 1
    assert uniform(np.array([2**64 - 1], np.uint64))[0] < 1
    for row in shares:
        counts = np.histogram(row, 20, (0, 1))[0]
        assert abs(((counts - 200) ** 2 / 200).sum() - 19) < 5 * math.sqrt(2 * 19)
    # Also with those of the positions beside it.
    for shift in (0, 1, 2, 4):
        correlation = np.corrcoef(np.concatenate([shares, np.roll(shares, shift, axis=1)]))[:4, 4:]
        apart = correlation[~np.eye(4, dtype=bool)] if shift == 0 else correlation
        assert np.abs(apart).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize(
    "choices",
    [
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


SCHEDULES = {"linear": lambda done: done, "cosine": lambda done: math.sin(math.pi * done / 2) ** 2}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_of_the_share(tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray, name: str) -> None:
    """From the first probability to the last, and as at the end where no progress is given."""
    objective = MaskedLM(tokenizer, 0.4, mask_schedule=name, final_mask_probability=0.1)  # type: ignore[arg-type]
    ids, words = blocks[0], int((~np.isin(blocks[0], tokenizer.all_special_ids)).sum())
    masks = {}
    for done in (0.0, 0.25, 0.5, 1.0):
        wanted = 0.4 - 0.3 * SCHEDULES[name](done)
        found = [make_example(objective, ids, (0, 0, sample), progress=done).positions for sample in range(40)]
        assert about(sum(map(len, found)), 40 * words, wanted)
        masks[done] = set(found[0].tolist())
    assert masks[0.0] > masks[0.25] > masks[0.5] > masks[1.0]  # the same draws, against another probability
    assert set(objective(ids, (0, 0, 0)).positions.tolist()) == masks[1.0]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"mask_schedule": "linear"}, "objective.mask_schedule=linear needs an end: objective.final_mask_probability"),
        ({"final_mask_probability": 0.1}, "mask_schedule=constant has no objective.final_mask_probability"),
    ],
)
def test_schedule_without_an_end(tokenizer: PreTrainedTokenizerBase, choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MaskedLM(tokenizer, **choices)


def test_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """All tokens of a word are targets or none is; words are chosen, each with the probability."""
    text = " ".join(["unforgettable", "some", "words", "antidisestablishment,", "few"] * 60)
    encoding = tokenizer(text)
    ids, words = np.array(encoding["input_ids"], np.int32), np.array(encoding.word_ids())
    assert len(ids) > 1.5 * len(set(words))
    continues = continued(numbered(encoding.word_ids()))
    objective = MaskedLM(tokenizer, 0.3, replace_mask=0.5, replace_random=0.2, whole_word=True)
    chosen = 0
    for sample in range(20):
        inputs, positions, targets, *_ = make_example(objective, ids, (0, 0, sample), continues=continues)
        np.testing.assert_array_equal(targets, ids[positions])
        assert np.isin(words, words[positions]).sum() == len(positions)
        # What a token of a word becomes is drawn for each.
        assert (inputs != ids).sum() < len(positions)
        chosen += len(set(words[positions]))
    assert about(chosen, 20 * len(set(words)), 0.3)
    # A word that the text begins in the middle of is a word.
    begins = np.flatnonzero(continues)[0]
    _, positions, _, *_ = make_example(objective, ids[begins:], (0, 0, 0), continues=continues[begins:])
    rest = words[begins:]
    assert np.isin(rest, rest[positions]).sum() == len(positions)


def test_whole_words_need_a_fast_tokenizer(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="whole_word=true needs a fast tokenizer"):
        MaskedLM(tokenizer, whole_word=True)


def test_progress_is_that_of_the_optimizer_step(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Not of the micro batch: each step has the same masks however it is divided."""
    ids = np.random.default_rng(0).integers(4, len(tokenizer), 16 * 64, dtype=np.int32)
    ids.tofile(tmp_path / "train.tokens")
    blocks = Blocks(FlatFiles(FlatFile(tmp_path / "train.tokens")), Slices(1024, 64))
    objective = MaskedLM(tokenizer, 0.9, mask_schedule="linear", final_mask_probability=0.1)
    whole, parts = (Batches(blocks, objective, 0, 1, steps=5, accumulate=n) for n in (1, 4))
    shares = []
    for step in range(5):
        drawn = draws(0, 8 * step, 8, 16)
        targets = whole[step, drawn].targets
        divided = [parts[4 * step + part, drawn[2 * part : 2 * part + 2]].targets for part in range(4)]
        assert torch.equal(torch.cat(divided), targets)
        shares.append(len(targets) / (8 * 64))
    assert shares == pytest.approx([0.9, 0.74, 0.58, 0.42, 0.26], abs=0.08)


def spans_written_out(ids: np.ndarray, objective: MaskedLM, key: tuple[int, int, int]) -> list[int]:
    """The leader of each token's span, by loops; -1 for a token that is in none."""
    start, lengths = span_distribution(objective.span_length or 0, objective.mask_probability)
    words, found, reach = random_words(key, 0, len(ids)), [], 0
    leader = -1
    for i in range(len(ids)):
        if uniform(words[0, i : i + 1])[0] < start:
            length = 1 + sum(uniform(words[3, i : i + 1])[0] >= edge for edge in lengths)
            if i + length > reach:
                leader, reach = i, i + length
        found.append(leader if i < reach else -1)
    return found


def test_spans(tokenizer: PreTrainedTokenizerBase, blocks: np.ndarray) -> None:
    """SpanBERT's lengths, of which all tokens are replaced alike; as written out, and in the share asked for."""
    objective = MaskedLM(tokenizer, span_length=3.8, replace_mask=0.5, replace_random=0.3)
    _, lengths = span_distribution(3.8, 0.15)
    share = np.diff([0, *lengths, 1])
    np.testing.assert_allclose(share[1:] / share[:-1], 0.8, rtol=0.01)  # Joshi et al.: p = 0.2, at most 10
    assert share @ np.arange(1, 11) == pytest.approx(3.8)
    count = hidden = 0
    for sample, ids in enumerate(blocks[:60]):
        example = objective(ids, (1, 0, sample))
        leaders = np.array(spans_written_out(ids, objective, (1, 0, sample)))
        special = np.isin(ids, tokenizer.all_special_ids)
        np.testing.assert_array_equal(example.positions, np.flatnonzero((leaders >= 0) & ~special))
        words = random_words((1, 0, sample), 0, len(ids))
        for position in example.positions:
            fate, drawn = uniform(words[1])[leaders[position]], int(words[2, position]) % len(tokenizer)
            wanted = tokenizer.mask_token_id if fate < 0.5 else drawn if fate < 0.8 else ids[position]
            assert example.inputs[position] == wanted
        count, hidden = count + int((leaders >= 0).sum()), hidden + len(ids)
    assert count / hidden == pytest.approx(0.15, abs=0.01)
    # Wherever the text is cut.
    whole, tail = objective(ids, (1, 0, 3)), objective(ids[100:], (1, 0, 3), 100)
    np.testing.assert_array_equal(whole.inputs[100:], tail.inputs)


def test_spans_of_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """A word is hidden as a whole, and the share is of words."""
    ids = np.full(30_000, tokenizer("s", add_special_tokens=False)["input_ids"][0], np.int32)
    continues = np.arange(len(ids)) % 3 > 0  # words of three tokens
    objective = MaskedLM(tokenizer, whole_word=True, span_length=2.0, replace_mask=1.0, replace_random=0.0)
    example = make_example(objective, ids, (0, 0, 0), continues=continues)
    hidden = (example.inputs == tokenizer.mask_token_id).reshape(-1, 3)
    assert (hidden.all(axis=1) == hidden.any(axis=1)).all()
    assert hidden.all(axis=1).mean() == pytest.approx(0.15, abs=0.02)
    edges = np.flatnonzero(np.diff(hidden[:, 0].astype(int), prepend=0, append=0))
    assert np.diff(edges)[::2].mean() > 1.7


@pytest.mark.parametrize("length", [1.0, 5.5])
def test_spans_of_no_length(length: float, refused: Any) -> None:
    said = refused("train", "objective=mlm", f"objective.span_length={length}")
    assert "objective.span_length" in said
    assert "more than 1, less than 5.5" in said
