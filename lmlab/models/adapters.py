"""Adapters: a few new weights that are trained beside those of a model, which stay as they are; by the library peft.

LoRA (Hu et al. 2021) adds a product of two small matrices to the matrix of a linear layer, and DoRA (Liu et al. 2024)
also trains the length of each of the sum's rows:

```
LoRA   W + s · B A                              W [out, in] frozen, A [r, in] and B [out, r] trained
DoRA   m · (W + s · B A) / ‖W + s · B A‖        m [out] trained too; s = alpha / r, or alpha / √r (rank-stabilised)
```

Both can be merged into W, which gives a model of the original architecture. QLoRA (Dettmers et al. 2023) rounds W
to 4 bits beforehand, so that it takes an eighth of the memory; the merged model is then that of the rounded W.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmlab.errors import UserError, first_line, nearest
from lmlab.hub import split_revision
from lmlab.models.efficiency import layers
from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.models.hashing import layers_hash
from lmlab.models.quantized import Quantized, quantize
from lmlab.models.torch_module import TorchModule

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""The name by peft of an adapter that is the only one of its model."""
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
"""The names by peft of the tasks that it has a class for, by the `AutoModel` class."""


def lora(
    r: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 16,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: Literal["all-linear"] | list[str] | None = None,
    rank_stabilised: bool = False,
    dora: bool = False,
    quantization: Literal["nf4"] | None = None,
    *,
    model: PreTrainedModel,
    base: str | None,
    revision: str | None,
    auto_class: str,
    seed: int,
) -> PreTrainedModel:
    """Adds an adapter to a model, in place, and freezes all its other weights; returns the model.

    The initial adapter does not change what the model computes. The class of the model and the names of the modules
    that get an adapter stay as they are. Its attribute `base_hash` becomes a hash of the layers, or None if they were
    not read from files as they are.

    Args:
        r: the rank, which is the number of rows of A.
        alpha: what is added to a matrix is scaled by alpha / r.
        dropout: the share of the inputs of A that are left out in training.
        targets: the linear layers that get an adapter, by the ends of their names; `all-linear` for all in the repeated
            layers. None takes those that peft has for the architecture, or all.
        rank_stabilised: divide alpha by √r rather than by r (Kalajdzievski 2023).
        dora: train the length of each row too.
        quantization: keep the weights of the linear layers in the repeated layers in 4 bits (`models/quantized.py`).
        base: hub id, directory or `.gguf` file that the model was loaded from, for the config of the adapter.
        revision: that of a hub id.
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".
        seed: decides the weights that A begins with.

    Raises:
        UserError: the model can't have an adapter, or none of its linear layers has such a name.
    """
    from peft import LoraConfig

    if isinstance(model, TorchModule | GeneratorAndDiscriminator):
        kind = "a torch module" if isinstance(model, TorchModule) else "a generator and a discriminator"
        raise UserError(f"adapter is for models of transformers, and the model is {kind}. Leave adapter out.")
    if random := getattr(model, "began_at_random", None):
        raise UserError(
            f"{base} holds no weights for {random}: beside an adapter they would stay random.\n"
            "Use a model that has them, or leave adapter out."
        )
    if base is not None:
        base, revision = split_revision(base, revision)
        base = str(Path(base).resolve()) if Path(base).exists() else base
    # A base that is itself an adapter was merged on this machine; another one may round differently.
    known = base is not None and model.device.type != "meta" and not hasattr(model, "merged_here")
    model.base_hash = layers_hash(model) if known else None
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=find_targets(model, targets),
        use_rslora=rank_stabilised,
        use_dora=dora,
        base_model_name_or_path=base,
        revision=revision,
        task_type=TASKS.get(auto_class),
    )
    if quantization is not None:
        quantize(model)
    try:
        inject(config, model, seed)
    except ValueError as error:
        raise UserError(
            f"adapter: {first_line(error)}\nName other layers as adapter.targets, or leave adapter out."
        ) from error
    return model


