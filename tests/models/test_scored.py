"""The head sees only scored positions, and the loss is the model's own (promise 3)."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError
from lmlab.models.chunked_loss import ChunkedNLL, compiled_nll_and_slope, logits_chunk_size, nll_and_slope
from lmlab.models.loading import from_scratch
from lmlab.models.loss import score
from lmlab.models.probe import probe

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
    # What others call the same.
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "num_local_experts": 4,
} | {f"{token}_token_id": 1 for token in ("pad", "bos", "eos", "cls", "sep")}
MASKED = ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"]
CAUSAL = ["gpt2", "llama", "qwen3", "gpt_neox"]
# Whose heads do not read what their base model returns.
CAUSAL += ["opt", "bart", "pegasus", "whisper", "llama4_text"]


def config_of(architecture: str, **settings: Any) -> PreTrainedConfig:
    known = AutoConfig.for_model(architecture)
    return AutoConfig.for_model(architecture, **{k: v for k, v in SMALL.items() if hasattr(known, k)} | settings)


def small(architecture: str, causal: bool, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(architecture, **settings)
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config).eval()
    probe(model)  # as building a model does, before anything is counted
    return model


@pytest.mark.parametrize("rows", [None, 2, 100])
@pytest.mark.parametrize("architecture", [*MASKED, *CAUSAL])
def test_loss_and_gradients_are_the_models_own(architecture: str, rows: int | None) -> None:
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

    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.numel() // out.shape[-1]))
    nll = score(model, ids, mask, positions, targets, rows).nll
    nll.sum().backward()

    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert seen == [5 if rows is None else 0]
    # Nothing is left behind: the model gives all its logits again.
    assert model(input_ids=ids, attention_mask=mask).logits.shape[1] == 16


@pytest.mark.parametrize("rows", [None, 4])
def test_nothing_to_score(rows: int | None) -> None:
    model = small("gpt2", True)
    none = torch.zeros(0, dtype=torch.long)
    nll = score(model, torch.ones(2, 8, dtype=torch.long), None, none, none, rows).nll
    assert nll.shape == (0,)
    nll.sum().backward()


class LargestLogits(TorchDispatchMode):
    """The most rows that any tensor with the vocabulary as its last dimension has."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


@pytest.mark.parametrize(("rows", "held"), [(None, 60), (40, 40)])  # the matrix itself has 32
def test_logits_are_held_a_few_rows_at_a_time(rows: int | None, held: int) -> None:
    model = small("gpt2", True)
    ids, positions = torch.randint(2, 90, (4, 16)), torch.arange(60)
    with LargestLogits(100) as largest:
        score(model, ids, None, positions, positions % 90, rows).nll.sum().backward()
    assert largest.rows == held


def test_without_gradients_none_are_made() -> None:
    model = small("gpt2", True)
    ids, positions = torch.randint(2, 90, (4, 16)), torch.arange(60)
    with torch.no_grad():
        nll = score(model, ids, None, positions, positions % 90, 8).nll
        torch.testing.assert_close(nll, score(model, ids, None, positions, positions % 90).nll)
    assert not nll.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_of_a_chunk_is_that_of_autograd(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(7, 90).to(dtype), torch.randint(90, (7,))
    reference = logits.double().requires_grad_()
    expected = F.cross_entropy(reference, targets, reduction="none")
    expected.sum().backward()
    nll, slope = nll_and_slope(logits.clone(), targets, dtype)
    assert slope is not None
    assert slope.dtype == dtype
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(slope.double(), reference.grad, rtol=tolerance, atol=tolerance**2)


def head(vocabulary: int, has_bias: bool) -> list[torch.Tensor | None]:
    """Returns hidden rows [20, 32], a head's weight and bias that need gradients, and targets."""
    torch.manual_seed(vocabulary)
    bias = torch.randn(vocabulary, requires_grad=True) if has_bias else None
    hidden, weight = (torch.randn(rows, 32, requires_grad=True) for rows in (20, vocabulary))
    return [hidden, weight, bias, torch.randint(vocabulary, (20,))]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 63, 64, 65])
def test_in_16_bits_the_vocabulary_is_padded_and_nothing_changes(
    vocabulary: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    hidden, weight, bias, targets = head(vocabulary, has_bias)
    trained = [hidden, weight, *([bias] if has_bias else [])]
    linear, widths = F.linear, set()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")
        gradients = torch.autograd.grad(expected.sum(), trained)
        monkeypatch.setattr(F, "linear", lambda x, w, b: widths.add(len(w)) or linear(x, w, b))
        nll = ChunkedNLL.apply(hidden, weight, bias, targets, 6, True)
        nll.sum().backward()
    assert widths == {64 if vocabulary <= 64 else 128}
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-5)
    for tensor, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=2**-7, atol=2**-7 * float(gradient.abs().max()))


