"""`preprocess=guide` against the guide's own code, block for block (guide, "Preprocess")."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.data import guide_preprocessing
from lmlab.config.files import CONF
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import prepare
from lmlab.data.preprocess import split
from lmlab.data.sources import Corpus, load_sample
from lmlab.data.tokenizers import bpe

from ..conftest import blocks_of

CHOICES = Preprocessing(**OmegaConf.to_container(OmegaConf.load(CONF / "preprocess" / "guide.yaml")))  # type: ignore


def gpt2_like(texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE that adds no special token."""
    tokenizer = bpe(texts, vocab_size=500)
    tokenizer.model_max_length = 96
    return tokenizer


def roberta_like(texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE that puts `<s> … </s>` around each record."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": AddedToken("<mask>", lstrip=True)},
    )


@pytest.fixture(scope="module")
def records() -> Dataset:
    """2,700 questions with 0 to 3 short answers each, put together from the sample's sentences."""
    answers = [text for texts in load_sample().train["answers"] for text in texts["text"]]
    sentences = [sentence for text in answers for sentence in re.split(r"(?<=[.?!]) ", text)]
    draw = random.Random(0)
    rows = []
    for i in range(2700):
        texts = [" ".join(draw.sample(sentences, draw.randint(1, 3))) for _ in range(draw.randint(0, 3))]
        rows.append({"q_id": f"q{i}", "title": "?", "answers": {"text": texts, "score": [1] * len(texts)}})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("make", [gpt2_like, roberta_like])
def test_blocks_and_ledger(
    records: Dataset, make: Callable[[Iterator[str]], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    corpus = Corpus(records, None, "answers.text", "records")
    tokenizer = make(text for answers in records["answers"][:300] for text in answers["text"])
    tokenized, reference = guide_preprocessing(records, tokenizer, block_size=128)
    ours = prepare(corpus, CHOICES, lambda texts: tokenizer, None, tmp_path)

    # The edges of the batches of 1,000 matter: in one go, other blocks come out.
    at_once = list(chain.from_iterable(tokenized["train"]["input_ids"]))
    assert len(tokenized["train"]) > 2000
    assert [at_once[i : i + 128] for i in range(0, len(at_once) - 127, 128)] != reference["train"]["input_ids"][:]

    halves = records.train_test_split(test_size=0.2, seed=0)
    for name, theirs in (("train", "train"), ("validation", "test")):
        assert [block.tolist() for block in blocks_of(ours, name)] == reference[theirs]["input_ids"][:]

        documents = [" ".join(answers["text"]) for answers in halves[theirs]["answers"]]
        whole = sum(len(tokenizer(document, verbose=False)["input_ids"]) for document in documents)
        cut = sum(map(len, tokenized[theirs]["input_ids"]))
        ledger = ours.ledger[name]
        assert ledger.documents == len(documents)
        assert ledger.bytes == sum(len(document.encode()) for document in documents)
        assert ledger.tokens == whole
        assert ledger.tokens_truncated == whole - cut > 0
        assert ledger.tokens_dropped == cut - 128 * len(reference[theirs]) > 0
        assert ledger.blocks == len(reference[theirs])

    if make is roberta_like:
        first = tokenized["train"][0]["input_ids"]
        assert (first[0], first[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(("count", "seed"), [(10, 0), (11, 0), (136, 7), (2700, 0), (2700, 7)])
def test_split(records: Dataset, count: int, seed: int) -> None:
    """The same records on the same side, in the same order; 11 records hold 3 out, not 2."""
    some = records.select(range(count))
    halves = some.train_test_split(test_size=0.2, seed=seed)
    ours = split(Corpus(some, None, "answers.text", "records"), replace(CHOICES, split_seed=seed))
    assert ours.train["q_id"][:] == halves["train"]["q_id"][:]
    assert ours.validation[""]["q_id"][:] == halves["test"]["q_id"][:]


def test_max_records(records: Dataset) -> None:
    """`max_records` is the guide's `[:5000]`: the first ones, taken before the split."""
    ours = split(Corpus(records, None, "answers.text", "records"), replace(CHOICES, max_records=500))
    halves = records.select(range(500)).train_test_split(test_size=0.2, seed=0)
    assert ours.train["q_id"][:] == halves["train"]["q_id"][:]
    assert ours.validation[""]["q_id"][:] == halves["test"]["q_id"][:]
