"""Only labelled positions go through the vocabulary head (promise 3), and only so many at a time.

Shapes: B samples, T positions, H hidden, N scored positions, V vocabulary, R rows held at once.
"""

import math
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from lmlab.errors import UserError, first_line
from lmlab.models.probe import backbone, example, forward, in_evaluation, probe

LOGITS = 128 * 2**20
"""Bytes of float32 logits held at once on a CPU: as fast as all of them, as fewer are not (benchmarks/README.md)."""

ASKED = (
    (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    (masking_utils, "find_packed_sequence_indices"),
)
"""What transformers reads from the device in each forward pass, and a host would wait for: whether rows
end in padding, or position ids begin anew, where no mask says so. In lmlab's batches neither happens."""


class Scores(NamedTuple):
    """What a model makes of the targets of a batch."""

    nll: Tensor
    """[N] negative log-likelihood of each target, nats."""
    auxiliary: Tensor | None
    """The model's own auxiliary loss (a scalar, weighted by its coefficient); None where it has none."""


def score(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    rows: int | None = None,
) -> Scores:
    """Score `targets` [N] at `positions` [N] of the flat B·T.

    A hook on the backbone hands only the scored rows of its `last_hidden_state` to the head
    (transform and vocabulary projection), whatever the architecture. Positions come as indices
    rather than as a mask: on a GPU a mask would have to be counted first, and the host would
    wait for it.

    Args:
        rows: of the logits, held at once; None holds all [N, V]. For models whose logits are
            what their output embedding gives, and sums of the result: see `ChunkedNLL`.
    """
    projected: list[Tensor] = []

    def keep_scored(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state  # [B, T, H]
        output.last_hidden_state = hidden.flatten(0, 1).index_select(0, positions)[None]  # [1, N, H]
        return output

    def project_nothing(module: nn.Module, args: Any) -> Any:
        projected.append(args[0][0])  # [N, H], through the head's transform
        return (args[0][:, :0],)

    head, body = model.get_output_embeddings(), backbone(model)
    with ExitStack() as stack:
        stack.callback(body.register_forward_hook(keep_scored).remove)
        if rows is not None:
            stack.callback(head.register_forward_pre_hook(project_nothing).remove)
        for owner, question in ASKED:
            stack.enter_context(patch.object(owner, question, lambda *args: None))
        output = forward(model, input_ids, attention_mask)
    auxiliary = auxiliary_loss(model, output)
    if rows is None:
        logits = output.logits[0]  # [N, V]
        return Scores(F.cross_entropy(logits.float(), targets, reduction="none"), auxiliary)
    nll = ChunkedNLL.apply(projected[0], head.weight, head.bias, targets, rows, torch.is_grad_enabled())
    return Scores(nll, auxiliary)


def auxiliary_loss(model: PreTrainedModel, output: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts (Fedus et al. 2022, section 2.2), times its coefficient.

    transformers computes it where the model's config has `output_router_logits`, and adds it to
    the loss by this coefficient.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    owners = (model, model.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return loss * next(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name))


@torch.no_grad()
def check_scoring(model: PreTrainedModel) -> None:
    """Refuse a model whose targets `score` does not score as its own logits do.

    Raises:
        UserError: says by how much they differ on a few tokens.
    """
    with in_evaluation(model):
        ids = torch.cat([example(model), example(model).flip(1)])  # [2, T]
        positions = torch.tensor([1, 3, 5, 6], device=ids.device)
        targets = ids.flatten()[positions - 1]
        own = F.cross_entropy(forward(model, ids).logits.flatten(0, 1)[positions].float(), targets, reduction="none")
        why = ""
        try:
            moved = float((score(model, ids, None, positions, targets).nll - own).abs().max())
        except (RuntimeError, IndexError, ValueError) as error:
            moved, why = math.inf, f" ({first_line(error)})"
    # Weights that give no numbers are for their metrics to show.
    if own.isfinite().all() and not moved <= 1e-4 * max(1.0, float(own.max())):
        by = f"by {moved:.2g} nats" if moved < math.inf else f"altogether{why}"
        raise UserError(
            f"lmlab can't score {model.config.model_type}: where only some positions go through its head, the nll of a "
            f"target differs from that of its own logits {by}.\nChoose another architecture."
        )


class ChunkedNLL(torch.autograd.Function):
    """nll [N] of targets under softmax(hidden · weightᵀ + bias), without ever holding logits [N, V].

    The gradients are made in the forward pass, while the logits of R rows are at hand, and
    scaled in the backward pass. So the nll of all rows must weigh the same, as in their sum.
    Softmax and sums are float32 whatever the precision of the product.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, learning: bool
    ) -> Tensor:
        """`hidden` [N, H], `weight` [V, H], `bias` [V], `targets` [N]; `learning`: gradients will be asked for."""
        device = hidden.device.type
        # A last norm gives float32 under autocast, and the product would not have been made in it.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if wants_float32(device, dtype):
            dtype = torch.float32
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        nll = torch.empty(len(h), dtype=torch.float32, device=h.device)
        if learning:
            d_hidden = torch.empty_like(h)
            d_weight = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
            d_bias = None if b is None else torch.zeros(b.shape, dtype=torch.float32, device=w.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h), rows):
                part, wanted = slice(start, start + rows), targets[start : start + rows, None]
                logits = F.linear(h[part], w, b).float()  # [R, V]
                norm = logits.logsumexp(1, keepdim=True)
                nll[part] = (norm - logits.gather(1, wanted))[:, 0]
                if learning:
                    # The probabilities, less 1 for the target: d nll / d logits.
                    slope = logits.sub_(norm).exp_()
                    slope.scatter_(1, wanted, slope.gather(1, wanted) - 1)
                    if d_bias is not None:
                        d_bias += slope.sum(0)
                    slope = slope.to(dtype)
                    torch.mm(slope, w, out=d_hidden[part])
                    if dtype == torch.float32:
                        d_weight.addmm_(slope.t(), h[part])
                    else:
                        d_weight += slope.t() @ h[part]
        if learning:
            # Not saved as autograd saves: the backward pass may write into them.
            ctx.gradients = d_hidden, d_weight, d_bias
            ctx.dtypes = hidden.dtype, weight.dtype
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if upstream.numel() > 1 and upstream.stride() != (0,):
            raise RuntimeError("the nll of all rows must weigh the same in what is differentiated: take their sum.")
        d_hidden, d_weight, d_bias = ctx.gradients
        ctx.gradients = None
        scale = upstream[:1].float().sum()  # 0 where N is 0
        scaled = [None if d is None else d.mul_(scale) for d in (d_hidden, d_weight, d_bias)]
        hidden_type, weight_type = ctx.dtypes
        types = (hidden_type, weight_type, weight_type)
        return *(None if d is None else d.to(t) for d, t in zip(scaled, types, strict=True)), None, None, None


def wants_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether the head's products are better made in float32, whatever the precision of the rest.

    In float16 gradients would vanish, as they are not yet scaled; a CPU below AVX-512 multiplies
    bf16 by a fallback some 100 times slower than float32.
    """
    slow = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return dtype == torch.float16 or slow


def rows_at_once(model: PreTrainedModel, wanted: int | None, on_gpu: bool) -> int | None:
    """How many rows of logits to hold: `wanted`, or what was measured to be fastest. None holds all.

    On GPUs nothing was measured yet: there all are held, unless the number is given.

    Raises:
        UserError: a number was given, and the model does more to its logits than project.
    """
    if wanted is None and on_gpu:
        return None
    if not probe(model).projects:
        if wanted is not None:
            raise UserError(
                f"logits_chunk_size={wanted}: {model.config.model_type} does more to its logits than project, so that "
                "they can't be made a few at a time.\nLeave it out."
            )
        return None
    return wanted or max(1, LOGITS // (4 * model.get_output_embeddings().out_features))
