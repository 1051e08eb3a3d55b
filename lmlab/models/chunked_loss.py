"""Computes the nll from the input of the head in chunks, without ever holding the logits of all scored positions.

Shapes: H hidden size, N scored positions of the batch, V vocabulary, V' the same after padding, R positions of a chunk.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lmlab.errors import UserError, first_line
from lmlab.models.probe import probe

if TYPE_CHECKING:
    from lmlab.models.teacher import TeacherOutput

LOG = logging.getLogger(__name__)
LOGITS_BYTES = {"cpu": 128 * 2**20, "gpu": 2**30}
"""The bytes of a chunk of logits, counted in float32. On a CPU it is as fast as all at once, a smaller one is slower
(benchmarks/README.md). On a GPU the products of some thousands of rows keep it busy, and all at once take many GiB."""
ALIGNMENT = 64
"""The number that V' is a multiple of where products are made in 16 bits. With rows of another length a GPU can't read
128 bytes at a time, and is several times slower."""


class ChunkedNLL(torch.autograd.Function):
    """Computes the nll [N] of targets under softmax(hidden · weightᵀ + bias) without ever holding logits [N, V].

    The gradients are made in the forward pass, while the logits of R rows are at hand, and scaled in the backward
    pass. So what is returned must weigh the same for all rows, as in their sum: weights of their own are given in the
    forward pass. Softmax and sums are float32 whatever the precision of the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        train: bool,
        scale: Tensor | None = None,
        weights: Tensor | None = None,
        taught: "TeacherOutput | None" = None,
        observe: Callable[[slice, Tensor], None] | None = None,
        z_loss: float = 0.0,
    ) -> Any:
        """Returns the nll [N], times its weights; with a z-loss, loss and nll, and with a teacher loss, nll and kl, [N]
        each (see `lmlab.models.loss.Scores`).

        Args:
            hidden: [N, H].
            weight: [V, H].
            bias: [V].
            targets: [N].
            chunk_size: R.
            train: whether gradients are made; autograd itself can't be asked in here.
            scale: a factor of the gradients in float16, which would vanish without it; the backward pass takes it
                off again.
            weights: [N].
            taught: what a teacher says of these rows. The loss alone can then be differentiated.
            observe: called with each part and its logits [R, V].
            z_loss: the coefficient of the z-loss. The loss alone can then be differentiated.
        """
        device = hidden.device.type
        dtype = product_dtype(hidden, train and scale is None)
        if dtype != torch.float16:
            scale = None
        h, w = hidden.to(dtype), pad_vocabulary(weight, dtype)  # [N, H], [V', H]
        b = None if bias is None else pad_vocabulary(bias, dtype)
        factors = scale if weights is None else (weights if scale is None else weights * scale)[:, None]
        vocabulary = len(weight)
        kinds = 3 if taught is not None else 2 if z_loss else 1
        losses = torch.empty((kinds, len(h)), dtype=torch.float32, device=h.device)
        d_hidden = d_weight = d_bias = None
        if train:
            _, trains_weight, trains_bias, *_ = ctx.needs_input_grad  # a frozen head has no gradient
            d_hidden = torch.empty_like(h)
            if trains_weight:
                d_weight = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
            if b is not None and trains_bias:
                d_bias = torch.zeros(b.shape, dtype=torch.float32, device=w.device)
        step = compiled_nll_and_slope(device) if device == "cuda" else nll_and_slope
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h), chunk_size):
                part = slice(start, start + chunk_size)
                logits = F.linear(h[part], w, b)  # [R, V']
                if len(w) > vocabulary:
                    logits[:, vocabulary:] = -torch.inf  # of probability 0, and so of slope 0
                if step is nll_and_slope:
                    logits = logits.float()  # here, so that memory holds them once
                if observe is not None:
                    observe(part, logits[:, :vocabulary])
                of_part = factors[part] if factors is not None and factors.dim() else factors
                rest = targets[part], dtype if train else None, of_part
                *values, slope = step(logits, *rest, z_loss) if taught is None else taught.distill(part, logits, *rest)
                for row, value in zip(losses, values, strict=True):
                    row[part] = value
                if slope is None or d_hidden is None:
                    continue
                if d_bias is not None:
                    d_bias += slope.sum(0, dtype=torch.float32)
                torch.mm(slope, w, out=d_hidden[part])
                if d_weight is None:
                    continue
                if dtype == torch.float32:
                    d_weight.addmm_(slope.t(), h[part])
                elif device == "cuda":  # CPUs have no product that adds 16 bits to 32
                    torch.addmm(d_weight, slope.t(), h[part], out_dtype=torch.float32, out=d_weight)
                else:
                    d_weight += slope.t() @ h[part]
        if weights is not None:
            losses.mul_(weights)
        if train:
            # Not saved as autograd saves: the backward pass may write into them.
            ctx.gradients = d_hidden, *(None if d is None else d[:vocabulary] for d in (d_weight, d_bias))
            ctx.dtypes, ctx.scale = (hidden.dtype, weight.dtype), scale
        if kinds == 1:
            return losses[0]
        loss, *others = losses
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *of_constants: Tensor) -> Any:
        if upstream.numel() > 1 and upstream.stride() != (0,):
            raise RuntimeError("the nll of all rows must weigh the same in what is differentiated: take their sum.")
        d_hidden, d_weight, d_bias = ctx.gradients
        ctx.gradients = None
        scale = upstream[:1].float().sum()  # 0 where N is 0
        if ctx.scale is not None:
            scale = scale / ctx.scale
        scaled = [None if d is None else d.mul_(scale) for d in (d_hidden, d_weight, d_bias)]
        hidden_type, weight_type = ctx.dtypes
        types = (hidden_type, weight_type, weight_type)
        return (
            *(None if d is None else d.to(t) for d, t in zip(scaled, types, strict=True)),
            *[None] * 8,
        )


