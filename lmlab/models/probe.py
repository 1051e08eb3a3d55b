"""Finds out by forward passes over a few tokens what an architecture does, rather than by the names in its class.

Shapes: B rows, T positions, U of a decoder beside an encoder, H hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import ModelOutput

from lmlab.errors import UserError
from lmlab.models.torch_module import TorchModule, constants_varied

TOKENS, PADDING = 4, 2  # of a probe: no more than any model has positions
PORTABLE = ("eager", "sdpa")
"""Implementations of attention that run on any device."""
DOCUMENT_ATTENTION = (*PORTABLE, "flex_attention")
"""Implementations of attention that take any mask, as attention within documents needs."""


DEVICE_READS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *args: None),
    (masking_utils, "find_packed_sequence_indices", lambda *args: None),
    (masking_utils, "is_tracing", lambda tensor=None: tensor is not None),
)
"""Functions of transformers that read from the device in each forward pass, so that the host would wait for it, and
what stands in for them: whether rows end in padding, or position ids begin anew, where no mask says so, and whether a
mask hides anything, which is read unless a tensor is traced. In lmlab's batches neither of the first two happens, and
there is a mask only where rows are padded."""


class Probe(NamedTuple):
    """The properties of a model's forward pass."""

    backbone: str
    """The module whose `last_hidden_state` [B, T, H] the head reads, by its dotted name in the model: of an
    encoder-decoder the decoder, [B, U, H], or the module with both. Of a
    `TorchModule` its head, which reads the hidden states, or the model itself (an empty name) where none is known."""
    projects: bool
    """True if the logits are just what the output embedding, a plain `nn.Linear`, returns."""
    sees_ahead: bool
    """True if a token changes the logits of positions before it; of an encoder-decoder one that the decoder reads."""
    padding_matters: bool
    """True if padding on the right changes the logits of a row's own positions."""
    needs_mask: bool
    """True if such padding changes them when no mask hides it. Models that do not see ahead mostly need no mask."""
    first_position: int | None
    """The number of the first position, see `first_position`; None if the model can't be told the position of each
    token, as some that know distances alone."""


PROBES: WeakKeyDictionary[nn.Module, Probe] = WeakKeyDictionary()


def probe(model: PreTrainedModel) -> Probe:
    """Returns the properties of the model's forward pass; the passes are made once for each model.

    Raises:
        UserError: no module of the model returns a `last_hidden_state`.
    """
    if model not in PROBES:
        PROBES[model] = run_probe(model)
    return PROBES[model]


def backbone(model: PreTrainedModel) -> nn.Module:
    """Returns the module whose `last_hidden_state` the head reads, all of the model but its head: `Probe.backbone`."""
    module: nn.Module = model.get_submodule(probe(model).backbone)
    return module


