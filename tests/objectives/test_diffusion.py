"""Masked diffusion: its rates and weights, its steps against a loop written out, and what its models write."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule, collate
from lmlab.data.sampler import Draw, draws
from lmlab.errors import UserError
from lmlab.models.generation import unmask
from lmlab.models.loading import from_scratch
from lmlab.objectives.diffusion import MaskedDiffusion
from lmlab.optim import AdamW
from lmlab.training.module import LMModule

from ..conftest import TINY, TINY_MLM, losses, metrics, run_verb, stop_after
from ..training.test_reference import BATCH, SEED, SIZES, STEPS, LossesOf, blocks, fitted, tokenizer

__all__ = ["blocks", "tokenizer"]


def model_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = size | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return from_scratch(tokenizer, "AutoModelForMaskedLM", "roberta", config)


@pytest.mark.parametrize("first", [0, 7, 10**9])
def test_rates_of_a_batch_are_spread_evenly(first: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Wherever a batch begins, no rate is far from the nearest: independent ones leave gaps three times as large."""
    objective = MaskedDiffusion(tokenizer, min_rate=0.25)
    for size in (8, 64):
        rates = np.sort([objective.rate(5, number) for number in range(first, first + size)])
        assert 0.25 <= rates[0] < rates[-1] < 1
        assert np.diff(rates, prepend=0.25, append=1).max() < 0.75 * 2 / size
    assert objective.rate(5, first) != objective.rate(6, first)


def test_an_example(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens are hidden at the rate of their sample, end-of-text tokens too, and weigh 1 / rate of all tokens."""
    objective = MaskedDiffusion(tokenizer, min_rate=0.1)
    ids = np.arange(20_000, dtype=np.int32) % 80
    ids.setflags(write=False)
    for number in range(5):
        rate = objective.rate(1, number)
        example = objective(ids, (1, 0, number), number=number)
        hidden = len(example.positions)
        assert abs(hidden - rate * len(ids)) < 4.5 * math.sqrt(len(ids) * rate * (1 - rate))
        assert (example.inputs[example.positions] == tokenizer.mask_token_id).all()
        kept = np.setdiff1d(np.arange(len(ids)), example.positions)
        np.testing.assert_array_equal(example.inputs[kept], ids[kept])
        np.testing.assert_array_equal(example.targets, ids[example.positions])
        assert example.weights is not None
        np.testing.assert_allclose(example.weights, 1 / rate)
        assert example.divisor == len(ids)
        again = objective(ids, (1, 0, number), number=number)
        np.testing.assert_array_equal(again.inputs, example.inputs)


@pytest.mark.parametrize("rows", [None, 100])
def test_steps_are_those_of_a_loop_written_out(
    rows: int | None, tokenizer: PreTrainedTokenizerFast, blocks: Blocks, tmp_path: Path
) -> None:
    """The loss of LLaDA (Nie et al. 2025, algorithm 1): Σ over hidden tokens of nll / rate, over all tokens."""
    objective, optim = MaskedDiffusion(tokenizer, min_rate=0.05), AdamW(lr=5e-3, weight_decay=0.05, warmup_steps=4)
    model = model_of(tokenizer)
    reference = copy.deepcopy(model).train()
    optimizer, schedule = optim(reference, STEPS)
    expected = []
    for step in range(STEPS):
        batch = collate(blocks, draws(SEED, step * BATCH, BATCH, len(blocks)), objective, SEED, pad_id=92)
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        total: Tensor = torch.zeros(())
        logits = reference(input_ids=batch.input_ids, attention_mask=mask).logits
        for row, draw in enumerate(draws(SEED, step * BATCH, BATCH, len(blocks))):
            text = torch.from_numpy(np.array(blocks[draw.block])).long()
            hidden = batch.input_ids[row, : len(text)] == tokenizer.mask_token_id
            nll = F.cross_entropy(logits[row, : len(text)], text, reduction="none")
            total = total + (nll * hidden).sum() / objective.rate(SEED, step * BATCH + row)
        loss = total / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    logger = LossesOf(tmp_path)
    module = LMModule(model, optim, steps=STEPS, metric=objective.metric, logits_chunk_size=rows, **SIZES)
    data = BlocksDataModule(blocks, [], objective, 92, BATCH, STEPS, SEED)
    fitted(module, data, STEPS, logger=logger, log_every_n_steps=1)
    np.testing.assert_allclose(logger.losses, expected, rtol=1e-4)
    assert min(expected[-5:]) < 0.97 * max(expected[:5])
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2 * optim.lr)


def test_the_weighted_loss_has_the_mean_of_the_bound(tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights of 1 / rate make up for the tokens that are not hidden: their sum is the number of tokens, on average."""
    objective, ids = MaskedDiffusion(tokenizer), [np.arange(400, dtype=np.int32) % 80]
    batch = collate(ids, [Draw(0, 0, number) for number in range(600)], objective, 2, 92)
    assert batch.weights is not None
    assert batch.divisor == 600 * 400
    assert float(batch.weights.double().sum()) / batch.divisor == pytest.approx(1, abs=0.03)


def test_what_a_model_unmasks(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of(tokenizer).eval()
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[1]))
    for options, steps in (({"steps": 3}, 3), ({}, 10), ({"do_sample": False, "steps": 99}, 10)):
        passes.clear()
        (said,) = unmask(model, tokenizer, "w7", 0, max_new_tokens=10, **options)
        assert len(passes) == steps
        assert said.startswith("w7 ")
        assert (said,) == (*unmask(model, tokenizer, "w7", 0, max_new_tokens=10, **options),)
    (filled,) = unmask(model, tokenizer, "w7<mask>w9[MASK]", 1)
    assert tokenizer.mask_token not in filled
    assert len({unmask(model, tokenizer, "w7", seed, max_new_tokens=10)[0] for seed in range(5)}) > 1


