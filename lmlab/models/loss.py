"""Computes the nll of the scored positions: only they go through the head (promise 3).

Shapes: B rows, T positions, U of a decoder beside an encoder, H hidden size, N scored positions of the batch,
V vocabulary, R positions of a chunk.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmlab.errors import UserError, first_line
from lmlab.models.chunked_loss import ChunkedNLL, nll_and_slope
from lmlab.models.probe import (
    evaluation_mode,
    example_decoder_ids,
    example_ids,
    forward,
    hook_hidden_states,
    prefix_mask,
    probe,
)

if TYPE_CHECKING:
    from lmlab.models.teacher import Teacher


class Scores(NamedTuple):
    """The losses of a batch."""

    nll: Tensor
    """[N] negative log-likelihood of each target, in nats, times its weight."""
    auxiliary: Tensor | None
    """The auxiliary loss (a scalar, weighted by its coefficient), per target, of a mixture of experts or a generator;
    None where there is none."""
    loss: Tensor | None = None
    """[N] the loss that is trained by, where it is not the nll: that of a student, (1 - weight) · nll + weight ·
    temperature² · kl of each target, times the target's own weight, a multiple of the nll, or the nll and the z-loss.
    The nll is then without gradient."""
    kl: Tensor | None = None
    """[N] KL(teacher ‖ student) of the distributions softened by the temperature, in nats, times the target's weight.
    None without a teacher."""


def score(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    chunk_size: int | None = None,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    prefix: Tensor | None = None,
    teacher: "Teacher | None" = None,
    decoder_ids: Tensor | None = None,
    document_positions: Tensor | None = None,
    observe: Callable[[slice, Tensor], None] | None = None,
    z_loss: float = 0.0,
) -> Scores:
    """Computes the nll of each target of a batch.

    A hook on the backbone hands only the scored rows of its `last_hidden_state` to the head (transform and projection
    to the vocabulary), whatever the architecture:

    ```
    last_hidden_state [B, T, H]  ─►  scored rows [1, N, H]  ─►  logits [1, N, V]  ─►  nll [N]
    ```

    Positions come as indices rather than as a mask: on a GPU a mask would have to be counted first, and the host
    would wait for it.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], 0 on padding; None where no row is padded.
        positions: [N] the scored positions, as indices into the B·T of the flattened batch, or its B·U.
        targets: [N] the id to predict at each of them.
        chunk_size: the number of scored positions whose logits are in memory at once (see
            `chunked_loss.logits_chunk_size`); only the sum of the nll can then be differentiated, see `ChunkedNLL`.
            None holds all [N, V].
        scale: the factor by which the loss is multiplied before the backward pass, that of a gradient scaler included:
            a scalar on the device. Gradients in float16 are multiplied by it as they are made, in the forward pass,
            as they would vanish otherwise.
        weights: [N] the factor of the nll of each target; None is 1 for each.
        prefix: [B] the number of first positions that every position of a row may attend to; None is 0 for each.
        teacher: the model whose probabilities are to be learned too, if there is one.
        decoder_ids: [B, U] what the decoder of an encoder-decoder reads; None for other models.
        document_positions: [B, T] the position of each token in its document, whose other documents it does not see;
            None where each row is one text.
        observe: called with the logits [R, V] of some of the scored positions, and which these are, while they are in
            memory.
        z_loss: the coefficient of log² Z, Z being the sum of the exponentials of the logits of a position, which keeps
            them from drifting (Chowdhery et al. 2022, section 5); without a teacher.
    """
    shown = input_ids, attention_mask, positions, prefix, decoder_ids, document_positions
    taught = None if teacher is None else teacher.read(*shown)
    output, rows = run_on_scored(model, *shown, project=chunk_size is None)
    auxiliary = auxiliary_loss(model, output)
    if chunk_size is None:
        if observe is not None:
            observe(slice(None), rows.detach())
        if torch.is_grad_enabled():
            nll = F.cross_entropy(rows.float(), targets, reduction="none")  # of logits [N, V]
        else:  # on a CPU the former is up to 2e-6 too small at 50,000 tokens, as it sums one after the other
            nll, _ = nll_and_slope(rows, targets, None)
        if z_loss:
            losses = torch.stack([nll + z_loss * rows.float().logsumexp(1).square(), nll.detach()])
        elif taught is not None:
            losses = torch.stack(taught.losses(rows, nll))
        else:
            losses = nll
        losses = losses if weights is None else losses * weights
    else:
        head, train = model.get_output_embeddings(), torch.is_grad_enabled()
        inputs = rows, head.weight, head.bias, targets, chunk_size, train, scale, weights, taught, observe, z_loss
        losses = ChunkedNLL.apply(*inputs)  # type: ignore[no-untyped-call]
    if z_loss:
        loss, nll = losses
        return Scores(nll.detach(), auxiliary, loss)
    if taught is None:
        return Scores(losses, auxiliary)
    loss, nll, kl = losses
    return Scores(nll.detach(), auxiliary, loss, kl.detach())


def run_on_scored(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    prefix: Tensor | None = None,
    decoder_ids: Tensor | None = None,
    document_positions: Tensor | None = None,
    *,
    project: bool,
) -> tuple[Any, Tensor]:
    """Runs a model of which only the scored rows go through the head; arguments are those of `score`.

    Returns:
        The model's output, and the logits of the scored rows [N, V]; without `project` what its last map, which is left
        out, would have made them of, [N, H].
    """
    projected: list[Tensor] = []

    def keep_scored(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, positions)[None]  # [1, N, H]

    def project_nothing(module: nn.Module, args: Any) -> Any:
        projected.append(args[0].flatten(0, 1))  # [N, H], through the head's transform
        return (args[0][:, :0],)

    head = model.get_output_embeddings()
    counts_padding = getattr(model.config.get_text_config(), "output_router_logits", False)  # in an auxiliary loss
    if prefix is not None:
        attention_mask = prefix_mask(prefix, attention_mask, input_ids.shape[1], model.dtype)
    elif not counts_padding and (document_positions is not None or not probe(model).needs_mask):
        attention_mask = None  # with a mask there is no flash attention; of documents, each token of padding is one
    with ExitStack() as stack:
        stack.callback(hook_hidden_states(model, keep_scored).remove)
        if not project:
            stack.callback(head.register_forward_pre_hook(project_nothing).remove)
        output = forward(model, input_ids, attention_mask, decoder_ids, document_positions)
    # The gradient of [0] would be copied into zeros.
    return output, output.logits.flatten(0, 1) if project else projected[0]


def auxiliary_loss(model: PreTrainedModel, output: Any) -> Tensor | None:
    """Returns the load-balancing loss of a mixture of experts (Fedus et al. 2022, section 2.2), times its coefficient.

    transformers computes it where the model's config has `output_router_logits`. None if there is none.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    owners = (model, model.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")
    coefficient = next(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name))
    return loss.mul(coefficient)


