"""A step does not wait for its device: nothing is read from it between two reports."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM
from lmlab.optim import AdamW
from lmlab.training.module import LMModule

from ..models.test_scored import small
from .test_reference import BATCH, SEED, SIZES, blocks, fitted, tokenizer

__all__ = ["blocks", "tokenizer"]  # fixtures

# What makes a host wait for a GPU: a value read, or a shape that hangs on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "item", "equal")


class Waits(TorchDispatchMode):
    """Counts these operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        # An index of truth values has to be counted first.
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or masked:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, 64])
@pytest.mark.parametrize("name", ["clm", "mlm"])
def test_no_step_waits_for_the_device(
    name: str, rows: int | None, tokenizer: Any, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU; on a CPU nothing waits anyhow.
    monkeypatch.setattr("lmlab.training.module.share_tied_gradient", lambda model: None)
    # Without the short one: padding is asked about by transformers.
    blocks = Blocks(blocks.tokens, np.asarray(blocks.bounds)[:40])
    counts = []
    for steps in (4, 12):
        objective: Any = CausalLM() if name == "clm" else MaskedLM(tokenizer)
        model = small("gpt2" if name == "clm" else "roberta", name == "clm")
        module = LMModule(model, AdamW(), steps=steps, metric=objective.metric, logits_chunk_size=rows, **SIZES)
        data = BlocksDataModule(blocks, [], objective, 92, BATCH, steps, SEED)
        with Waits() as waits:
            fitted(module, data, steps, log_every_n_steps=100)
        counts.append(waits.counts)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 0  # the report at the end is seen


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_pinned_where_they_go_to_a_gpu(
    device: str, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = BlocksDataModule(blocks, [], CausalLM(), 92, BATCH, 4, SEED)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, global_step=0)  # type: ignore
    assert [loader.pin_memory for loader in (data.train_dataloader(), data.val_dataloader())] == [device == "cuda"] * 2
