"""The bound of a masked model in any order: against enumeration, against closed forms, and its own error."""

import copy
import math
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from lmlab.data.datamodule import HeldOutData
from lmlab.data.tokenizers import char
from lmlab.errors import UserError
from lmlab.evaluation.metrics import BOUND, compute_metrics, sum_totals
from lmlab.evaluation.scoring import HeldOut, Scorer
from lmlab.objectives.mlm import MaskedLM

from .test_closed_form import Table
from .test_scoring import held_out_of, prepared, sums_of, trainer

TEXTS = ["abba", "", "cab a", "b"]
TOKENIZER = char(TEXTS)


def held_out(
    cache: Path, draws: int = 8, seed: int = 0, context: str = "document", block: int = 8, times: int = 1
) -> HeldOut:
    data = prepared(TEXTS * times, TOKENIZER, cache, block)
    choices: dict[str, Any] = {"score": "elbo", "draws": draws, "context": context, "seed": seed}
    return held_out_of(data, MaskedLM(TOKENIZER), block, **choices)


def encoder() -> PreTrainedModel:
    """A small encoder whose predictions depend on what it is shown."""
    torch.manual_seed(3)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(TOKENIZER), max_position_embeddings=16, initializer_range=0.5, **size)
    return BertForMaskedLM(config).double().eval()


@torch.no_grad()
def nll_of(model: PreTrainedModel, ids: list[int], hidden: tuple[int, ...], framed: bool = True) -> dict[int, float]:
    """The nll of each hidden token of a text, given the others."""
    shown = [TOKENIZER.mask_token_id if i in hidden else token for i, token in enumerate(ids)]
    end = [TOKENIZER.eos_token_id] if framed else []
    logs = model(input_ids=torch.tensor([[*end, *shown, *end]])).logits[0].log_softmax(-1)
    return {i: -float(logs[i + len(end), ids[i]]) for i in hidden}


def bound_of(model: PreTrainedModel, ids: list[int]) -> float:
    """The sum over the number of hidden tokens, by all their sets."""
    length, total = len(ids), 0.0
    for k in range(1, length + 1):
        sets = [sum(nll_of(model, ids, hidden).values()) for hidden in combinations(range(length), k)]
        total += sum(sets) / len(sets) / k
    return total


def in_any_order(model: PreTrainedModel, ids: list[int]) -> float:
    """-log of the probability of a text that is written in an order drawn at random."""
    orders = list(permutations(range(len(ids))))
    total = 0.0
    for order in orders:
        steps = (nll_of(model, ids, tuple(sorted(order[i:])))[order[i]] for i in range(len(ids)))
        total += math.exp(-sum(steps))
    return -math.log(total / len(orders))


def test_draws_are_those_of_the_enumeration(tmp_path: Path) -> None:
    """Of the rows of a text, the mean over the sets of each size, and over the sizes, is the bound by enumeration."""
    model, data = encoder(), held_out(tmp_path, draws=600)
    rows, ids = data.rows, TOKENIZER("abba")["input_ids"]
    of_window: dict[tuple[int, ...], set[float]] = {}
    numbers = []
    for index in range(0, len(rows), 3):  # three windows, of which "abba" is the first
        row = rows.row(index)
        hidden = tuple(row.tokens.tolist())
        numbers.append(len(hidden))
        assert row.inputs.tolist() == [
            *[TOKENIZER.eos_token_id],
            *[TOKENIZER.mask_token_id if i in hidden else token for i, token in enumerate(ids)],
            *[TOKENIZER.eos_token_id],
        ]
        nll = nll_of(model, ids, hidden)
        of_window.setdefault(hidden, set()).add(600 * row.factor * sum(nll.values()))
    assert len(of_window) == 2**4 - 1
    assert all(len(values) == 1 for values in of_window.values())
    assert np.bincount(numbers).tolist() == [0, 150, 150, 150, 150]
    by_size = [[value for hidden, (value,) in of_window.items() if len(hidden) == k] for k in range(1, 5)]
    assert np.mean([np.mean(values) for values in by_size]) == pytest.approx(bound_of(model, ids), rel=1e-6)


