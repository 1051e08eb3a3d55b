"""The memory that each GPU of a run would need, on paper: without a GPU, and without making any weights."""

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from lmlab.config import schema, targets
from lmlab.config.models import model_without_weights
from lmlab.console import counted, show_result
from lmlab.data.datamodule import Batch
from lmlab.models import memory
from lmlab.models.efficiency import layers
from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.optim import Scheduled

GPUS = (24, 40, 80, 141)
"""Sizes of GPUs that clusters have, in GB (10⁹ bytes)."""


def show_memory(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, auto_class: str, first: Batch) -> None:
    """Prints what each GPU of a run would hold, and which GPUs have room for it.

    Args:
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".
        first: a micro batch of the run.

    Raises:
        UserError: no model can be made of the config.
    """
    model = model_without_weights(cfg, tokenizer, auto_class)
    if model is None:
        print(f"The memory of each GPU is not estimated: {cfg.model._target_} may make any model.")
        return
    if model.config.is_encoder_decoder:
        print("The memory of each GPU is not estimated: encoder and decoder read texts of different lengths.")
        return
    if isinstance(model, GeneratorAndDiscriminator):
        print("The memory of each GPU is not estimated: a generator and a discriminator take turns.")
        return
    here = torch.cuda.is_available()
    precision = cfg.trainer.precision or (schema.best_precision(cfg.trainer) if here else "bf16-mixed")
    shards = schema.shards(cfg.trainer)
    # The first samples may be short ones.
    samples, positions = len(first.input_ids), schema.preprocessing(cfg).block_size
    tokens = samples * positions
    optimizer = targets.build(cfg.optim, "optim")
    known = isinstance(optimizer, Scheduled)
    if known:
        optimizer.freeze(model)
    estimate = memory.estimate_training(
        model,
        tensors=3 if known else 1,
        precision=precision,
        shards=shards,
        tokens=tokens,
        targets=round(tokens * first.targets.numel() / first.tokens),
        checkpointing=cfg.activation_checkpointing,
        chunk_size=cfg.logits_chunk_size,
        masked_positions=0 if first.document_positions is None else positions,
    )
    rows = {
        "weights": size_text(estimate.weights),
        "gradients": size_text(estimate.gradients),
        "optimizer": size_text(estimate.optimizer) if known else "not known",
        "gathered weights" if shards > 1 else "copies of weights": size_text(estimate.copies),
        "activations": size_text(estimate.activations),
        "logits, gradient of the head": size_text(estimate.logits),
        "in all": size_text(sum(estimate)) + ("" if known else " and the optimizer"),
    }
    show_result(rows, "Memory of each GPU, estimated")
    count, trainable = memory.count_parameters(model)
    part = f" ({trainable:,} of them trainable)" if trainable < count else ""
    divided = f", divided over {counted(shards, 'GPU')}" if shards > 1 else ""
    print(f"For {count:,} parameters{part}{divided}, {samples} × {positions} tokens at once, in {precision}.")
    if not all(map(memory.is_plain, layers(model) or [model])):
        kind = model.config.model_type
        print(f"Activations are counted as if layers were attention and one MLP; those of {kind} have other parts.")
    elif "eager" in (cfg.attention, model.config._attn_implementation):
        print("Not in it: the scores of all pairs of positions, which attention=eager keeps.")
    if "distill" in cfg:
        print("Not in it: the teacher's weights and logits.")
    if known:
        print(comparison(sum(estimate)))


def size_text(size: int) -> str:
    """Returns a number of bytes in GiB, a small one in MiB."""
    return f"{size / memory.GIB:,.2f} GiB" if size >= memory.GIB / 10 else f"{size / 2**20:,.1f} MiB"


def comparison(needed: int) -> str:
    """Returns a sentence that compares needed bytes with the GPU of this machine or, without one, with other GPUs."""
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        return f"The GPU here has {size_text(there)}, which is {'enough' if needed < there else 'too little'}."
    enough = next((size for size in GPUS if needed < size * 10**9), None)
    return f"No GPU of up to {GPUS[-1]} GB has room for it." if enough is None else f"It fits a GPU of {enough} GB."
