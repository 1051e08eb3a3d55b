"""A run whose length is a budget of tokens or of computation."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lmlab.config import short_run
from lmlab.config.short_run import Measurement
from lmlab.runs.directory import RunDirectory
from lmlab.runs.lifecycle import describe_finished
from tests.conftest import TINY, run_verb

Train = Callable[..., Path]
WORDS = [word for word in TINY if not word.startswith("trainer.max_steps")]
PER_STEP = 8 * 32  # tokens


@pytest.mark.parametrize("key", ["tokens", "tokens_per_parameter", "flops"])
def test_the_steps_that_a_budget_pays_for(key: str, train: Train) -> None:
    value = {"tokens": 1000, "tokens_per_parameter": 0.05, "flops": 1e8}[key]
    run = train(*WORDS, f"budget.{key}={value}")
    assert describe_finished(RunDirectory(run)).endswith(f" budget.{key}=…")
    summary = json.loads((run / "summary.json").read_text())
    if key == "flops":
        per_step = summary["flops"] / summary["steps"]
        assert value <= summary["flops"] * 1.02
        assert summary["flops"] < value + 1.1 * per_step
    else:
        parameters = AutoModelForCausalLM.from_pretrained(run / "model").num_parameters()
        tokens = value * (parameters if key == "tokens_per_parameter" else 1)
        assert summary["steps"] == math.ceil(tokens / PER_STEP)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("budget.tokens=1e4 trainer.max_steps=5", "budget.tokens and trainer.max_steps are two lengths of one run"),
        ("budget.tokens=1e4 trainer.max_epochs=5", "budget.tokens and trainer.max_epochs are two lengths of one run"),
        ("budget.tokens=1e4 budget.flops=1e9", "budget.tokens and budget.flops are two lengths of one run"),
        ("budget.tokens=1e4 ++trainer.max_epochs=5", "budget.tokens and trainer.max_epochs are two lengths of one run"),
        ("budget.tokens=1e4 budget.hours=1", "budget.tokens and budget.hours are two lengths of one run"),
        ("budget=3", "budget=3: it has to be a mapping"),
        ("budget.flops=inf", "it has to be a number, more than 0"),
        ("budget.flops=-1", "budget.flops=-1: it has to be a number, more than 0"),
    ],
)
def test_what_is_no_budget(
    words: str, said: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(*WORDS, *words.split())
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hours_are_steps_at_the_speed_of_a_short_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are worked out once, and stay what they are when the run goes on."""
    measured = Measurement(parameters=1, steps=[2.0, 0.5, 0.5], start=3.0, validation_batch=0.1)
    monkeypatch.setattr(short_run, "measure", lambda cfg, steps: measured)
    run = train(*WORDS, "budget.hours=0.01", "trainer.val_check_interval=4")
    rows = json.loads((run / "ledger.json").read_text())["validation"]["blocks"]
    batches = math.ceil(rows / 8)

    def seconds(steps: int) -> float:
        return 3 + 2 + (steps - 1) * 0.5 + (1 + math.ceil(steps / min(4, steps))) * batches * 0.1

    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert json.loads((run / "manifest.json").read_text())["budget_steps"] == steps
    assert describe_finished(RunDirectory(run)).endswith(" budget.hours=null trainer.max_steps=…")
    assert seconds(steps) <= 36 < seconds(steps + 1)
    for words, said in (
        (["resume", run, "budget.hours=2"], f"was begun with {steps} steps, and goes on at the speed that it has"),
        (["train", *WORDS, "budget.hours=1e-4"], "budget.hours=0.0001 is too short for this run"),
    ):
        with pytest.raises(SystemExit):
            run_verb(*words)
        assert said in capsys.readouterr().err
