"""The head runs on scored positions only (promise 3).

Shapes: B samples, T positions, H hidden, N scored positions, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def scored_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    targets: Tensor,
) -> Tensor:
    """Negative log-likelihood [N] of `targets` [N] at `positions` [N] of the flat B·T.

    A hook on `model.base_model` hands only the scored rows of `last_hidden_state` to the
    head (transform and vocabulary projection), whatever the architecture. Positions come
    as indices rather than as a mask: on a GPU a mask would have to be counted first, and
    the host would wait for it.
    """

    def keep_scored(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state  # [B, T, H]
        output.last_hidden_state = hidden.flatten(0, 1).index_select(0, positions)[None]  # [1, N, H]
        return output

    cache = {"use_cache": False} if model.can_generate() else {}
    handle = model.base_model.register_forward_hook(keep_scored)
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **cache).logits[0]  # [N, V]
    finally:
        handle.remove()
    return F.cross_entropy(logits.float(), targets, reduction="none")
