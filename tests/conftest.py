"""What all tests share: no network, caches of their own, and a way to run `lmlab.train` in this process."""

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports the libraries that read them.
HOME = tempfile.mkdtemp(prefix="lmlab-test-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ["LMLAB_CACHE"] = f"{HOME}/lmlab"
os.environ["HF_HOME"] = f"{HOME}/huggingface"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests run side by side; threads that wait for a core another test holds cost far more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("WANDB_API_KEY", None)

import pytest  # noqa: E402

TINY = [
    "model.config.n_embd=32",
    "model.config.n_head=2",
    "model.config.n_layer=1",
    "tokenizer.vocab_size=300",
    "preprocess.block_size=32",
    "trainer.max_steps=4",
    "logger=file",
]
"""Overrides that make a causal run take a second."""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run `python -m lmlab.train` with overrides in this process; returns the run directory."""
    from lmlab import train as verb

    def run(*overrides: str, run_dir: Path = tmp_path / "run") -> Path:
        monkeypatch.setattr(sys, "argv", ["lmlab.train", *overrides, f"hydra.run.dir={run_dir}"])
        # Hydra sets logging up for the process; the next test should not write to this run's log.
        handlers = logging.root.handlers[:]
        try:
            verb.main()
        finally:
            logging.root.handlers = handlers
        return run_dir

    return run


def metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
