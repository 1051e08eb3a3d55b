"""Models whose probability of a text is known by hand give exactly that (Σ nll, bytes and words alike)."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from lmlab.data.documents import COUNTS
from lmlab.data.tokenizers import bpe, char
from lmlab.evaluation.metrics import compute_metrics, sum_totals
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from . import reference
from .test_scoring import held_out_of, prepared, sums_of, wordpiece

TEXTS = ["abba cab", "", "ab\u00e9 👩‍🚀 ba", "b", " \n", "a\u0301 你好  c  "]
BYTES = sum(len(text.encode()) for text in TEXTS)
WORDS = sum(len(text.split()) for text in TEXTS)


def spelled() -> PreTrainedTokenizerBase:
    """A token per byte: byte-level BPE without a merge."""
    return bpe(["abc"], vocab_size=259)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": spelled,
    "char": lambda: char(TEXTS),
    "char with unknowns": lambda: char(["abc "]),
    "wordpiece": wordpiece,
}


class Body(nn.Module):
    """Hidden state: which token it is."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        return BaseModelOutput(nn.functional.one_hot(input_ids, self.vocabulary).double())


class Table(PreTrainedModel):
    """Predicts by the last token alone, from a table of probabilities."""

    config_class = PreTrainedConfig
    base_model_prefix = "body"

    def __init__(self, table: Tensor):
        """`table` [V, V]: row i is the distribution where token i stands."""
        super().__init__(PreTrainedConfig())
        self.body = Body(len(table))
        self.head = nn.Linear(*table.shape, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(table.double().log().T)

    def get_input_embeddings(self) -> nn.Linear:
        return self.head  # which also has a row for each token

    def forward(self, **inputs: Any) -> MaskedLMOutput:
        return MaskedLMOutput(logits=self.head(self.body(**inputs).last_hidden_state))


def halving(count: int, shift: int = 0) -> list[Fraction]:
    """Probabilities 1/2, 1/4, … of `count` tokens, from one of them on; later ones share what is left."""
    steep = [Fraction(1, 2 ** (i + 1)) for i in range(min(16, count // 2))]
    rest = [(1 - sum(steep)) / (count - len(steep))] * (count - len(steep))
    return [(steep + rest)[(i + shift) % count] for i in range(count)]


def bits(probabilities: list[Fraction], token: int) -> float:
    """What a token costs, in bits."""
    return math.log2(probabilities[token].denominator) - math.log2(probabilities[token].numerator)


def figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Path, objective: Any = None, **choices: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an evaluation says: totals and figures."""
    objective = objective or CausalLM()
    held_out = held_out_of(prepared(TEXTS, tokenizer, cache, 8), objective, 8, **choices)
    totals = sum_totals(*sums_of(model, held_out))
    return totals, compute_metrics(totals, held_out.facts["figure"])


def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text with its end."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    return [[*ids, end] if ids else [] for ids in texts]


def unknown_bytes(tokenizer: PreTrainedTokenizerBase, unscored: int = 0) -> int:
    """Bytes of `TEXTS` that a tokenizer does not spell, but for those of the first tokens."""
    tokens = [token for tokens in reference.tokenized(TEXTS, tokenizer) for token in tokens]
    return sum(token.unspelled for token in tokens[unscored:])


def test_unknown_bytes_by_hand() -> None:
    found = {name: unknown_bytes(make()) for name, make in TOKENIZERS.items()}
    assert found["bytes"] == found["char"] == 0
    assert found["char with unknowns"] == len("é👩\u200d🚀\n\u0301你好".encode()) == 22


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("context", ["document", "sliding"])
def test_a_uniform_model(name: str, context: str, tmp_path: Path) -> None:
    """Every token costs log2 of the vocabulary: a GPT-2 of zeros, whatever it is shown."""
    tokenizer = TOKENIZERS[name]()
    vocabulary = len(tokenizer)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1, vocab_size=vocabulary, **ends)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    totals, found = figures(model, tokenizer, tmp_path, context=context)
    documents = [ids for ids in ids_of(tokenizer) if ids]
    tokens = sum(map(len, documents))
    if name == "wordpiece":  # nothing to begin with, so the first token of each text has no context
        tokens -= len(documents) if context == "document" else 1
    else:
        assert (totals["bytes"], totals["words"]) == (BYTES, WORDS)
    assert totals["tokens"] == tokens
    if name == "bytes":
        assert tokens == BYTES + len(documents)
    cost = tokens * math.log2(vocabulary) + 8 * totals["unknown_bytes"]
    words = totals["words"] + len(documents)
    assert found["perplexity"] == pytest.approx(vocabulary, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(cost / totals["bytes"], rel=1e-6)
    assert found["bits_per_word"] == pytest.approx(cost / words, rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(2 ** (cost / words), rel=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_unigram_model(name: str, tmp_path: Path) -> None:
    """−Σ log2 p over all tokens, per byte of the texts themselves."""
    tokenizer = TOKENIZERS[name]()
    unigram = halving(len(tokenizer))
    assert sum(unigram) == 1
    table = torch.tensor([[float(p) for p in unigram]] * len(tokenizer), dtype=torch.float64)
    totals, found = figures(Table(table), tokenizer, tmp_path, context="sliding", stride=3)
    flat = [token for ids in ids_of(tokenizer) for token in ids]
    cost = math.fsum(bits(unigram, token) for token in (flat[1:] if name == "wordpiece" else flat))
    assert totals["nll"] == pytest.approx(cost * math.log(2), rel=1e-6)
    unknown = unknown_bytes(tokenizer, unscored=name == "wordpiece")
    of_text = cost + 8 * unknown
    assert totals["unknown_bytes"] == unknown
    assert found["bits_per_byte"] == pytest.approx(of_text / totals["bytes"], rel=1e-6)
    assert found["bits_per_word"] == pytest.approx(of_text / (totals["words"] + totals["ends"]), rel=1e-6)
    if name != "wordpiece":
        assert (totals["bytes"], totals["words"]) == (BYTES, WORDS)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("context", "stride"), [("blocks", None), ("document", None), ("document", 8), ("sliding", 1)])
def test_a_bigram_model(name: str, context: str, stride: int | None, tmp_path: Path) -> None:
    """−Σ log2 p(token | the one before it): each target stands right behind its own context."""
    tokenizer = TOKENIZERS[name]()
    rows = [halving(len(tokenizer), 7 * i) for i in range(len(tokenizer))]
    model = Table(torch.tensor([[float(p) for p in row] for row in rows], dtype=torch.float64))
    totals, found = figures(model, tokenizer, tmp_path, context=context, stride=stride)
    documents = [ids for ids in ids_of(tokenizer) if ids]
    flat = [token for ids in documents for token in ids]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = {
        "blocks": [flat[i : i + 8] for i in range(0, len(flat), 8)],
        "document": [head + ids for ids in documents],
        "sliding": [head + flat],
    }[context]
    pairs = [(a, b) for ids in texts for a, b in pairwise(ids)]
    cost = math.fsum(bits(rows[a], b) for a, b in pairs)
    assert totals["tokens"] == len(pairs)
    assert totals["nll"] == pytest.approx(cost * math.log(2), rel=1e-6)
    of_text = cost + 8 * totals["unknown_bytes"]
    assert found["bits_per_byte"] == pytest.approx(of_text / totals["bytes"], rel=1e-6)
    squares = math.fsum((bits(rows[a], b) * math.log(2)) ** 2 for a, b in pairs)
    assert totals["nll_squared"] == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("name", ["bytes", "char", "char with unknowns", "wordpiece"])
@pytest.mark.parametrize("context", ["blocks", "document"])
def test_a_masked_model(name: str, context: str, tmp_path: Path) -> None:
    """Every token hidden in turn, and predicted from the mask: unigram costs, under names of their own."""
    tokenizer = TOKENIZERS[name]()
    unigram = halving(len(tokenizer))
    rows = [halving(len(tokenizer), 5 * (i + 1)) for i in range(len(tokenizer))]
    rows[tokenizer.mask_token_id] = unigram
    model = Table(torch.tensor([[float(p) for p in row] for row in rows], dtype=torch.float64))
    unknown = {tokenizer.unk_token_id}
    every = MaskedLM(tokenizer, mask_probability=1.0, replace_mask=1.0, replace_random=0.0)
    # An unknown token is no target of the masks in training, as in the guide; hidden in turn, it is.
    for prefix, choices, spared in (("masked_", {}, set()), ("pseudo_", {"score": "pseudo"}, unknown)):
        special = {*tokenizer.all_special_ids} - spared
        tokens = [token for ids in ids_of(tokenizer) for token in ids if token not in special]
        cost = math.fsum(bits(unigram, token) for token in tokens)
        totals, found = figures(model, tokenizer, tmp_path, every, context=context, **choices)
        assert totals["tokens"] == len(tokens)
        assert totals["nll"] == pytest.approx(cost * math.log(2), rel=1e-6)
        assert found[f"{prefix}perplexity"] == pytest.approx(2 ** (cost / len(tokens)), rel=1e-5)
        of_text = cost + 8 * (unknown_bytes(tokenizer) if spared else 0)
        assert found[f"{prefix}bits_per_byte"] == pytest.approx(of_text / totals["bytes"], rel=1e-6)
        # No figure of it goes by the name of a causal model's.
        assert {key for key in found if not key.startswith(prefix)} == {"nll_per_token"}
        if name in ("bytes", "char"):
            assert (totals["bytes"], totals["words"]) == (BYTES, WORDS)


@pytest.mark.parametrize("name", ["perplexity", "masked_perplexity", "surprise"])
def test_figures_agree_with_each_other(name: str) -> None:
    """All are the one sum, over tokens, bytes or words; each power of two or of e belongs to its own."""
    totals = {"nll": 700.0, "nll_squared": 900.0, "tokens": 300, "bytes": 1100, "words": 210}
    found = compute_metrics(totals, name)
    assert list(found).count(name) == 1
    prefix = {"perplexity": "", "masked_perplexity": "masked_", "surprise": "surprise_"}[name]
    per_byte, per_word, words = (
        found[f"{prefix}{key}"] for key in ("bits_per_byte", "bits_per_word", "word_perplexity")
    )
    assert found["nll_per_token"] * totals["tokens"] == pytest.approx(700, rel=1e-12)
    assert found[name] ** totals["tokens"] == pytest.approx(math.exp(700), rel=1e-9)
    assert per_byte * totals["bytes"] == pytest.approx(700 / math.log(2), rel=1e-12)
    assert per_word * totals["words"] == pytest.approx(per_byte * totals["bytes"], rel=1e-12)
    assert words == pytest.approx(2**per_word, rel=1e-12)


def test_figures_with_nothing_under_them() -> None:
    """Tokens that stand for no text, no token at all, and a perplexity beyond a float."""
    found = compute_metrics({"nll": 5000.0, "nll_squared": 1.0, "tokens": 2, "bytes": 0, "words": 0})
    assert found["perplexity"] == math.inf
    assert found["bits_per_byte"] is found["bits_per_word"] is found["word_perplexity"] is None
    nothing = sum_totals(np.zeros((3, 2)), np.zeros((3, len(COUNTS)), np.int64))
    assert nothing["documents"] == 3
    assert nothing["documents_scored"] == 0
    assert set(compute_metrics(nothing, sample=0.5).values()) == {None}