def test_a_tokenizer_without_a_mask() -> None:
    class NoMask:
        mask_token_id = None

    with pytest.raises(UserError, match="this objective needs a tokenizer with a mask token"):
        MaskedDiffusion(NoMask())  # type: ignore[arg-type]


@pytest.mark.long
def test_a_run(
    train: Callable[..., Path], evaluate: Callable[..., Path], refused: Any, tmp_path: Path, capsys: Any
) -> None:
    """It goes on exactly, certifies a bound, is compared with exact metrics, and writes by unmasking."""
    short = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
    words = [*TINY_MLM[1:], *short, "objective=diffusion", "objective.draws=4"]
    whole = train(*words, run_dir=tmp_path / "whole")
    stop_after(whole, 3, tmp_path / "stopped")
    assert losses(train(*words, run_dir=tmp_path / "stopped")) == losses(whole)
    assert {name for row in metrics(whole) for name in row if name.startswith("val/")} == {
        *("val/loss", "val/bound_perplexity", "val/bound_bits_per_byte"),
        *("val/bound_bits_per_word", "val/bound_word_perplexity"),
    }
    causal = train(*TINY, *short, run_dir=tmp_path / "causal")
    own = json.loads((whole / "certificate.json").read_text())
    assert own["figure"] == "bound_perplexity"
    assert own["policy"]["elbo"] == {"draws": 4, "seed": 0}
    again, more = evaluate(whole), evaluate(whole, "draws=32", "seed=3")
    assert json.loads((again / "certificate.json").read_text())["figures"] == pytest.approx(own["figures"], rel=1e-6)
    sharper, error = json.loads((more / "certificate.json").read_text())["figures"], "nll_per_token_standard_error"
    apart = abs(sharper["nll_per_token"] - own["figures"]["nll_per_token"])
    assert 0 < apart < 5 * own["figures"][error]
    assert 0 < sharper[error] < own["figures"][error]

    capsys.readouterr()
    run_verb("compare", causal, whole, "--pairs", "--out", tmp_path / "comparison")
    shown = capsys.readouterr().out
    values = [json.loads((run / "certificate.json").read_text())["figures"] for run in (causal, whole)]
    exact, bound = values[0]["bits_per_byte"], values[1]["bound_bits_per_byte"]
    assert f"≤ {bound:.4f}" in shown
    assert f"≤ {exact:.4f}" not in shown
    assert "≤ Row 2 is an upper bound" in shown
    assert shown.count("undecided") == (3 if bound > exact else 0)

    run_verb("predict", whole, "Light is", "--max-new-tokens", 6, "--steps", 2)
    assert capsys.readouterr().out.startswith("Light is")
    run_verb("predict", whole, "Light is a <mask>.", "--greedy", "--json")
    assert "<mask>" not in json.loads(capsys.readouterr().out)["generated_text"]

    for command, said in {
        (
            "evaluate",
            causal,
            "score=elbo",
        ): "score=elbo hides tokens, which is for models that predict a token where it stands",
        ("evaluate", whole, "score=labels"): "held-out text of MaskedDiffusion is scored by score=elbo",
        ("evaluate", whole, "draws=3"): "draws=3: it has to be an even number",
        ("evaluate", causal, "draws=4"): "draws is for score=elbo",
        ("predict", causal, "Light is", "--steps", "3"): "--steps is for a run with objective=diffusion",
        ("predict", whole, "Light is", "--option", "num_beams=2"): "--option num_beams=2: it is for a causal model",
    }.items():
        assert said in refused(*command)


def test_the_bound_of_a_masked_model(train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path) -> None:
    """By default each document on its own; all of its tokens are scored."""
    run = train(*TINY_MLM, run_dir=tmp_path / "masked")
    found = json.loads((evaluate(run, "score=elbo", "draws=2") / "certificate.json").read_text())
    ledger = json.loads((run / "ledger.json").read_text())["validation"]
    assert found["policy"]["context"] == "document"
    assert found["totals"]["bytes"] == ledger["bytes"]
    assert found["totals"]["tokens"] == ledger["tokens"] - ledger["documents"]  # their ends are not scored
