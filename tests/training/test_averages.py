"""Averages of the weights against ones that are computed from the weights of each step."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lmlab.evaluation import records
from tests.conftest import TINY, losses, metrics, run_verb, stop_after

Train = Callable[..., Path]
EVERY_STEP = ["callbacks.series.steps=1", "trainer.val_check_interval=1", "optim.lr=0.05"]


def weights_of_steps(run: Path) -> Iterator[dict[str, Tensor]]:
    for step in range(5):
        yield load_file(run / "series" / f"step-{step}" / "model.safetensors")


def ema(run: Path, decay: float) -> dict[str, Tensor]:
    first, *others = weights_of_steps(run)
    for number, weights in enumerate(others):
        now = min(decay, (1 + number) / (10 + number))
        first = {name: now * tensor + (1 - now) * weights[name] for name, tensor in first.items()}
    return first


def mean(run: Path, count: int) -> dict[str, Tensor]:
    last = [*weights_of_steps(run)][-count:]
    return {name: sum(weights[name] for weights in last) / count for name in last[0]}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (["callbacks=ema", "callbacks.averages.ema=0.15"], {"kind": "ema", "decay": 0.15}, lambda run: ema(run, 0.15)),
        (["callbacks.averages.last=3"], {"kind": "last", "weights": 3, "every_steps": 1}, lambda run: mean(run, 3)),
    ],
    ids=["ema", "last"],
)
def test_an_average_is_exported_and_certified(
    words: list[str],
    kind: dict[str, object],
    expected: Callable[[Path], dict[str, Tensor]],
    train: Train,
    tmp_path: Path,
) -> None:
    run = train(*TINY, *EVERY_STEP, *words, f"callbacks.checkpoints.monitor=val/{kind['kind']}_loss")
    rows = {row["step"]: row for row in metrics(run) if "val/loss" in row}
    of_average = {step: row[f"val/{kind['kind']}_loss"] for step, row in rows.items()}
    best = min((step for step in rows if step), key=lambda step: of_average[step])
    assert best == 4  # which the averages here are of
    exported = load_file(run / "model" / "model.safetensors")
    for name, tensor in expected(run).items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6)
    certificate = json.loads((run / "certificate.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert certificate["average"] == summary["average"] == kind
    assert summary["val/loss"] == of_average[4] != rows[4]["val/loss"]
    run_verb("evaluate", f"model={run}", f"hydra.run.dir={tmp_path / 'evaluation'}")
    totals = [records.read(place).certificate["totals"]["nll"] for place in (run, tmp_path / "evaluation")]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    # The weights that are trained are those of a run without it.
    names = ("train/loss", "val/loss")
    plain = train(*TINY, *EVERY_STEP, run_dir=tmp_path / "plain")
    assert [[row.get(name) for name in names] for row in metrics(run)] == [
        [row.get(name) for name in names] for row in metrics(plain)
    ]


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


def test_the_better_of_weights_and_averages_is_exported(train: Train) -> None:
    run = train(*TINY, "callbacks.averages.ema=0.999", "optim.lr=1e-3")  # so slow that the weights are better
    summary = json.loads((run / "summary.json").read_text())
    last = [row for row in metrics(run) if "val/loss" in row][-1]
    assert ("average" in summary) == (last["val/ema_loss"] < last["val/loss"])
    assert summary["val/loss"] == min(last["val/ema_loss"], last["val/loss"])
