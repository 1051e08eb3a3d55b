"""In 16-mixed the loss is scaled, and the run is that of one that is not. On a CPU, whose scaler is a GPU's."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule
from lmlab.objectives.clm import CausalLM
from lmlab.optim import AdamW
from lmlab.training.module import NEVER, LMModule

from ..models.test_scored import small
from .test_reference import BATCH, SEED, SIZES, blocks, fitted, tokenizer

__all__ = ["blocks", "tokenizer"]  # fixtures
STEPS = 4
# Adam itself would take any scale off: with an epsilon far above the gradients it does not.
FUSED = AdamW(lr=3.0, eps=1.0)


def unfused(model: torch.nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0, eps=1.0, fused=False)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


class ScaledFloat32(MixedPrecision):
    """Scales the loss as 16-mixed does, and computes in float32: what differs is the scaling alone."""

    def autocast_context_manager(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return nullcontext()


class Record(L.Callback):
    """Keeps the norm of each step's gradient, and the weights after it; one step's gradient is made infinite."""

    def __init__(self, infinite_at: int | None) -> None:
        self.infinite_at = infinite_at
        self.norms: list[float] = []
        self.weights: list[list[Tensor]] = []

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        if len(self.norms) == self.infinite_at:
            next(module.model.parameters()).grad[0, 0] = torch.inf

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.norms):
            self.norms.append(float(module.grad_norm))
            self.weights.append([p.detach().clone() for p in module.model.parameters()])

    def moved(self) -> list[Tensor]:
        """Returns how far each weight has come since the first step."""
        return [last - first for last, first in zip(self.weights[-1], self.weights[0], strict=True)]


def run(
    blocks: Blocks,
    optimizer: Callable[..., Any],
    plugin: type[MixedPrecision] | None,
    clip: float | None = None,
    infinite_at: int | None = None,
    rows: int | None = 64,
) -> tuple[LMModule, Record, torch.amp.GradScaler | None]:
    """Trains for `STEPS` steps of two micro batches."""
    module = LMModule(small("gpt2", True), optimizer, steps=STEPS, logits_chunk_size=rows, **SIZES)
    data = BlocksDataModule(blocks, [], CausalLM(), 92, BATCH, STEPS, SEED, accumulate=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if plugin else None
    plugins = [plugin("16-mixed", "cpu", scaler)] if plugin else []
    record = Record(infinite_at)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    fitted(module, data, STEPS, plugins=plugins, callbacks=[record], **options)
    return module, record, scaler


@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("optimizer", [FUSED, unfused], ids=["fused", "unfused"])
def test_a_scaled_loss_trains_alike(optimizer: Callable[..., Any], clip: float | None, blocks: Blocks) -> None:
    _, plain, _ = run(blocks, unfused if optimizer is unfused else FUSED, None, clip)
    module, scaled, _ = run(blocks, optimizer, ScaledFloat32, clip)
    assert getattr(module.trainer.optimizers[0], "_step_supports_amp_scaling", False) == (optimizer is FUSED)
    assert scaled.norms == pytest.approx(plain.norms, rel=1e-5)
    assert min(plain.norms) > 0.25  # it is clipped
    for ours, theirs in zip(scaled.moved(), plain.moved(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("optimizer", [FUSED, unfused], ids=["fused", "unfused"])
def test_a_step_whose_gradient_is_infinite_is_left_out(optimizer: Callable[..., Any], blocks: Blocks) -> None:
    module, record, scaler = run(blocks, optimizer, ScaledFloat32, 0.5, infinite_at=2)  # the third step
    assert scaler is not None
    moved = [not all(map(torch.equal, before, after)) for before, after in pairwise(record.weights)]
    assert moved == [True, False, True]
    assert scaler.get_scale() == 2.0**11
    assert module.first_bad_batch == NEVER


def test_in_chunks_float16_trains_as_with_all_logits_at_once(blocks: Blocks) -> None:
    (_, one, _), (_, other, _) = (run(blocks, FUSED, MixedPrecision, 0.5, rows=rows) for rows in (64, None))
    assert one.norms == pytest.approx(other.norms, rel=1e-2)
    for ours, theirs in zip(one.moved(), other.moved(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))
