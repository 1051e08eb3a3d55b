"""Computes how much memory a model needs, and refuses it before the system kills the process without a word."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lmlab.errors import UserError

GIB = 2**30


def available_memory() -> int:
    """Returns how many bytes of main memory a process can still get, of the machine or of its control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_weights(auto: Any, config: PreTrainedConfig) -> None:
    """Refuses a config whose model's float32 weights do not fit into main memory, before they are made.

    Args:
        auto: the `AutoModel` class that makes the model.

    Raises:
        UserError: says how much they need, and how much there is.
    """
    with torch.device("meta"):
        model = auto.from_config(config)
    count, _ = count_parameters(model)
    if 4 * count > (free := available_memory()):
        raise UserError(
            f"the model has {count:,} parameters: its weights take {4 * count / GIB:,.1f} GiB, and "
            f"{free / GIB:,.1f} GiB of memory are free here.\nUse a smaller model, or a machine with more memory."
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the number of parameters of a model, a shared one counted once, and of those that are trainable."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def check_training(model: nn.Module, tensors: int, half: bool, device: torch.device, ranks: int, shards: int) -> bool:
    """Refuses a model whose gradients and optimizer do not fit beside its weights.

    Activations and logits, which follow from the batch, are not counted.

    Args:
        tensors: how many of the size of a trained parameter its gradient and the optimizer keep.
        half: whether all of them take 2 bytes a number rather than 4.
        ranks: how many ranks share the main memory of this node.
        shards: over how many ranks all of it is divided.

    Returns:
        Whether a gradient of the whole model takes less than half of what is left.

    Raises:
        UserError: says how much they need, and how much there is.
    """
    size, (count, trainable) = 2 if half else 4, count_parameters(model)
    weights, more = size * count, size * tensors * trainable
    if device.type == "cuda":
        parts, needed = "weights, gradients and optimizer", (weights + more) / shards
        owner, free = "the GPU has", torch.cuda.get_device_properties(device).total_memory
    else:  # the weights are in memory already
        parts, needed = "gradients and optimizer", ranks * more / shards
        owner, free = "beside its weights this machine has", available_memory()
    if needed > free:
        raise UserError(
            f"to train the model takes {needed / GIB:,.1f} GiB for its {parts}, and {owner} {free / GIB:,.1f} GiB.\n"
            "Use a smaller model, a device with more memory, or several that share it (trainer=fsdp)."
        )
    gradient = more / tensors * (1 if device.type == "cuda" else ranks)
    return gradient < (free - needed) / 2
