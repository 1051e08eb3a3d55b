"""Whatever the documents, windows, batches and ranks: every target once, and the same totals (promise 2)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lmlab.data.blocks import check_counts, read_counts, write_split
from lmlab.data.documents import Documents, read_documents
from lmlab.data.options import Preprocessing
from lmlab.data.preprocess import group_texts
from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from ..conftest import TINY
from .test_scoring import held_out_of, model_for, sums_of, tokenizer_named

SOME = settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Half of all characters are those the tokenizers have learned, or white space.
CHARACTERS = st.sampled_from("The cat sat \n\t") | st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.just("") | st.text(CHARACTERS, max_size=40), min_size=1, max_size=8)


def documents_of(texts: list[str], name: str, place: Path) -> Documents:
    """Tokenized as a held-out split."""
    choices = Preprocessing(end_of_text=name != "bare")
    try:
        write_split(place, "validation", ([text] for text in texts), tokenizer_named(name), choices)
        check_counts("validation", read_counts(place, "validation"))
    except UserError:  # there is no token in them
        assume(False)
    return read_documents(place, "validation")


def windows_of(documents: Documents, name: str, objective: Any, block_size: int, **choices: Any) -> Any:
    """What is scored of them."""
    data = SimpleNamespace(
        tokenizer=tokenizer_named(name),
        validation=documents,
        bounds=group_texts(documents.lengths, block_size),
        tokenizer_hash="",
    )
    try:
        return held_out_of(data, objective, block_size, **choices)
    except UserError as error:
        if "nothing to score" not in str(error):
            raise
        assume(False)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """A causal context, with a block size and a stride that it may have."""
    context = draw(st.sampled_from(["blocks", "document", "sliding"]))
    block_size = draw(st.integers(2, 40))
    stride = None if context == "blocks" else draw(st.none() | st.integers(1, block_size))
    return {"context": context, "block_size": block_size, "stride": stride}


@SOME
@given(texts=TEXTS, policy=policies(), name=st.sampled_from(["bpe", "char", "wordpiece", "bare"]))
def test_every_target_once_with_all_the_context_it_is_due(
    texts: list[str], policy: dict[str, Any], name: str, tmp_path: Path
) -> None:
    documents = documents_of(texts, name, tmp_path)
    held_out = windows_of(documents, name, CausalLM(), **policy)
    context, block_size = policy["context"], policy["block_size"]
    tokens = np.array(documents.tokens)
    head = tokenizer_named(name).bos_token_id
    # Where each text begins, by token.
    begins = np.zeros(len(tokens), np.int64)
    if context == "document":
        begins = np.repeat(documents.edges[:-1], documents.lengths)
    elif context == "blocks":
        begins = np.arange(len(tokens)) // block_size * block_size
    scored = np.zeros(len(tokens), np.int64)
    for index in range(len(held_out)):
        row = held_out.rows.row(index)
        assert 1 <= len(row.inputs) <= block_size
        np.testing.assert_array_equal(row.targets, tokens[row.tokens])
        np.add.at(scored, row.tokens, 1)
        for position, token in zip(row.positions, row.tokens, strict=True):
            # What it is shown ends right before the target, all of it of its own text.
            framed = context != "blocks" and head is not None
            own = [*([head] if framed else []), *tokens[begins[token] : token]]
            shown = row.inputs[: position + 1].tolist()
            assert shown == own[len(own) - len(shown) :]
            stride = 0 if context == "blocks" else policy["stride"] or block_size // 2
            assert len(shown) >= min(len(own), block_size - stride)
    first = begins == np.arange(len(tokens))
    wanted = np.ones(len(tokens)) if context != "blocks" and head is not None else ~first
    np.testing.assert_array_equal(scored, wanted)


@SOME
@given(
    texts=TEXTS,
    policy=policies(),
    name=st.sampled_from(["bpe", "char", "wordpiece", "bare"]),
    batch_size=st.integers(1, 17),
    ranks=st.integers(1, 2),
)
def test_causal_totals_do_not_follow_batches_and_ranks(
    texts: list[str], policy: dict[str, Any], name: str, batch_size: int, ranks: int, tmp_path: Path
) -> None:
    documents = documents_of(texts, name, tmp_path)
    same(windows_of(documents, name, CausalLM(), **policy), model_for(name, "gpt2"), batch_size, ranks)


@SOME
@given(
    texts=TEXTS,
    name=st.sampled_from(["bpe", "char", "wordpiece"]),
    context=st.sampled_from(["blocks", "document"]),
    score=st.sampled_from(["labels", "pseudo"]),
    block_size=st.integers(3, 40),
    batch_size=st.integers(1, 17),
    ranks=st.integers(1, 2),
)
def test_masked_totals_do_not_follow_batches_and_ranks(
    texts: list[str], name: str, context: str, score: str, block_size: int, batch_size: int, ranks: int, tmp_path: Path
) -> None:
    documents = documents_of(texts, name, tmp_path)
    objective = MaskedLM(tokenizer_named(name), mask_probability=0.3)
    held_out = windows_of(documents, name, objective, block_size, context=context, score=score)
    tokens = np.concatenate([held_out.rows.row(index).tokens for index in range(len(held_out))])
    assert len(np.unique(tokens)) == len(tokens)
    if score == "pseudo":
        tokenizer = tokenizer_named(name)
        special = np.isin(documents.tokens, sorted({*tokenizer.all_special_ids} - {tokenizer.unk_token_id}))
        np.testing.assert_array_equal(np.sort(tokens), np.flatnonzero(~special))
    for index in range(len(held_out)):
        assert 1 <= len(held_out.rows.row(index).inputs) <= block_size
    same(held_out, model_for(name, "bert" if name == "wordpiece" else "roberta"), batch_size, ranks)


def same(held_out: Any, model: Any, batch_size: int, ranks: int) -> None:
    """One row at a time in one process comes to the same."""
    nll, counts = sums_of(model, held_out, batch_size, ranks)
    one_nll, one_counts = sums_of(model, held_out, 1)
    np.testing.assert_array_equal(counts, one_counts)
    np.testing.assert_allclose(nll.sum(0), one_nll.sum(0), rtol=1e-6)
    np.testing.assert_allclose(nll, one_nll, rtol=1e-5, atol=1e-6)


@pytest.mark.longest
def test_two_processes_come_to_the_same(train: Callable[..., Path], evaluate: Callable[..., Path]) -> None:
    """The verb itself, on a trained run: two ranks over gloo, an odd batch size, against one process."""
    run = train(*TINY, "preprocess.test_size=0.07")
    common = [f"model={run}", "context=document", "stride=7"]
    one = records.read(evaluate(*common, "batch_size=16"))
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "batch_size=5"]
    two = records.read(evaluate(*common, *ranks))
    (nll, counts), (other_nll, other_counts) = one.sums, two.sums
    assert len(nll) > 5
    np.testing.assert_array_equal(counts, other_counts)
    np.testing.assert_allclose(nll, other_nll, rtol=1e-5)
    totals, others = one.certificate["totals"], two.certificate["totals"]
    for name, value in totals.items():
        exact = name not in ("nll", "nll_squared")
        assert others[name] == (value if exact else pytest.approx(value, rel=1e-6))
    for fact in ("policy", "data_hash", "tokenizer_hash", "weights_hash", "figure", "precision"):
        assert one.certificate[fact] == two.certificate[fact]
    # The run's own certificate is of the same documents, under the policy of training.
    own = json.loads((run / "certificate.json").read_text())
    assert own["data_hash"] == one.certificate["data_hash"]
    assert own["weights_hash"] == one.certificate["weights_hash"]
