"""Files that are whole or not there (promise 6)."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.fabric.plugins import TorchCheckpointIO
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.runs.files import replaced


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their place, flushed, and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Any error while writing leaves the file that was there before."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.partial")
        try:
            with beside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)


def best_checkpoint(trainer: L.Trainer) -> dict[str, Any] | None:
    """The checkpoint that a run was found best at; None where none monitors a figure. Nothing in the file is run."""
    path = next((callback.best_model_path for callback in trainer.checkpoint_callbacks if callback.monitor), "")  # type: ignore[attr-defined]
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path else None


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Model and tokenizer in Hugging Face form, as `transformers.pipeline` loads them."""

    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replaced(place, write)