def pad_vocabulary(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight [V, …] in a dtype, in 16 bits with rows of zeros up to the next multiple of `ALIGNMENT`."""
    padding = -len(weight) % ALIGNMENT
    if dtype == torch.float32 or not padding:
        return weight.to(dtype)
    padded = weight.new_empty((len(weight) + padding, *weight.shape[1:]), dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def nll_and_slope(
    logits: Tensor, targets: Tensor, dtype: torch.dtype | None, factors: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Any, ...]:
    """Returns the nll [R] of targets [R] under logits [R, V], and its derivative by the logits, in a dtype.

    The derivative, None without a dtype, is the probabilities less 1 for the target, times factors, a scalar or [R, 1],
    if there are any. It may overwrite the logits. With a z-loss (see `lmlab.models.loss.score`), the loss [R] comes
    before the nll, and the derivative is that of the loss.
    """
    logits = logits.float()
    # As logsumexp does it, but written out: torch.compile then makes maximum and sum in one pass rather than two.
    largest = logits.amax(1, keepdim=True)
    norm = (logits - largest).exp_().sum(1, keepdim=True).log_().add_(largest)
    nll = (norm - logits.gather(1, targets[:, None]))[:, 0]
    losses = (nll + z_loss * norm[:, 0].square(), nll) if z_loss else (nll,)
    if dtype is None:
        return *losses, None
    slope, of_target = logits.sub_(norm).exp_(), (-nll).expm1()[:, None]
    if z_loss:
        of_z = 2 * z_loss * norm
        slope, of_target = slope.mul_(1 + of_z), of_target + of_z * (-nll).exp()[:, None]
    if factors is not None:
        slope, of_target = slope.mul_(factors), of_target * factors
    return *losses, slope.to(dtype).scatter_(1, targets[:, None], of_target.to(dtype))


@cache
def compiled_nll_and_slope(device: str) -> Callable[..., tuple[Any, ...]]:
    """Returns `nll_and_slope` compiled for a kind of device: in two passes over the logits rather than ten.

    It is returned as it is, and a warning logged, where it can't be compiled: Triton needs a C compiler, Python's
    headers and the driver's library.
    """
    compiled = torch.compile(nll_and_slope, dynamic=True)
    try:
        compiled(torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device), torch.float32)
    except Exception as error:  # of Triton, of the compiler that it calls, or of torch
        LOG.warning("the loss is not compiled, and so takes longer: %s", first_line(error))
        return nll_and_slope
    return compiled


def product_dtype(hidden: Tensor, unscaled: bool) -> torch.dtype:
    """Returns the dtype in which a head multiplies its input; for `unscaled` see `multiplies_in_float32`."""
    device = hidden.device.type
    # A last norm gives float32 under autocast, and the product would not have been made in it.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if multiplies_in_float32(device, dtype, unscaled) else dtype


def multiplies_in_float32(device: str, dtype: torch.dtype, unscaled: bool) -> bool:
    """Returns whether the head's products are made in float32, whatever the precision of the rest.

    In float16 gradients vanish where they are `unscaled`; a CPU without AVX-512 multiplies bf16 by a fallback some 100
    times slower than float32.
    """
    slow = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return slow or (dtype == torch.float16 and unscaled)


def logits_chunk_size(model: PreTrainedModel, requested: int | None, on_gpu: bool) -> int | None:
    """Returns the number of scored positions whose logits `lmlab.models.loss.score` should hold at once; None for all.

    Args:
        requested: the config's `logits_chunk_size`. None: as many as `LOGITS_BYTES` hold.

    Raises:
        UserError: a number was requested, and the model does more to its logits than project.
    """
    if not probe(model).projects:
        if requested is not None:
            raise UserError(
                f"logits_chunk_size={requested}: {model.config.model_type} does more to its logits than project, so "
                "that they can't be made a few at a time.\nLeave it out."
            )
        return None
    return requested or chunk_of(model.get_output_embeddings().weight, on_gpu)


def chunk_of(head: Tensor, on_gpu: bool) -> int:
    """Returns the number of scored positions whose logits `LOGITS_BYTES` hold.

    It is half as many where the head is frozen: no chunk then adds to a gradient of the size of the head, which takes
    as long for few rows as for many.

    Args:
        head: [V, H] its matrix.
    """
    share = 1 if head.requires_grad else 2
    return max(1, LOGITS_BYTES["gpu" if on_gpu else "cpu"] // (4 * len(head) * share))
