"""The same numbers as the Hugging Face Trainer, from the same weights and batches."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import BlocksDataModule, collate
from lmlab.data.sampler import draws
from lmlab.data.tokens import FlatFile, FlatFiles
from lmlab.evaluation.scoring import DocumentSums
from lmlab.models.loading import from_scratch
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM
from lmlab.optim import AdamW
from lmlab.training.measure import Measure
from lmlab.training.module import LMModule

STEPS, BATCH, BLOCK, SEED = 20, 8, 32, 3
SIZES: dict[str, Any] = {"batch_size": BATCH, "block_size": BLOCK, "seed": SEED, "sums": DocumentSums(1)}
VOCABULARY = {f"w{i}": i for i in range(90)} | {"<s>": 90, "</s>": 91, "<pad>": 92, "<mask>": 93}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(VOCABULARY, unk_token="w0")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    """41 blocks, the last of 7 tokens, so that batches span epochs and hold padding."""
    # Skewed, so that there is something to learn.
    tokens = (90 * np.random.default_rng(0).random(40 * BLOCK + 7) ** 3).astype(np.int32)
    tokens.tofile(tmp_path / "tokens")
    starts = np.arange(0, len(tokens), BLOCK)
    return Blocks(
        FlatFiles(FlatFile(tmp_path / "tokens")), np.stack([starts, np.minimum(starts + BLOCK, len(tokens))], 1)
    )


class LossesOf(L.pytorch.loggers.CSVLogger):
    """Keeps each step's training loss, the model's own auxiliary loss included."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.losses: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if "train/loss" in metrics:
            self.auxiliary = metrics.get("train/aux_loss", 0.0)
            self.losses.append(metrics["train/loss"] + self.auxiliary)


def losses_of_trainer(
    model: PreTrainedModel, rows: list[dict[str, Tensor]], folder: Path, optim: AdamW, causal: bool
) -> list[float]:
    """The Hugging Face Trainer's loss at each step, on these rows in this order."""
    losses: list[float] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        warmup_steps=optim.warmup_steps or 0,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    InOrder(model=model, args=arguments, train_dataset=rows).train()
    return losses


def fitted(module: LMModule, data: BlocksDataModule, steps: int, **options: Any) -> None:
    """Train, without validation."""
    L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"logger": False, "callbacks": [Measure()], "gradient_clip_val": 1.0} | options),
    ).fit(module, data)


@pytest.mark.parametrize("rows", [None, 100])
@pytest.mark.parametrize("name", ["clm", "mlm", "mixture"])
def test_losses_agree_with_the_trainer(
    name: str, rows: int | None, tokenizer: PreTrainedTokenizerFast, blocks: Blocks, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if name == "clm":
        objective: Any = CausalLM()
        size = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = size | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        model = from_scratch(tokenizer, "AutoModelForCausalLM", "gpt2", config)
    elif name == "mixture":  # of experts, with an auxiliary loss of its own
        objective = CausalLM()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = size | {"intermediate_size": 32, "num_local_experts": 4}
        config |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
        model = from_scratch(tokenizer, "AutoModelForCausalLM", "mixtral", config)
    else:
        objective = MaskedLM(tokenizer, mask_probability=0.3)
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = size | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = from_scratch(tokenizer, "AutoModelForMaskedLM", "roberta", config)
    reference = copy.deepcopy(model)
    optim = AdamW(lr=5e-3, weight_decay=0.05, warmup_steps=4)

    samples = []
    for step in range(STEPS):
        batch = collate(blocks, draws(SEED, step * BATCH, BATCH, len(blocks)), objective, SEED, pad_id=92)
        labels = torch.full(batch.input_ids.shape, -100).flatten()
        # The reference shifts causal labels itself.
        labels[batch.positions + objective.target_shift] = batch.targets
        mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
        for ids, seen, wanted in zip(batch.input_ids, mask, labels.view_as(batch.input_ids), strict=True):
            padding = BLOCK - len(ids)
            assert padding == 0  # every batch here holds a full block
            samples.append({"input_ids": ids, "attention_mask": seen, "labels": wanted})
    assert not all(sample["attention_mask"].all() for sample in samples)
    expected = losses_of_trainer(reference, samples, tmp_path / "trainer", optim, not objective.bidirectional)

    logger = LossesOf(tmp_path)
    module = LMModule(model, optim, steps=STEPS, metric=objective.metric, logits_chunk_size=rows, **SIZES)
    data = BlocksDataModule(blocks, [], objective, 92, BATCH, STEPS, SEED)  # nothing is validated
    fitted(module, data, STEPS, logger=logger, log_every_n_steps=1)

    assert len(expected) == len(logger.losses) == STEPS
    assert (logger.auxiliary > 0) == (name == "mixture")
    assert expected[-1] < 0.97 * expected[0]  # it learns, so agreement is no accident of a still model
    np.testing.assert_allclose(logger.losses, expected, rtol=1e-4)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # Adam turns rounding into a share of lr where a gradient is all but zero.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2 * optim.lr)
