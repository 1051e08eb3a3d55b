"""What a model says at each validation, and that a run is the same with it and without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab.objectives.clm import CausalLM
from lmlab.training.samples import Samples
from tests.conftest import TINY, TINY_MLM, Refused, losses, metrics, stop_after

Train = Callable[..., Path]
THREE = "callbacks.samples.count=3"
SIX = [*TINY, THREE, "trainer.max_steps=6", "trainer.val_check_interval=2"]


def said(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_a_causal_model_goes_on_with_held_out_texts(train: Train) -> None:
    run = train(*SIX)
    lines = said(run)
    assert [line["step"] for line in lines] == [step for step in (0, 2, 4, 6) for _ in range(3)]
    texts = [line["text"] for line in lines[:3]]
    assert len(set(texts)) == 3
    for start in range(0, 12, 3):
        assert [line["text"] for line in lines[start : start + 3]] == texts
    assert all(line["said"].startswith(line["text"][:5]) and len(line["said"]) > len(line["text"]) for line in lines)
    assert lines[0]["said"] != lines[-3]["said"]  # the weights are others


def test_a_masked_model_fills_a_mask(train: Train) -> None:
    lines = said(train(*TINY_MLM, "callbacks.samples.count=1"))
    assert [line["step"] for line in lines] == [0, 4]
    for line in lines:
        assert "<mask>" in line["text"]
        guesses = [float(guess.split()[0]) for guess in line["said"].splitlines()[1:]]
        assert len(guesses) == 3
        assert guesses == sorted(guesses, reverse=True)


@pytest.mark.long
@pytest.mark.parametrize("tiny", [TINY, TINY_MLM], ids=["causal", "masked"])
def test_samples_change_nothing(train: Train, tmp_path: Path, tiny: list[str]) -> None:
    """With dropout, which a wrong mode or a generator moved on would change."""
    overrides = [*tiny, THREE, "trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
    runs = [
        train(*overrides, run_dir=tmp_path / "with"),
        train(*overrides, "callbacks.samples.count=0", run_dir=tmp_path / "without"),
    ]
    assert not (runs[1] / "samples.jsonl").exists()
    assert losses(runs[0]) == losses(runs[1])
    kept = [torch.load(run / "checkpoints" / "step-6.ckpt", weights_only=True)["state_dict"] for run in runs]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    for name in ("generation_config.json", "config.json", "model.safetensors"):
        if (runs[0] / "model" / name).exists():
            assert (runs[0] / "model" / name).read_bytes() == (runs[1] / "model" / name).read_bytes()


@pytest.mark.long
def test_a_run_that_goes_on_has_each_sample_once(train: Train, tmp_path: Path) -> None:
    """From a state, and from the start where none was kept."""
    whole = train(*SIX, run_dir=tmp_path / "whole")
    for step in (4, 0):
        stopped = tmp_path / f"stopped-{step}"
        stop_after(whole, step, stopped)
        if not step:
            for best in stopped.glob("checkpoints/*"):
                best.unlink()
        assert {line["step"] for line in said(stopped)} == {0, 2, 4, 6}  # more than the state knows of
        train(*SIX, run_dir=stopped)
        assert said(stopped) == said(whole)


def test_a_model_that_can_not_speak_is_said_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no voice")

    monkeypatch.setattr(CausalLM, "sample", fails)
    run = train(*SIX)
    assert not (run / "samples.jsonl").exists()
    assert (run / "train.log").read_text().count("the model can't speak, so there are no samples: no voice") == 1


def test_a_full_disk_loses_no_sample(full_disk: Path, tmp_path: Path) -> None:
    samples = Samples(str(full_disk))
    line = {"step": 0, "text": "a", "said": "b" * 1000}
    filler = full_disk / "filler"
    filler.write_bytes(b"x" * 196 * 1024)
    for _ in range(8):
        samples.lines.append(line)
    before = said(full_disk)
    filler.unlink()
    samples.lines.append(line)
    assert len(before) < 8
    assert said(full_disk) == [line] * 9


@pytest.mark.long
def test_sampling_is_no_part_of_the_speed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(CausalLM, "sample", lambda *_: time.sleep(0.3) or ("a", "b"))
    run = train(*SIX, "trainer.log_every_n_steps=1")
    assert max(line["perf/step_ms"] for line in metrics(run) if "perf/step_ms" in line) < 300
    assert json.loads((run / "summary.json").read_text())["seconds"] < 4 * 3 * 0.3 / 2


def test_a_count_that_is_none(refused: Refused, tmp_path: Path) -> None:
    said = refused("train", *TINY, "callbacks.samples.count=-1", f"hydra.run.dir={tmp_path / 'run'}")
    assert "callbacks.samples.count=-1: it has to be a whole number, 0 or more." in said