def hook_hidden_states(model: PreTrainedModel, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Lets a function replace the hidden states [B, T, H] that the head reads.

    Of a `TorchModule` without a known head it replaces the logits [B, T, V].
    """
    body = backbone(model)
    if body is model.get_output_embeddings():
        handle: RemovableHandle = body.register_forward_pre_hook(lambda module, args: (function(args[0]), *args[1:]))
        return handle
    name = "logits" if body is model else "last_hidden_state"

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        output[name] = function(output[name])
        return output

    return body.register_forward_hook(replace)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode, with an attention that runs on any device, and afterwards back.

    A `TorchModule` shows what it can do also where its parameters start with zeros.
    """
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention not in PORTABLE:
        model.set_attn_implementation("eager")
    try:
        with constants_varied(model) if isinstance(model, TorchModule) else nullcontext():
            yield
    finally:
        model.train(training)
        if attention not in PORTABLE:
            model.set_attn_implementation(attention)


def example_ids(model: PreTrainedModel) -> Tensor:
    """Returns ids [1, T] of different tokens that are hardly special ones."""
    return torch.arange(2, 2 + TOKENS, device=model.device)[None] % vocabulary(model)


def vocabulary(model: PreTrainedModel) -> int:
    """Returns the number of ids that a model can read: the rows of its embedding."""
    embedding = model.get_input_embeddings()
    return model.config.vocab_size if embedding is None else len(embedding.weight)


def forward(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None = None,
    decoder_ids: Tensor | None = None,
    document_positions: Tensor | None = None,
) -> Any:
    """Returns the model's output for ids [B, T].

    Args:
        mask: [B, T], 0 on padding, or a `prefix_mask`. None where no row is padded: some models take no mask.
        decoder_ids: [B, U] what the decoder of an encoder-decoder reads; None for other models.
        document_positions: [B, T] the position of each token in its document, whose other documents it does not see;
            None where each row is one text.
    """
    given = {"attention_mask": mask, "decoder_input_ids": decoder_ids}
    if document_positions is not None and (first := probe(model).first_position) is not None:
        given["position_ids"] = document_positions + first
    masked = {name: tensor for name, tensor in given.items() if tensor is not None}
    with ExitStack() as stack:
        for owner, name, function in DEVICE_READS:
            stack.enter_context(patch.object(owner, name, function))
        if document_positions is not None:
            masks = masks_within_documents(document_positions)
            stack.enter_context(patch.object(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", masks))
        return model(input_ids=ids, **masked, **({"use_cache": False} if model.can_generate() else {}))


def masks_within_documents(positions: Tensor) -> AttentionMaskInterface:
    """Returns the functions by which transformers makes its masks, changed so that documents do not see one another.

    Whatever a layer's own attention is (causal, in both directions, over a window or a chunk of positions), its mask
    becomes that of each document on its own. Two documents of two tokens in a row of a causal model:

    ```
    positions   0  1  0  1
    query 0     x  .  .  .
    query 1     x  x  .  .
    query 2     .  .  x  .
    query 3     .  .  x  x
    ```

    Args:
        positions: [B, T] the position of each token in its document; a document begins where it is 0.
    """
    documents = (positions == 0).cumsum(1)

    def within(make_mask: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, mask_function: Callable[..., Tensor], **options: Any) -> Any:
            def seen(row: Any, head: Any, query: Any, key: Any) -> Tensor:
                same = documents[row, query] == documents[row, key]
                return same & mask_function(row, head, positions[row, query], positions[row, key])

            # Without a mask the attention would be that of the whole row.
            never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return make_mask(*args, mask_function=seen, **options | never)

        return make

    masks = AttentionMaskInterface()
    for name in DOCUMENT_ATTENTION:
        masks[name] = within(masks[name])
    return masks


def example_decoder_ids(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Returns what a decoder beside an encoder reads where the encoder reads ids [B, T]: the same; else None."""
    return ids if getattr(model.config, "is_encoder_decoder", False) else None


def prefix_mask(prefix: Tensor, attention_mask: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
    """Returns the mask [B, 1, T, T] by which positions attend to a prefix, themselves and those before them.

    It is added to the scores of queries (third dimension) and keys (fourth), the form that both eager attention and
    sdpa take, so it is 0 where a position is seen, and the least number of the dtype where it is not. Three tokens and
    one of padding, with a prefix of 2:

    ```
    query 0   0  0  -  -
    query 1   0  0  -  -
    query 2   0  0  0  -
    query 3   0  0  0  -
    ```

    Args:
        prefix: [B] the number of first positions that every position may attend to.
        attention_mask: [B, T], 0 on padding; None where no row is padded.
        length: T.
        dtype: that of the model's weights.
    """
    numbers = torch.arange(length, device=prefix.device)
    seen = (numbers <= numbers[:, None]) | (numbers < prefix[:, None, None])  # [B, T, T]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None].bool()
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def run_probe(model: PreTrainedModel) -> Probe:
    """Runs the forward passes on the model as it is now, of which `probe` keeps the result.

    Whoever builds a model step by step calls this, so that nothing is kept of an unfinished one.
    """
    ids, head = example_ids(model), model.get_output_embeddings()
    # A hook that somebody else registered may do anything to the output of the last layer.
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    inner: list[nn.Module] = []
    projected: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if module is head:
            projected.append(output.clone())  # what comes after the head may change it in place
        elif module is not model and isinstance(output, ModelOutput) and output.get("last_hidden_state") is not None:
            inner.append(module)

    decoder_ids, changed = example_decoder_ids(model, ids), torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    with evaluation_mode(model):
        handle = register_module_forward_hook(watch)
        try:
            logits = forward(model, ids, None, decoder_ids).logits
        finally:
            handle.remove()
        last = forward(model, changed) if decoder_ids is None else forward(model, ids, None, changed)
        last_changed = last.logits
        padding_matters, needs_mask = (padding_changes(model, ids, logits, masked) for masked in (True, False))
    if not inner and not isinstance(model, TorchModule):
        raise UserError(
            f"lmlab can't score {model.config.model_type}: none of its modules returns a last_hidden_state.\n"
            "Choose another architecture."
        )
    names = {id(module): name for name, module in model.named_modules()}
    # The outermost module ends last.
    body = model.head or "" if isinstance(model, TorchModule) else names[id(inner[-1])]
    return Probe(
        backbone=body,
        projects=plain and len(projected) == 1 and torch.equal(projected[0], logits),
        sees_ahead=differ(logits[:, :-1], last_changed[:, :-1]),
        padding_matters=padding_matters,
        # Fresh weights of an encoder may hide what trained ones show: its mask is always kept.
        needs_mask=needs_mask or not model.can_generate() or decoder_ids is not None,
        first_position=first_position(model) if "position_ids" in inspect.signature(model.forward).parameters else None,
    )


def position_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Returns the table of a model's learned positions; None if it has none."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    return next((table for table in reversed(tables) if isinstance(table, nn.Embedding)), None)


def first_position(model: PreTrainedModel) -> int:
    """Returns the number of a model's first position: RoBERTa and its kin count from behind the padding index."""
    table = position_embedding(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def padding_changes(model: PreTrainedModel, ids: Tensor, logits: Tensor, masked: bool) -> bool:
    """Returns whether padding changes the logits [1, T, V] of ids [1, T], with a mask that hides it or without one."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    padded = nn.functional.pad(ids, (0, PADDING), value=0 if pad is None else pad)
    mask = nn.functional.pad(torch.ones_like(ids), (0, PADDING))
    try:
        output = forward(model, padded, mask if masked else None, example_decoder_ids(model, ids))
        return differ(logits, output.logits[:, :TOKENS])
    except TypeError:  # it takes no mask
        return True


def differ(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors differ by more than rounding.

    Those of a model whose weights give no finite numbers do not: its metrics will show that.
    """
    one, other = one.float(), other.float()
    if not one.isfinite().all():
        return False
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
