"""Weights sharded over two real processes: the same run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import metrics
from .test_width import DROPOUT_OFF

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu"]
COMMON = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]


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


def test_without_a_best_checkpoint_the_last_weights_are_gathered(train: Callable[..., Path]) -> None:
    run = train(*DROPOUT_OFF["clm"], *COMMON, *FSDP, "~callbacks.best")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weight = "transformer.wpe.weight"
    assert torch.equal(load_file(run / "model" / "model.safetensors")[weight], last[f"model.{weight}"])


RESUME = """
import sys
from pathlib import Path
from lmlab.config import build, check, compose
from lmlab.data.datamodule import BlocksDataModule
from lmlab.models.scored import rows_at_once
from lmlab.training.module import LMModule

run, checkpoint, losses = map(Path, sys.argv[1:])
cfg = compose.read_config(run)
cfg.callbacks, cfg.logger = {}, {}
data = build.prepare_data(cfg)
objective, model = build.build_model(cfg, data.tokenizer)
held_out = build.build_held_out(cfg, data, objective)
module = LMModule(
    model, check.build(cfg.optim, "optim"), 6, cfg.batch_size, 32, cfg.seed, len(data.validation),
    rows=rows_at_once(model, None, False),
)
data = BlocksDataModule(data.train, held_out, objective, held_out.pad_id, cfg.batch_size, 6, cfg.seed)
trainer = build.build_trainer(cfg, 6, 3, "resumed")
trainer.fit(module, data, ckpt_path=str(checkpoint))
assert trainer.global_step == 6
if trainer.is_global_zero:
    losses.write_text(repr(module.validations[6]["val/loss"]))
"""


def test_checkpoint_goes_on_sharded(train: Callable[..., Path], tmp_path: Path) -> None:
    """From step 3 of a checkpoint to step 6: weights, optimizer and schedule as if never stopped."""
    common = [*DROPOUT_OFF["clm"], *COMMON, *FSDP]
    whole = train(*common, run_dir=tmp_path / "whole")
    half = train(
        *common, "+callbacks.last.save_top_k=-1", "callbacks.last.filename='{step}'", run_dir=tmp_path / "half"
    )
    checkpoint = next((half / "checkpoints").glob("step=3.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["optimizer_states"]
    (tmp_path / "resume.py").write_text(RESUME)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-endpoint=localhost:0"]
    launch += ["--rdzv-backend=c10d", str(tmp_path / "resume.py"), str(half), str(checkpoint), str(tmp_path / "loss")]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [line["val/loss"] for line in metrics(whole) if "val/loss" in line][-1]
    assert float((tmp_path / "loss").read_text()) == pytest.approx(expected, rel=1e-6)
