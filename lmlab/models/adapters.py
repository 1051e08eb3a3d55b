"""Adapters: a few new weights that are trained beside those of a model, which stay as they are; by the library peft.

LoRA (Hu et al. 2021) adds a product of two small matrices to the matrix of a linear layer, and DoRA (Liu et al. 2024)
also trains the length of each of the sum's rows:

```
LoRA   W + s · B A                              W [out, in] frozen, A [r, in] and B [out, r] trained
DoRA   m · (W + s · B A) / ‖W + s · B A‖        m [out] trained too; s = alpha / r, or alpha / √r (rank-stabilised)
```

Both can be merged into W, which gives a model of the original architecture.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lmlab.errors import UserError, check_installed, first_line, nearest
from lmlab.hub import ADAPTER, from_hub, is_adapter, is_gguf, split_revision
from lmlab.io import read_json, replaced
from lmlab.models.efficiency import layers
from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.models.torch_module import TorchModule

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""The name by peft of an adapter that is the only one of its model."""
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Stands before the name of each weight in the files of peft."""
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
"""The names by peft of the tasks that it has a class for, by the `AutoModel` class."""
READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
"""The keys of an adapter's config that its merged weights depend on."""
IGNORED = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "peft_version"),
)
"""The keys that say where it comes from and how it was trained."""
BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The ways to begin an adapter that leave the weights of the base as they are."""


def lora(
    r: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 16,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: Literal["all-linear"] | list[str] | None = None,
    rank_stabilised: bool = False,
    dora: bool = False,
    *,
    model: PreTrainedModel,
    base: str | None,
    revision: str | None,
    auto_class: str,
    seed: int,
) -> PreTrainedModel:
    """Adds an adapter to a model, in place, and freezes all its other weights; returns the model.

    The initial adapter does not change what the model computes. The class of the model and the names of the modules
    that get an adapter stay as they are.

    Args:
        r: the rank, which is the number of rows of A.
        alpha: what is added to a matrix is scaled by alpha / r.
        dropout: the share of the inputs of A that are left out in training.
        targets: the linear layers that get an adapter, by the ends of their names; `all-linear` for all in the repeated
            layers. None takes those that peft has for the architecture, or all.
        rank_stabilised: divide alpha by √r rather than by r (Kalajdzievski 2023).
        dora: train the length of each row too.
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
    try:
        inject(config, model, seed)
    except ValueError as error:
        raise UserError(f"adapter: {first_line(error)}") from error
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
        raise UserError(f"adapter: no linear layer of {model.config.model_type} was found. Name some: adapter.targets")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name in chosen:
        if modules[name] is head and embedding is not None and head.weight is embedding.weight:
            raise UserError(
                f"adapter.targets: the weights of {name} are those of the embedding too, which would then differ.\n"
                "Leave it out, or untie them: model.config.tie_word_embeddings=false"
            )
    return chosen


def inject(config: "LoraConfig", model: PreTrainedModel, seed: int = 0) -> None:
    """Adds an adapter to a model, in place. Its weights follow from the seed, and torch's generator stays as it is."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights of a Conv1D are transposed
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)


def adapted_layers(model: nn.Module) -> "list[tuple[str, LoraLayer]]":
    """Returns the layers of a model that have an adapter, with their names; none where it has no adapter."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def merged_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Lets a model in evaluation mode compute with merged weights, as its export does; afterwards they are as before.

    Where the adapter is computed beside them instead, products are rounded in other places, which shows in bf16. One
    layer at a time is merged, in a copy of its weight: there may be no memory for a copy of all.
    """
    with ExitStack() as stack:
        for _, layer in [] if model.training else adapted_layers(model):
            kept: list[Tensor] = []
            assert isinstance(layer, nn.Module)
            stack.callback(layer.register_forward_pre_hook(partial(merge_copy, kept)).remove)
            stack.callback(layer.register_forward_hook(partial(take_back, kept), always_call=True).remove)
        yield


def merge_copy(kept: list[Tensor], layer: Any, args: Any) -> None:
    """Merges the adapter of a layer into a copy of its weight, and keeps the weight."""
    weight = layer.get_base_layer().weight
    kept.append(weight.data)
    weight.data = weight.data.clone()
    with torch.autocast(weight.device.type, enabled=False):  # which would multiply A and B in bf16
        layer.merge()


def take_back(kept: list[Tensor], layer: Any, args: Any, output: Any) -> None:
    """Gives a layer its kept weight back."""
    layer.get_base_layer().weight.data = kept.pop()
    layer.merged_adapters.clear()


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict of a model with its adapter merged, under the names that the architecture itself has.

    Args:
        model: has such an adapter, of which no weight is read; or none, and then the state dict stays as it is.
        state: its state dict, of whatever step.
    """
    merged = dict(state)
    for name, layer in adapted_layers(model):
        own = {key.removeprefix(f"{name}."): merged.pop(key) for key in state if key.startswith(f"{name}.")}
        twin: Any = copy.deepcopy(layer).cpu()
        twin.load_state_dict(own)
        twin.merge()
        merged |= {f"{name}.{key}": tensor for key, tensor in twin.get_base_layer().state_dict().items()}
    return merged


