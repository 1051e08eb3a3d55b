"""Fill in the middle against the paper written out, its statistics, and runs of it."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lmlab.data.tokenizers import bpe, char
from lmlab.errors import UserError
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.fim import FillInTheMiddle
from lmlab.objectives.mlm import random_words

from ..conftest import TINY, losses, metrics, run_verb, stop_after

SENTINELS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe(["some words to make a few merges of, and some more of the same words"], 280, SENTINELS)


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Blocks of several lengths with several documents, some of them empty; one without an end-of-text token."""
    random = np.random.default_rng(0)
    made = [random.integers(3, 280, size=length, dtype=np.int32) for length in (1, 2, 3, 9, *[128] * 200)]
    for ids in made[:-1]:
        ids[random.random(len(ids)) < 0.05] = tokenizer.eos_token_id
    for ids in made:
        ids.setflags(write=False)  # as the blocks that are mapped from a file
    return made


def written_out(
    ids: list[int], rate: float, spm_rate: float, marks: list[int], end: int, words: list[list[int]]
) -> list[int]:
    """The paper's context-level form: split at end-of-text, rewrite each document, join, and trim."""
    pre, suf, mid = marks
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    joined: list[int] = []
    for number, document in enumerate(documents):
        if number > 0:
            joined.append(end)
        whether, first, second, order = words[number]
        if document and (whether >> 11) / 2**53 < rate:
            cuts = [first % (len(document) + 1), second % (len(document) + 1)]
            prefix, middle, suffix = [], [], []
            for place, token in enumerate(document):
                if place < min(cuts):
                    prefix.append(token)
                elif place < max(cuts):
                    middle.append(token)
                else:
                    suffix.append(token)
            if (order >> 11) / 2**53 < spm_rate:
                joined += [pre, suf, *suffix, mid, *prefix, *middle]
            else:
                joined += [pre, *prefix, suf, *suffix, mid, *middle]
        else:
            joined += document
    return joined[: len(ids)]


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.9, 0.5), (1.0, 1.0), (0.5, 0.0)])
def test_as_written_out(
    tokenizer: PreTrainedTokenizerBase, blocks: list[np.ndarray], rate: float, spm_rate: float
) -> None:
    objective = FillInTheMiddle(tokenizer, rate, spm_rate)
    marks, end = tokenizer.convert_tokens_to_ids(SENTINELS), tokenizer.eos_token_id
    for sample, ids in enumerate(blocks):
        key = (3, 1, sample)
        inputs, positions, targets, *_ = objective(ids, key)
        words = random_words(key, 0, len(ids) + 1).T.tolist()
        expected = written_out(ids.tolist(), rate, spm_rate, marks, end, words)
        assert inputs.tolist() == expected
        assert inputs.dtype == ids.dtype
        # Every token but the first is a target, sentinels included.
        assert positions.tolist() == list(range(len(ids) - 1))
        assert targets.tolist() == expected[1:]


def test_the_two_orders() -> None:
    """The drawing of the docstring, with words that make its cuts."""
    tokenizer = char(["abcdef"], SENTINELS)
    document = np.array(tokenizer("abcdef").input_ids, np.int32)
    words = np.array([0, 4, 2, 0], np.uint64)
    psm, spm = (FillInTheMiddle(tokenizer, 1.0, rate).rewrite(document, words) for rate in (0.0, 1.0))
    assert tokenizer.decode(psm) == "<|fim_prefix|>ab<|fim_suffix|>ef<|fim_middle|>cd"
    assert tokenizer.decode(spm) == "<|fim_prefix|><|fim_suffix|>ef<|fim_middle|>abcd"


