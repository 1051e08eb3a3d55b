"""What makes a model's steps faster or smaller, and leaves what it computes and how it is saved alone."""

from collections.abc import Callable
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from lmlab.errors import UserError, first_line
from lmlab.models.probe import backbone

WINDOWED = {"sliding_attention": ("local_attention", "sliding_window"), "chunked_attention": ("attention_chunk_size",)}
"""Layers whose attention reaches so many positions only, and the keys of a config that may say how many."""
WITHOUT_SCORES = ("linear_attention", "conv", "moe")
"""Layers in which no position is weighed against each other one: their matrices are all that counts."""
OTHER_ATTENTION = (
    *("attention_window", "attention_type", "attention_layers", "attn_layers"),
    *("num_landmarks", "num_hash", "pos_att_type"),
)
"""Keys in configs of other forms of attention: Longformer, BigBird, GPT-Neo, Reformer, Nyströmformer, YOSO, DeBERTa."""


class Flops(NamedTuple):
    """Floating-point operations of forward and backward pass, as Chowdhery et al. 2022 (appendix B) count them.

    6 per weight of a matrix and token, of the experts of a mixture by the share that a token uses;
    and in attention 12 · heads · head dimension per token and position that it can reach, the
    future of a causal model included. What activation checkpointing computes again is not counted.
    """

    token: int
    """Per token, in the backbone's matrices."""
    attention: tuple[tuple[int, int | None], ...]
    """For each layer with attention: per token and position, and how many positions it reaches; None is all."""
    target: int
    """Per scored position, in the head."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Flops | None":
        """Count a model; None where its layers are of a kind that this does not know."""
        reaches = attention_of(model.config.get_text_config())
        if reaches is None:
            return None
        body, head = backbone(model), model.get_output_embeddings()
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        share = experts_used(model.config.get_text_config())
        inside = {
            id(p): round(p.numel() * (share if ".experts." in f".{name}" else 1.0))
            for name, p in body.named_parameters()
            if p.ndim > 1
        }
        outside = {id(p): p.numel() for p in [*model.parameters(), head.weight] if p.ndim > 1}
        base = sum(size for name, size in inside.items() if name not in embeddings)
        tied = head.weight.numel() if id(head.weight) in inside else 0
        beyond = sum(size for name, size in outside.items() if name not in inside) + tied
        return cls(6 * base, reaches, 6 * beyond)

    def step(self, tokens: int, targets: int, length: int) -> int:
        """Count so many tokens in blocks of `length`, so many of them scored."""
        attention = sum(each * min(length, reach or length) for each, reach in self.attention)
        return tokens * (self.token + attention) + targets * self.target


def attention_of(config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...] | None:
    """`Flops.attention` of a model with this config; None where it has layers that are not known."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or any(getattr(config, key, None) for key in OTHER_ATTENTION):
        return None
    usual = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Of keys and of values, which differ in DeepSeek's attention.
    key, value = (getattr(config, name, None) or usual for name in ("qk_head_dim", "v_head_dim"))
    each = 6 * heads * (key + value)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if isinstance(window, int) else "full_attention"] * config.num_hidden_layers
    found: list[tuple[int, int | None]] = []
    for kind in kinds:
        if kind == "full_attention":
            found.append((each, None))
        elif kind in WINDOWED:
            reaches = (getattr(config, key, None) for key in WINDOWED[kind])
            found.append((each, next(reach for reach in reaches if reach is not None)))
        elif kind not in WITHOUT_SCORES:
            return None
    return tuple(found)


def experts_used(config: PreTrainedConfig) -> float:
    """The share of a mixture's experts that a token passes through."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if experts and used else 1.0


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers: the longest list of modules in the base model."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules)))) if lists else []


def fuse_activations(model: PreTrainedModel) -> None:
    """GPT-2's GELU in one kernel instead of eight passes over memory; it has no weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` for each layer while it trains, in place: no name in the state dict changes.

    Layers of one kind share their code, so a deep model takes no longer to compile than a
    flat one. What has another shape each time stays as it is: the scored positions of a
    step, held-out windows, generated text.
    """
    for layer in layers(model):
        layer.forward = compiled_in_training(layer)


def compiled_in_training(layer: nn.Module) -> Callable[..., Any]:
    """A layer's forward: compiled in training, as it is elsewhere."""
    eager = layer.forward
    # On a CPU the compiler's own random numbers are slower than torch's; these also give the same dropout.
    compiled = torch.compile(eager, options={"fallback_random": not torch.cuda.is_available()})
    return lambda *args, **options: (compiled if layer.training else eager)(*args, **options)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input, and compute the rest again in the backward pass (Chen et al. 2016)."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"activation_checkpointing: {model.config.model_type} can't do it. Leave it out.")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Set how attention is computed: eager, sdpa, flash_attention_2, flex_attention, or another of transformers."""
    try:
        if "/" in name:
            raise ValueError("a kernel of the hub would be code from there, which lmlab does not run.")
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{model.config.model_type} has no choice of attention.")
    except (ValueError, ImportError) as error:
        why = shorten(first_line(error), 150, placeholder=" …")
        raise UserError(
            f"attention={name}: {why}\nUse eager, sdpa, or leave it out for the model's own choice."
        ) from error


def share_tied_gradient(model: PreTrainedModel) -> None:
    """Let the input embedding add its few rows to the head's gradient, where both share one matrix.

    Otherwise autograd would fill a second gradient [V, H] with zeros and add all of it. On a
    CPU that took a fifth of a DistilRoBERTa-sized step; on a GPU adding single rows has no fixed
    order, and the result no fixed bits. Called when wrappers are on: DDP takes an embedding that
    says so for one whose gradient stays sparse, which this one's does not.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(embedding, nn.Embedding) and head is not None and embedding.weight is head.weight
    if tied and embedding.weight.device.type == "cpu" and not isinstance(embedding.weight, DTensor):
        embedding.sparse = True


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Parameters, gradients and optimizer states over the ranks of a mesh, layer by layer (FSDP2)."""
    from torch.distributed.fsdp import FSDPModule, fully_shard  # most runs need not wait for it

    if isinstance(model, FSDPModule):
        return  # Lightning asks before each of its runs
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
