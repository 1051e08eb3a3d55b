"""Weights sharded over two real processes: the same run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import losses, metrics, stop_after
from .test_width import DROPOUT_OFF

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu"]
COMMON = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]


@pytest.mark.long
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_same_run_as_on_one_device(
    objective: str, train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    # A norm this small is always clipped; 10 documents give validation rows that do not divide by two.
    common = [f"objective={objective}", *DROPOUT_OFF[objective], *COMMON]
    common += ["trainer.gradient_clip_val=0.1", "preprocess.test_size=0.07"]
    one = train(*common, run_dir=tmp_path / "one")
    two = train(*common, *FSDP, run_dir=tmp_path / "two")
    for name in ("train/loss", "optim/grad_norm", "val/loss", "data/tokens_seen"):
        expected, found = ([line[name] for line in metrics(run) if name in line] for run in (one, two))
        assert found == pytest.approx(expected, rel=1e-5)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)
    # The certificate is of the exported weights, and a sharded evaluation of them gives it again.
    again = evaluate(f"model={two}", *FSDP)
    certificates = [json.loads((run / "certificate.json").read_text()) for run in (two, again)]
    assert certificates[0]["weights_hash"] == certificates[1]["weights_hash"]
    assert certificates[1]["totals"]["nll"] == pytest.approx(certificates[0]["totals"]["nll"], rel=1e-6)


@pytest.mark.long
def test_a_run_goes_on_sharded(train: Callable[..., Path], tmp_path: Path) -> None:
    """From the state of step 3 to step 6: weights, optimizer and schedule as if never stopped.

    Where no best weights are kept, the last ones are gathered for the export.
    """
    common = [*DROPOUT_OFF["clm"], *COMMON, *FSDP, "callbacks.checkpoints.keep_best=0"]
    whole = train(*common, run_dir=tmp_path / "whole")
    stop_after(whole, 3, tmp_path / "stopped")
    stopped = train(*common, run_dir=tmp_path / "stopped")
    assert losses(stopped) == losses(whole)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    last = torch.load(stopped / "checkpoints" / "step-6.ckpt", weights_only=True)["state_dict"]
    weight = "transformer.wpe.weight"
    assert torch.equal(weights[1][weight], last[f"model.{weight}"])