def test_rate_0_is_next_token_prediction(tokenizer: PreTrainedTokenizerBase, blocks: list[np.ndarray]) -> None:
    for sample, ids in enumerate(blocks):
        for ours, theirs in zip(
            FillInTheMiddle(tokenizer, 0.0)(ids, (0, 0, sample)), CausalLM()(ids, (0, 0, sample)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_pure_function_of_the_key(tokenizer: PreTrainedTokenizerBase, blocks: list[np.ndarray]) -> None:
    """The order of calls, other draws and other objects do not move a cut, and each key has its own."""
    keys = [(0, 0, 0), (0, 0, 1), (5, 3, 2), (0, 7, 7)]
    one, other = FillInTheMiddle(tokenizer), FillInTheMiddle(tokenizer)
    first = {key: one(blocks[-2], key).inputs.tolist() for key in keys}
    np.random.seed(1)
    assert {key: other(blocks[-2].copy(), key).inputs.tolist() for key in reversed(keys)} == first
    assert len(set(map(tuple, first.values()))) == len(keys)


def test_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    """Documents rewritten, of these in the order SPM, and pairs of cuts, each within 4.5 standard deviations.

    The form is read off the tokens alone: behind the sentinels it is a document with its middle at the end.
    """
    objective, count = FillInTheMiddle(tokenizer, 0.7, 0.3), 4000
    pre, suf, mid = tokenizer.convert_tokens_to_ids(SENTINELS)
    document = np.array([10, 11, 12, 13], np.int32)
    end = np.array([tokenizer.eos_token_id], np.int32)
    # Empty documents before it in the block, and room for the sentinels behind it.
    block = np.concatenate([end, end, document, end, np.full(8, 20, np.int32)])
    forms: Counter[str] = Counter()
    cuts: Counter[tuple[int, int]] = Counter()
    for sample in range(count):
        tokens = objective(block, (1, 0, sample)).inputs.tolist()[2:]
        tokens = tokens[: tokens.index(end[0])]
        if tokens == document.tolist():
            forms["as it is"] += 1
            continue
        assert tokens[0] == pre
        assert sorted(tokens) == sorted([pre, suf, mid, *document])
        before, after = tokens[1 : tokens.index(suf)], tokens[tokens.index(suf) + 1 : tokens.index(mid)]
        assert before + tokens[tokens.index(mid) + 1 :] + after == document.tolist()
        forms["before first" if before else "suffix first"] += 1
        if before:
            cuts[len(before), len(document) - len(after)] += 1

    def about(found: int, trials: int, probability: float) -> bool:
        return abs(found - trials * probability) <= 4.5 * math.sqrt(trials * probability * (1 - probability))

    rewritten = count - forms["as it is"]
    assert about(rewritten, count, 0.7)
    # The prefix of PSM is empty, which looks like SPM, unless both cuts are behind the first of five places.
    assert about(forms["before first"], rewritten, 0.7 * 16 / 25)
    assert set(cuts) == {(one, two) for one in range(1, 5) for two in range(one, 5)}
    for (one, two), found in cuts.items():
        assert about(found, forms["before first"], (1 if one == two else 2) / 16)


def test_a_tokenizer_without_the_sentinels() -> None:
    with pytest.raises(UserError, match="lacks: <\\|fim_suffix\\|>, <\\|fim_middle\\|>") as error:
        FillInTheMiddle(char(["abc"], SENTINELS[:1]))
    assert len(str(error.value).splitlines()) <= 3
    with pytest.raises(UserError, match="three different tokens"):
        FillInTheMiddle(char(["abc"], SENTINELS), sentinels=[SENTINELS[0], SENTINELS[0], SENTINELS[2]])
    # Those of another name.
    FillInTheMiddle(char(["abc"], ["<a>", "<b>", "<c>"]), sentinels=["<a>", "<b>", "<c>"])


@pytest.mark.long
def test_a_run(train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on exactly after a stop, and is scored and compared as a causal run; its model keeps the sentinels."""
    words = [*TINY, "trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
    whole = train(*words, "objective=fim", run_dir=tmp_path / "whole")
    stop_after(whole, 3, tmp_path / "stopped")
    assert losses(train(*words, "objective=fim", run_dir=tmp_path / "stopped")) == losses(whole)
    # The same text, and the same tokens of it: what differs is what is trained on.
    with_the_tokens = f"tokenizer.extra_tokens=[{','.join(map(repr, SENTINELS))}]"
    causal = train(*words, with_the_tokens, run_dir=tmp_path / "causal")
    assert metrics(causal)[0]["val/perplexity"] == metrics(whole)[0]["val/perplexity"]
    assert metrics(causal)[1]["train/loss"] != metrics(whole)[1]["train/loss"]
    one, two = (json.loads((run / "certificate.json").read_text()) for run in (causal, whole))
    assert one["figure"] == two["figure"] == "perplexity"
    for key in ("policy", "data_hash", "tokenizer_hash"):
        assert one[key] == two[key]
    run_verb("evaluate", whole, f"hydra.run.dir={tmp_path / 'evaluation'}")
    again = json.loads((tmp_path / "evaluation" / "certificate.json").read_text())
    assert again["figures"]["perplexity"] == pytest.approx(two["figures"]["perplexity"], rel=1e-6)
    run_verb("compare", causal, whole, "--out", tmp_path / "comparison")
    capsys.readouterr()
    prompt = "<|fim_prefix|>The cat <|fim_suffix|> mat.<|fim_middle|>"
    run_verb("predict", whole, prompt, "--max-new-tokens", 5)
    shown = capsys.readouterr().out
    assert shown.startswith(prompt)
    assert len(shown) > len(prompt) + 1
