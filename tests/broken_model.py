"""A model whose third training forward gives no number, on rank 1 alone."""

import os
from typing import Any

import torch

from lmlab.models import loading


def from_scratch_and_fails_once(tokenizer: Any, causal: bool, architecture: str, config: dict[str, Any]) -> Any:
    model = loading.from_scratch(tokenizer, causal, architecture, config)
    steps = 0

    def spoil(module: torch.nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += module.training
        return logits * float("nan") if module.training and steps == 3 and os.environ.get("RANK") == "1" else logits

    model.get_output_embeddings().register_forward_hook(spoil)
    return model