def find_targets(model: PreTrainedModel, targets: str | list[str] | None) -> list[str]:
    """Returns the names of the linear layers that get an adapter; `targets` is that of `lora`.

    Raises:
        UserError: one of the targets is no linear layer, or the projection to the vocabulary where that is tied.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT

    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    chosen: list[str] = []
    if isinstance(targets, list):
        for target in targets:
            found = [name for name in linear if f".{name}".endswith(f".{target}")]
            if not found:
                ends = sorted({name.rpartition(".")[2] for name in linear})
                other = next((type(m).__name__ for n, m in modules.items() if f".{n}".endswith(f".{target}")), None)
                why = f"is of the type {other}, and no linear layer" if other else "is no layer of the model"
                raise UserError(
                    f"adapter.targets: {target} {why}.{nearest(target, ends)}\nLinear layers: {', '.join(ends)}."
                )
            chosen += [name for name in found if name not in chosen]
    elif targets is None and (known := OF_PEFT.get(model.config.model_type)):
        pattern = known if isinstance(known, str) else rf"(.*\.)?({'|'.join(map(re.escape, known))})"
        chosen = [name for name in linear if re.fullmatch(pattern, name)]
    if not chosen and not isinstance(targets, list):
        repeated = {id(module) for layer in layers(model) for module in layer.modules()}
        chosen = [name for name in linear if id(modules[name]) in repeated]
    if not chosen:
        kind = model.config.model_type
        raise UserError(f"adapter: no linear layer of {kind} was found. Name some as adapter.targets.")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name in chosen:
        if modules[name] is head and embedding is not None and head.weight is embedding.weight:
            raise UserError(
                f"adapter.targets: the weights of {name} are those of the embedding too, which would then differ.\n"
                "Leave it out."
            )
    return chosen


def inject(config: "LoraConfig", model: PreTrainedModel, seed: int = 0) -> None:
    """Adds an adapter to a model, in place. The seed decides its weights; torch's generator stays as it is."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights of a Conv1D are transposed
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers of a model that have an adapter, with their names; none where it has no adapter."""
    if not hasattr(model, "peft_config"):  # peft need not be installed then
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def merged_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Lets a model in evaluation mode compute with merged weights, as its export does; afterwards they are as before.

    With the adapter computed beside them instead, products would be rounded differently, which shows in bf16. Each
    layer is merged in a copy while it computes: there may be no memory for a copy of all.
    """
    with ExitStack() as stack:
        for _, layer in [] if model.training else adapted_layers(model):
            stack.callback(layer.register_forward_pre_hook(merge_copy).remove)
            stack.callback(layer.register_forward_hook(partial(restore, layer.base_layer), always_call=True).remove)
        yield


def merge_copy(layer: Any, args: Any) -> None:
    """Merges the adapter of a layer into a copy of its base layer, which takes the place of that."""
    if not isinstance(layer.base_layer, Quantized):  # of which `merge_layer` makes a new one
        layer.base_layer = copy.deepcopy(layer.base_layer)
    with torch.autocast(args[0].device.type, enabled=False):  # which would multiply A and B in bf16
        merge_layer(layer)


def restore(base: nn.Module, layer: Any, args: Any, output: Any) -> None:
    """Gives a layer the base layer that it had before `merge_copy`."""
    layer.base_layer = base
    layer.merged_adapters.clear()


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with the adapter merged and no weight quantized, under the names of the architecture itself.

    Args:
        model: says which layers have an adapter or are quantized; its weights are not read.
        state: a state dict of the model, which may be of an earlier step.
    """
    merged = dict(state)
    for name, layer in changed_layers(model):
        own = {key.removeprefix(f"{name}."): merged.pop(key) for key in state if key.startswith(f"{name}.")}
        twin = copy.deepcopy(layer).cpu()
        twin.load_state_dict(own)
        merged |= {f"{name}.{key}": tensor for key, tensor in merge_layer(twin).state_dict().items()}
    return merged


def changed_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers of a model that have an adapter or are quantized without one, with their names."""
    adapted = adapted_layers(model)
    bases = {id(layer.get_base_layer()) for _, layer in adapted}
    return adapted + [(n, m) for n, m in model.named_modules() if isinstance(m, Quantized) and id(m) not in bases]


def merge_layer(layer: Any) -> nn.Module:
    """Returns a layer of the architecture that computes what one of `changed_layers` does; that one is used up."""
    if isinstance(layer, Quantized):
        return layer.dense()
    if isinstance(layer.base_layer, Quantized):
        layer.base_layer = layer.base_layer.dense()
    layer.merge()
    merged: nn.Module = layer.base_layer
    return merged


def remove(model: PreTrainedModel, merged: Mapping[str, Tensor]) -> None:
    """Removes the adapter of a model without merging it, in place, and unfreezes all weights of the model.

    Args:
        merged: its merged state dict, whose tensors become the weights of layers that were quantized: there may be no
            memory for others.
    """
    for name, layer in changed_layers(model):
        base = layer if isinstance(layer, Quantized) else layer.get_base_layer()
        parent, _, leaf = name.rpartition(".")
        plain = base.dense(merged[f"{name}.weight"]) if isinstance(base, Quantized) else base
        setattr(model.get_submodule(parent), leaf, plain)
    del model.peft_config
    model.requires_grad_(True)
