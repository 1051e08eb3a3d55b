"""Surprisal by word and calibration, from the definitions: a loop over words in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lmlab.evaluation.calibration import calibrate
from lmlab.evaluation.certify import certify
from lmlab.evaluation.records import read
from lmlab.evaluation.scoring import HeldOut
from lmlab.evaluation.token_scores import white_space
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from . import reference
from .test_scoring import exact, held_out_of, model_for, prepared, tokenizer_named

TEXTS = [
    "The cat sat on the other mat.",
    "",
    "  the  mat,\tand the façade of no one,\n\nthe café. Yes?  ",
    "a",
    " \n ",
    "the rat, the cat\n",
]


def words_in(path: Path, model: Any, held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """The words and the certificate of an evaluation."""
    certify(model, held_out, path, surprisal=tokenizer, calibration=True, **options)
    return pq.read_table(path / "words.parquet").to_pandas(), read(path)


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_words_of_a_causal_model(name: str, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_named(name), exact(name, "gpt2")
    data = prepared(TEXTS, tokenizer, tmp_path / "cache", 64)
    held_out = held_out_of(data, CausalLM(), 64, context="document")
    table, records = words_in(tmp_path / "1", model_for(name, "gpt2"), held_out, tokenizer)
    other, _ = words_in(tmp_path / "2", model_for(name, "gpt2"), held_out, tokenizer, batch_size=2, chunk_size=3)
    np.testing.assert_allclose(table["nll_corrected"], other["nll_corrected"], rtol=1e-5)

    boundary = torch.from_numpy(white_space(tokenizer).boundaries)
    assert boundary.sum() > len(tokenizer.all_special_ids)
    expected = []
    for number, tokens in enumerate(reference.tokenized(TEXTS, tokenizer)):
        ids = [tokenizer.eos_token_id, *(token.id for token in tokens)]
        spelled = [tokenizer.decode([token]) for token in ids]
        log_probabilities = reference.logits_of(model, tuple(ids)).log_softmax(1) if tokens else []
        # The probability that a word ends before each token; after white space it has.
        ended = [
            0.0 if place == 1 or spelled[place - 1][-1:].isspace() else float(each[boundary].logsumexp(0))
            for place, each in enumerate(log_probabilities[: len(tokens)], start=1)
        ] + [0.0]
        words = list[list[int]]()
        for place in range(1, len(ids)):
            starts = spelled[place][:1].isspace() or spelled[place - 1][-1:].isspace() or place == len(ids) - 1
            if place == 1 or (starts and not (words and "".join(spelled[p] for p in words[-1]).isspace())):
                words.append([])
            words[-1].append(place)
        for word, places in enumerate(words):
            nll = -sum(float(log_probabilities[place - 1][ids[place]]) for place in places)
            text = tokenizer.decode([ids[place] for place in places if place < len(ids) - 1]).strip()
            corrected = nll - ended[places[-1]] + ended[places[0] - 1]
            expected.append((number, word, text, places[0] - 1, len(places), nll, corrected))
        texts = [text for each, _, text, *_ in expected if each == number and text]
        assert texts == TEXTS[number].split()
    assert table["text"].tolist() == [text for _, _, text, *_ in expected]
    for column, place in (("word", 1), ("position", 3), ("tokens", 4)):
        assert table[column].tolist() == [row[place] for row in expected]
    np.testing.assert_allclose(table["nll"], [row[5] for row in expected], rtol=1e-5)
    np.testing.assert_allclose(table["nll_corrected"], [row[6] for row in expected], rtol=1e-4)
    # Words sum to their document, corrected or not.
    sums = table.groupby("document", sort=False)[["nll", "nll_corrected"]].sum()
    nll = {row["document"]: row["nll"] for row in records.table.to_pylist() if row["tokens"]}
    for column in sums:
        assert sums[column].to_dict() == pytest.approx(nll, rel=1e-6)


def test_corrected_words_are_a_distribution() -> None:
    """Of all words that can follow a text, the probabilities sum to 1, as those of their tokens do not.

    Tokens are "a", "b" and " " with "a" and " " with "b"; each depends on the token before it, and no text ends.
    """
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(4), 4)  # of the next token, by the one before
    boundary, sums = np.array([False, False, True, True]), []
    for before in range(4):
        ended = p[before, boundary].sum()
        tokens, corrected = 0.0, 0.0
        alive = np.where(boundary, p[before], 0.0)  # the probability of the words of one length, by their last token
        for _ in range(400):
            tokens += alive.sum()
            corrected += (alive * p[:, boundary].sum(1)).sum() / ended
            alive = alive @ np.where(boundary, 0.0, p)
        assert corrected == pytest.approx(1)
        sums.append(tokens)
    assert max(sums) > 1.05


@pytest.mark.parametrize("score", ["labels", "pseudo"])
def test_words_of_a_masked_model(score: str, tmp_path: Path) -> None:
    """A word has a surprisal where each of its tokens is hidden; no probability of its end is known."""
    tokenizer, texts = tokenizer_named("bpe"), [TEXTS[0], "a", "the rat, the cat"]
    data = prepared(texts, tokenizer, tmp_path / "cache", 64)
    held_out = held_out_of(data, MaskedLM(tokenizer, mask_probability=0.5), 64, context="document", score=score)
    table, records = words_in(tmp_path / "1", model_for("bpe", "roberta"), held_out, tokenizer)
    assert table["nll_corrected"].isna().all()
    assert records.certificate["surprisal"]["correction"] is None
    known, nll = table.dropna(subset="nll"), records.certificate["totals"]["nll"]
    if score == "pseudo":  # all but the ends
        assert known["nll"].sum() == pytest.approx(nll, rel=1e-6)
        assert known["text"].tolist() == [word for text in texts for word in text.split()]
    else:
        assert 0 < known["nll"].sum() < nll


def test_calibration_from_its_definition() -> None:
    scores = {
        "scored": np.array([1, 1, 1, 1, 0]),
        "confidence": np.array([0.9, 0.91, 0.2, 1.0, 0.0]),
        "hits": np.array([1, 0, 1, 1, 0]),
        "nll": np.array([0.1, 2.0, 1.6, 0.0, 0.0]),
    }
    found = calibrate(scores, np.array([7, 7, 8, 9, 7]))
    first, middle, last = found["by_confidence"]
    assert (first["from"], first["to"], first["tokens"], first["accuracy"]) == (3 / 15, 4 / 15, 1, 1.0)
    assert (middle["tokens"], middle["accuracy"], last["tokens"]) == (2, 0.5, 1)
    error = (1 * abs(1 - 0.2) + 2 * abs(0.5 - 0.905) + 1 * 0.0) / 4
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert [(row["from"], row["to"], row["tokens"]) for row in found["by_frequency"]] == [(1, 1, 2), (2, 3, 2)]
    assert found["by_frequency"][1]["nll"] == pytest.approx(1.05)


def test_calibration_of_a_model(tmp_path: Path) -> None:
    tokenizer, model = tokenizer_named("bpe"), exact("bpe", "gpt2")
    data = prepared(TEXTS, tokenizer, tmp_path / "cache", 64)
    held_out = held_out_of(data, CausalLM(), 64, context="document")
    _, records = words_in(tmp_path / "1", model_for("bpe", "gpt2"), held_out, tokenizer)
    confidence, hits = [], []
    for tokens in reference.tokenized(TEXTS, tokenizer):
        ids = (tokenizer.eos_token_id, *(token.id for token in tokens))
        for place in range(len(tokens)):
            probabilities = reference.logits_of(model, ids)[place].softmax(0)
            confidence.append(float(probabilities.max()))
            hits.append(int(probabilities.argmax()) == ids[place + 1])
    found = records.certificate["calibration"]
    assert found["confidence"] == pytest.approx(math.fsum(confidence) / len(confidence), rel=1e-5)
    assert found["accuracy"] == sum(hits) / len(hits)
