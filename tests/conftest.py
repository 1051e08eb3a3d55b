"""What all tests share: no network, caches of their own, and a way to run the verbs in this process."""

import atexit
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read them.
HOME = tempfile.mkdtemp(prefix="lmlab-test-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ["LMLAB_CACHE"] = f"{HOME}/lmlab"
os.environ["HF_HOME"] = f"{HOME}/huggingface"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
GPUS = shutil.which("nvidia-smi") is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
"""True if there are GPUs, which only the tests of tests/gpu are to see."""
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests run side by side; threads that wait for a core another test holds cost far more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("WANDB_API_KEY", None)

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=6, help="how often tests/training/test_kill.py kills its run")
    parser.addoption("--kill-seed", type=int, default=0, help="decides the instants")


TINY = [
    "model.config.n_embd=32",
    "model.config.n_head=2",
    "model.config.n_layer=1",
    "tokenizer.vocab_size=300",
    "preprocess.block_size=32",
    "trainer.max_steps=4",
    "callbacks.samples.count=0",
    "logger=file",
]
"""Overrides that make a causal run take a second."""


TINY_MLM = [
    "objective=mlm",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.intermediate_size=64",
    *(override for override in TINY if not override.startswith("model.")),
]
"""The same for a masked one."""


def command_module(name: str) -> Any:
    """The module of a command, which is a file or the `__main__` of a package."""
    module = importlib.import_module(f"lmlab.{name}")
    return importlib.import_module(f"lmlab.{name}.__main__") if hasattr(module, "__path__") else module


def run_verb(name: str, *arguments: object) -> None:
    """Run `python -m lmlab.<name>` with arguments in this process."""
    verb = command_module(name)
    # Hydra sets logging up for the process; the next test should not write to this run's log.
    argv, handlers = sys.argv, logging.root.handlers[:]
    sys.argv = [f"lmlab.{name}", *map(str, arguments)]
    try:
        verb.main()
    finally:
        sys.argv, logging.root.handlers = argv, handlers


Refused = Callable[..., str]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Run `python -m lmlab.train` with overrides; returns the run directory."""

    def run(*overrides: str, run_dir: Path = tmp_path / "run") -> Path:
        run_verb("train", *overrides, f"hydra.run.dir={run_dir}")
        return run_dir

    return run


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Path]:
    """Run `python -m lmlab.evaluate` with arguments; returns the directory of the evaluation."""
    numbers = count()

    def run(*arguments: object, run_dir: Path | None = None) -> Path:
        run_dir = run_dir or tmp_path / f"evaluation{next(numbers)}"
        run_verb("evaluate", *arguments, f"hydra.run.dir={run_dir}")
        return run_dir

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a verb with arguments that it has to refuse; returns what it says."""

    def run(verb: str, *words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_verb(verb, *words)
        assert ended.value.code == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert len(shown.splitlines()) <= 3
        return shown

    return run


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that takes a run's first files, and then no more."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk can't be mounted here, which takes root: {error}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    """Every loss that a run logged, in order."""
    names = ("train/loss", "val/loss")
    return [(line["step"], name, line[name]) for line in metrics(run_dir) for name in names if name in line]


def stop_after(run_dir: Path, step: int, place: Path) -> None:
    """A copy of a finished run as a kill would have left it some time after it kept the state of `step`."""
    shutil.copytree(run_dir, place)
    for name in ("summary.json", "certificate.json", "records.parquet"):
        (place / name).unlink()
    shutil.rmtree(place / "model")
    for kept in place.glob("checkpoints/*.ckpt"):
        if kept.name.startswith("step-") and int(kept.stem.rpartition("-")[2]) > step:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()


def blocks_of(prepared: Any, split: str) -> list[Any]:
    """The blocks [T] of one split of `Prepared` data."""
    if split == "train":
        return list(prepared.train)
    return [prepared.validation.tokens[start:end] for start, end in prepared.bounds]
