"""A block whose documents do not see one another is to a model what each document is alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmlab.data.datamodule import document_positions_of, pad_rows
from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError
from lmlab.models.checks import check_document_attention
from lmlab.models.efficiency import checkpoint_activations, choose_attention, compile_layers
from lmlab.models.loss import score
from lmlab.models.torch_module import wrap
from lmlab.objectives import make_example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM
from lmlab.objectives.prefix import PrefixLM

from .test_scored import small

DOCUMENTS = [np.array([13, 20, 7]), np.array([25, 4]), np.array([40])]
"""The documents of each row, the second shorter than the others: its end is padding."""
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "roberta": {},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    # Layers that see a window of positions, chunks of them, distances alone, or positions of a table with an offset.
    "mistral": {"sliding_window": 5},
    "llama4_text": {"attention_chunk_size": 8},
    "mpt": {"n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "opt": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}
ENCODERS = ("roberta", "modernbert", "distilbert")
BLOCKS = [np.random.default_rng(row).integers(5, 100, lengths.sum()) for row, lengths in enumerate(DOCUMENTS)]


class EveryToken(CausalLM):
    """Scores each token where it stands, for encoders."""

    bidirectional, target_shift = True, 0

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Any:
        return super().__call__(ids, key)._replace(positions=np.arange(len(ids)), targets=ids)


def batch_of(architecture: str) -> tuple[Any, Tensor | None]:
    """The blocks as `score` takes them, and the positions in their documents."""
    objective = EveryToken() if architecture in ENCODERS else CausalLM()
    rows = [make_example(objective, ids, (0, 0, 0), documents=d) for ids, d in zip(BLOCKS, DOCUMENTS, strict=True)]
    return pad_rows(rows, pad_id=0), document_positions_of(rows)


def alone(model: PreTrainedModel, architecture: str) -> Tensor:
    """The nll of each document, run on its own by the model itself."""
    nll = []
    for ids, lengths in zip(BLOCKS, DOCUMENTS, strict=True):
        for document in torch.from_numpy(ids).split(lengths.tolist()):
            logits = model(input_ids=document[None]).logits[0]
            shift = 0 if architecture in ENCODERS else 1
            target = document[shift:]
            nll.append(nn.functional.cross_entropy(logits[: len(target)].float(), target, reduction="none"))
    return torch.cat(nll)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(300, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 300)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cell(self.embedding(input_ids))[0])
        return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", SETTINGS)
def test_each_document_is_as_if_it_were_alone(architecture: str, attention: str) -> None:
    model = small(architecture, architecture not in ENCODERS, **SETTINGS[architecture])
    if attention not in ("eager", model.config._attn_implementation):
        pytest.skip(f"{architecture} has eager attention only")
    choose_attention(model, attention)
    (ids, mask, *scored), positions = batch_of(architecture)
    assert mask is not None
    expected = alone(model, architecture)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for rows in (None, 16):
        nll = score(model, ids, mask, *scored, rows, document_positions=positions).nll
        nll.sum().backward()
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(parameter.grad, 2 * gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
def test_without_it_documents_leak(architecture: str) -> None:
    """What the test above would find if there were no mask, or no positions that begin anew."""
    model = small(architecture, architecture not in ENCODERS)
    (ids, mask, scored, targets), positions = batch_of(architecture)
    expected = alone(model, architecture)
    assert not torch.allclose(score(model, ids, mask, scored, targets).nll, expected, atol=1e-3)
    # transformers finds packed documents in their positions for decoders alone.
    options = {"position_ids": positions + 2} if architecture == "roberta" else {"use_cache": False}
    logits = model(input_ids=ids, **{"position_ids": positions} | options).logits.flatten(0, 1)[scored]
    own = nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(own, expected, atol=1e-5) is (architecture == "gpt2")


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.longest), True])
def test_layers_that_are_compiled_or_computed_again(checkpointing: bool) -> None:
    expected = alone(small("gpt2", True), "gpt2")
    model = small("gpt2", True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).train()
    if checkpointing:
        checkpoint_activations(model)
    else:
        compile_layers(model)
    batch, positions = batch_of("gpt2")
    nll = score(model, *batch, document_positions=positions).nll
    nll.sum().backward()
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_padding_is_counted_by_no_router() -> None:
    """A mixture of experts is given the mask for its auxiliary loss; its padding sees nothing, and is finite."""
    model = small("mixtral", True, output_router_logits=True)
    batch, positions = batch_of("mixtral")
    scores = score(model, *batch, document_positions=positions)
    torch.testing.assert_close(scores.nll, alone(model, "mixtral"), rtol=1e-5, atol=1e-5)
    assert scores.auxiliary is not None
    assert scores.auxiliary.isfinite()


@pytest.mark.parametrize(
    ("model", "objective", "said"),
    [
        (lambda: small("mamba", True), CausalLM(), "mamba does not keep the documents of a block apart"),
        (lambda: small("deberta-v2", False), MaskedLM(bpe(["some text"], 300)), "deberta-v2 does not keep"),
        (lambda: small("gpt2", True), PrefixLM(0.2, 0.5, validation_prefix_share=0), "PrefixLM needs another mask"),
        (
            lambda: wrap(Recurrent(), bpe(["some text"], 300), "AutoModelForCausalLM"),
            CausalLM(),
            "torch_module does not",
        ),
    ],
    ids=["state", "distances", "prefix", "module"],
)
def test_what_leaks_is_refused(model: Any, objective: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_document_attention(model(), 32, objective)


def test_a_window_that_is_shorter_than_a_block_is_kept() -> None:
    """A mask of documents alone would let such layers see all of a document."""
    model = small("modernbert", False, local_attention=8, global_attn_every_n_layers=2)
    check_document_attention(model, 64, EveryToken())
