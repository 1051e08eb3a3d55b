"""Makes a model's training steps faster or smaller, without a change to what it computes or to how it is saved.

Shapes: V vocabulary, H hidden size.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from lmlab.errors import UserError, first_line
from lmlab.models.electra import GeneratorAndDiscriminator


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the repeated layers: the longest list of modules in the base model.

    Of an encoder-decoder these are the layers of both, and of a discriminator with a generator too.
    """
    if isinstance(model, GeneratorAndDiscriminator):
        return [layer for half in (model.generator, model.discriminator) for layer in layers(half)]
    if getattr(model.config, "is_encoder_decoder", False):
        # A layer of T5's is a list itself, which may be longer than that of the layers.
        halves = [half.modules() for half in (model.get_encoder(), model.get_decoder())]
        first = (next((part for part in half if isinstance(part, nn.ModuleList)), ()) for half in halves)
        return [layer for repeated in first for layer in repeated]
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules)))) if lists else []


def fuse_activations(model: PreTrainedModel) -> None:
    """Computes GPT-2's GELU in one kernel instead of eight passes over memory; it has no weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def compile_layers(model: PreTrainedModel) -> None:
    """Applies `torch.compile` to each layer in training, in place: no name in the state dict changes.

    Layers of one kind share their code, so a deep model takes no longer to compile than a shallow one. What has
    another shape each time stays eager: the scored positions of a step, held-out windows, generated text.
    """
    if not layers(model):
        raise UserError("compile=true compiles layers, and this model has no nn.ModuleList of them. Leave it out.")
    for layer in layers(model):
        layer.forward = compiled_in_training(layer)


def compiled_in_training(layer: nn.Module) -> Callable[..., Any]:
    """Returns a forward function for a layer that is compiled in training and eager elsewhere."""
    eager = layer.forward
    # On a CPU the compiler's own random numbers are slower than torch's; these also give the same dropout.
    compiled = torch.compile(eager, options={"fallback_random": not torch.cuda.is_available()})
    return lambda *args, **options: (compiled if layer.training else eager)(*args, **options)


PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
"""The operations whose results selective checkpointing keeps: matrix products and sdpa's attention. Others, such as
norms and activation functions, are cheap to compute again."""


def checkpoint_activations(model: PreTrainedModel, selective: bool = False) -> None:
    """Keeps only each layer's input, and computes the rest again in the backward pass (Chen et al. 2016).

    Args:
        selective: keep the results of matrix products and attention too, and compute again only what is cheap to
            compute (Korthikanti et al. 2022, section 5).
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"activation_checkpointing: {model.config.model_type} can't do it. Leave it out.")
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kept = [getattr(torch.ops.aten, name).default for name in PRODUCTS]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    with warnings.catch_warnings():  # newer versions of transformers rename this method, older ones lack the new name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Sets how attention is computed.

    Args:
        name: eager, sdpa, flash_attention_2, flex_attention, or another of transformers' implementations.
    """
    try:
        if "/" in name:
            raise ValueError("a kernel of the hub would be code from there, which lmlab does not run.")
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{model.config.model_type} has no choice of attention.")
    except (ValueError, ImportError) as error:
        reason = shorten(first_line(error), 150, placeholder=" …")
        raise UserError(
            f"attention={name}: {reason}\nUse eager, sdpa, or leave it out for the model's own choice."
        ) from error


def check_flex_attention(model: PreTrainedModel, gpu: bool) -> None:
    """Refuses to train by flex attention where torch has no backward pass of it, or it lacks the model's dropout."""
    if not gpu:
        raise UserError("attention=flex_attention trains on GPUs alone. Leave it out on a CPU.")
    keys = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    dropout = [key for key in keys if getattr(model.config, key, None)]
    if dropout:
        raise UserError(
            f"attention=flex_attention has no dropout, and the model has model.config.{dropout[0]}="
            f"{getattr(model.config, dropout[0])}.\nSet that to 0, or leave attention=flex_attention out."
        )


def share_tied_gradient(model: PreTrainedModel) -> None:
    """Lets the input embedding add its few rows to the head's gradient, where both share one matrix.

    Otherwise autograd fills a second gradient [V, H] with zeros and adds all of it, which took a fifth of a
    DistilRoBERTa-sized step on a CPU. On a GPU adding single rows has no fixed order, and the result no fixed bits,
    so there nothing changes. Call it when the model is wrapped: DDP would take an embedding marked so for one whose
    gradient stays sparse, and this one's does not.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(embedding, nn.Embedding) and head is not None and embedding.weight is head.weight
    if tied and embedding.weight.device.type == "cpu" and not isinstance(embedding.weight, DTensor):
        embedding.sparse = True


def check_sharding(model: PreTrainedModel) -> None:
    """Refuses to shard a model without a list of layers, or one that leaves out layers at random in training.

    Gradients are summed over the ranks as a backward pass comes to a layer: without one they would not be, as the loss
    does not come from what the whole model returns. Ranks gather the weights of a layer together, so that those of
    another layer would come in their place where each rank leaves out other ones.

    Raises:
        UserError: says so, or names the key of the model's config.
    """
    if isinstance(model, GeneratorAndDiscriminator):
        raise UserError(
            "a generator and a discriminator, which share their embeddings, are not sharded.\n"
            "Train them without trainer=fsdp, such as with trainer=ddp."
        )
    if not layers(model):
        raise UserError(
            "a model is sharded layer by layer, and this one has no nn.ModuleList of layers.\n"
            "Train it without trainer=fsdp, such as with trainer=ddp."
        )
    for key, value in model.config.to_dict().items():
        if key.endswith("layerdrop") and value:
            raise UserError(
                f"model.config.{key}={value}: the ranks of a sharded model can't leave out different layers.\n"
                f"Set model.config.{key}=0, or train without trainer=fsdp."
            )


def shard(model: PreTrainedModel, mesh: DeviceMesh, bf16: bool) -> None:
    """Divides parameters, gradients and optimizer states over the ranks of a mesh, layer by layer (FSDP2).

    The weights are those of rank 0. Those of other ranks may lie on the meta device; each gets its shards, one
    parameter after the other.

    Args:
        mesh: of one dimension, over which the model is sharded; or of two, over the first of which its shards are
            replicated (HSDP).
        bf16: True to gather the weights in bf16 (2 bytes a parameter in the forward and in the backward pass), False
            to gather them in float32, in which they are kept. Gradients are summed over the ranks in float32 either
            way. Products are those of autocast, which rounds weights too; in bf16, embeddings and the weights of norms
            are rounded as well.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # most runs need not wait for it

    if isinstance(model, FSDPModule):
        return  # Lightning asks for it before each of its runs
    if bf16:  # what the layers add to stays in float32, as under autocast
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, output: output.float())
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    empty = any(weight.is_meta for weight in weights.values())
    for module in (*layers(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    device = torch.device(mesh.device_type)
    if empty:
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        weight = weights.pop(name)
        weight = torch.empty_like(weight, device=device) if empty else weight.to(device)
        shards = distribute_tensor(weight, mesh, parameter.placements)
        parameter.detach().to_local().copy_(shards.to_local())
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def unsharded(model: PreTrainedModel, empty: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Gives whole weights, and the buffers of a sharded model, to an empty one of the same kind, and returns that."""
    empty.load_state_dict(weights, assign=any(weight.is_meta for weight in empty.parameters()))
    empty.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(empty.get_submodule(owner), leaf, buffer.cpu())
    return empty
