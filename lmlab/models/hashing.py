"""Computes the hashes by which weights are told apart."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmlab.models.efficiency import layers


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """Returns a hash of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def layers_hash(model: PreTrainedModel) -> str:
    """Returns a hash of the weights of the repeated layers, which are the same for whatever task a model is loaded."""
    return weights_hash({f"{i}.{k}": v for i, layer in enumerate(layers(model)) for k, v in layer.state_dict().items()})
