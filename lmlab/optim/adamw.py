"""AdamW (Loshchilov and Hutter 2019)."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Len, Lt
from pydantic.dataclasses import dataclass
from torch import nn

from lmlab.optim.schedule import Decayed
from lmlab.optim.width import width_factors


@dataclass(config={"strict": True})
class AdamW(Decayed):
    """Builds AdamW for a model, without weight decay on norms and biases."""

    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    """The decay rates of the running means of the gradient and of its square."""
    eps: Annotated[float, Ge(0)] = 1e-8
    """The term added to the denominator of the update, for numerical stability."""

    base_width: Annotated[int, Ge(1)] | None = None
    """The width of the model whose lr this is: of a wider one, rates and initial weights follow from it (width.py)."""

    def factors(self, model: nn.Module) -> dict[str, float]:
        """Returns the factors of the rates that go by the width of a model; none without `base_width`."""
        return {} if self.base_width is None else width_factors(model, self.base_width)

    def make(self, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """Returns torch's AdamW, in one pass over the parameters where the device has that."""
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused)
