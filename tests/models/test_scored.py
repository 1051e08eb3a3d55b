"""The head sees only scored positions, and the loss is the model's own (promise 3)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from lmlab.models.scored import scored_nll

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "embedding_size": 32,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
} | {f"{token}_token_id": 1 for token in ("pad", "bos", "eos", "cls", "sep")}
MASKED = ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"]
CAUSAL = ["gpt2", "llama", "qwen3", "gpt_neox"]


def small(architecture: str, causal: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    known = AutoConfig.for_model(architecture)
    config = AutoConfig.for_model(architecture, **{k: v for k, v in SMALL.items() if hasattr(known, k)})
    return (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config).eval()


@pytest.mark.parametrize("architecture", [*MASKED, *CAUSAL])
def test_loss_and_gradients_are_the_models_own(architecture: str) -> None:
    causal = architecture in CAUSAL
    model = small(architecture, causal)
    ids = torch.randint(5, 100, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 10:] = 0
    positions = torch.tensor([1, 5, 20, 33, 40])
    targets = torch.tensor([7, 8, 9, 10, 11])

    full = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[positions]
    expected = F.cross_entropy(full.float(), targets, reduction="none")
    expected.sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    rows = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.numel() // out.shape[-1]))
    nll = scored_nll(model, ids, mask, positions, targets)
    nll.sum().backward()

    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert rows == [5]
    # Nothing is left behind: the model gives all its logits again.
    assert model(input_ids=ids, attention_mask=mask).logits.shape[1] == 16


def test_nothing_to_score() -> None:
    model = small("gpt2", True)
    none = torch.zeros(0, dtype=torch.long)
    nll = scored_nll(model, torch.ones(2, 8, dtype=torch.long), None, none, none)
    assert nll.shape == (0,)
    nll.sum().backward()
