"""Every figure per document against a brute-force reference in float64 (promise 2)."""

import copy
import logging
import math
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from lmlab.config.held_out import build_held_out
from lmlab.data.datamodule import HeldOutData
from lmlab.data.documents import COUNTS
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared, prepare_validation
from lmlab.data.sampler import EvaluationSampler
from lmlab.data.sources import Corpus
from lmlab.data.tokenizers import bpe, char
from lmlab.errors import UserError
from lmlab.evaluation.metrics import compute_metrics, sum_totals
from lmlab.evaluation.scoring import DocumentSums, HeldOut, Scorer
from lmlab.models.loss import score
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from . import reference

LEARNED = ["The cat sat on the mat, and the other cat sat on the rat.", "No one knows the café's naïve façade.\n\tYes?"]
HARD = [
    "The cat sat on the other mat.",
    "",
    "x",
    "👩‍🚀 at 🏳️‍🌈 👍🏽",
    " \n\t ",
    "e\u0301 and n\u0303o\u0308, Z̷̧̛",
    "",
    "  the  mat,\tand the façade of no one; the rat knows the café\u3000on \u2028the\u00a0mat. Yes?  ",
    "a",
    "你好, مرحبا",
    "\u0301",
]


def wordpiece() -> PreTrainedTokenizerBase:
    """As BERT's: lower case, no accents, white space dropped, unknown words one token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(LEARNED, trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def bare() -> PreTrainedTokenizerBase:
    """No special token at all: nothing to begin or end a text with, or to pad with."""
    letters = sorted(set("".join(LEARNED + HARD)))
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def two_ends() -> PreTrainedTokenizerBase:
    """As BigBird's: an end-of-text token beside the one that separates sentences."""
    tokenizer = char(LEARNED)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    return tokenizer


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerBase:
    made = {
        "bpe": lambda: bpe(LEARNED, vocab_size=290),
        "char": lambda: char(LEARNED),
        "wordpiece": wordpiece,
        "bare": bare,
        "two_ends": two_ends,
    }
    return made[name]()


@cache
def model_for(name: str, architecture: str) -> PreTrainedModel:
    """Random weights far from 0, so that another context is another figure."""
    torch.manual_seed(0)
    tokenizer = tokenizer_named(name)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    if architecture == "gpt2":
        size |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        config = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, **size)
        return AutoModelForCausalLM.from_config(config).eval()
    size |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    size |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 72}
    config = {"roberta": RobertaConfig, "bert": BertConfig}[architecture](**size)
    return AutoModelForMaskedLM.from_config(config).eval()


@cache
def exact(name: str, architecture: str) -> PreTrainedModel:
    """The same model in float64."""
    return copy.deepcopy(model_for(name, architecture)).double()


def prepared(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, cache: Path, block_size: int, end_of_text: bool = True
) -> Prepared:
    """Texts on the way that an evaluation takes them."""
    corpus = Corpus(None, Dataset.from_dict({"text": texts}), "text", repr(texts))
    choices = Preprocessing(block_size=block_size, end_of_text=end_of_text)
    return prepare_validation(corpus, choices, tokenizer, cache)


def held_out_of(data: Any, objective: Any, block_size: int, **choices: Any) -> HeldOut:
    """What is scored, as `lmlab.evaluate` makes it with these keys on its command line."""
    keys = {"context": None, "stride": None, "score": "labels", "within_word": False, "sample": None, "seed": 0}
    apart = choices.get("context") == "apart"  # blocks whose documents do not see one another
    choices |= {"context": "blocks"} if apart else {}
    preprocess = {"block_size": block_size, "drop_remainder_every": None, "end_of_text": True}
    preprocess["document_attention"] = apart
    preprocess |= {"special_tokens": False, "truncation": False}
    return build_held_out(
        OmegaConf.create(keys | choices | {"preprocess": preprocess, "objective": {}}), data, objective
    )


