"""Wraps a plain torch module, `forward(input_ids [B, T]) -> logits [B, T, V]`, as a model of transformers.

Shapes: B rows, T positions, H hidden size, V vocabulary, N scored positions.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from lmlab.errors import UserError, first_line, out_of_memory
from lmlab.models.efficiency import layers

EXPECTED = "forward(input_ids [B, T]) has to return logits [B, T, V]"


class TorchModuleConfig(PreTrainedConfig):  # type: ignore[misc]
    """The config of a torch module: under `module` its class or function (`_target_`) and the arguments of that."""

    model_type = "torch_module"


AutoConfig.register(TorchModuleConfig.model_type, TorchModuleConfig)


class TorchModule(PreTrainedModel):  # type: ignore[misc]
    """A torch module with the methods by which lmlab uses a model of transformers; `wrap` makes it."""

    config_class = TorchModuleConfig
    base_model_prefix = "module"
    embedding: str | None = None
    """The `nn.Embedding` that reads the ids, by its dotted name; None if there is none."""
    head: str | None = None
    """The `nn.Linear` that makes the logits of whatever rows it is given, by its dotted name; None if there is none."""

    def __init__(self, config: TorchModuleConfig, module: nn.Module):
        super().__init__(config)
        self.module = module
        self.takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
        self.supports_gradient_checkpointing = bool(layers(self))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> CausalLMOutput:
        """Returns the module's logits [B, T, V] for ids [B, T]; it is given the mask where it has that parameter."""
        mask = {"attention_mask": attention_mask} if self.takes_mask else {}
        return CausalLMOutput(logits=self.module(input_ids, **mask))

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.embedding is None else self.get_submodule(self.embedding)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.head is None else self.get_submodule(self.head)

    def set_attn_implementation(self, attn_implementation: Any, *unused: Any) -> None:
        raise UserError(f"attention={attn_implementation}: a torch module has no choice of attention. Leave it out.")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        for layer in layers(self):
            layer.forward = partial(checkpoint, layer.forward, **gradient_checkpointing_kwargs or {})

    def save_pretrained(
        self, save_directory: Any, state_dict: Mapping[str, Tensor] | None = None, **unused: Any
    ) -> None:
        """Writes the config, and the module's own state dict under its own names: a shared tensor under each of them.

        They are copies, as safetensors takes no tensors that share memory, such as those of an LSTM on a GPU.

        Args:
            state_dict: that of this model at another time.
        """
        self.config.save_pretrained(save_directory)
        named = self.state_dict() if state_dict is None else state_dict
        state = {n.removeprefix("module."): tensor.detach().cpu().contiguous().clone() for n, tensor in named.items()}
        save_file(state, Path(save_directory, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})


class TorchModuleForCausalLM(TorchModule, GenerationMixin):  # type: ignore[misc]
    """A torch module that continues texts, each token from all of those before it, without a cache."""

    def __init__(self, config: TorchModuleConfig, module: nn.Module):
        super().__init__(config, module)
        self.generation_config.use_cache = False


class TorchModuleForMaskedLM(TorchModule):
    """A torch module that fills masks."""


@torch.no_grad()
def wrap(module: Any, tokenizer: PreTrainedTokenizerBase, auto_class: str) -> TorchModule:
    """Returns a torch module as a model of transformers, in evaluation mode.

    Args:
        module: an `nn.Module`; one that takes only so many positions may say so by an attribute `max_positions`.
        tokenizer: gives the ids, and the special tokens.
        auto_class: the class of transformers that the objective wants, such as "AutoModelForCausalLM".

    Raises:
        UserError: it is no module, or returns something else than logits [B, T, V] for each token of the tokenizer.
    """
    if not isinstance(module, nn.Module):
        raise UserError(
            f"the model's _target_ returns {described(module)}.\n"
            "Let it return a model of transformers (PreTrainedModel) or a torch module (nn.Module)."
        )
    if auto_class == "AutoModelForSeq2SeqLM":
        raise UserError(
            "this objective trains encoder-decoders of transformers, and no torch module: it takes no second text.\n"
            "Use model=t5_small, or model=scratch model.architecture=…"
        )
    if auto_class == "AutoModelForPreTraining":
        raise UserError(
            "this objective trains a discriminator with a generator, and no torch module.\nUse model=electra_small."
        )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    kind = TorchModuleForMaskedLM if auto_class == "AutoModelForMaskedLM" else TorchModuleForCausalLM
    positions = getattr(module, "max_positions", None)
    config = TorchModuleConfig(architectures=[kind.__name__], max_position_embeddings=positions, **special)
    model = kind(config, module)
    rows, length, tokens = 2, 4, len(tokenizer)
    ids = torch.arange(rows * length).view(rows, length) % tokens
    ids[-1, -1] = tokens - 1
    model.eval()
    logits = checked_logits(model, ids)
    if logits.shape[-1] < tokens:
        raise UserError(
            f"{name_of(model)} makes logits {list(logits.shape)}, and the tokenizer has {tokens} tokens: "
            f"[B, T, V] is [{rows}, {length}, {tokens}] here, or more.\n"
            "Give it that vocabulary: a target with a parameter `tokenizer` is given the tokenizer."
        )
    config.vocab_size = logits.shape[-1]
    find_embedding_and_head(model, ids, logits)
    return model


