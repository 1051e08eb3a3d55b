"""Counts the floating-point operations of a training step from a model's config and weights."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.models.probe import backbone
from lmlab.models.quantized import elements

SPAN_KEYS = {
    "sliding_attention": ("local_attention", "sliding_window"),
    "chunked_attention": ("attention_chunk_size",),
}
"""Types of layers whose attention spans a limited number of positions, and the config keys that may say how many."""
WITHOUT_SCORES = ("linear_attention", "conv", "moe")
"""Types of layers in which positions are not compared in pairs: their matrices are all that counts."""
OTHER_ATTENTION = (
    *("attention_window", "attention_type", "attention_layers", "attn_layers"),
    *("num_landmarks", "num_hash", "pos_att_type"),
)
"""Config keys of other forms of attention: Longformer, BigBird, GPT-Neo, Reformer, Nyströmformer, YOSO, DeBERTa."""


class Flops(NamedTuple):
    """Floating-point operations of forward and backward pass, as Chowdhery et al. 2022 (appendix B) count them.

    6 per weight of a matrix and token, 4 where it is frozen and so has no gradient, those of a mixture's experts by the
    share that a token uses; and in attention 12 · heads · head dimension per token and position in its span, the future
    of a causal model and other documents of a block included. What activation checkpointing computes a second time is
    not counted.
    """

    per_token: int
    """Operations in the backbone's matrices, for each token."""
    per_layer_attention: tuple[tuple[int, int | None], ...]
    """Operations per token and position of each layer with attention, and the positions that it spans (None: all)."""
    per_target: int
    """Operations in the head, for each scored position."""

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "Flops | None":
        """Counts a model's operations; returns None if it has layers of a kind that is not known here.

        Nor are those of an encoder-decoder counted, whose two parts read texts of different lengths, or of a
        discriminator with a generator.
        """
        if getattr(model.config, "is_encoder_decoder", False) or isinstance(model, GeneratorAndDiscriminator):
            return None
        config = model.config.get_text_config()
        attention = attention_flops(config)
        if attention is None:
            return None
        head = model.get_output_embeddings()
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        share = expert_share(config)
        inside = {
            id(p): round(operations(p) * (share if ".experts." in f".{name}" else 1.0))
            for name, p in backbone(model).named_parameters()
            if p.ndim > 1
        }
        matrices = {id(p): operations(p) for p in [*model.parameters(), head.weight] if p.ndim > 1}
        per_token = sum(size for key, size in inside.items() if key not in embeddings)
        tied = operations(head.weight) if id(head.weight) in inside else 0
        per_target = sum(size for key, size in matrices.items() if key not in inside) + tied
        return cls(per_token, attention, per_target)

    def step(self, tokens: int, targets: int, block_size: int) -> int:
        """Returns the operations for `tokens` tokens in blocks of `block_size`, of which `targets` are scored."""
        attention = sum(each * min(block_size, span or block_size) for each, span in self.per_layer_attention)
        return tokens * (self.per_token + attention) + targets * self.per_target


def operations(matrix: nn.Parameter) -> int:
    """Returns the operations of a matrix in the products of forward and backward pass, per row of their input."""
    return (6 if matrix.requires_grad else 4) * elements(matrix)


def attention_flops(config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...] | None:
    """Returns `Flops.per_layer_attention` of models with this config; None if a type of layer is not known."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or any(getattr(config, key, None) for key in OTHER_ATTENTION):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # The dimensions of keys and of values differ in DeepSeek's attention.
    key_dim, value_dim = (getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
    each = 6 * heads * (key_dim + value_dim)
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["sliding_attention" if isinstance(window, int) else "full_attention"] * config.num_hidden_layers
    spans: list[int | None] = []
    for layer_type in types:
        if layer_type == "full_attention":
            spans.append(None)
        elif layer_type in SPAN_KEYS:
            values = (getattr(config, key, None) for key in SPAN_KEYS[layer_type])
            spans.append(next(value for value in values if value is not None))
        elif layer_type not in WITHOUT_SCORES:
            return None
    return tuple((each, span) for span in spans)


def expert_share(config: PreTrainedConfig) -> float:
    """Returns the share of a mixture's experts that a token passes through; 1 if there is no mixture."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if experts and used else 1.0
