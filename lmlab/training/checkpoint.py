"""Files that are whole or not there (promise 6)."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
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


def load_weights(module: nn.Module, path: str | Path) -> int:
    """Put a checkpoint's weights into a module; returns its step. Nothing in the file is run."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    module.load_state_dict(checkpoint["state_dict"])
    return checkpoint["global_step"]


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Model and tokenizer in Hugging Face form, as `transformers.pipeline` loads them."""

    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replaced(place, write)
