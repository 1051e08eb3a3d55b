"""Perplexity as others count it: their windows, and what they leave out, by their own code or written anew."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.evaluation.certify import certify
from lmlab.evaluation.metrics import BOUND, compute_metrics, sum_totals
from lmlab.evaluation.sides import check_comparable
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from ..conftest import TINY
from . import reference
from .test_closed_form import Table
from .test_documents import metaspace
from .test_scoring import HARD, agree, exact, held_out_of, model_for, prepared, sums_of, tokenizer_named

TEXTS = ["The Milky Way is a galaxy.", "", "Water boils at 100 °C, ice\nmelts at 0.", "Light is a wave. " * 12]


# --- score_end=false ---


@pytest.mark.parametrize(
    ("context", "block_size", "stride"),
    [("blocks", 8, None), ("apart", 8, None), ("document", 8, 3), ("document", 64, None), ("sliding", 8, None)],
)
def test_causal(context: str, block_size: int, stride: int | None, tmp_path: Path) -> None:
    tokenizer = tokenizer_named("bpe")
    data = prepared(HARD, tokenizer, tmp_path, block_size)
    held_out = held_out_of(data, CausalLM(), block_size, context=context, stride=stride, score_end=False)
    assert held_out.facts["policy"]["score_end"] is False
    documents = reference.without_ends(reference.tokenized(HARD, tokenizer))
    wanted = reference.causal(exact("bpe", "gpt2"), tokenizer, documents, context, block_size, stride)
    assert sum(each.ends for each in wanted) == 0
    agree(sums_of(model_for("bpe", "gpt2"), held_out), wanted)


@pytest.mark.parametrize(("score", "context"), [("labels", "blocks"), ("labels", "document"), ("pseudo", "blocks")])
@pytest.mark.parametrize(("architecture", "name"), [("roberta", "bpe"), ("bert", "two_ends")])
def test_masked(architecture: str, name: str, context: str, score: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_named(name)
    objective = MaskedLM(tokenizer, mask_probability=0.4)
    data = prepared(HARD, tokenizer, tmp_path, 30)
    held_out = held_out_of(data, objective, 30, context=context, score=score, score_end=False)
    documents, model = reference.without_ends(reference.tokenized(HARD, tokenizer)), exact(name, architecture)
    if score == "pseudo":
        wanted = reference.pseudo(model, tokenizer, documents, context, 30)
    else:
        wanted = reference.labelled(model, tokenizer, documents, context, 30, objective, 0)
    agree(sums_of(model_for(name, architecture), held_out), wanted)


def test_an_end_that_is_the_unknown_token_too(tmp_path: Path) -> None:
    """As of GPT-2 and XLNet: where it stands for text it is scored, and not where it ends a document."""
    tokenizer = metaspace()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    data = prepared(["the cat", "ß the"], tokenizer, tmp_path, 30)
    scored = {}
    for score_end in (True, False):
        rows = held_out_of(data, MaskedLM(tokenizer), 30, context="blocks", score="pseudo", score_end=score_end).rows
        scored[score_end] = np.sort(np.concatenate([rows.row(i).tokens for i in range(len(rows))]))
    assert [*scored[True]] == [*range(len(data.validation.tokens))]
    ends = data.validation.edges[1:] - 1
    assert [*scored[False]] == [token for token in scored[True] if token not in ends]
    assert tokenizer.unk_token_id in data.validation.tokens[scored[False]]


def test_the_bound_given_the_ends(tmp_path: Path) -> None:
    """No end is hidden or counted: a uniform model costs log2 of the vocabulary for each token of the text."""
    tokenizer, texts = tokenizer_named("char"), ["The cat", "", "sat", "a" * 13]
    data = prepared(texts, tokenizer, tmp_path, 8)
    choices: dict[str, Any] = {"score": "elbo", "draws": 6, "context": "blocks", "score_end": False}
    held_out = held_out_of(data, MaskedLM(tokenizer), 8, **choices)
    ends = {*(data.validation.edges[1:][data.validation.lengths > 0] - 1).tolist()}
    assert 25 in ends  # a block of this token alone
    assert not ends & {*np.concatenate([held_out.rows.row(i).tokens for i in range(len(held_out))]).tolist()}
    size = len(tokenizer)
    totals = sum_totals(*sums_of(Table(torch.full((size, size), 1 / size)), held_out))
    assert [totals["tokens"], totals["bytes"], totals["ends"]] == [23, 23, 0]
    assert compute_metrics(totals, BOUND)["bound_bits_per_byte"] == pytest.approx(math.log2(size), rel=1e-6)


def test_nothing_to_leave_out_is_refused(tmp_path: Path) -> None:
    data = prepared(HARD, tokenizer_named("bpe"), tmp_path, 8, end_of_text=False)
    with pytest.raises(UserError, match=r"score_end=false would change nothing.*\nLeave it out"):
        held_out_of(data, CausalLM(), 8, score_end=False)


# --- Windows ---


@pytest.mark.parametrize("score_end", [True, False])
@pytest.mark.parametrize("block_size", [5, 8, 64])
@pytest.mark.parametrize("name", ["bpe", "char", "wordpiece"])
def test_rolling(name: str, block_size: int, score_end: bool, tmp_path: Path) -> None:
    """Windows of as many targets as positions, with one token before them, of which the last one has more."""
    tokenizer, model = tokenizer_named(name), exact(name, "gpt2")
    documents = reference.tokenized(HARD, tokenizer)
    wanted = [reference.Sums() for _ in documents]
    head = reference.first_of(tokenizer, "bos", "eos")
    for sums, tokens in zip(wanted, documents, strict=True):
        scored = [token for token in tokens if score_end or not token.ends_text]
        ids = [token.id for token in scored]
        given = [] if ids[:1] == head else head
        ids = [*given, *ids]
        for at in range(1, len(ids)):
            end = min(len(ids), block_size * -(-at // block_size) + 1)  # of its window
            before = ids[max(0, end - block_size - 1) : at]
            sums.add(scored[at - len(given)], reference.nll_of(model, tuple(before), -1, ids[at]))
    held_out = held_out_of(
        prepared(HARD, tokenizer, tmp_path, block_size), CausalLM(), block_size, context="rolling", score_end=score_end
    )
    assert held_out.facts["policy"]["stride"] is None
    agree(sums_of(model_for(name, "gpt2"), held_out), wanted)


def fixed_length(model: PreTrainedModel, ids: list[int], max_length: int, stride: int) -> list[tuple[float, int]]:
    """The loss of each window and the number of its targets, as the page of transformers computes them."""
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        labels = [-100] * (before - begin) + ids[before:end]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids[begin:end]]), labels=torch.tensor([labels])).loss
        losses.append((float(loss), sum(label != -100 for label in labels[1:])))
        before = end
        if end == len(ids):
            return losses
    raise AssertionError


@pytest.mark.parametrize(("max_length", "stride"), [(16, 8), (16, 16), (9, 4), (64, 1)])
def test_fixed_length(max_length: int, stride: int, tmp_path: Path) -> None:
    """It is the mean of the windows' losses by their targets; the page weighs all but the first by one less."""
    tokenizer, text = tokenizer_named("bpe"), "\n\n".join(HARD)
    data = prepared([text], tokenizer, tmp_path, max_length, end_of_text=False)
    choices = {"context": "fixed_length", "stride": stride}
    sums = sums_of(model_for("bpe", "gpt2"), held_out_of(data, CausalLM(), max_length, **choices))
    found = compute_metrics(sum_totals(*sums))["nll_per_token"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = fixed_length(exact("bpe", "gpt2"), ids, max_length, stride)
    targets = sum(count for _, count in losses)
    assert sums[1][:, 0].sum() == targets == len(ids) - (len(losses) if stride == max_length else 1)
    assert found == pytest.approx(sum(loss * count for loss, count in losses) / targets, rel=1e-6)


# --- Certificates ---


def test_conventions_are_named_and_kept_apart(tmp_path: Path) -> None:
    tokenizer, texts = tokenizer_named("bpe"), ["The cat", "", "sat on\nthe mat", "Yes?\n"]
    data, read = prepared(texts, tokenizer, tmp_path, 32), {}
    for name, choices in {
        "whole": {"context": "document"},
        "text": {"context": "document", "score_end": False},
        "rolling": {"context": "rolling", "score_end": False},
        "fixed": {"context": "fixed_length"},
        "words": {"context": "document", "units": "words"},
    }.items():
        certify(model_for("bpe", "gpt2"), held_out_of(data, CausalLM(), 32, **choices), tmp_path / name)
        read[name] = records.read(tmp_path / name)
    shown = {name: records.describe(one.certificate) for name, one in read.items()}
    assert shown["whole"]["context"] == "document, 32 positions, stride 16"
    assert shown["text"]["context"] == "document, 32 positions, stride 16, ends of documents not scored"
    assert shown["rolling"]["context"] == "rolling, 32 positions, ends of documents not scored"
    assert shown["fixed"]["context"] == "fixed_length, 32 positions, stride 16"
    assert shown["words"]["scored"].endswith(" 7 words and 4 ends of lines")
    assert "score_end" not in read["whole"].certificate["policy"]  # as in certificates before there was a choice
    # Of fixed_length the first token is not scored, with which the first word begins.
    for name, words in {"whole": 7 + 3, "text": 7, "rolling": 7, "fixed": 6 + 3, "words": 7 + 4}.items():
        figures, totals = (read[name].certificate[part] for part in ("figures", "totals"))
        assert figures["word_perplexity"] == pytest.approx(math.exp(totals["nll"] / words), rel=1e-12)
    for one, other, said in (
        ("whole", "text", "score_end is true in one and false in the other"),
        ("text", "rolling", "context is document in one and rolling in the other"),
        ("whole", "fixed", "context is document in one and fixed_length in the other"),
    ):
        with pytest.raises(UserError, match=said):
            check_comparable([read[one], read[other]])
    check_comparable([read["whole"], read["words"]])  # by bits per byte, which have no words in them


# --- lm-evaluation-harness ---


@pytest.mark.long
@pytest.mark.parametrize(("context", "size"), [("document", 256), ("rolling", 32)])
def test_the_harness(
    context: str, size: int, train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own rolling log-likelihood, of documents that fit and of one that does not."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lmlab[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    run, file = train(*TINY), tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words = [f"model={run}", "data=files", f"data.validation={file}", f"preprocess.block_size={size}"]
    place = evaluate(*words, f"context={context}", "score_end=false")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=size, batch_size=3, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    likelihoods = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    longest = max(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (longest > 3 * size) == (size == 32)
    found = records.read(place)
    np.testing.assert_allclose(-found.table["nll"].to_numpy(), likelihoods, rtol=1e-6, atol=1e-5)
    results = [process_results({"page": text}, [one]) for text, one in zip(TEXTS, likelihoods, strict=True)]
    total, edges = sum(likelihoods), sum(text != text.strip() for text in TEXTS) + 1  # and one for the empty text
    counted, of_bytes = (sum(one[key][1] for one in results) for key in ("word_perplexity", "bits_per_byte"))
    figures, totals = found.certificate["figures"], found.certificate["totals"]
    assert counted == totals["words"] + edges  # it counts an empty word there
    assert figures["word_perplexity"] == pytest.approx(math.exp(-total / totals["words"]), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(-total / of_bytes / math.log(2), rel=1e-6)
