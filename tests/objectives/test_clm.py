"""A causal model's labels are the tokens themselves, one place on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lmlab.objectives.clm import CausalLM
from tests.conftest import TINY, metrics

EOS = 3
KEY = (0, 0, 0)


@pytest.mark.parametrize("length", [1, 2, 9, 128])
def test_labels(length: int) -> None:
    ids = np.random.default_rng(0).integers(50, size=length, dtype=np.int32)
    inputs, positions, targets, *_ = CausalLM()(ids, KEY)
    np.testing.assert_array_equal(inputs, ids)
    assert list(zip(positions, targets, strict=True)) == [(t, ids[t + 1]) for t in range(length - 1)]


def test_end_of_text_is_a_target() -> None:
    """A real one, inside the block and at its end, whatever the tokenizer pads with."""
    ids = np.array([7, 8, EOS, 9, 5, EOS], np.int32)
    _, positions, targets, *_ = CausalLM()(ids, KEY)
    assert positions[targets == EOS].tolist() == [1, 4]
    assert len(targets) == len(ids) - 1


def test_labels_do_not_depend_on_the_cut() -> None:
    """Of a text that is cut, only the first token of each piece goes without being predicted."""
    ids = np.random.default_rng(1).integers(50, size=30, dtype=np.int32)
    found = []
    for first, end in ((0, 7), (7, 8), (8, 30)):
        _, positions, targets, *_ = CausalLM()(ids[first:end], KEY)
        found += [(first + int(place), int(target)) for place, target in zip(positions, targets, strict=True)]
    assert found == [(t, ids[t + 1]) for t in range(29) if t + 1 not in (7, 8)]


def test_as_transformers_shifts() -> None:
    """The same loss as of a Hugging Face model given the ids as labels, which it shifts itself."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_head=2, n_layer=1, n_positions=32)).eval()
    ids = np.random.default_rng(0).integers(50, size=32, dtype=np.int64)
    inputs, positions, targets, *_ = CausalLM()(ids, KEY)
    with torch.no_grad():
        output = model(torch.from_numpy(ids)[None], labels=torch.from_numpy(ids)[None])
        logits = model(torch.from_numpy(inputs)[None]).logits[0, torch.from_numpy(positions)]
    ours = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets))
    torch.testing.assert_close(ours, output.loss)


def test_a_z_loss_is_of_training_alone(train: Callable[..., Path], tmp_path: Path) -> None:
    """The nll is logged as without it, and the certificate is of the same policy."""
    words = [*TINY, "trainer.max_steps=1"]
    runs = [train(*words, f"objective.z_loss={z}", run_dir=tmp_path / f"{z}") for z in (0.0, 0.01)]
    first, second = (next(row for row in metrics(run) if "train/loss" in row) for run in runs)
    assert first["train/loss"] == pytest.approx(second["train/loss"], rel=1e-6)
    assert "train/z_loss" not in first
    assert 0.01 * 5.5**2 < second["train/z_loss"] < 0.01 * 6**2  # of 300 tokens: ln 300 is 5.7
    policies = [json.loads((run / "certificate.json").read_text())["policy"] for run in runs]
    assert policies[0] == policies[1]