@torch.no_grad()
def check_scoring(model: PreTrainedModel) -> None:
    """Compares `score` with the model's own logits on a few tokens.

    Raises:
        UserError: they differ; says by how much.
    """
    with evaluation_mode(model):
        ids = torch.cat([example_ids(model), example_ids(model).flip(1)])  # [2, T]
        positions = torch.tensor([1, 3, 5, 6], device=ids.device)
        targets, decoder_ids = ids.flatten()[positions - 1], example_decoder_ids(model, ids)
        logits = forward(model, ids, None, decoder_ids).logits.flatten(0, 1)
        own = F.cross_entropy(logits[positions].float(), targets, reduction="none")
        reason = ""
        try:
            scores = score(model, ids, None, positions, targets, decoder_ids=decoder_ids)
            moved = float((scores.nll - own).abs().max())
        except (RuntimeError, IndexError, ValueError) as error:
            moved, reason = math.inf, f" ({first_line(error)})"
    # The metrics of weights that give no finite numbers will show that.
    if own.isfinite().all() and not moved <= 1e-4 * max(1.0, float(own.max())):
        by = f"by {moved:.2g} nats" if moved < math.inf else f"altogether{reason}"
        raise UserError(
            f"lmlab can't score {model.config.model_type}: where only some positions go through its head, the nll of a "
            f"target differs from that of its own logits {by}.\nChoose another architecture."
        )
