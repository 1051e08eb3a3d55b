"""Averages of the weights against ones that are computed from the weights of each step."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lmlab.evaluation import records
from tests.conftest import TINY, losses, metrics, run_verb, stop_after

Train = Callable[..., Path]
EVERY_STEP = ["callbacks.series.steps=1", "trainer.val_check_interval=1", "optim.lr=0.05"]


def weights_of_steps(run: Path, last: int) -> list[dict[str, Tensor]]:
    return [load_file(run / "series" / f"step-{step}" / "model.safetensors") for step in range(last + 1)]


def ema(run: Path, decay: float, last: int) -> dict[str, Tensor]:
    average, *others = weights_of_steps(run, last)
    for number, weights in enumerate(others):
        now = min(decay, (1 + number) / (10 + number))
        average = {name: now * tensor + (1 - now) * weights[name] for name, tensor in average.items()}
    return average


def mean(run: Path, count: int) -> dict[str, Tensor]:
    last = weights_of_steps(run, 4)[-count:]
    return {name: sum(weights[name] for weights in last) / count for name in last[0]}  # type: ignore[misc]


def check_exported(run: Path, expected: dict[str, Tensor]) -> None:
    exported = load_file(run / "model" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_average_is_exported_and_certified(train: Train, tmp_path: Path) -> None:
    """The one that is monitored; and the trained weights are those of a run without averages."""
    words = ["callbacks.averages={ema: 0.15, last: 3}", "callbacks.checkpoints.monitor=val/last_loss"]
    run = train(*TINY, *EVERY_STEP, *words)
    rows = {row["step"]: row for row in metrics(run) if "val/loss" in row}
    assert min((step for step in rows if step), key=lambda step: rows[step]["val/last_loss"]) == 4
    check_exported(run, mean(run, 3))
    certificate = json.loads((run / "certificate.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert certificate["average"] == summary["average"] == {"kind": "last", "weights": 3, "every_steps": 1}
    assert summary["val/loss"] == rows[4]["val/last_loss"] != rows[4]["val/loss"]
    run_verb("evaluate", f"model={run}", f"hydra.run.dir={tmp_path / 'evaluation'}")
    totals = [records.read(place).certificate["totals"]["nll"] for place in (run, tmp_path / "evaluation")]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    without_series = [word for word in EVERY_STEP if not word.startswith("callbacks")]
    assert losses(run) == losses(train(*TINY, *without_series, run_dir=tmp_path / "plain"))


def test_the_best_of_weights_and_averages_is_exported(train: Train) -> None:
    words = ["callbacks=ema", "callbacks.averages.ema=0.15"]
    run = train(*TINY, *EVERY_STEP, *words, "optim.lr=0.3", "optim.schedule=constant")  # too high for the weights alone
    rows = [row for row in metrics(run) if row["step"] and "val/loss" in row]
    loss, kind, step = min((row[f"val/{kind}loss"], kind, row["step"]) for row in rows for kind in ("", "ema_"))
    summary = json.loads((run / "summary.json").read_text())
    assert (kind, summary["val/loss"]) == ("ema_", loss)
    assert summary["average"] == {"kind": "ema", "decay": 0.15}
    check_exported(run, ema(run, 0.15, step))


@pytest.mark.long
def test_a_run_with_averages_goes_on_bit_for_bit(train: Train, tmp_path: Path) -> None:
    run = train(*TINY, "callbacks.averages={ema: 0.9, last: 2, every_steps: 1}", "trainer.val_check_interval=2")
    stop_after(run, 2, tmp_path / "stopped")
    run_verb("resume", tmp_path / "stopped")
    assert losses(run) == losses(tmp_path / "stopped")
    logged = [
        [(row["val/ema_loss"], row["val/last_loss"]) for row in metrics(place) if "val/loss" in row]
        for place in (run, tmp_path / "stopped")
    ]
    assert logged[0] == logged[1]
