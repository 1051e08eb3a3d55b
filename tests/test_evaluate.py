"""`lmlab.evaluate` as a person runs it: from a model and a text to records and their certificate.

Two tiny runs serve all tests; what is expected comes from them, or from transformers alone.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from lmlab.config import evaluated
from lmlab.evaluation import records, scoring
from lmlab.evaluation.suites import certificates
from lmlab.models.hashing import weights_hash
from lmlab.models.loss import Scores, score

from .conftest import TINY, TINY_MLM, run_verb

Verb = Callable[..., Path]
FIGURES = ["perplexity", "bits_per_byte", "bits_per_word", "word_perplexity"]
"""By the names they have for a causal model."""
TEXTS = ["The Milky Way is a galaxy.", "", "Water boils at 100 °C, ice\nmelts at 0.", "Why?", "Light is a wave. " * 3]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, best at a step that is not its last."""
    place = tmp_path_factory.mktemp("runs") / "causal"
    harm = ["trainer.max_steps=3", "trainer.val_check_interval=1", "optim.lr=0.35", "optim.warmup_steps=1"]
    run_verb("train", *TINY, *harm, f"hydra.run.dir={place}")
    return place


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "masked"
    # Another seed than an evaluation's: masks of held-out text do not follow a run's.
    run_verb("train", *TINY_MLM, "seed=5", f"hydra.run.dir={place}")
    return place


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A few short documents."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def files(place: Path) -> list[str]:
    return ["data=files", f"data.validation={place}"]


def certificate(place: Path) -> dict[str, Any]:
    """The certificate, checked against its records."""
    return records.read(place).certificate


def same(one: Path, other: Path) -> None:
    """Two evaluations counted the same, and summed it to the same up to rounding."""
    (nll, units), (other_nll, other_units) = records.read(one).sums, records.read(other).sums
    np.testing.assert_array_equal(units, other_units)
    np.testing.assert_allclose(nll, other_nll, rtol=1e-5, atol=1e-6)
    assert math.fsum(nll[:, 0]) == pytest.approx(math.fsum(other_nll[:, 0]), rel=1e-6)


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], Any]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) <= 3
    return shown


