"""The same numbers at any width: one batch of 8, two accumulated of 4, two processes of 4."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ..conftest import TINY, metrics

DROPOUT_OFF = {
    "clm": [*TINY, "model.config.attn_pdrop=0", "+model.config.embd_pdrop=0", "+model.config.resid_pdrop=0"],
    "mlm": [
        "tokenizer.vocab_size=300",
        "preprocess.block_size=32",
        "logger=file",
        "model.config.hidden_size=32",
        "model.config.num_hidden_layers=1",
        "model.config.num_attention_heads=2",
        "model.config.intermediate_size=64",
        "+model.config.hidden_dropout_prob=0",
    ],
}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(name, marks=pytest.mark.long if name == "mlm" else pytest.mark.longest)
        for name in ("clm", "mlm", "clm, documents apart", "diffusion", "hybrid", "electra")
    ],
)
def test_loss_and_perplexity_are_the_same_at_any_width(
    objective: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    objective, apart, _ = objective.partition(", documents apart")
    common = [
        f"objective={objective}",
        *(["preprocess.document_attention=true"] if apart else []),
        *DROPOUT_OFF["clm" if objective in ("clm", "hybrid") else "mlm"],
        "trainer.max_steps=12",
        "trainer.val_check_interval=5",  # no divisor of 12: the last steps are measured all the same
        "trainer.log_every_n_steps=1",
        "preprocess.test_size=0.07",  # 10 records: validation blocks that do not divide by two ranks
    ]
    widths = {
        "one": ["trainer=cpu"],
        "accumulated": ["trainer=cpu", "trainer.accumulate_grad_batches=2"],
        "ranks": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    }
    figures, counts = {}, {}
    for name, overrides in widths.items():
        run = train(*common, *overrides, run_dir=tmp_path / name)
        lines = metrics(run)
        figures[name] = (
            [line["train/loss"] for line in lines if "train/loss" in line],
            [line["optim/grad_norm"] for line in lines if "train/loss" in line],
            [line["val/loss"] for line in lines if "val/loss" in line],
            [line["data/tokens_seen"] for line in lines if "train/loss" in line],
        )
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 12
        assert ("flops" in summary) is (objective != "electra")  # of two models they are not counted
        counts[name] = [summary.get(count) for count in ("tokens", "flops", "parameters", "trainable_parameters")]
    assert counts["one"] == counts["accumulated"] == counts["ranks"]
    losses, norms, val_losses, tokens = figures["one"]
    assert len(losses) == 12
    assert len(val_losses) == 4  # before, at 5, at 10, at the end
    for name in ("accumulated", "ranks"):
        np.testing.assert_allclose(figures[name][0], losses, rtol=1e-5)
        np.testing.assert_allclose(figures[name][1], norms, rtol=1e-4)
        np.testing.assert_allclose(figures[name][2], val_losses, rtol=1e-5)
        assert figures[name][3] == tokens
