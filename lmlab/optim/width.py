"""Rates and initial weights by width, so that the best learning rate of a narrow model is that of a wide one.

This is the maximal update parametrization for Adam (Yang et al. 2022, "Tensor Programs V", table 8). m is the width
of the base over that of the model:

```
                                                initial weights   learning rate   weight decay
matrices of the layers                          · √m              · m             / m
norm before the projection to the vocabulary    · m               · m             / m
all others: embeddings, projection, vectors     as they are       as it is        as it is
```

The norm stands for the factor m of the logits in the paper: to Adam it is the same, and the exported model is one of
its own architecture.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lmlab.errors import UserError
from lmlab.optim.groups import layer_matrices

FINAL_NORM = {"gpt2": "transformer.ln_f"}
"""The norm before the projection to the vocabulary, of the architectures for which it was tried that rates transfer."""


def width_factors(model: nn.Module, base_width: int) -> dict[str, float]:
    """Returns m for the names of the parameters whose rate goes by the width.

    Raises:
        UserError: the model is not of an architecture for which that was tried.
    """
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else "torch module"
    if not isinstance(model, PreTrainedModel) or kind not in FINAL_NORM:
        raise UserError(
            f"optim.base_width is for {', '.join(FINAL_NORM)}, and the model is a {kind}, of which it is not known "
            "whether rates transfer.\nLeave it out."
        )
    matrices, norm = layer_matrices(model), f"{FINAL_NORM[kind]}."
    scaled = [name for name, p in model.named_parameters() if id(p) in matrices or name.startswith(norm)]
    return dict.fromkeys(scaled, base_width / model.config.hidden_size)


@torch.no_grad()
def scale_initial_weights(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Scales the initial weights of a model by its width, in place.

    Args:
        factors: as of `width_factors`.
    """
    for name, factor in factors.items():
        parameter = model.get_parameter(name)
        parameter.mul_(factor**0.5 if parameter.ndim > 1 else factor)
