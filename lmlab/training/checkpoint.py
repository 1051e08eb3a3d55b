"""Files that are whole or not there (promise 6)."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
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


def best_weights(trainer: L.Trainer) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The model's state dict that a run was found best at, and the checkpoint it is of.

    The last weights, and None, where no callback monitors a figure. Nothing in the file is run.
    All ranks have to call it: weights that are sharded come together, on rank 0.
    """
    path = next((callback.best_model_path for callback in trainer.checkpoint_callbacks if callback.monitor), "")  # type: ignore[attr-defined]
    best = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path else None
    state = trainer.strategy.lightning_module_state_dict() if best is None else best["state_dict"]
    return {n.removeprefix("model."): tensor for n, tensor in state.items() if n.startswith("model.")}, best


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Model and tokenizer in Hugging Face form, as `transformers.pipeline` loads them."""

    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replaced(place, write)
