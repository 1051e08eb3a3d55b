"""Weights sharded over two real processes: the same run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmlab.training.checkpoint_io import load_checkpoint, load_weights

from ..conftest import losses, metrics, run_verb, stop_after
from ..distributed.test_launch import on_two_nodes, start
from ..processes import begin, wait_for
from .test_width import DROPOUT_OFF

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu"]
COMMON = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]


@pytest.mark.parametrize(
    "objective", [pytest.param("clm", marks=pytest.mark.long), pytest.param("mlm", marks=pytest.mark.longest)]
)
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


@pytest.mark.longest
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
    """Two nodes of one rank each; one device; two ranks of one node; two whole copies: all as on one device."""
    common = [*DROPOUT_OFF["clm"], *COMMON, "optim.schedule=constant", "trainer.max_steps=8"]
    one = train(*common, run_dir=tmp_path / "one")
    run = tmp_path / "run"
    words = [*common, *FSDP, "trainer.max_steps=2", f"hydra.run.dir={run}"]
    on_two_nodes(*words, "trainer.devices=1", "trainer.num_nodes=2", ranks=1)
    run_verb("resume", run, "trainer.max_steps=4", "trainer=cpu")
    run_verb("resume", run, "trainer.max_steps=6", *FSDP)
    run_verb("resume", run, "trainer.max_steps=8", "trainer=ddp", "trainer.accelerator=cpu")
    # Sums over ranks are made in another order, no more.
    expected, found = (
        {(line["step"], name): line[name] for line in metrics(r) for name in ("train/loss", "val/loss") if name in line}
        for r in (one, run)
    )
    assert found == pytest.approx({at: expected.get(at, loss) for at, loss in found.items()}, rel=1e-5)
    assert {(step, "train/loss") for step in range(1, 9)} <= found.keys()


@pytest.mark.long
def test_replicated_over_nodes(train: Callable[..., Path], tmp_path: Path) -> None:
    """Each of two nodes holds the model, sharded over its two ranks."""
    common = [*DROPOUT_OFF["clm"], *COMMON, "trainer.max_steps=3", "trainer.gradient_clip_val=0.1"]
    one, run = train(*common, run_dir=tmp_path / "one"), tmp_path / "run"
    words = [*common, *FSDP, "trainer.strategy=hsdp", "trainer.num_nodes=2", f"hydra.run.dir={run}"]
    on_two_nodes(*words, ranks=2)
    for name in ("train/loss", "optim/grad_norm", "val/loss"):
        expected, found = ([line[name] for line in metrics(r) if name in line] for r in (one, run))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_what_rank_zero_refuses_ends_the_others_under_torchrun(tmp_path: Path) -> None:
    """It alone has the weights that a model is checked with; torchrun kills one that waits on after half a minute."""
    words = [*DROPOUT_OFF["clm"], *FSDP, "preprocess.block_size=4096", f"hydra.run.dir={tmp_path / 'run'}"]
    run = start(*words, torchrun=True)
    _, errors = run.communicate(timeout=120)
    assert errors.count("error: preprocess.block_size=4096 is more than the") == 1
    assert "forcefully" not in errors


@pytest.mark.long
def test_a_disk_that_is_full_to_one_rank_is_full_to_all(tmp_path: Path) -> None:
    """None waits for a rank that has given up."""
    words = [*DROPOUT_OFF["clm"], *COMMON, *FSDP, "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    run = start(*words, "+callbacks.full._target_=tests.broken_callback.HasNoRoomForFolders")
    shown, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "step-2.ckpt could not be kept, as the disk is full" in shown + errors
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.long
def test_a_run_goes_on_sharded(
    train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed while it writes a checkpoint in the background, with the one before that damaged: as if never stopped.

    Where no best weights are kept, the last ones are gathered for the export.
    """
    common = [*DROPOUT_OFF["clm"], *COMMON, *FSDP, "callbacks.checkpoints.keep_best=0", "trainer.val_check_interval=2"]
    common += ["callbacks.checkpoints.background=true", "+callbacks.slow._target_=tests.broken_callback.SavesSlowly"]
    whole = train(*common, run_dir=tmp_path / "whole")
    run, out = tmp_path / "run", tmp_path / "out"
    process = begin("train", *common, f"hydra.run.dir={run}", out=out)
    wait_for((run / "checkpoints" / ".step-6.ckpt.partial" / "shard-00002-model-00001-of-00001.safetensors").exists)
    process.kill()
    process.join()
    assert sorted(path.name for path in (run / "checkpoints").glob("step*")) == ["step-2.ckpt", "step-4.ckpt"]
    damaged = run / "checkpoints" / "step-4.ckpt" / "shard-00001-model-00001-of-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    capfd.readouterr()
    train(*common, run_dir=run)
    shown = capfd.readouterr().out
    assert f"step-4.ckpt is damaged (the checksum of {damaged.name} is another)" in shown
    assert "from step 2." in shown
    assert losses(run) == losses(whole)
    assert not list(run.rglob("*.partial"))
    weights = [load_file(place / "model" / "model.safetensors") for place in (whole, run)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    path = run / "checkpoints" / "step-6.ckpt"
    last = load_weights(path, load_checkpoint(path))
    assert all(torch.equal(last[f"model.{name}"], weight) for name, weight in weights[1].items())
    # Before its end, a run is evaluated by the weights so far.
    stop_after(run, 4, tmp_path / "stopped")
    part = json.loads((evaluate(f"model={tmp_path / 'stopped'}") / "certificate.json").read_text())["totals"]
    validations = {line["step"]: line["val/loss"] for line in metrics(run) if "val/loss" in line}
    assert part["nll"] / part["tokens"] == pytest.approx(validations[4], rel=1e-5)
