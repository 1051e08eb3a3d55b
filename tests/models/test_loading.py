"""Models as they are made on the ranks that another one sends its weights."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.train import make_tokenizer
from lmlab.models.efficiency import unsharded
from lmlab.models.loading import from_scratch, pretrained

from .test_scored import small

CLASS = "AutoModelForCausalLM"


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_an_empty_model_has_the_shapes_and_no_weights(tmp_path: Path) -> None:
    model = small("llama", True)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    empty = pretrained(CLASS, str(tmp_path), empty=True)
    assert {(p.device.type, p.dtype) for p in empty.parameters()} == {("meta", torch.float32)}
    assert shapes(empty) == shapes(model)


def test_an_empty_model_from_scratch() -> None:
    tokenizer = make_tokenizer(100)
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    model, empty = (from_scratch(tokenizer, CLASS, "gpt2", config, empty=empty) for empty in (False, True))
    assert all(p.is_meta for p in empty.parameters())
    assert shapes(empty) == shapes(model)


def test_weights_and_buffers_make_it_whole(tmp_path: Path) -> None:
    """Rotary frequencies are buffers that no state dict has."""
    model = small("llama", True).eval()
    model.save_pretrained(tmp_path)
    whole = unsharded(model, pretrained(CLASS, str(tmp_path), empty=True), model.state_dict()).eval()
    ids = torch.arange(5, 21)[None]
    assert torch.equal(whole(ids).logits, model(ids).logits)