# --- A run, and its own held-out text ---


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_run_certifies_its_exported_weights(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    found, summary = certificate(run), json.loads((run / "summary.json").read_text())
    ledger = json.loads((run / "ledger.json").read_text())["validation"]
    manifest = json.loads((run / "manifest.json").read_text())
    name = {"causal": "perplexity", "masked": "masked_perplexity"}[kind]
    assert found["figure"] == name
    assert found["figures"]["nll_per_token"] == summary["val/loss"]
    assert found["figures"][name] == pytest.approx(summary[f"val/{name}"], rel=1e-12)
    table = records.read(run).table
    assert math.fsum(table["nll"].to_pylist()) / sum(table["tokens"].to_pylist()) == summary["val/loss"]
    assert found["totals"]["documents"] == ledger["documents"] == len(table)
    if kind == "causal":  # all but the first token of each block
        assert found["totals"]["tokens"] == ledger["tokens"] - ledger["blocks"]
    assert found["tokenizer_hash"] == manifest["tokenizer_hash"]
    assert found["run"] == {
        "run_id": manifest["run_id"],
        "config": OmegaConf.to_container(OmegaConf.load(run / "config.yaml")),
    }
    weights = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    assert found["weights_hash"] == weights_hash(weights.from_pretrained(run / "model").state_dict())


def test_the_run_is_no_trivial_one(causal: Path) -> None:
    """What is certified is neither the last validation nor the first."""
    losses = [json.loads(line).get("val/loss") for line in (causal / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert certificate(causal)["figures"]["nll_per_token"] == min(losses[1:]) != losses[-1]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_run_evaluated_again_gives_its_own_certificate(
    kind: str, evaluate: Verb, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = request.getfixturevalue(kind)
    place = evaluate(f"model={run}", "batch_size=5")
    shown = capsys.readouterr().out
    ours, theirs = certificate(place), certificate(run)
    same(place, run)
    assert {path.name for path in place.iterdir() if path.suffix != ".log" and path.name != ".lock"} == {
        *("config.yaml", "overrides.yaml", "manifest.json", "records.parquet", "certificate.json")
    }
    for key in ("data_hash", "tokenizer_hash", "weights_hash", "policy", "figure", "run", "precision"):
        assert ours[key] == theirs[key], key
    for name, total in theirs["totals"].items():
        assert ours["totals"][name] == (pytest.approx(total, rel=1e-6) if name.startswith("nll") else total)
    assert ours["figures"] == pytest.approx(theirs["figures"], rel=1e-6)
    assert records.read(place).table["document"].equals(records.read(run).table["document"])
    assert f"{ours['figures'][ours['figure']]:,.4f}" in shown
    assert "certificate" in shown  # its path may be folded
    assert json.loads((place / "manifest.json").read_text())["seeds"] == {"masks": 0}


def test_masked_figures_never_go_by_causal_names(
    masked: Path, evaluate: Verb, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prefix, more in (("masked", []), ("pseudo", [*files(text), "score=pseudo"])):
        capsys.readouterr()
        found = certificate(evaluate(f"model={masked}", *more))
        assert found["figures"].keys() == {"nll_per_token", *(f"{prefix}_{name}" for name in FIGURES)}
        assert found["figure"] == f"{prefix}_perplexity"
        shown = capsys.readouterr().out
        for name in FIGURES:
            assert name.replace("_", " ") in shown
            assert not re.search(rf"(?<!{prefix} )(?<!{prefix} word ){name.replace('_', ' ')}", shown)


def test_masks_are_of_the_seed(masked: Path, evaluate: Verb) -> None:
    """Of an evaluation's own; the same positions for runs of any seed."""
    again, other = (certificate(evaluate(f"model={masked}", f"seed={seed}")) for seed in (0, 1))
    assert again["totals"]["tokens"] == certificate(masked)["totals"]["tokens"]
    assert again["totals"]["nll"] != other["totals"]["nll"]
    assert (again["policy"]["masks_seed"], other["policy"]["masks_seed"]) == (0, 1)


def test_a_run_whose_text_has_changed_is_refused(
    train: Verb, evaluate: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.txt"
    file.write_text("".join(f"line {i} of a text\n" for i in range(60)))
    run = train(*TINY, "trainer.max_steps=2", "data=files", f"data.train={file}", "data.document=line")
    before = file.read_text()
    same(evaluate(f"model={run}"), run)
    file.write_text(before.replace("text", "book"))
    place = tmp_path / "refused"
    shown = refused(capsys, lambda: evaluate(f"model={run}", run_dir=place))
    assert f"the data of {run} is not what it was trained with" in shown
    assert "data=" in shown
    assert not place.exists()
    # Other text may be named all the same, and the right one is welcome again.
    evaluate(f"model={run}", *files(file), "data.document=line")
    file.write_text(before)
    same(evaluate(f"model={run}"), run)


# --- Contexts ---


@pytest.mark.parametrize("context", [["document"], ["document", "stride=7"], ["sliding", "stride=9"], ["sliding"]])
def test_contexts_score_every_token(context: list[str], causal: Path, evaluate: Verb) -> None:
    """With the special token before a text all of it is predicted, and every byte of it is counted."""
    name, *stride = context
    place = evaluate(f"model={causal}", f"context={name}", *stride)
    found, ledger = certificate(place), json.loads((causal / "ledger.json").read_text())["validation"]
    assert [found["totals"][key] for key in ("tokens", "bytes")] == [ledger["tokens"], ledger["bytes"]]
    step = int(stride[0].removeprefix("stride=")) if stride else 16
    assert found["policy"] | {"context": name, "block_size": 32, "stride": step} == found["policy"]
    texts = records.read(place).table
    assert sum(texts["words"].to_pylist()) == found["totals"]["words"] > 2000


@pytest.mark.parametrize("context", ["document", "blocks"])
def test_masked_contexts_score_the_same_positions(context: str, masked: Path, evaluate: Verb) -> None:
    """Wherever a text is cut, its masks are where they are."""
    place = evaluate(f"model={masked}", f"context={context}", "preprocess.block_size=50")
    np.testing.assert_array_equal(records.read(place).sums[1], records.read(masked).sums[1])
    assert certificate(place)["totals"]["nll"] != certificate(masked)["totals"]["nll"]


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text and the end-of-text token; an empty text has none."""
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] if text else [] for text in texts]


@torch.no_grad()
def test_words_and_calibration(
    causal: Path, evaluate: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change no metric, and a report draws them."""
    plain = evaluate(f"model={causal}", "context=document")
    capsys.readouterr()
    found = evaluate(f"model={causal}", "context=document", "surprisal=true", "calibration=true")
    said = capsys.readouterr().out
    assert "words, in words.parquet, also corrected for their ends" in said
    assert "expected calibration error" in said
    same(plain, found)
    words = pq.read_table(found / "words.parquet")
    assert math.fsum(words["nll"].to_pylist()) == pytest.approx(certificate(found)["totals"]["nll"], rel=1e-9)
    assert certificate(found)["surprisal"]["words"] == certificate(found)["totals"]["words"]
    run_verb("report", found, "--out", tmp_path / "report")
    for view in ("position", "frequency", "length", "calibration"):
        assert (tmp_path / "report" / f"clm_by_{view}.svg").stat().st_size > 1000
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "Where models fail" in page
    hardest = (tmp_path / "report" / "clm_by_hardest.csv").read_text("utf-8").splitlines()
    assert len(hardest) == 6


@pytest.mark.parametrize("key", ["surprisal", "calibration"])
def test_bounds_have_no_words(key: str, masked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, lambda: run_verb("evaluate", f"model={masked}", "score=elbo", f"{key}=true"))
    assert f"{key}=true needs one prediction for each token of the text, which score=elbo does not make" in said


@pytest.mark.parametrize("options", [TINY, TINY_MLM], ids=["causal", "masked"])
def test_a_run_whose_documents_do_not_see_one_another(
    options: list[str], train: Verb, evaluate: Verb, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated as it was trained, on text of its own and on other text, and compared with no other figure."""
    run = train(*options, "preprocess.document_attention=true")
    found = certificate(run)
    assert found["policy"]["document_attention"] is True
    assert found["figures"]["nll_per_token"] == json.loads((run / "summary.json").read_text())["val/loss"]
    same(run, evaluate(f"model={run}"))
    capsys.readouterr()
    apart = evaluate(f"model={run}", *files(text))
    assert "blocks, 32 positions, documents apart" in capsys.readouterr().out
    whole = evaluate(f"model={run}", *files(text), "preprocess.document_attention=false")
    assert "document_attention" not in certificate(whole)["policy"]
    if options is TINY:  # its texts fit into the blocks: but for the first token of each document, all are targets
        short = [*files(text), "context=document", "preprocess.end_of_text=true"]
        assert certificate(apart)["totals"]["tokens"] < certificate(whole)["totals"]["tokens"]
        assert certificate(evaluate(f"model={run}", *short))["policy"].get("document_attention") is None
        said = refused(capsys, lambda: evaluate(f"model={run}", "context=sliding"))
        assert "context=sliding lets a model see the documents before its own" in said
        other = train(*TINY, "preprocess.document_attention=true", "tokenizer.vocab_size=310", run_dir=tmp_path / "310")
        said = refused(capsys, lambda: run_verb("compare", run, other))
        assert "the first token of each document is not scored, which is not the same text in both" in said
    said = refused(capsys, lambda: run_verb("compare", apart, whole))
    assert "document_attention is true in one and false in the other" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=hybrid"], "HybridLM needs another mask"),
        (["objective=span"], "SpanCorruption trains encoder-decoders"),
        (["attention=flash_attention_2"], "takes no mask that keeps documents apart"),
    ],
)
def test_what_can_not_keep_documents_apart(words: list[str], said: str, train: Verb, refused: Any) -> None:
    small = ["tokenizer.vocab_size=300", "preprocess.block_size=32", "preprocess.document_attention=true"]
    assert said in refused("train", *words, *small)


def test_sliding_by_one_against_transformers(causal: Path, evaluate: Verb, text: Path) -> None:
    """At stride 1 each token is predicted from the 12 before it, or from all there are."""
    place = evaluate(f"model={causal}", *files(text), "context=sliding", "stride=1", "preprocess.block_size=12")
    model = AutoModelForCausalLM.from_pretrained(causal / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(causal / "model")
    documents = ids_of(TEXTS, tokenizer)
    ids = [tokenizer.bos_token_id, *(token for document in documents for token in document)]
    wanted = [
        -float(model(torch.tensor([ids[max(0, t - 12) : t]])).logits[0, -1].log_softmax(-1)[ids[t]])
        for t in range(1, len(ids))
    ]
    nll, units = records.read(place).sums
    edges = np.cumsum([0, *map(len, documents)])
    assert units[:, 0].tolist() == [len(document) for document in documents]
    sums = [math.fsum(wanted[start:end]) for start, end in pairwise(edges)]
    np.testing.assert_allclose(nll[:, 0], sums, rtol=1e-5)


@torch.no_grad()
def test_documents_against_transformers(causal: Path, evaluate: Verb, text: Path) -> None:
    """Each on its own, behind the special token; nothing of one is seen in another."""
    place = evaluate(f"model={causal}", *files(text), "context=document", "preprocess.block_size=200", "batch_size=2")
    model = AutoModelForCausalLM.from_pretrained(causal / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(causal / "model")
    wanted = []
    for document in ids_of(TEXTS, tokenizer):
        ids = torch.tensor([[tokenizer.bos_token_id, *document]])
        logs = model(ids).logits[0, :-1].log_softmax(-1)
        wanted.append(-float(logs[range(len(document)), document].double().sum()) if document else 0.0)
    table = records.read(place).table
    np.testing.assert_allclose(table["nll"].to_numpy(), wanted, rtol=1e-5)
    assert table["bytes"].to_pylist() == [len(text.encode()) for text in TEXTS]
    assert table["words"].to_pylist() == [len(text.split()) for text in TEXTS]
    assert table["start"].to_pylist() == [" ".join(text.split()) for text in TEXTS]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_document_longer_than_the_models_positions(
    kind: str, evaluate: Verb, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    file = tmp_path / "long.txt"
    file.write_text("A long story, word by word, that has no end. " * 40)
    tokens = len(AutoTokenizer.from_pretrained(run / "model")(file.read_text(), verbose=False)["input_ids"]) + 1
    assert tokens > 2 * 256
    for context in ("document", "sliding", "blocks")[:: 1 if kind == "causal" else 2]:
        found = certificate(evaluate(f"model={run}", *files(file), f"context={context}", "preprocess.block_size=256"))
        if kind == "causal":
            assert found["totals"]["tokens"] == tokens - (-(-tokens // 256) if context == "blocks" else 0)
        assert found["totals"]["tokens"] > 0.1 * tokens


# --- Pseudo-likelihood ---


@torch.no_grad()
def test_pseudo_against_transformers(masked: Path, evaluate: Verb, text: Path) -> None:
    """Each token hidden in turn, in its document between special tokens; with the rest of its word, or alone."""
    model = AutoModelForMaskedLM.from_pretrained(masked / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(masked / "model")
    end, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    command = [f"model={masked}", *files(text), "score=pseudo", "preprocess.block_size=100"]
    alone, whole = (evaluate(*command, f"within_word={within}", "batch_size=16") for within in ("false", "true"))
    for place, within in ((alone, False), (whole, True)):
        wanted = []
        for text_of_one in TEXTS:
            encoded = tokenizer(text_of_one)
            ids, words, total = encoded["input_ids"], encoded.word_ids(), 0.0
            for at in range(len(ids)):
                hidden = [
                    mask if i == at or (within and i > at and words[i] == words[at]) else token
                    for i, token in enumerate(ids)
                ]
                logits = model(torch.tensor([[end, *hidden, end]])).logits[0, at + 1]
                total -= float(logits.log_softmax(-1)[ids[at]])
            wanted.append(total)
        table = records.read(place).table
        np.testing.assert_allclose(table["nll"].to_numpy(), wanted, rtol=1e-5)
        assert table["tokens"].to_pylist() == [len(tokenizer(one)["input_ids"]) for one in TEXTS]
        assert certificate(place)["policy"]["pseudo"] == {"within_word": within, "sample": None, "seed": None}
        assert certificate(place)["policy"]["context"] == "document"
        assert certificate(place)["policy"]["stride"] is None
    assert certificate(alone)["totals"]["nll"] != certificate(whole)["totals"]["nll"]


def test_a_sample_has_a_standard_error(
    masked: Path, evaluate: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"This is sentence {i}, and {i * i} is its square.\n" for i in range(20)))
    command = [f"model={masked}", *files(file), "data.document=line", "score=pseudo", "batch_size=64"]
    exact = certificate(evaluate(*command))
    assert not [name for name in exact["figures"] if "error" in name]
    assert "±" not in capsys.readouterr().out
    place = evaluate(*command, "sample=0.3")
    sampled, shown = certificate(place), capsys.readouterr().out
    share = sampled["totals"]["tokens"] / exact["totals"]["tokens"]
    assert 0.2 < share < 0.4
    figures, error = sampled["figures"], sampled["figures"]["nll_per_token_standard_error"]
    assert 0 < error < 0.2
    assert abs(figures["nll_per_token"] - exact["figures"]["nll_per_token"]) < 5 * error
    assert figures["pseudo_perplexity_standard_error"] == pytest.approx(figures["pseudo_perplexity"] * error)
    assert f"± {figures['pseudo_perplexity_standard_error']:.4f} (standard error)" in shown
    # The same tokens whatever is scored at once; others of another seed.
    same(evaluate(*command, "sample=0.3", "batch_size=3"), place)
    other = evaluate(*command, "sample=0.3", "seed=1")
    assert records.read(other).table["tokens"] != records.read(place).table["tokens"]


# --- Models and texts from elsewhere ---


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_an_exported_directory(
    kind: str, evaluate: Verb, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It says itself as what it was trained; the figures are those of the run on the same text."""
    run = request.getfixturevalue(kind)
    exported = tmp_path / "exported"
    shutil.copytree(run / "model", exported)
    place = evaluate(f"model={exported}", *files(text), "preprocess.block_size=32")
    of_run = evaluate(f"model={run}", *files(text))
    same(place, of_run)
    ours, theirs = certificate(place), certificate(of_run)
    assert ours["run"] is None
    assert theirs["run"]["run_id"] == json.loads((run / "manifest.json").read_text())["run_id"]
    assert ours["model"] == str(exported)
    for key in ("data_hash", "tokenizer_hash", "weights_hash", "figure", "policy"):
        assert ours[key] == theirs[key], key
    # No block size is named: as many positions as the model has.
    assert certificate(evaluate(f"model={exported}", *files(text)))["policy"]["block_size"] == 256
    if kind == "causal":
        sliding = certificate(evaluate(f"model={exported}", *files(text), "context=sliding", "stride=1"))
        assert (sliding["policy"]["block_size"], sliding["policy"]["stride"]) == (256, 1)


def test_a_relative_path_and_the_folder_of_the_model(
    causal: Path, evaluate: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run by the way a person would type it, from where they are."""
    monkeypatch.chdir(causal.parent)
    same(evaluate("model=causal"), causal)
    same(evaluate("model=./causal/"), causal)


@pytest.mark.parametrize("name", ["lr=0.1,seed=2", "a (copy)", 'brav"o[1]', "número"])
def test_a_place_is_taken_as_typed(name: str, causal: Path, evaluate: Verb, tmp_path: Path) -> None:
    """A sweep may well have named it; to Hydra's grammar these are signs."""
    shutil.copytree(causal / "model", tmp_path / name / "model")
    for file in ("config.yaml", "manifest.json", "certificate.json"):
        shutil.copy(causal / file, tmp_path / name)
    same(evaluate(f"model={tmp_path / name}"), causal)


def test_logits_are_held_for_as_many_positions_as_asked_for(
    causal: Path, evaluate: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[int | None] = []

    def seen(*args: Any) -> Scores:
        held.append(args[5])
        return score(*args)

    monkeypatch.setattr(scoring, "score", seen)
    same(evaluate(f"model={causal}", "logits_chunk_size=3"), causal)
    assert set(held) == {3}
    assert "logits_chunk_size=0: it has to be a whole number" in refused(
        capsys, lambda: evaluate(f"model={causal}", "logits_chunk_size=0")
    )


def test_text_is_hashed_by_what_it_says(causal: Path, evaluate: Verb, text: Path, tmp_path: Path) -> None:
    """Not by the file it comes in: the same documents are the same data."""
    other = tmp_path / "other.csv"
    other.write_text("text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in TEXTS))
    one, two = (evaluate(f"model={causal}", *files(file)) for file in (text, other))
    same(one, two)
    assert certificate(one)["data_hash"] == certificate(two)["data_hash"] != certificate(causal)["data_hash"]


def test_multirun(causal: Path, masked: Path, text: Path, tmp_path: Path, evaluate: Verb) -> None:
    """`-m model=A,B` evaluates each, in a directory of its own."""
    run_verb("evaluate", "-m", f"model={causal},{masked}", *files(text), f"hydra.sweep.dir={tmp_path}/sweep")
    for number, run in enumerate((causal, masked)):
        place = tmp_path / "sweep" / str(number)
        assert certificate(place)["model"] == str(run / "model")
        same(place, evaluate(f"model={run}", *files(text)))


# --- Minimal pairs ---

PAIRS = (
    "good,bad,phenomenon\n"
    "The galaxies are old.,The galaxies is old.,agreement\n"
    "Why does water boil?,Why do water boil?,agreement\n"
    "You can see it.,You see can it.,order\n"
)


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """The words of a command for a file of pairs."""
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return ["suite=minimal_pairs", f"pairs={tmp_path / 'pairs.csv'}"]


def test_minimal_pairs_are_compared_and_reported(
    causal: Path, masked: Path, pairs: list[str], evaluate: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By pair, whatever the objectives; not with held-out text, nor with other pairs. No batch size moves an nll."""
    one, two = evaluate(f"model={causal}", *pairs), evaluate(f"model={masked}", *pairs)
    assert "3 pairs" in capsys.readouterr().out
    for place, pseudo in ((one, None), (two, {"within_word": True, "sample": None, "seed": None})):
        policy = certificates.read(place).certificate["policy"]
        assert (policy["context"], policy["end_of_text"], policy["pseudo"]) == ("document", False, pseudo)
    run_verb("compare", one, two, "--power", "10%", "--out", tmp_path / "compared")
    said = capsys.readouterr().out
    assert "Accuracy on 3 pairs" in said
    assert "What would show a difference of" in said
    rows = pd.read_csv(tmp_path / "compared" / "comparison.csv")
    accuracy = [certificates.read(place).certificate["figures"]["pairs_accuracy"] for place in (one, two)]
    assert rows["phenomenon"].tolist() == ["all", "all", "agreement", "agreement", "order", "order"]
    assert rows["value"][:2].tolist() == accuracy
    assert rows["difference"][1] == pytest.approx(accuracy[1] - accuracy[0])
    assert "are not the same measure" in refused(capsys, lambda: run_verb("compare", one, causal))
    file = Path(pairs[1].removeprefix("pairs="))
    file.write_text(file.read_text() + "It is.,It are.,agreement\n")
    other = evaluate(f"model={causal}", *pairs, "batch_size=1")
    for side in ("nll_good", "nll_bad"):
        np.testing.assert_allclose(*(certificates.read(place).table[side][:3] for place in (one, other)), rtol=1e-6)
    assert "what they measured is not the same" in refused(capsys, lambda: run_verb("compare", one, other))
    run_verb("report", one, two, other, causal, "--out", tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "suites.csv")
    of_all = table[(table["group"] == "all") & (table["metric"] == "pairs_accuracy")]
    assert of_all["value"].tolist()[:2] == accuracy
    assert "minimal_pairs" in (tmp_path / "report" / "report.html").read_text()


def test_memorization_and_generation(
    causal: Path, masked: Path, evaluate: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the run's own held-out text: measured, compared with themselves, and shown in a report."""
    memory = ["suite=memorization", "prefix=4", "continuation=2"]
    one, other = evaluate(f"model={causal}", *memory), evaluate(f"model={causal}", *memory, "batch_size=3")
    texts = evaluate(f"model={causal}", "suite=generation", "prompts=3", "prefix=4", "continuation=28")
    for place, figure in ((one, "verbatim_share"), (texts, "distinct_2")):
        found = certificates.read(place).certificate
        assert found["figure"] == figure
        assert found["figures"][figure] is not None
    np.testing.assert_allclose(*(certificates.read(place).table["min_k_nll"] for place in (one, other)), rtol=1e-5)
    capsys.readouterr()
    run_verb("compare", one, other, "--out", tmp_path / "compared")
    assert "Verbatim share on " in capsys.readouterr().out
    deeper = evaluate(f"model={causal}", *memory[:2], "continuation=3")
    assert "continuation is 2 in one and 3 in the other" in refused(capsys, lambda: run_verb("compare", one, deeper))
    run_verb("report", one, texts, causal, "--out", tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "suites.csv")
    assert {*table["suite"]} == {"memorization", "generation"}
    assert {"verbatim_share", "min_k_nll", "distinct_1", "reference_repetition_4"} <= {*table["metric"]}
    said = refused(capsys, lambda: evaluate(f"model={masked}", "suite=generation"))
    assert "suite=generation is for causal models" in said


@pytest.mark.longest
def test_generation_on_two_devices(causal: Path, evaluate: Verb) -> None:
    words = [f"model={causal}", "suite=generation", "prompts=5", "prefix=4", "continuation=6"]
    one, two = evaluate(*words), evaluate(*words, "trainer=ddp", "trainer.accelerator=cpu", "batch_size=2")
    assert certificates.read(one).table == certificates.read(two).table


@pytest.mark.long
def test_minimal_pairs_on_two_devices(causal: Path, masked: Path, evaluate: Verb, pairs: list[str]) -> None:
    one = certificates.read(evaluate(f"model={masked}", *pairs))
    two = certificates.read(
        evaluate(f"model={masked}", *pairs, "trainer=ddp", "trainer.accelerator=cpu", "batch_size=2")
    )
    np.testing.assert_allclose(one.sums[0], two.sums[0], rtol=1e-6)
    assert one.certificate["figures"] == two.certificate["figures"]
    checked = certificates.read(evaluate(f"model={causal}", *pairs, "check=true")).certificate["check"]
    assert checked["devices"] == [1, 2]
    assert checked["total_moved_by"] <= 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("suite=minimal_pairs", "suite=minimal_pairs needs pairs: add pairs=FILE"),
        ("suite=minimal_pairs pairs=none.csv", "pairs=none.csv: no such file"),
        ("suite=minimal_pairs pairs=x data=sample", "leave data=… out"),
        ("suite=minimal_pairs pairs=x context=sliding", "leave context, stride and sample out"),
        ("suite=minimal_pair pairs=x", "minimal_pairs"),
        ("suite=generation pairs=x", 'no key "pairs". It is one of suite=minimal_pairs'),
        ("pairs=x", "pairs"),
    ],
)
def test_minimal_pairs_that_are_refused(
    words: str, said: str, causal: Path, evaluate: Verb, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in refused(capsys, lambda: evaluate(f"model={causal}", *words.split(), run_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# --- Widths and precisions ---


@pytest.mark.parametrize(("typed", "precision"), [("bf16", "bf16-mixed"), ("bf16-true", "bf16-true")])
def test_precision(typed: str, precision: str, causal: Path, evaluate: Verb) -> None:
    found, exact = certificate(evaluate(f"model={causal}", f"trainer.precision={typed}")), certificate(causal)
    assert found["precision"] == precision
    assert found["weights_hash"] == exact["weights_hash"]  # of the weights, before they are cast
    assert found["totals"]["nll"] != exact["totals"]["nll"]
    assert found["totals"]["nll"] == pytest.approx(exact["totals"]["nll"], rel=1e-3)
    assert found["totals"]["tokens"] == exact["totals"]["tokens"]


@pytest.mark.long
def test_check_passes(causal: Path, evaluate: Verb, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half the batch, on two processes."""
    place = evaluate(f"model={causal}", *files(text), "check=true", "context=document")
    found = certificate(place)["check"]
    assert (found["batch_size"], found["devices"]) == ([8, 7], [1, 2])
    assert 0 <= found["total_moved_by"] <= 1e-6
    assert 0 <= found["a_document_moved_by"] <= 1e-5
    assert "passed" in capsys.readouterr().out
    assert not (place / "check").exists()


def test_check_fails(
    causal: Path,
    evaluate: Verb,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model whose scores move with the batch is found out, and no certificate is left of it."""

    def moved(model: Any, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        return Scores(score(model, input_ids, *args).nll * (1 + 1e-3 * len(input_ids)), None)

    monkeypatch.setattr(scoring, "score", moved)
    monkeypatch.setattr(evaluated, "other_width", lambda cfg: {"batch_size": 3})
    place = tmp_path / "checked"
    command = [f"model={causal}", *files(text), "context=document"]
    shown = refused(capsys, lambda: evaluate(*command, "check=true", run_dir=place))
    assert "the check failed" in shown
    assert "total nll moved by" in shown
    assert not place.exists()
    # The directory is free again.
    assert "check" not in certificate(evaluate(*command, run_dir=place))


def test_check_fails_when_other_tokens_are_scored(
    causal: Path, evaluate: Verb, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = scoring.HeldOut.__getitem__

    def short(held_out: scoring.HeldOut, indices: list[int]) -> scoring.ScoringBatch:
        return real(held_out, indices[:3])

    monkeypatch.setattr(scoring.HeldOut, "__getitem__", short)
    monkeypatch.setattr(evaluated, "other_width", lambda cfg: {"batch_size": 3})
    command = [f"model={causal}", *files(text), "context=document", "batch_size=4", "check=true"]
    assert "scored other tokens" in refused(capsys, lambda: evaluate(*command))


@pytest.mark.long
def test_two_devices(masked: Path, evaluate: Verb) -> None:
    """The verb on two processes: the figures are those of one."""
    place = evaluate(f"model={masked}", "trainer=ddp", "trainer.accelerator=cpu", "batch_size=7")
    same(place, masked)


def test_weights_are_not_touched(causal: Path, evaluate: Verb, text: Path) -> None:
    before = load_file(causal / "model" / "model.safetensors")
    files_before = sorted((path, path.stat().st_mtime_ns) for path in causal.rglob("*"))
    evaluate(f"model={causal}", *files(text))
    after = load_file(causal / "model" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted((path, path.stat().st_mtime_ns) for path in causal.rglob("*")) == files_before
