"""Weights sharded over two real processes: the same run."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import losses, metrics, run_verb, stop_after
from ..distributed.test_launch import start
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
    common += ["trainer.gradient_clip_val=0.1", "preprocess.test_size=0.07", "validation.max_documents=6"]
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
def test_in_bf16_with_accumulated_batches(train: Callable[..., Path], tmp_path: Path) -> None:
    """Gradients are summed over the ranks once a step."""
    common = [*DROPOUT_OFF["clm"], *COMMON, "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2"]
    one = train(*common, run_dir=tmp_path / "one")
    two = train(*common, *FSDP, run_dir=tmp_path / "two")
    for name, tolerance in (("train/loss", 1e-3), ("optim/grad_norm", 2e-2), ("val/loss", 1e-3)):
        expected, found = ([line[name] for line in metrics(run) if name in line] for run in (one, two))
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.long
def test_over_nodes_and_at_other_widths(train: Callable[..., Path], tmp_path: Path) -> None:
    """Two nodes of one rank each; then one device, unsharded; then two ranks of one node: all as on one device."""
    common = [*DROPOUT_OFF["clm"], *COMMON, "optim.schedule=constant"]
    one = train(*common, run_dir=tmp_path / "one")
    run = tmp_path / "run"
    words = [*common, *FSDP, "trainer.devices=1", "trainer.num_nodes=2", "trainer.max_steps=2", f"hydra.run.dir={run}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        start(
            *words,
            torchrun=True,
            options=["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"],
        )
        for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors
    run_verb("resume", run, "trainer.max_steps=4", "trainer=cpu")
    run_verb("resume", run, "trainer.max_steps=6", *FSDP)
    # Sums over ranks are made in another order, no more.
    expected, found = (
        {(line["step"], name): line[name] for line in metrics(r) for name in ("train/loss", "val/loss") if name in line}
        for r in (one, run)
    )
    assert found == pytest.approx({at: expected.get(at, loss) for at, loss in found.items()}, rel=1e-5)
    assert {(step, "train/loss") for step in range(1, 7)} <= found.keys()


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
