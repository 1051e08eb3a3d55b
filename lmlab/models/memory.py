"""Computes how much memory a model needs, and refuses it before the system kills the process without a word.

Shapes: H hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmlab.errors import UserError
from lmlab.models.chunked_loss import chunk_of
from lmlab.models.efficiency import layers
from lmlab.models.quantized import Quantized, elements, weight_bytes

GIB = 2**30


class Memory(NamedTuple):
    """The bytes that training takes on each GPU, by what they hold; all of it is there when a forward pass ends."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Copies of the weights in the numbers that products are made in; of a sharded model its gathered weights."""
    activations: int
    """Results of the forward pass that the backward pass needs."""
    logits: int
    """The logits that are held at once, and the gradient of the head's matrix, which is made with them."""


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
    count, _ = count_parameters(meta_model(auto, config))
    if 4 * count > (free := available_memory()):
        raise UserError(
            f"the model has {count:,} parameters: its weights take {4 * count / GIB:,.1f} GiB, and "
            f"{free / GIB:,.1f} GiB of memory are free here.\nUse a smaller model, or a machine with more memory."
        )


def meta_model(auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Makes a model whose float32 weights have a shape and no content, on torch's meta device: it takes no memory.

    Args:
        auto: the `AutoModel` class that makes the model.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the number of parameters of a model, a shared one counted once, and of those that are trainable."""
    parameters = list(model.parameters())
    return sum(elements(p) for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def count_state(model: nn.Module, tensors: int, half: bool) -> tuple[int, int, int]:
    """Returns the bytes of a model's weights, of their gradients, and of what the optimizer keeps.

    Args:
        tensors: how many of the size of a trained parameter its gradient and the optimizer keep.
        half: whether all of them take 2 bytes a number rather than 4.
    """
    size, (_, trainable) = 2 if half else 4, count_parameters(model)
    return weight_bytes(model, size), size * trainable, size * (tensors - 1) * trainable


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
    weights, gradients, optimizer = count_state(model, tensors, half)
    if device.type == "cuda":
        parts, needed = "weights, gradients and optimizer", (weights + gradients + optimizer) / shards
        owner, free = "the GPU has", torch.cuda.get_device_properties(device).total_memory
    else:  # the weights are in memory already
        parts, needed = "gradients and optimizer", ranks * (gradients + optimizer) / shards
        owner, free = "beside its weights this machine has", available_memory()
    if needed > free:
        raise UserError(
            f"to train the model takes {needed / GIB:,.1f} GiB for its {parts}, and {owner} {free / GIB:,.1f} GiB.\n"
            "Use a smaller model, a device with more memory, or several that share it (trainer=fsdp)."
        )
    return gradients * (1 if device.type == "cuda" else ranks) < (free - needed) / 2


def estimate_training(
    model: PreTrainedModel,
    *,
    tensors: int,
    precision: str,
    shards: int,
    tokens: int,
    targets: int,
    checkpointing: bool | str,
    chunk_size: int | None,
    masked_positions: int = 0,
) -> Memory:
    """Returns what training takes on each GPU, counted from a model that may be on the meta device.

    Attention is counted as what keeps no scores of pairs of positions (sdpa, flash attention), steps as not compiled.
    What the allocator leaves unused, and CUDA itself, are not counted.

    Args:
        tensors: as for `count_state`.
        precision: that of the trainer.
        shards: over how many ranks the model is divided.
        tokens: of a micro batch.
        targets: scored positions of a micro batch.
        checkpointing: the config's `activation_checkpointing`.
        chunk_size: the config's `logits_chunk_size`.
        masked_positions: the positions of a block where a mask keeps its documents apart; 0 where there is none.
    """
    config, repeated = model.config.get_text_config(), layers(model)
    width, depth = config.hidden_size, getattr(config, "num_hidden_layers", len(repeated))  # ALBERT's share weights
    logits = logits_bytes(model.get_output_embeddings().weight, targets, precision, chunk_size)
    # In each layer sdpa turns the mask into numbers that it adds to its scores, and keeps them.
    masks = masked_positions * (4 if precision == "32-true" else 2)
    inside = [tokens * (layer_bytes(layer, width, precision) + masks) for layer in repeated]
    stream = 2 if precision == "bf16-true" else 4
    # The embeddings' dropout, the last norm; then the scored rows, as they are, for the head, and their gradient.
    activations = tokens * (1 + stream) * width + targets * 8 * width
    if checkpointing:
        # A layer that is computed again is there when the logits no longer are.
        activations += depth * tokens * stream * width + max(0, max(inside, default=0) - logits)
        if checkpointing == "selective" and repeated:
            results = sum(product_bytes(layer, width, precision) for layer in repeated)
            activations += tokens * results * depth // len(repeated)
    elif inside:
        activations += sum(inside) * depth // len(inside)
    state = count_state(model, tensors, half=precision == "bf16-true")
    weights, gradients, optimizer = (size // shards for size in state)
    return Memory(weights, gradients, optimizer, copies_bytes(model, precision, shards), activations, logits)


def copies_bytes(model: PreTrainedModel, precision: str, shards: int) -> int:
    """Returns the bytes of the copies of weights that a forward pass makes.

    Autocast copies every matrix that is multiplied by. A sharded model gathers the weights of a layer at a time, and
    those outside of its layers. One quantized weight at a time is there in float32, and under autocast in 16 bits too.
    """
    if shards > 1:
        count, _ = count_parameters(model)
        sizes = [count_parameters(layer)[0] for layer in layers(model)]
        return (2 if precision.startswith("bf16") else 4) * (count - sum(sizes) + max(sizes, default=0))
    quantized = max((elements(p) for p in model.parameters() if p.dtype == torch.uint8), default=0)
    if not precision.endswith("mixed"):
        return 4 * quantized
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    copied: int = sum(
        p.numel() for p in model.parameters() if p.ndim > 1 and p.is_floating_point() and id(p) not in tables
    )
    return 2 * copied + (4 + 2) * quantized


def products(layer: nn.Module, of_adapters: bool = True) -> dict[int, tuple[int, int]]:
    """Returns the sizes of input and output of each linear map in a layer, by the id of its weight.

    Args:
        of_adapters: count the maps of adapters too.
    """
    sizes = {}
    for name, module in layer.named_modules():
        if not of_adapters and ".lora_" in name:
            continue
        weight = module.packed if isinstance(module, Quantized) else getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            sizes[id(weight)] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            sizes[id(weight)] = (module.nx, module.nf)
    return sizes


def is_plain(layer: nn.Module) -> bool:
    """Returns whether a layer has no matrices but those of plain products, so that `layer_bytes` knows all of it."""
    known = products(layer)
    return bool(known) and all(p.ndim < 2 or id(p) in known for p in layer.parameters())


def product_bytes(layer: nn.Module, width: int, precision: str) -> int:
    """Returns the bytes per token of the results of a layer's products and of its attention, whose width is H."""
    return (4 if precision == "32-true" else 2) * (sum(made for _, made in products(layer).values()) + width)


def layer_bytes(layer: nn.Module, width: int, precision: str) -> int:
    """Returns the bytes per token that a layer of attention and an MLP keeps for the backward pass.

    In bf16-mixed, by the width H:

    ```
                                     GPT-2        Llama, with an MLP of width I
    inputs of products                14 H                      12 H + 2 I
    queries, keys, values              6 H        6 H, less with fewer heads for keys and values
    inputs of GELU; of SiLU and ×      8 H                             6 I
    norms, in float32                  8 H        16 H (in several passes over it)
    masks of dropout                   2 H                              —
    ```

    The input of a product is kept for the gradient of its matrix, and so not where that is frozen.

    Args:
        width: H.
    """
    size, stream = 4 if precision == "32-true" else 2, 2 if precision == "bf16-true" else 4
    sizes = list(products(layer, of_adapters=False).values())
    trained = {id(p) for p in layer.parameters() if p.requires_grad}
    widest = max((read for read, _ in sizes), default=0)  # the inside of the MLP
    # Autocast makes a copy of its own for each product that reads a norm's output.
    inputs = sum(read for key, (read, _) in products(layer).items() if key in trained)
    if not precision.endswith("mixed"):
        inputs = min(inputs, 3 * width + widest)
    # All but what attention and the MLP add to the hidden states.
    outputs = sum(made for _, made in sizes) - 2 * width
    gated = sum(made for _, made in sizes if made in (widest, 2 * widest)) >= 2 * widest
    total = size * (inputs + outputs + (widest if gated else 0))
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1:
            # A norm of each head is one of all of them. Those of transformers keep their result before it is scaled.
            passes = stream if isinstance(module, nn.LayerNorm | nn.RMSNorm) else stream + 4
            total += passes * max(width, len(weight))
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()):
        total += 2 * width
    return total


def logits_bytes(head: torch.Tensor, targets: int, precision: str, chunk_size: int | None) -> int:
    """Returns the bytes of the logits that are held at once, and of the gradient of the head made with them.

    Args:
        head: [V, H] its matrix.
        targets: scored positions of a micro batch.
        chunk_size: the config's `logits_chunk_size`; None for what `chunked_loss.logits_chunk_size` chooses on a GPU.
    """
    vocabulary = len(head)
    rows = min(targets, chunk_size or chunk_of(head, on_gpu=True))
    # A chunk and its derivative, both still there as the next one is made.
    size = 4 if precision == "32-true" else 2
    gradient = 4 * head.numel() if head.requires_grad else 0
    return size * (2 * rows + min(rows, targets - rows)) * vocabulary + gradient
