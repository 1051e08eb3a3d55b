"""A training loop in plain torch and transformers, for objectives that give a decoder an attention mask."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule
from lmlab.data.sampler import draws
from lmlab.data.tokens import FlatFile, FlatFiles
from lmlab.models.loading import from_scratch
from lmlab.objectives import Example
from lmlab.optim import AdamW
from lmlab.training.module import LMModule

from ..training.test_reference import BATCH, BLOCK, SEED, SIZES, STEPS, VOCABULARY, LossesOf, fitted

LossOfStep = Callable[[PreTrainedModel, list[tuple[np.ndarray, Example]]], Tensor]
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One of 94 tokens, four of them special."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(VOCABULARY, unk_token="w0")),
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    )


def text(folder: Path) -> Blocks:
    """41 blocks, the last of 7 tokens; each second token is that of the place before, less a little."""
    drawn = (90 * np.random.default_rng(0).random(40 * BLOCK + 7) ** 3).astype(np.int32)
    drawn[1::2] = drawn[:-1:2] // 2
    drawn.tofile(folder / "tokens")
    starts = np.arange(0, len(drawn), BLOCK)
    return Blocks(FlatFiles(FlatFile(folder / "tokens")), np.stack([starts, np.minimum(starts + BLOCK, len(drawn))], 1))


def decoder(architecture: str, attention: str = "sdpa") -> PreTrainedModel:
    """A small one, without dropout."""
    torch.manual_seed(0)
    model = from_scratch(tokenizer(), "AutoModelForCausalLM", architecture, DECODERS[architecture])
    model.set_attn_implementation(attention)
    return model


def logits_of(model: PreTrainedModel, inputs: np.ndarray, seen: Callable[[int, int], bool]) -> Tensor:
    """The logits [T, V] of one text, in which the query i attends to the key j if `seen(i, j)`."""
    numbers, least = range(len(inputs)), torch.finfo(torch.float32).min
    mask = torch.tensor([[[[0.0 if seen(i, j) else least for j in numbers] for i in numbers]]])
    ids = torch.from_numpy(inputs.astype(np.int64))[None]
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    return logits


def agrees(
    objective: Any, model: PreTrainedModel, loss_of_step: LossOfStep, rows: int | None, folder: Path
) -> tuple[list[float], list[Example]]:
    """Holds that a run of `STEPS` steps has the losses and the weights of the loop written out here.

    Returns:
        the losses of the loop, and all examples that it was trained on.

    Args:
        loss_of_step: the loss of the texts of a step, each with the objective's example of it.
        rows: the number of scored positions whose logits the run holds at once.
    """
    blocks, reference, optim = text(folder), copy.deepcopy(model), AdamW(lr=5e-3, weight_decay=0.05, warmup_steps=4)
    optimizer, schedule = optim(reference, STEPS)
    expected, examples = list[float](), list[Example]()
    for step in range(STEPS):
        samples = list[tuple[np.ndarray, Example]]()
        for draw in draws(SEED, step * BATCH, BATCH, len(blocks)):
            samples.append((blocks[draw.block], objective(blocks[draw.block], (SEED, draw.epoch, draw.block))))
        examples += [example for _, example in samples]
        loss = loss_of_step(reference, samples)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())

    logger = LossesOf(folder)
    options = {"logits_chunk_size": rows, "losses": getattr(objective, "losses", None)}
    module = LMModule(model, optim, steps=STEPS, metric=objective.metric, **options, **SIZES)
    data = BlocksDataModule(blocks, [], objective, 92, BATCH, STEPS, SEED)  # nothing is validated
    fitted(module, data, STEPS, logger=logger, log_every_n_steps=1)

    assert len(logger.losses) == STEPS
    assert expected[-1] < 0.97 * expected[0]  # it learns, so agreement is no accident of a still model
    np.testing.assert_allclose(logger.losses, expected, rtol=1e-4)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # Adam turns rounding into a share of lr where a gradient is all but zero.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2 * optim.lr)
    return expected, examples