def remove(model: PreTrainedModel) -> None:
    """Removes the adapter of a model, in place, and unfreezes all weights of the model."""
    for name, layer in adapted_layers(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def take_out(
    model: PreTrainedModel, state: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, path: Path
) -> dict[str, Tensor]:
    """Takes the adapter out of a model, writes it in the form of peft, and returns the model's merged state dict.

    Args:
        state: the state dict of the model with its adapter.
        tokenizer: lies beside the adapter, as it may differ from that of the base.
        path: the directory.
    """
    from peft import get_peft_model_state_dict

    merged, config = merged_state(model, state), copy.copy(model.peft_config[NAME])
    own = get_peft_model_state_dict(model, dict(state), save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in own.items()}
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        tokenizer.save_pretrained(folder)

    replaced(path, write)
    remove(model)
    return merged


def adapter_directory(name: str, revision: str | None = None) -> str | None:
    """Returns the directory of an adapter, which is downloaded if it is on the hub; None if the name is of none.

    Args:
        name: hub id or directory of an adapter, or of anything else.
        revision: branch, tag or commit of a hub id.
    """
    if is_adapter(name):
        return name
    if Path(name).exists() or is_gguf(name):
        return None
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return download_adapter(name, revision)
    except LocalEntryNotFoundError:  # not in the cache while the hub can't be reached
        return None


@cache
def download_adapter(name: str, revision: str | None) -> str | None:
    """Downloads what is read of an adapter on the hub, once, and returns its directory; None if there is none.

    Config, tokenizer and weights of a model are loaded one by one, and each load asks whether it is an adapter.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(name, ADAPTER, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    for file in (WEIGHTS, "tokenizer_config.json"):
        with suppress(EntryNotFoundError):
            hf_hub_download(name, file, revision=revision)
    return str(Path(config).parent)


@contextmanager
def base_of(adapter: str, name: str) -> Iterator[tuple[str, str | None]]:
    """Yields the hub id or path of the base of an adapter, and its revision; a failure to load inside names that base.

    A relative path begins at the directory of the adapter or, as for peft, at the working directory.

    Args:
        adapter: the directory of the adapter.
        name: that directory or the hub id of the adapter.

    Raises:
        UserError: its config names no base, or the adapter itself, or an adapter that is not LoRA.
    """
    config = read_adapter(adapter)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise UserError(f"{name} is an adapter that names no base: add base_model_name_or_path to its {ADAPTER}.")
    beside = Path(adapter, base)
    base = str(beside) if beside.exists() else base
    if Path(base) in (Path(adapter), Path(name)):
        raise UserError(f"{name} is an adapter whose base is itself: change base_model_name_or_path in its {ADAPTER}.")
    with from_hub("the base of an adapter, model", base, f"base_model_name_or_path in {Path(adapter, ADAPTER)}"):
        yield base, revision


def read_adapter(name: str) -> dict[str, Any]:
    """Returns the config of the adapter in a directory.

    Raises:
        UserError: it is no LoRA, or of a kind that lmlab does not read; says why.
    """
    config = read_json(Path(name, ADAPTER))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{name} is an adapter of the type {kind}, and lmlab reads those of the type LORA alone.")
    if config.get("init_lora_weights", True) not in BESIDE_THE_BASE:
        raise UserError(
            f"{name} began with a change of its base, which lmlab does not make (init_lora_weights="
            f"{config['init_lora_weights']}).\nLet peft convert it to plain LoRA, by save_pretrained and its "
            "path_initial_model_for_weight_conversion."
        )
    return config


def merge_adapter(model: PreTrainedModel, name: str) -> None:
    """Merges the adapter in a directory into its base, in place.

    Only the keys of its config that LoRA and DoRA are made of go to peft: others can name code.

    Raises:
        UserError: it is of a kind that lmlab does not read, is damaged, or does not fit the base; says why.
    """
    check_installed(f"the adapter {name}", "adapters", "peft")
    from peft import LoraConfig, set_peft_model_state_dict

    config, defaults = read_adapter(name), LoraConfig().to_dict()
    for key, value in config.items():
        if key not in (*READ, *IGNORED) and value and value != defaults.get(key):
            raise UserError(f"{name} has {key}={value}, and lmlab reads adapters of LoRA and DoRA without it alone.")
    if not Path(name, WEIGHTS).is_file():
        raise UserError(f"{name} has no {WEIGHTS}, and weights in another form are not read: they may hold code.")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(Path(name, WEIGHTS)).items()}
    try:
        inject(LoraConfig(**{key: config[key] for key in READ if key in config}), model)
        result = set_peft_model_state_dict(model, tensors)
        missing = [key for key in result.missing_keys if ".lora_" in key]
        wrong = [*result.unexpected_keys, *missing]
        if wrong:
            raise ValueError(f"{len(wrong)} weights, such as {wrong[0]}, are in one of them alone")
        for _, layer in adapted_layers(model):
            layer.merge(safe_merge=True)
    except (ValueError, RuntimeError, TypeError, KeyError, re.error) as error:
        raise UserError(f"the adapter {name} does not fit its base: {first_line(error)}.") from error
    remove(model)
