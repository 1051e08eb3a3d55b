"""Muon for the matrices of the layers, and AdamW for all other parameters."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Len, Lt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from lmlab.errors import UserError
from lmlab.optim.groups import layer_matrices
from lmlab.optim.schedule import Decayed


@dataclass(config={"strict": True})
class Muon(Decayed):
    """Builds Muon (Jordan et al. 2024) for the matrices of a model's layers, and AdamW for all else.

    That is embeddings, head, norms, biases, and weights of more than two dimensions, such as those of convolutions.

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

    def freeze(self, model: nn.Module) -> None:
        """Takes the parameters that `groups` freezes out of training.

        Raises:
            UserError: as of `Scheduled.freeze`; or the layers of the model have no matrices that are trained.
        """
        super().freeze(model)
        matrices = layer_matrices(model)
        if not any(p.requires_grad for p in model.parameters() if id(p) in matrices):
            raise UserError(
                "optim=muon is for the matrices of layers, and this model has none that are trained.\nUse optim=adamw."
            )

    def make(self, model: nn.Module, groups: list[dict[str, Any]]) -> "MuonAndAdamW":
        """Returns Muon and AdamW as one optimizer."""
        matrices = layer_matrices(model)
        split = [
            group | {"params": [p for p in group["params"] if (id(p) in matrices) is of_muon], "muon": of_muon}
            for group in groups
            for of_muon in (True, False)
        ]
        options = {"momentum": self.momentum, "ns_steps": self.newton_schulz_steps, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"betas": (self.betas[0], self.betas[1]), "eps": self.eps}
        return MuonAndAdamW([group for group in split if group["params"]], options, adamw)


class MuonAndAdamW(Optimizer):
    """Updates the groups whose key `muon` is true by Muon, and the others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]):
        super().__init__(groups, {})
        # The optimizer of each kind gets its groups and the common state anew in each step, as `load_state_dict`
        # replaces both.
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
        """Makes a step; `closure`, if there is one, computes the loss before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for of_muon, part in self.parts:
            part.param_groups = [group for group in self.param_groups if group["muon"] is of_muon]
            part.state = self.state
            part.step()
        return loss
