"""A run that is killed, at whatever instant, ends as the one that was not (promises 1, 4 and 6)."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import TINY, metrics
from ..processes import begin, finish, wait_for

# Some documents to train on: an epoch is a few steps of two accumulated batches.
COMMON = [
    *TINY,
    "preprocess.test_size=0.5",
    "preprocess.max_records=2",
    "batch_size=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=3",  # a report's steps lie on both sides of a state
    "callbacks.checkpoints.every_steps=3",
    "optim.schedule=cosine",
    "optim.warmup_steps=3",
]
STEPS = "trainer.max_steps=14"
MODULE, CHECKPOINT = "lmlab.training.module.LMModule", "lmlab.training.checkpoint"


def content(run: Path) -> dict[str, Any]:
    """All that a run leaves which is no matter of time: to be the same, bit for bit."""
    named = {path.name: torch.load(path, weights_only=True) for path in (run / "checkpoints").glob("*.ckpt")}
    lines = [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in metrics(run)]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "weights": load_file(run / "model" / "model.safetensors"),
        "kept": {
            name: {key: kept.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers", "validations")}
            for name, kept in named.items()
        },
        "metrics": lines,
        "summary": {name: summary[name] for name in summary if name.startswith("val/") or name in ("steps", "tokens")},
        "totals": json.loads((run / "certificate.json").read_text())["totals"],
    }


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("undisturbed")
    assert finish("train", *COMMON, STEPS, f"hydra.run.dir={place / 'run'}", out=place / "out") == 0
    found = content(place / "run")
    assert [line["step"] for line in found["metrics"] if "val/loss" in line] == [0, 4, 8, 12, 14]
    assert [line["step"] for line in found["metrics"] if "train/loss" in line] == [3, 6, 9, 12, 14]
    return found


# Each in the n-th call of a function, before it does anything, or when it has written half a file.
INSTANTS = {
    "before the first step": [f"{MODULE}.training_step", 1],
    "before the first state": [f"{MODULE}.training_step", 4],
    "between two accumulated batches": [f"{MODULE}.training_step", 14],
    "before the optimizer steps": [f"{MODULE}.configure_gradient_clipping", 7],
    "in the validation before training": ["lmlab.evaluation.scoring.Scorer.validation_step", 3],
    "in a later validation": ["lmlab.evaluation.scoring.Scorer.validation_step", 41],
    "in the last validation": [f"{MODULE}.on_validation_epoch_end", 5],
    "half of a state written": ["torch.save", 5, 0.5],
    "half of the best weights written": ["torch.save", 2, 0.5],
    "a state written and not renamed": ["os.replace", 14],
    "between best weights and state": [f"{CHECKPOINT}.Checkpoints.save", 4],
    "when older states are removed": [f"{CHECKPOINT}.Checkpoints.remove_old", 3],
    "before a line of figures": ["lmlab.training.loggers.MetricsFile.log_metrics", 6],
    "before the certificate": ["lmlab.evaluation.records.write", 1],
    "before the export": [f"{CHECKPOINT}.export", 1],
    "before the summary": ["lmlab.training.summary.write_json", 1],
}


@pytest.mark.long
@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_at_an_instant(instant: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", *COMMON, STEPS, f"hydra.run.dir={run}"]
    name, *when = INSTANTS[instant]
    assert finish(*command, out=out, faults={name: ["die", *when]}) == -signal.SIGKILL, out.read_text()
    assert not (run / "summary.json").exists()
    assert finish(*command, out=out) == 0, out.read_text()
    assert same(content(run), undisturbed)
    assert not list(run.rglob("*partial*"))


@pytest.mark.longest
def test_killed_with_workers(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["train", *COMMON, STEPS, "num_workers=2", f"hydra.run.dir={run}"]
    assert finish(*command, out=out, faults={f"{MODULE}.training_step": ["die", 13]}) == -signal.SIGKILL
    assert finish(*command, out=out) == 0, out.read_text()
    assert same(content(run), undisturbed)


def newest(run: Path) -> int:
    """The step of the last state that a run has kept."""
    return max((int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.ckpt")), default=-1)


@pytest.mark.long
def test_killed_at_random(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """`--kills` times over one run, at instants drawn from `--kill-seed`; files are slow to reach the disk."""
    kills, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("kill_seed")
    draw = random.Random(seed)
    steps = f"trainer.max_steps={20 * kills}"
    whole, run, out = tmp_path / "whole", tmp_path / "run", tmp_path / "out"
    common = ["train", *COMMON, steps, "trainer.val_check_interval=25", "callbacks.checkpoints.every_steps=2"]
    assert finish(*common, f"hydra.run.dir={whole}", out=out) == 0
    seen: list[str] = []
    last = -1
    # Go on until a kill has met a checkpoint that is being written: when it does, the speed of the machine decides.
    while len(seen) < kills or (len(seen) < 4 * kills and not any(".ckpt" in instant for instant in seen)):
        process = begin(*common, f"hydra.run.dir={run}", out=out, faults={"os.fsync": ["slow", 0.05]})
        if len(seen) % 2:  # at any time
            process.join(draw.uniform(0.2, 3.0))
        else:  # while it trains and keeps its states
            wait_for(lambda: newest(run) > last or process.exitcode is not None)  # noqa: B023
            process.join(draw.uniform(0.0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, out.read_text()[-3000:]
        last = newest(run)
        writing = "".join(f", {path.name[1:-8]} half-written" for path in run.rglob(".*.partial"))
        seen.append(f"step {last}{writing}" if last >= 0 else f"before any state{writing}")
    assert finish(*common, f"hydra.run.dir={run}", out=out) == 0, out.read_text()[-3000:]
    print(f"{kills} kills, seed {seed}:", "; ".join(seen))
    assert any(".ckpt" in instant for instant in seen), seen
    assert same(content(run), content(whole))