def load(
    name: str,
    revision: str | None,
    config: TorchModuleConfig,
    module: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    auto_class: str,
) -> TorchModule:
    """Gives the weights of an exported torch module to one that was made as it was, and returns that.

    Args:
        name: hub id or directory.
        revision: branch, tag or commit of a hub id.
        config: the exported one.
        module: what the config's `module` names; None is refused, as that is code which nobody has allowed to run.
        tokenizer, auto_class: as for `wrap`.

    Raises:
        UserError: the module is not there, or other weights than its own are.
    """
    if module is None:
        words = " ".join(f"+model.module.{key}={value}" for key, value in config.module.items())
        raise UserError(
            f"{name} holds a torch module, made by code that runs only where it is named.\n"
            f"If you trust that code, add to a command that takes overrides: {words}"
        )
    model = wrap(module, tokenizer, auto_class)
    try:
        module.load_state_dict(load_file(cached_file(name, SAFE_WEIGHTS_NAME, revision=revision)))
    except RuntimeError as error:
        why = shorten(str(error), 300, placeholder=" …")
        raise UserError(f"the weights of {name} are not those of {name_of(model)}: {why}") from error
    return model


def checked_logits(model: TorchModule, ids: Tensor) -> Tensor:
    """Returns the logits [B, T, V] of ids [B, T].

    Raises:
        UserError: the module can't read the ids, or returns something else.
    """
    shape = list(ids.shape)
    try:
        logits = model(ids).logits
    except Exception as error:  # of the module's own code, which has not run before
        if out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{name_of(model)} can't read ids {shape} from 0 to {int(ids.max())} ({cause}).\n"
            f"{EXPECTED}. debug=true shows where it fails."
        ) from error
    if isinstance(logits, Tensor) and logits.ndim == 3 and list(logits.shape[:2]) == shape:
        return logits
    more = ", and no loss with them, which lmlab computes itself" if isinstance(logits, tuple | list | dict) else ""
    raise UserError(
        f"{name_of(model)} returns {described(logits)} for ids {shape}.\n"
        f"{EXPECTED}, here [{shape[0]}, {shape[1]}, V]: those of all positions{more}."
    )


def check_length(model: TorchModule, length: int) -> None:
    """Refuses a block size that the module can't read.

    Raises:
        UserError: says so.
    """
    try:
        with torch.no_grad():
            checked_logits(model, torch.arange(length)[None] % model.config.vocab_size)
    except UserError as error:
        first, *_ = str(error).splitlines()
        raise UserError(f"{first}\nSet preprocess.block_size to what it can read at once.") from error


def name_of(model: TorchModule) -> str:
    """Returns the import path of the class of a torch module."""
    return f"{type(model.module).__module__}.{type(model.module).__qualname__}"


def described(value: Any) -> str:
    """Returns what something is, in words, such as "a tuple of a tensor [2, 1, 300], None"."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(described, value)) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"


def find_embedding_and_head(model: TorchModule, ids: Tensor, logits: Tensor) -> None:
    """Finds the embedding and the head of a torch module by a forward pass over ids [B, T], and notes their names."""
    names = {id(part): name for name, part in model.named_modules()}
    embeddings, linears = list[nn.Module](), list[nn.Module]()

    def watch(part: nn.Module, args: Any, output: Any) -> None:
        if isinstance(part, nn.Embedding) and args and torch.equal(args[0], ids):
            embeddings.append(part)
        elif isinstance(part, nn.Linear) and output.shape == logits.shape:
            linears.append(part)

    handle = register_module_forward_hook(watch)
    try:
        checked_logits(model, ids)
    finally:
        handle.remove()
    if embeddings:
        model.embedding = names[id(embeddings[0])]
    if linears and linears.count(linears[-1]) == 1 and projects_rows(model, linears[-1], ids):
        model.head = names[id(linears[-1])]


def projects_rows(model: TorchModule, head: nn.Module, ids: Tensor) -> bool:
    """Returns whether the module makes the same logits of a few positions where only these are handed to a Linear."""
    rows = torch.tensor([0, 2, 3, 5, 6])  # as many as there are neither rows in the batch nor positions in one

    def select(part: nn.Module, args: Any) -> Any:
        return (args[0].flatten(0, 1).index_select(0, rows)[None], *args[1:])

    with constants_varied(model):
        own = checked_logits(model, ids).flatten(0, 1)[rows]
        handle = head.register_forward_pre_hook(select)
        try:
            made = model(ids).logits
        except Exception:  # whatever the module does to the shape of the logits
            return False
        finally:
            handle.remove()
    return isinstance(made, Tensor) and made.shape == own[None].shape and torch.allclose(made[0], own, 1e-4, 1e-5)


@contextmanager
@torch.no_grad()
def constants_varied(model: nn.Module) -> Iterator[None]:
    """Varies the parameters that hold one value alone, for the time inside.

    An output projection that starts with zeros would hide from a probe what lies before it: an attention that sees
    ahead, for instance, until it is trained.
    """
    constants = [(p, p.flatten()[0].clone()) for p in model.parameters() if p.numel() and p.eq(p.flatten()[0]).all()]
    generator = torch.Generator().manual_seed(0)
    for parameter, _ in constants:
        noise = 0.05 + 0.1 * torch.rand(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter))
    try:
        yield
    finally:
        for parameter, value in constants:
            parameter.copy_(value)
