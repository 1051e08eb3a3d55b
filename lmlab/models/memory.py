"""How much memory a model needs, said before the system kills the process for it without a word."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lmlab.errors import UserError

GIB = 2**30


def available() -> int:
    """Bytes of main memory that a process can still get: of the machine, or of the control group it lies in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    most, now = group / "memory.max", group / "memory.current"
    if most.is_file() and now.is_file() and most.read_text().strip() != "max":
        free = min(free, int(most.read_text()) - int(now.read_text()))
    return free


def check_weights(auto: Any, settings: PreTrainedConfig) -> None:
    """Refuse a config whose model's float32 weights do not fit into main memory, before they are made.

    Args:
        auto: the class that makes the model of the config.

    Raises:
        UserError: says how much they need, and how much there is.
    """
    with torch.device("meta"):
        model = auto.from_config(settings)
    count = sum(parameter.numel() for parameter in model.parameters())
    if 4 * count > (free := available()):
        raise UserError(
            f"the model has {count:,} parameters: its weights take {4 * count / GIB:,.1f} GiB, and "
            f"{free / GIB:,.1f} GiB of memory are free here.\nUse a smaller model, or a machine with more memory."
        )


def check_training(model: nn.Module, tensors: int, half: bool, device: torch.device, ranks: int, shards: int) -> None:
    """Refuse a model whose gradients and optimizer do not fit beside its weights.

    Activations and logits, which follow from the batch, come on top and are not counted.

    Args:
        tensors: of the size of a trained parameter that gradient and optimizer keep for it.
        half: whether all of them are kept in 2 bytes a number rather than in 4.
        ranks: of this node, which share its main memory.
        shards: over which all of it is divided.

    Raises:
        UserError: says how much they need, and how much there is.
    """
    size = 2 if half else 4
    weights = size * sum(parameter.numel() for parameter in model.parameters())
    more = size * tensors * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if device.type == "cuda":
        what, need = "weights, gradients and optimizer", (weights + more) / shards
        whose, room = "the GPU has", torch.cuda.get_device_properties(device).total_memory
    else:  # the weights are there already
        what, need = "gradients and optimizer", ranks * more / shards
        whose, room = "beside its weights this machine has", available()
    if need > room:
        raise UserError(
            f"to train the model takes {need / GIB:,.1f} GiB for its {what}, and {whose} {room / GIB:,.1f} GiB.\n"
            "Use a smaller model, a device with more memory, or several that share it (trainer=fsdp)."
        )