@pytest.mark.parametrize("has_bias", [False, True])
def test_in_float32_the_bits_are_those_of_plain_operations(has_bias: bool) -> None:
    hidden, weight, bias, targets = head(50, has_bias)
    nll = ChunkedNLL.apply(hidden, weight, bias, targets, 6, True)
    nll.sum().backward()
    d_weight = torch.zeros(50, 32)
    with torch.no_grad():
        for part in map(slice, range(0, 20, 6), range(6, 26, 6)):
            logits = F.linear(hidden[part], weight, bias)
            norm = logits.logsumexp(1, keepdim=True)
            own = norm - logits.gather(1, targets[part, None])
            slope = (logits - norm).exp().scatter(1, targets[part, None], (-own).expm1())
            d_weight.addmm_(slope.t(), hidden[part])
            assert torch.equal(nll[part], own[:, 0])
            assert torch.equal(hidden.grad[part], slope @ weight)
    assert torch.equal(weight.grad, d_weight)


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weighted_rows_have_weighted_gradients(
    has_bias: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, whose gradients are scaled as they are made, and in float32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    hidden, weight, bias, targets = head(50, has_bias)
    trained, weights = [hidden, weight, *([bias] if has_bias else [])], torch.rand(20) * 5
    expected = weights * F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    gradients = torch.autograd.grad(expected.sum() / 7, trained)
    dtype, tolerance = (torch.float32, 1e-5) if scale is None else (torch.float16, 2e-3)
    with torch.autocast("cpu", dtype, enabled=scale is not None):
        factor = None if scale is None else torch.tensor(scale)
        nll = ChunkedNLL.apply(hidden, weight, bias, targets, 6, True, factor, weights)
    (nll.sum() / 7).backward()
    torch.testing.assert_close(nll, expected, rtol=tolerance, atol=20 * tolerance)
    for tensor, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_a_chunk_gives_the_same() -> None:
    """As on a GPU, with chunks of two sizes: the last one of a batch is shorter."""
    for rows in (8, 3):
        logits, targets = torch.randn(rows, 90).bfloat16(), torch.randint(90, (rows,))
        found = compiled_nll_and_slope("cpu")(logits.clone(), targets, torch.bfloat16)
        torch.testing.assert_close(found, nll_and_slope(logits.clone(), targets, torch.bfloat16))


@pytest.mark.parametrize(
    ("architecture", "causal", "needed"), [("gpt2", True, False), ("opt", True, False), ("roberta", False, True)]
)
def test_padding_on_the_right_needs_no_mask_where_nothing_is_seen_ahead(
    architecture: str, causal: bool, needed: bool
) -> None:
    """With a mask a GPU does not take flash attention."""
    model = small(architecture, causal).eval()
    ids = torch.randint(5, 90, (2, 8))
    ids[1, 5:], mask = 1, torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    positions = torch.tensor([0, 3, 6, 8, 11])  # none in the padding
    masks = []
    model.register_forward_pre_hook(lambda _, args, given: masks.append(given.get("attention_mask")), with_kwargs=True)
    own = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[positions]
    nll = score(model, ids, mask, positions, positions + 5).nll
    torch.testing.assert_close(nll, F.cross_entropy(own, positions + 5, reduction="none"))
    assert probe(model).needs_mask == needed == (masks[-1] is not None)


def test_rows_of_unequal_weight_are_refused() -> None:
    model = small("gpt2", True)
    positions = torch.arange(5)
    nll = score(model, torch.ones(1, 8, dtype=torch.long), None, positions, positions, 2).nll
    with pytest.raises(RuntimeError, match="take their sum"):
        (nll * torch.arange(5)).sum().backward()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
@pytest.mark.parametrize("rows", [2, 100])
def test_in_bf16_sums_and_softmax_are_float32(
    rows: int, architecture: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = small(architecture, architecture == "gpt2")
    products = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: products.append((len(w), x.dtype)) or linear(x, w, b))
    ids, positions = torch.randint(5, 90, (4, 16)), torch.arange(40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = score(model, ids, None, positions, positions + 5).nll
        expected.sum().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        nll = score(model, ids, None, positions, positions + 5, rows).nll
        nll.sum().backward()
    assert nll.dtype == torch.float32
    assert products[-1] == ((128, torch.bfloat16) if capability == "AVX512" else (100, torch.float32))
    torch.testing.assert_close(nll, expected, rtol=2e-2, atol=2e-2)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            assert parameter.grad.dtype == gradient.dtype
            # A key's bias has no gradient but rounding.
            torch.testing.assert_close(
                parameter.grad, gradient, rtol=0.1, atol=1e-5 + 0.05 * float(gradient.abs().max())
            )


def test_logits_that_are_more_than_a_projection_are_left_to_the_model() -> None:
    """Gemma 2 bends its logits; what the last layer gives is not what it scores."""
    bent = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma2", **{k: v for k, v in SMALL.items() if k != "embedding_size"})
    )
    assert not probe(bent).projects
    assert logits_chunk_size(bent, None, False) is None
    with pytest.raises(UserError, match="gemma2 does more to its logits"):
        logits_chunk_size(bent, 8, False)
    plain = small("gpt2", True)
    assert probe(plain).projects
    assert [logits_chunk_size(plain, wanted, True) for wanted in (8, None)] == [8, 2**30 // 400]
    assert logits_chunk_size(plain, None, False) == 128 * 2**20 // 400


def test_a_model_is_looked_at_as_who_builds_it_left_it() -> None:
    """A builder of the user's may change a model after lmlab has made it."""
    tokenizer = bpe(["a text of a few words"], vocab_size=280)
    model = from_scratch(tokenizer, "AutoModelForCausalLM", "gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1})
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits.tanh())
    assert logits_chunk_size(model, None, False) is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [None, 6])
def test_a_z_loss_against_autograd(rows: int | None, weighted: bool) -> None:
    """The loss has it and its gradient, the nll has neither."""
    model = small("gpt2", True)
    ids, positions, weights = torch.randint(2, 90, (4, 16)), torch.arange(60), torch.rand(60) * 2 if weighted else None
    targets = positions % 90
    logits = model(ids).logits.flatten(0, 1)[positions]
    nll = F.cross_entropy(logits, targets, reduction="none") * (1 if weights is None else weights)
    z = 0.1 * logits.logsumexp(1).square() * (1 if weights is None else weights)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((nll + z).sum(), parameters)
    scores = score(model, ids, None, positions, targets, rows, weights=weights, z_loss=0.1)
    assert scores.loss is not None
    torch.testing.assert_close(scores.nll, nll.detach())
    torch.testing.assert_close(scores.loss.detach(), (nll + z).detach())
    found = torch.autograd.grad(scores.loss.sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
