"""Models that go wrong on purpose, on rank 1 alone, or take their time."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmlab.models import loading


def from_scratch_and_fails_once(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """Its third training forward gives no number, on rank 1."""
    return hooked(
        loading.from_scratch(tokenizer, auto_class, architecture, config),
        lambda step, logits: logits * float("nan") if step == 3 and on_rank_1() else logits,
    )


def from_scratch_and_raises(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """Its third training forward is a defect, on rank 1."""

    def fail(step: int, logits: Tensor) -> Tensor:
        if step == 3 and on_rank_1():
            raise ZeroDivisionError("only rank 1")
        return logits

    return hooked(loading.from_scratch(tokenizer, auto_class, architecture, config), fail)


def from_scratch_and_fails_at_first(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """Its fourth training forward is a defect, on rank 1, until torchrun has started all ranks again."""

    def fail(step: int, logits: Tensor) -> Tensor:
        if step == 4 and on_rank_1() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise ZeroDivisionError("only the first time")
        return logits

    return hooked(loading.from_scratch(tokenizer, auto_class, architecture, config), fail)


def from_scratch_and_explodes(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """A model whose third training step has a loss, and no gradient that is a number."""
    model = loading.from_scratch(tokenizer, auto_class, architecture, config)
    now = 0

    def count(step: int, logits: Tensor) -> Tensor:
        nonlocal now
        now = step
        return logits

    model.get_input_embeddings().weight.register_hook(lambda g: g * (float("inf") if now == 3 else 1.0))
    return hooked(model, count)


def from_scratch_and_slow(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """Each training forward takes its time."""

    def wait(step: int, logits: Tensor) -> Tensor:
        time.sleep(0.1 if step else 0.0)
        return logits

    return hooked(loading.from_scratch(tokenizer, auto_class, architecture, config), wait)


def on_rank_1() -> bool:
    return os.environ.get("RANK") == "1"


def hooked(model: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """The model, its logits given to `change` with the number of the training forward, 0 outside of training."""
    steps = 0

    def hook(module: torch.nn.Module, args: Any, logits: Tensor) -> Tensor:
        nonlocal steps
        steps += module.training
        return change(steps if module.training else 0, logits)

    model.get_output_embeddings().register_forward_hook(hook)
    return model
