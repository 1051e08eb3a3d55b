"""Muon for the matrices of the layers, and AdamW for all other parameters."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Len, Lt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from lmlab.errors import UserError
from lmlab.optim.schedule import Scheduled


@dataclass(config={"strict": True})
class Muon(Scheduled):
    """Builds Muon (Jordan et al. 2024) for the matrices of a model's layers, and AdamW for embeddings, head, norms and
    biases.

    An update of a matrix is its momentum with all singular values near 1, scaled such that its root mean square is that
    of an AdamW update (Liu et al. 2025, section 2.2), so that a learning rate for AdamW suits both.
    """

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """The decay rate of Muon's momentum, which is Nesterov's."""
    newton_schulz_steps: Annotated[int, Gt(0)] = 5
    """The iterations by which the singular values are brought near 1."""
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    """The decay rates of AdamW's running means of the gradient and of its square."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """The term added to the denominator of AdamW's update, for numerical stability."""

    def make(self, model: nn.Module, groups: list[dict[str, Any]]) -> "MuonAndAdamW":
        """Returns the optimizer.

        Raises:
            UserError: the layers of the model have no matrices that are trained.
        """
        matrices = layer_matrices(model)
        split = [
            group | {"params": [p for p in group["params"] if (id(p) in matrices) is of_muon], "muon": of_muon}
            for group in groups
            for of_muon in (True, False)
        ]
        if not any(group["params"] for group in split if group["muon"]):
            raise UserError(
                "optim=muon is for the matrices of layers, and none of this model's are trained: optim=adamw."
            )
        options = {"momentum": self.momentum, "ns_steps": self.newton_schulz_steps, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"betas": (self.betas[0], self.betas[1]), "eps": self.eps}
        return MuonAndAdamW([group for group in split if group["params"]], options, adamw)


def layer_matrices(model: nn.Module) -> set[int]:
    """Returns the `id` of each matrix of a model that is neither an embedding nor the projection to the vocabulary."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        apart.add(id(head.weight))
    return {id(p) for p in model.parameters() if p.ndim == 2} - apart


class MuonAndAdamW(Optimizer):
    """An optimizer whose groups go to Muon where they have `muon`, and to AdamW otherwise."""

    def __init__(self, groups: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]):
        super().__init__(groups, {})
        # Each of them sees its groups and the common state, whatever has been loaded in the meantime.
        self.parts: list[tuple[bool, Optimizer]] = []
        for of_muon, kind, options in ((True, torch.optim.Muon, muon), (False, torch.optim.AdamW, adamw)):
            own = [group for group in self.param_groups if group["muon"] is of_muon]
            if own:
                part = kind([{**group} for group in own], **options)
                for group, filled in zip(own, part.param_groups, strict=True):
                    group.update(filled)  # with the options that the kind has
                self.parts.append((of_muon, part))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Makes a step, before which `closure` may compute the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for of_muon, part in self.parts:
            part.param_groups = [group for group in self.param_groups if group["muon"] is of_muon]
            part.state = self.state
            part.step()
        return loss
