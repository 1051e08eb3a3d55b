"""Causal and masked samples of one decoder, against a loop in plain torch, and as a pure function of the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmlab.data.sampler import EVALUATION
from lmlab.errors import UserError
from lmlab.evaluation.scoring import Scorer
from lmlab.objectives import Example, check_shapes, make_example
from lmlab.objectives.hybrid import HybridLM
from lmlab.objectives.mlm import MaskedLM

from ..conftest import TINY, Refused
from ..evaluation.test_scoring import HARD, held_out_of, model_for, prepared, tokenizer_named
from .reference import agrees, decoder, logits_of, tokenizer
from .test_mlm import about

LENGTH, SAMPLES = 64, 800
IDS = np.random.default_rng(0).integers(90, size=LENGTH, dtype=np.int32)


def hybrid(causal_share: float = 0.5, validation_causal_share: float | None = 1.0, **choices: Any) -> HybridLM:
    return HybridLM(tokenizer(), causal_share, validation_causal_share, **choices)


def loss_of_step(model: PreTrainedModel, samples: list[tuple[np.ndarray, Example]]) -> Tensor:
    """Each sample weighs as many tokens as causal prediction has targets in it."""
    total, tokens = torch.zeros(()), 0
    for ids, example in samples:
        truth = torch.from_numpy(ids.astype(np.int64))
        if example.prefix == 0:
            np.testing.assert_array_equal(example.inputs, ids)
            logits = logits_of(model, ids, lambda i, j: j <= i)
            nll = F.cross_entropy(logits[:-1], truth[1:])
        else:
            hidden = torch.from_numpy(example.positions + 1)
            if len(hidden) == 0:
                continue
            logits = logits_of(model, example.inputs, lambda i, j: True)
            nll = F.cross_entropy(logits[hidden - 1], truth[hidden])
        total, tokens = total + (len(ids) - 1) * nll, tokens + len(ids) - 1
    return total / tokens


@pytest.mark.parametrize(("architecture", "attention", "rows"), [("gpt2", "sdpa", None), ("llama", "eager", 100)])
def test_training_agrees_with_a_plain_loop(architecture: str, attention: str, rows: int | None, tmp_path: Path) -> None:
    _, examples = agrees(hybrid(mask_probability=0.3), decoder(architecture, attention), loss_of_step, rows, tmp_path)
    assert len({example.prefix for example in examples}) > 2  # none, and those of blocks of several lengths


@pytest.mark.parametrize("share", [0.0, 0.0625, 0.5, 1.0])
def test_shares(share: float) -> None:
    """Samples are causal in the share asked for, and in the others tokens are targets in the share asked for."""
    objective = hybrid(share, mask_probability=0.3)
    examples = [objective(IDS, (0, 0, sample)) for sample in range(SAMPLES)]
    masked = [example for example in examples if example.prefix]
    assert about(SAMPLES - len(masked), SAMPLES, share)
    assert about(sum(len(example.targets) for example in masked), len(masked) * (LENGTH - 1), 0.3)
    for example in examples:
        check_shapes(objective, example, len(IDS))
        np.testing.assert_array_equal(example.targets, IDS[example.positions + 1])
        # What is no target is not touched.
        np.testing.assert_array_equal(np.delete(example.inputs - IDS, example.positions + 1), 0)
        assert (example.prefix, example.weights is None) in ((0, True), (LENGTH, False))


def test_hides_what_a_masked_model_would() -> None:
    """The same tokens by the same draws, but for the first, which no position stands before."""
    ours, theirs = hybrid(0.0, mask_probability=0.4), MaskedLM(tokenizer(), mask_probability=0.4)
    for sample in range(20):
        one, other = ours(IDS, (0, 1, sample)), theirs(IDS, (0, 1, sample))
        np.testing.assert_array_equal(one.inputs[1:], other.inputs[1:])
        assert one.inputs[0] == IDS[0]
        np.testing.assert_array_equal(one.positions + 1, other.positions[other.positions > 0])


def test_pure_function_of_the_key() -> None:
    keys = [(seed, epoch, sample) for seed in (0, 5) for epoch in (0, 3, EVALUATION) for sample in range(20)]
    first = {key: hybrid()(IDS, key) for key in keys}
    for key in reversed(keys):
        for ours, theirs in zip(first[key], hybrid()(IDS.copy(), key), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    kinds = np.array([example.prefix > 0 for example in first.values()]).reshape(6, 20)
    assert len({tuple(row) for row in kinds}) == 6


def test_a_schedule_hides_fewer_tokens_at_the_end() -> None:
    objective = hybrid(0.0, mask_probability=0.4, mask_schedule="linear", final_mask_probability=0.1)
    counts = [len(make_example(objective, IDS, (0, 0, 0), progress=done).targets) for done in (0.0, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_texts(length: int) -> None:
    """One without a target counts for nothing."""
    for sample in range(20):
        example = hybrid(0.0)(IDS[:length], (0, 0, sample))
        check_shapes(hybrid(), example, length)
        assert example.divisor == (length - 1 if len(example.targets) else 0)


def test_held_out_text_is_scored_as_a_causal_model_is(
    train: Callable[..., Path], evaluate: Callable[..., Path]
) -> None:
    """The perplexity of a run is that of its weights under objective=clm, to the last bit."""
    run = train("objective=hybrid", "objective.causal_share=0.5", *TINY)
    causal = evaluate(run, "objective=clm")
    ours, theirs = (json.loads((path / "certificate.json").read_text()) for path in (run, causal))
    assert [found["policy"]["objective"]["_target_"].rpartition(".")[2] for found in (ours, theirs)] == [
        "HybridLM",
        "CausalLM",
    ]
    assert ours["figure"] == theirs["figure"] == "perplexity"
    assert ours["totals"] == theirs["totals"]
    assert ours["figures"] == theirs["figures"]


@pytest.mark.parametrize("context", ["blocks", "document"])
@torch.no_grad()
def test_held_out_text_with_hidden_tokens(context: str, tmp_path: Path) -> None:
    """Each target is predicted one position earlier, by a model that sees all of the window, also its last token."""
    tokens, model = tokenizer_named("bpe"), model_for("bpe", "gpt2")
    objective = HybridLM(tokens, 0.0, mask_probability=0.3)
    assert objective.metric == "mntp_perplexity"
    held_out = held_out_of(prepared(HARD, tokens, tmp_path, 16), objective, 16, context=context)
    assert held_out.facts["policy"]["masks_seed"] == 0
    text, targets = held_out.documents.tokens, list[int]()
    for first in range(0, len(held_out), 3):  # rows of several lengths, so that there is padding
        indices = list(range(first, min(first + 3, len(held_out))))
        expected = []
        for row in (held_out.rows.row(int(index)) for index in held_out.order[indices]):
            assert len(row.inputs) <= 16
            hidden = row.positions + 1
            np.testing.assert_array_equal(row.targets, text[row.tokens])
            # All else is the text, with its last token.
            start = int(row.tokens[0] - hidden[0]) if len(hidden) else 0
            shown = np.delete(np.arange(len(row.inputs)), hidden)
            if len(hidden) and context == "blocks":
                np.testing.assert_array_equal(row.inputs[shown], text[start + shown])
                assert (start + len(row.inputs)) % 16 == 0 or start + len(row.inputs) == len(text)
            logits = logits_of(model, row.inputs, lambda i, j: True)[row.positions]
            truth = torch.from_numpy(row.targets.astype(np.int64))
            expected.append(F.cross_entropy(logits, truth, reduction="none"))
            targets += row.tokens.tolist()
        batch = held_out[indices]
        torch.testing.assert_close(Scorer(model, 1).score(batch).nll, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert len(targets) == len(set(targets)) > 0.15 * len(text)


def test_a_mixture_on_held_out_text_is_refused() -> None:
    with pytest.raises(UserError, match="validation_causal_share=1 for next-token prediction, or 0 for masked"):
        hybrid(0.5, None)
    assert (hybrid(0.0, None).metric, hybrid(1.0, None).metric) == ("mntp_perplexity", "perplexity")
    assert (hybrid(0.5, 0.0).metric, hybrid(0.5, 1.0).metric) == ("mntp_perplexity", "perplexity")


def test_refused_before_training(refused: Refused) -> None:
    said = refused("train", "objective=hybrid", "objective.validation_causal_share=0.5", *TINY)
    assert "held-out text is scored in one way" in said
    said = refused("train", "objective=hybrid", "attention=flash_attention_2", *TINY)
    assert "attention=flash_attention_2 takes no mask" in said
    assert "attention=sdpa" in said


def test_tokenizer_without_a_mask() -> None:
    without = tokenizer()
    without.mask_token = None
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        HybridLM(without, validation_causal_share=1.0)