@torch.no_grad()
def sums_of(
    model: PreTrainedModel, held_out: HeldOut, batch_size: int = 4, ranks: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Per document nll [D, 2] and counts [D, 7], added up over ranks."""
    sums = []
    for rank in range(ranks):
        metric = held_out.sums()
        for indices in EvaluationSampler(len(held_out), batch_size, rank, ranks):
            batch = held_out[indices]
            given = batch.input_ids, batch.attention_mask, batch.positions, batch.targets
            metric.update(score(model, *given, document_positions=batch.document_positions).nll, batch)
        sums.append([part.numpy() for part in metric.compute()])
    nll, counts = (np.sum(parts, axis=0) for parts in zip(*sums, strict=True))
    return nll, counts


def agree(sums: tuple[np.ndarray, np.ndarray], wanted: list[reference.Sums]) -> None:
    """Units are the same; nll to the rounding of float32."""
    nll, counts = sums
    np.testing.assert_array_equal(counts, [each.counts for each in wanted])
    expected = np.array([each.nll for each in wanted])
    assert expected.sum() > 0
    np.testing.assert_allclose(nll[:, 0].sum(), expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(nll[:, 0], expected, rtol=1e-5)


CAUSAL = [
    ("blocks", 8, None),
    ("blocks", 50, None),
    ("apart", 8, None),
    ("apart", 50, None),
    ("document", 8, None),
    ("document", 8, 8),
    ("document", 7, 2),
    ("document", 64, None),
    ("sliding", 8, None),
    ("sliding", 9, 1),
    ("sliding", 13, 13),
]


@pytest.mark.parametrize(("context", "block_size", "stride"), CAUSAL)
@pytest.mark.parametrize("name", ["bpe", "char", "wordpiece", "bare"])
def test_causal(name: str, context: str, block_size: int, stride: int | None, tmp_path: Path) -> None:
    tokenizer, ends = tokenizer_named(name), name != "bare"
    data = prepared(HARD, tokenizer, tmp_path, block_size, end_of_text=ends)
    held_out = held_out_of(data, CausalLM(), block_size, context=context, stride=stride)
    documents = reference.tokenized(HARD, tokenizer, ends)
    wanted = reference.causal(exact(name, "gpt2"), tokenizer, documents, context, block_size, stride)
    agree(sums_of(model_for(name, "gpt2"), held_out), wanted)


MASKED = [("roberta", "bpe"), ("roberta", "char"), ("bert", "wordpiece")]


@pytest.mark.parametrize(
    ("context", "block_size"),
    [("blocks", 8), ("blocks", 64), ("apart", 8), ("apart", 64), ("document", 8), ("document", 64)],
)
@pytest.mark.parametrize(("architecture", "name"), MASKED)
def test_masked(architecture: str, name: str, context: str, block_size: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_named(name)
    objective = MaskedLM(tokenizer, mask_probability=0.4)
    data = prepared(HARD, tokenizer, tmp_path, block_size)
    held_out = held_out_of(data, objective, block_size, context=context, seed=3)
    documents = reference.tokenized(HARD, tokenizer)
    model = exact(name, architecture)
    wanted = reference.labelled(model, tokenizer, documents, context, block_size, objective, 3)
    agree(sums_of(model_for(name, architecture), held_out), wanted)


def test_whole_words_of_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_named("char")
    with pytest.raises(UserError, match=r"objective\.whole_word=true would change nothing"):
        held_out_of(prepared(HARD, tokenizer, tmp_path, 8), MaskedLM(tokenizer, whole_word=True), 8)


@pytest.mark.parametrize("within_word", [False, True])
@pytest.mark.parametrize(("context", "block_size"), [("blocks", 8), ("apart", 30), ("document", 8), ("document", 64)])
@pytest.mark.parametrize(("architecture", "name"), MASKED)
def test_pseudo(architecture: str, name: str, context: str, block_size: int, within_word: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_named(name)
    data = prepared(HARD, tokenizer, tmp_path, block_size)
    choices = {"score": "pseudo", "context": context, "within_word": within_word}
    if within_word and name == "char":  # each is a word of its own
        with pytest.raises(UserError, match="would change nothing"):
            held_out_of(data, MaskedLM(tokenizer), block_size, **choices)
        return
    held_out = held_out_of(data, MaskedLM(tokenizer), block_size, **choices)
    documents = reference.tokenized(HARD, tokenizer)
    model = exact(name, architecture)
    wanted = reference.pseudo(model, tokenizer, documents, context, block_size, within_word)
    agree(sums_of(model_for(name, architecture), held_out, batch_size=16), wanted)


def test_the_end_of_text_gives_way_to_the_frame(tmp_path: Path) -> None:
    """A document ends in its frame's token alone, where the end-of-text token is another (BigBird's, Funnel's)."""
    tokenizer = tokenizer_named("two_ends")
    objective = MaskedLM(tokenizer, mask_probability=0.4)
    data = prepared(HARD, tokenizer, tmp_path, 64)
    held_out = held_out_of(data, objective, 64, context="document")
    documents = reference.tokenized(HARD, tokenizer)
    rows = sorted(held_out.rows.row(i).inputs[[0, -2, -1]].tolist() for i in range(len(held_out)))
    assert {(row[0], row[2]) for row in rows} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    assert tokenizer.eos_token_id not in {row[1] for row in rows}
    wanted = reference.labelled(exact("two_ends", "bert"), tokenizer, documents, "document", 64, objective, 0)
    agree(sums_of(model_for("two_ends", "bert"), held_out), wanted)


def test_the_reference_tells_policies_apart() -> None:
    """A context, a stride or a hidden word that were mistaken would move it far beyond the tolerance."""
    causal, masked = exact("bpe", "gpt2"), exact("bpe", "roberta")
    tokenizer = tokenizer_named("bpe")
    documents = reference.tokenized(HARD, tokenizer)
    policies = [("document", 8, None), ("document", 8, 5), ("sliding", 8, None), ("sliding", 8, 5), ("sliding", 9, 4)]
    found = [reference.causal(causal, tokenizer, documents, *policy) for policy in policies]
    found += [reference.pseudo(masked, tokenizer, documents, "document", 8, within) for within in (False, True)]
    found += [reference.pseudo(masked, tokenizer, documents, "document", 9)]
    totals = sorted(math.fsum(each.nll for each in sums) for sums in found)
    assert min(b / a - 1 for a, b in pairwise(totals)) > 1e-4


def trainer(folder: Path, **options: Any) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
def test_the_scorer(architecture: str, batch_size: int, tmp_path: Path) -> None:
    """The whole way through Lightning; a second validation starts from nothing."""
    tokenizer = tokenizer_named("char")
    documents = reference.tokenized(HARD, tokenizer)
    data = prepared(HARD, tokenizer, tmp_path, 8)
    model = exact("char", architecture)
    if architecture == "gpt2":
        held_out = held_out_of(data, CausalLM(), 8, context="sliding", stride=3)
        wanted = reference.causal(model, tokenizer, documents, "sliding", 8, 3)
    else:
        objective = MaskedLM(tokenizer)
        held_out = held_out_of(data, objective, 8, context="document")
        wanted = reference.labelled(model, tokenizer, documents, "document", 8, objective, 0)
    scorer = Scorer(copy.deepcopy(model_for("char", architecture)), DocumentSums(len(data.validation)))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(tmp_path).validate(scorer, HeldOutData(held_out, batch_size), verbose=False)
        agree(scorer.result, wanted)
        assert scorer.sums.nll.numel() == scorer.sums.counts.numel() == 0  # between validations they take no memory


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_sums_are_float64_whatever_the_precision(precision: str, tmp_path: Path) -> None:
    """A trainer in bf16-true casts every module's buffers; sums in 8 bits would stop growing at a few hundred."""
    held_out = held_out_of(prepared(HARD * 8, tokenizer_named("bpe"), tmp_path, 8), CausalLM(), 8, context="document")
    scorer = Scorer(copy.deepcopy(model_for("bpe", "gpt2")), held_out.sums())
    one_row: list[float] = []
    update = scorer.sums.update
    scorer.sums.update = lambda nll, batch: (one_row.extend(nll.double().tolist()), update(nll, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, precision=precision).validate(scorer, HeldOutData(held_out, 3), verbose=False)
    nll, counts = scorer.result
    assert nll.dtype == np.float64
    assert counts[:, 0].sum() == len(one_row)
    assert nll[:, 0].sum() == pytest.approx(math.fsum(one_row), rel=1e-12)


def test_a_block_of_one_token(tmp_path: Path) -> None:
    """A last block of a single token: nothing for a causal model, something for a masked one."""
    tokenizer = tokenizer_named("char")
    texts = ["The cat", "sat"]
    tokens = len("The cat") + len("sat") + 2
    data = prepared(texts, tokenizer, tmp_path, tokens - 1)
    held_out = held_out_of(data, CausalLM(), tokens - 1)
    assert len(held_out) == 1
    assert sums_of(model_for("char", "gpt2"), held_out)[1][:, 0].sum() == tokens - 2
    assert len(held_out_of(data, MaskedLM(tokenizer, mask_probability=1.0), tokens - 1)) == 2


def test_remainders_that_are_dropped_are_not_scored(tmp_path: Path) -> None:
    """The guide's grouping: whole blocks only, and no window for what it loses."""
    tokenizer = tokenizer_named("char")
    corpus = Corpus(None, Dataset.from_dict({"text": HARD}), "text", "dropped")
    data = prepare_validation(corpus, Preprocessing(8, drop_remainder_every=3), tokenizer, tmp_path)
    lengths = [len(tokens) for tokens in reference.tokenized(HARD, tokenizer)]
    groups = [sum(lengths[i : i + 3]) for i in range(0, len(lengths), 3)]
    held_out = held_out_of(data, CausalLM(), 8)
    assert sums_of(model_for("char", "gpt2"), held_out)[1][:, 0].sum() == sum(7 * (size // 8) for size in groups)


def targets_of(held_out: HeldOut, batch_size: int = 4) -> dict[int, tuple[int, int, int]]:
    """Of each scored token of the documents: its document, what is to be predicted and what is shown in its place."""
    documents = held_out.documents
    found = {}
    for indices in EvaluationSampler(len(held_out), batch_size):
        rows = [held_out.rows.row(int(held_out.order[index])) for index in indices]
        batch = held_out[indices]
        shown = batch.input_ids.flatten()[batch.positions].tolist()
        tokens = [int(token) for row in rows for token in row.tokens]
        for token, owner, target, ids in zip(
            tokens, batch.stretches.tolist(), batch.targets.tolist(), shown, strict=True
        ):
            assert token not in found
            assert documents.edges[owner] <= token < documents.edges[owner + 1]
            assert target == documents.tokens[token]
            found[token] = owner, target, ids
    return found


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
def test_masks_do_not_follow_the_blocks(name: str, tmp_path: Path) -> None:
    """The same tokens are hidden, behind the same ones, wherever blocks cut and however batches are made."""
    tokenizer = tokenizer_named(name)
    objective = MaskedLM(tokenizer, mask_probability=0.3, replace_mask=0.5, replace_random=0.4)
    found = []
    for context in ("blocks", "document"):
        for block_size in (3, 8, 13, 200):
            data = prepared(HARD, tokenizer, tmp_path, block_size)
            held_out = held_out_of(data, objective, block_size, context=context)
            found += [targets_of(held_out, batch_size) for batch_size in (1, 4, 100)]
    assert len(found[0]) > 10
    assert len({shown for _, _, shown in found[0].values()} - {tokenizer.mask_token_id}) > 2
    assert all(each == found[0] for each in found)
    assert targets_of(held_out_of(data, objective, 200, seed=1)) != found[0]


def test_masks_do_not_follow_other_documents(tmp_path: Path) -> None:
    """A document's masks hang on its number alone, not on what stands before it; equal documents differ in theirs."""
    tokenizer = tokenizer_named("char")
    objective = MaskedLM(tokenizer, mask_probability=0.3)
    text = "The cat sat on the mat, and the other cat sat on the rat."
    found = {}
    for first in ("x", "No one knows"):
        data = prepared([first, text, text], tokenizer, tmp_path, 16)
        edges = data.validation.edges
        scored = targets_of(held_out_of(data, objective, 16))
        found[first] = [
            {token - edges[document] for token, (owner, _, _) in scored.items() if owner == document}
            for document in (1, 2)
        ]
    assert found["x"] == found["No one knows"]
    assert found["x"][0] != found["x"][1]


def test_a_sample_is_a_part_of_the_whole(tmp_path: Path) -> None:
    """The tokens that are taken do not hang on blocks or context, and each scores as it does among all."""
    tokenizer, model = tokenizer_named("char"), model_for("char", "roberta")
    objective = MaskedLM(tokenizer)
    texts = HARD + LEARNED
    chosen = []
    for context, block_size in (("document", 16), ("document", 64), ("blocks", 16)):
        data = prepared(texts, tokenizer, tmp_path, block_size)
        choices = {"score": "pseudo", "context": context}
        every = set(targets_of(held_out_of(data, objective, block_size, **choices)))
        held_out = held_out_of(data, objective, block_size, sample=0.3, **choices)
        chosen.append(set(targets_of(held_out)))
        assert chosen[-1] < every
        assert 0.15 * len(every) < len(chosen[-1]) < 0.45 * len(every)
        other = set(targets_of(held_out_of(data, objective, block_size, sample=0.3, seed=1, **choices)))
        assert other != chosen[-1]
        edges = data.validation.edges
        documents = np.searchsorted(edges, sorted(chosen[-1]), side="right") - 1
        only = {(int(d), int(t - edges[d])) for d, t in zip(documents, sorted(chosen[-1]), strict=True)}
        tokens = reference.tokenized(texts, tokenizer)
        wanted = reference.pseudo(exact("char", "roberta"), tokenizer, tokens, context, block_size, only=only)
        agree(sums_of(model, held_out, batch_size=7), wanted)
    assert chosen[0] == chosen[1] == chosen[2]


def test_the_standard_error_of_a_sample(tmp_path: Path) -> None:
    """Over many seeds, the figure of a sample is as far from the whole one as it says."""
    tokenizer = tokenizer_named("char")
    text = "".join(LEARNED) * 10
    data = prepared([text, text], tokenizer, tmp_path, 64)
    choices = {"score": "pseudo", "context": "document"}
    every = held_out_of(data, MaskedLM(tokenizer), 64, **choices).rows.tokens
    # Any figures do, if they are skewed as those of a model are.
    each = np.random.default_rng(0).gamma(0.7, 2.0, every.max() + 1)
    whole = each[every].mean()
    scores = []
    for seed in range(300):
        rows = held_out_of(data, MaskedLM(tokenizer), 64, sample=0.6, seed=seed, **choices).rows
        nll = each[rows.tokens]
        counts = np.ones((len(nll), len(COUNTS)), np.int64)
        totals = sum_totals(np.stack([nll, nll**2], axis=1), counts)
        figures = compute_metrics(totals, "pseudo_perplexity", sample=0.6)
        error = figures["nll_per_token_standard_error"]
        np.testing.assert_allclose(figures["pseudo_perplexity_standard_error"], math.exp(nll.mean()) * error)
        scores.append((nll.mean() - whole) / error)
    assert abs(np.mean(scores)) < 4 / math.sqrt(len(scores))
    assert 0.85 < np.std(scores) < 1.15
    assert "nll_per_token_standard_error" not in compute_metrics(totals, "pseudo_perplexity")


def test_within_word_hides_what_is_left_of_a_word(tmp_path: Path) -> None:
    """By hand: of "catsat" in three tokens, the first is predicted with all three hidden, the last with one."""
    tokenizer = tokenizer_named("wordpiece")
    text = "the catsat mat"
    words = tokenizer(text, add_special_tokens=False).word_ids()
    inside = [i for i, word in enumerate(words) if word == 1]
    assert len(inside) > 1
    data = prepared([text], tokenizer, tmp_path, 64)
    hidden = {}
    for within_word in (False, True):
        choices = {"score": "pseudo", "context": "document", "within_word": within_word}
        rows = held_out_of(data, MaskedLM(tokenizer), 64, **choices).rows
        for row in map(rows.row, range(len(rows))):
            places = np.flatnonzero(row.inputs == tokenizer.mask_token_id) - 1
            hidden[within_word, int(row.tokens[0])] = places.tolist()
    for place, word in enumerate(words):
        assert hidden[False, place] == [place]
        assert hidden[True, place] == [i for i in range(place, len(words)) if words[i] == word]


def test_padding_is_masked_where_no_token_is_for_it(tmp_path: Path) -> None:
    """A tokenizer without a padding token pads with a real one; attention must not see it."""
    data = prepared(["a cat", "the other cat sat on the mat"], tokenizer_named("bare"), tmp_path, 64, end_of_text=False)
    held_out = held_out_of(data, CausalLM(), 64, context="document")
    batch = held_out[[0, 1]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [27, 4]
    assert held_out[[1]].attention_mask is None


def test_a_rank_without_rows(tmp_path: Path) -> None:
    """More ranks than rows: the dry ones run the model all the same, and count nothing."""
    data = prepared(["the cat"], tokenizer_named("char"), tmp_path, 64)
    held_out = held_out_of(data, CausalLM(), 64, context="document")
    batch = held_out[[]]
    assert batch.input_ids.shape == (1, len("the cat") + 1)
    assert {len(part) for part in batch[2:] if part is not None} == {0}
    one, three = (sums_of(model_for("char", "gpt2"), held_out, 1, ranks) for ranks in (1, 3))
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1], three[1])
