"""Linear layers whose frozen weight is kept in 4 bits: the base of an adapter in QLoRA (Dettmers et al. 2023).

Each block of 64 numbers is divided by its largest magnitude, and rounded to one of the 16 values of NF4, quantiles of a
normal distribution. The magnitudes are rounded to 8 bits in turn, by blocks of 256, so that a number takes 4.13
bits. bitsandbytes rounds; the layers hold nothing but tensors, which go into state dicts and copies as any others.

Shapes: out and in are those of the linear layer, n = out · in.
"""

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmlab.errors import UserError
from lmlab.models.efficiency import layers

BLOCK, BLOCK_OF_SCALES = 64, 256
"""The numbers that share a scale, and the scales that share one."""

# On some CPUs it warns that it can't load a kernel from the hub, which is not needed here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Quantized(nn.Module):
    """A linear layer with a frozen weight in 4 bits.

    Args:
        layer: the layer that it replaces, whose bias it takes over.
    """

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T.contiguous()
        packed, state = quantize_4bit(weight.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.shape = weight.shape  # [out, in]
        self.packed = nn.Parameter(packed, requires_grad=False)  # [n / 2, 1] uint8, two numbers in each
        self.bias = layer.bias
        self.register_buffer("scales", state.absmax)  # [⌈n / 64⌉] uint8
        self.register_buffer("mean_scale", state.offset)  # [] float32, added to each scale
        self.register_buffer("scales_of_scales", state.state2.absmax)  # [⌈n / 64 / 256⌉] float32
        self.register_buffer("values_of_scales", state.state2.code)  # [256] float32, what 8 bits of a scale stand for

    @property
    def weight(self) -> Tensor:
        """[out, in], in a `Conv1D` [in, out], float32: the dequantized weight, made anew each time."""
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            self.scales, self.scales_of_scales, self.values_of_scales, BLOCK_OF_SCALES, torch.float32
        )
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, scales + self.mean_scale, BLOCK, "nf4", self.shape, torch.float32
        )
        return weight.T.contiguous() if isinstance(self, Conv1D) else weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, FrozenProduct.apply(x, self))  # type: ignore[no-untyped-call]
        return cast(Tensor, super().forward(x))  # that of nn.Linear or Conv1D

    def dense(self, weight: Tensor | None = None) -> nn.Linear | Conv1D:
        """Returns a layer of the original class, with the same bias.

        Args:
            weight: its weight; None for the dequantized one, with which it computes the same.
        """
        outputs, inputs = self.shape
        with torch.device("meta"):
            layer = Conv1D(outputs, inputs) if isinstance(self, Conv1D) else nn.Linear(inputs, outputs)
        layer.weight = nn.Parameter(self.weight if weight is None else weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[override]
    """An `nn.Linear` with a frozen weight in 4 bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.out_features, self.in_features = self.shape


class QuantizedConv1D(Quantized, Conv1D):  # type: ignore[misc]
    """A `Conv1D` of transformers with a frozen weight in 4 bits."""

    def __init__(self, layer: Conv1D) -> None:
        super().__init__(layer)
        self.nf: int = self.shape[0]
        self.nx: int = self.shape[1]


class FrozenProduct(torch.autograd.Function):
    """The output of a `Quantized` layer, whose weight is dequantized again for the backward pass.

    Autograd would keep the float32 weights of all layers until then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.weight.to(gradient.dtype)
        return gradient @ (weight.T if isinstance(ctx.layer, Conv1D) else weight), None


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Returns the linear layers that `quantize` replaces, by their names: those in the repeated layers of a model.

    One whose weight has an odd number of elements is left out, as a byte holds two. So is one that the architecture
    wants in float32, which transformers does not quantize either: `wo` of T5.
    """
    in_float32 = tuple(model._keep_in_fp32_modules or ())
    repeated = {id(module) for layer in layers(model) for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in repeated
        and type(module) in (nn.Linear, Conv1D)
        and module.weight.numel() % 2 == 0
        and not name.endswith(in_float32)
    }


def quantized(layer: nn.Module) -> Quantized:
    """Returns a layer that replaces a linear layer, with its weight in 4 bits."""
    assert isinstance(layer, nn.Linear | Conv1D)
    return QuantizedConv1D(layer) if isinstance(layer, Conv1D) else QuantizedLinear(layer)


def quantize(model: PreTrainedModel) -> None:
    """Quantizes the linear layers in the repeated layers of a model, in place.

    Raises:
        UserError: it has none.
    """
    names = [*linear_layers(model)]  # rather than layers, so that each is freed as soon as it is replaced
    if not names:
        raise UserError(
            f"adapter.quantization: {model.config.model_type} has no linear layers that can be quantized. Leave it out."
        )
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized(model.get_submodule(name)))


def round_weights(model: PreTrainedModel) -> None:
    """Replaces the weights of the layers that `quantize` would replace by those that they would have then, in place."""
    for layer in linear_layers(model).values():
        layer.weight.data = quantized(layer).weight


def quantization_config(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the config by which transformers quantizes the same layers in the same way: a `BitsAndBytesConfig`.

    Args:
        model: is not quantized.
    """
    chosen = linear_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": [name for name in linear if name not in chosen],
    }


def elements(parameter: Tensor) -> int:
    """Returns the number of weights that a parameter holds: two in each byte of a quantized one."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def weight_bytes(model: nn.Module, size: int) -> int:
    """Returns the bytes of the weights of a model.

    Args:
        size: the bytes of a weight that is not quantized.
    """
    scales = [buffer for module in model.modules() if isinstance(module, Quantized) for buffer in module.buffers()]
    kept = sum(p.numel() * (1 if p.dtype == torch.uint8 else size) for p in model.parameters())
    return kept + sum(buffer.nbytes for buffer in scales)