def test_it_is_a_bound(tmp_path: Path) -> None:
    """Above the nll of a text in any order, which has an enumeration of its own; each document by itself."""
    model = encoder()
    nll, counts = sums_of(model, held_out(tmp_path, draws=400))
    assert counts[:, 0].tolist() == [len(text) for text in TEXTS]
    assert counts[:, 1].tolist() == [len(text) for text in TEXTS]
    for text, mean in zip(TEXTS, nll[:, 0], strict=True):
        if text:
            ids = TOKENIZER(text)["input_ids"]
            assert mean == pytest.approx(bound_of(model, ids), rel=0.03)  # by 400 draws
            assert bound_of(model, ids) >= in_any_order(model, ids) - 1e-9
    assert nll[3, 1] == pytest.approx(0, abs=1e-20)  # a single token leaves nothing to be drawn
    assert bound_of(model, TOKENIZER("abba")["input_ids"]) > in_any_order(model, TOKENIZER("abba")["input_ids"]) + 0.01


@pytest.mark.parametrize("context", ["document", "blocks"])
def test_a_model_without_context_is_exact(context: str, tmp_path: Path) -> None:
    """A uniform one costs log2 of the vocabulary a token in each draw, and its error is 0."""
    size = len(TOKENIZER)
    data = held_out(tmp_path, draws=2, context=context)
    totals = sum_totals(*sums_of(Table(torch.full((size, size), 1 / size)), data))
    tokens = sum(map(len, TEXTS)) + (3 if context == "blocks" else 0)  # and the ends of documents
    found = compute_metrics(totals, BOUND)
    assert totals["tokens"] == tokens
    assert totals["nll"] == pytest.approx(tokens * math.log(size), rel=1e-6)
    assert found["bound_bits_per_byte"] == pytest.approx(tokens * math.log2(size) / sum(map(len, TEXTS)), rel=1e-6)
    assert found["bound_perplexity"] == pytest.approx(size, rel=1e-6)
    assert found["nll_per_token_standard_error"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("context", ["document", "blocks"])
def test_the_error_is_that_of_other_draws(context: str, tmp_path: Path) -> None:
    """The standard deviation over 80 seeds is what each of them says, also where documents share a window."""
    model = encoder()
    found = []
    for seed in range(80):
        totals = sum_totals(*sums_of(model, held_out(tmp_path, 4, seed, context, 16, times=10), batch_size=160))
        found.append((totals["nll"], totals["nll_squared"]))
    nll, variance = np.array(found).T
    assert nll.std(ddof=1) == pytest.approx(math.sqrt(variance.mean()), rel=0.25)
    if context == "document":
        expected = 10 * sum(bound_of(model, TOKENIZER(text)["input_ids"]) for text in TEXTS if text)
        assert abs(nll.mean() - expected) < 4.5 * nll.std() / math.sqrt(80)


def test_batches_and_ranks_move_nothing(tmp_path: Path) -> None:
    """As `Scorer` adds up the states of several ranks, before it computes the error."""
    model, data = encoder(), held_out(tmp_path)
    alone = sums_of(model, data, batch_size=5)
    for indices in ([], [0], list(range(len(data)))):
        assert len(data[indices].counted) == len(data[indices].counts)
    scorer = Scorer(copy.deepcopy(model), data.sums())
    trainer(tmp_path).validate(scorer, HeldOutData(data, 2), verbose=False)
    np.testing.assert_allclose(scorer.result[0], alone[0], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(scorer.result[1], alone[1])


def test_an_odd_number_of_draws(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws=7: it has to be an even number"):
        held_out(tmp_path, draws=7)


def test_what_is_drawn_is_of_the_seed(tmp_path: Path) -> None:
    def positions(seed: int) -> list[list[int]]:
        data = held_out(tmp_path, seed=seed)
        return [data.rows.row(i).positions.tolist() for i in range(len(data))]

    assert positions(1) == positions(1) != positions(2)


def test_factors_are_of_float64(tmp_path: Path) -> None:
    batch = held_out(tmp_path)[[0, 1, 2]]
    assert isinstance(batch.factors, Tensor)
    assert batch.factors.dtype == torch.float64
