"""Minimal pairs: formats, exact scores of models that are known by hand, refusals, and the command."""

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lmlab.data.pairs import Pair, read_pairs
from lmlab.data.tokenizers import char
from lmlab.errors import UserError
from lmlab.evaluation.metrics import wilson
from lmlab.evaluation.suites import minimal_pairs
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM

from .test_closed_form import Table, bits, halving
from .test_scoring import held_out_of, model_for, prepared, sums_of, tokenizer_named, wordpiece

PAIRS = [
    Pair("abba cab", ("abba bac",), "order"),
    Pair("a", ("b",), "letters"),
    Pair("cabb", ("cabc", "bacc", "cccc"), "letters"),
    Pair("abc", ("acb",), "order"),
    Pair("bb aa bb aa bb", ("bb ba bb",), "letters"),
]
SENTENCES = [sentence for pair in PAIRS for sentence in pair.sentences]


def rows_of(pairs: list[Pair], nll: np.ndarray, counts: np.ndarray, held_out: Any) -> list[dict[str, Any]]:
    return minimal_pairs.table_of(pairs, held_out.documents, nll, counts).to_pylist()


def sentences_of(
    tokenizer: Any, cache: Path, pairs: list[Pair], objective: Any, block_size: int = 64, **keys: Any
) -> Any:
    """The rows of the sentences of pairs, as the suite makes them."""
    texts = [sentence for pair in pairs for sentence in pair.sentences]
    data = prepared(texts, tokenizer, cache, block_size, end_of_text=False)
    held_out = held_out_of(data, objective, block_size, context="document", suite="minimal_pairs", **keys)
    minimal_pairs.check(pairs, held_out)
    return held_out


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_bigram_model(batch_size: int, tmp_path: Path) -> None:
    """Each sentence costs −Σ log2 p(token | the one before it), the first one after the token that opens a text."""
    tokenizer = char(["abc "])
    rows = [halving(len(tokenizer), 7 * i) for i in range(len(tokenizer))]
    model = Table(torch.tensor([[float(p) for p in row] for row in rows], dtype=torch.float64))
    held_out = sentences_of(tokenizer, tmp_path, PAIRS, CausalLM())
    found = rows_of(PAIRS, *sums_of(model, held_out, batch_size), held_out)
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def cost(sentence: str) -> float:
        ids = [opening, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        return math.log(2) * sum(bits(rows[a], b) for a, b in pairwise(ids))

    for pair, row in zip(PAIRS, found, strict=True):
        good, (bad, text) = cost(pair.good), min((cost(text), text) for text in pair.bad)
        assert (row["nll_good"], row["nll_bad"]) == (pytest.approx(good), pytest.approx(bad))
        assert row["score"] == (0.5 if good == pytest.approx(bad) else float(good < bad))
        assert row["bad"] == text
        assert (row["tokens_good"], row["bytes_bad"]) == (len(pair.good), len(text))
    assert {row["score"] for row in found} >= {0, 1}  # or nothing was tested
    parts = minimal_pairs.figures_and_totals(pa.Table.from_pylist(found, minimal_pairs.PairRecords.schema), {})
    assert parts["figures"]["pairs_accuracy"] == sum(row["score"] for row in found) / len(PAIRS)
    order = [row["score"] for row in found if row["phenomenon"] == "order"]
    assert parts["phenomena"]["order"]["figures"]["pairs_accuracy"] == sum(order) / 2


@pytest.mark.parametrize("within_word", [False, True])
def test_a_masked_model(within_word: bool, tmp_path: Path) -> None:
    """The pseudo-log-likelihood of transformers' own logits, a token hidden at a time, or the rest of its word too."""
    tokenizer, model = tokenizer_named("wordpiece"), model_for("wordpiece", "bert")
    pairs = [
        Pair("The cat sat on the mat.", ("The mat cat on the sat.",), "order"),
        Pair("the cats", ("café mat",), "x"),
    ]
    keys = {"score": "pseudo", "within_word": within_word}
    held_out = sentences_of(tokenizer, tmp_path, pairs, MaskedLM(tokenizer), **keys)
    found = rows_of(pairs, *sums_of(model, held_out, 5), held_out)

    def cost(sentence: str) -> float:
        encoded = tokenizer(sentence)
        ids, words, total = torch.tensor(encoded["input_ids"]), encoded.word_ids(), 0.0
        for i, word in enumerate(words):
            if word is not None:
                rest = [j for j in range(i, len(words)) if j == i or (within_word and words[j] == word)]
                hidden = ids.clone()
                hidden[rest] = tokenizer.mask_token_id
                logits = model(hidden[None]).logits[0, i].double()
                total -= float(logits.log_softmax(-1)[ids[i]])
        return total

    with torch.no_grad():
        for pair, row in zip(pairs, found, strict=True):
            assert row["nll_good"] == pytest.approx(cost(pair.good), rel=1e-5)
            assert row["nll_bad"] == pytest.approx(cost(pair.bad[0]), rel=1e-5)


def test_a_tie_counts_half(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sentences of equal tokens, and those to which a model gives the same probability."""
    tokenizer = wordpiece()
    pairs = [Pair("the cat", ("The  CAT",), "x"), Pair("cat the", ("the cat",), "x"), Pair("cat cat", ("the",), "x")]
    model = Table(torch.tensor([[1 / len(tokenizer)] * len(tokenizer)] * len(tokenizer)))
    held_out = sentences_of(tokenizer, tmp_path, pairs, MaskedLM(tokenizer), score="pseudo")
    assert "1 of 3 pairs" in caplog.text
    table = minimal_pairs.table_of(pairs, held_out.documents, *sums_of(model, held_out))
    assert table["score"].to_pylist() == [0.5, 0.5, 0.0]
    totals = minimal_pairs.figures_and_totals(table, {})["totals"]
    assert (totals["ties"], totals["equal_tokens"]) == (2, 1)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],  # the last: Newcombe 1998, table I
)
def test_wilson(successes: float, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


BLIMP = {"sentence_good": "A b.", "sentence_bad": "B a.", "UID": "u", "linguistics_term": "term", "field": "f"}
GROUP = {"good": "A b.", "bad": ["B a.", "A, b."]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("adjuncts.jsonl", lines(BLIMP), Pair("A b.", ("B a.",), "term")),
        ("adjuncts.jsonl.gz", gzip.compress(lines(BLIMP), mtime=0), Pair("A b.", ("B a.",), "term")),
        ("groups.json", json.dumps([GROUP]).encode(), Pair("A b.", ("B a.", "A, b."), "groups")),
        ("t.csv", b"\xef\xbb\xbfgood;bad\nA, b.;B a.\n", Pair("A, b.", ("B a.",), "t")),
        ("t.tsv", b'bad\tgood\tphenomenon\n"B\na."\tA b.\tx\n', Pair("A b.", ("B\na.",), "x")),
        ("agreement-x.txt", b"B a .\r\nA b .\r\n\r\n", Pair("A b .", ("B a .",), "agreement-x")),
    ],
)
def test_formats(name: str, content: bytes, expected: Pair, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_pairs(str(tmp_path / "*")) == [expected]


def test_a_column_of_ones_choice(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([BLIMP]), tmp_path / "a.parquet")
    assert [pair.phenomenon for pair in read_pairs(str(tmp_path / "a.parquet"), "UID")] == ["u"]
    with pytest.raises(UserError, match="row 1: there is no column uid, but sentence_good"):
        read_pairs(str(tmp_path / "a.parquet"), "uid")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            lines({"good": "A.", "worse": "B."}),
            "a.jsonl, line 1: there is no column sentence_bad or bad, but",
        ),
        ("a.jsonl", lines({"good": "A.", "bad": "A."}), "line 1: the sentences of the pair are equal ('A.')"),
        ("a.jsonl", lines({"good": "A.", "bad": ""}), "\"bad\" has to be text, and is ''"),
        ("a.jsonl", lines({"good": "A.", "bad": []}), '"bad" has to be text, and is []'),
        ("a.jsonl", lines(BLIMP | {"linguistics_term": " "}), "\"linguistics_term\" has to be text, and is ' '"),
        ("a.jsonl", b'{"good": "A.",\n', "a.jsonl, line 1: malformed JSON"),
        ("a.json", b'["A", "B"]', "record 1: a record is an object"),
        ("a.csv", b"good,bad\n", "there is no pair in it"),
        ("a.csv", b"good,bad\nA.\n", 'line 2: "bad" has to be text, and is None'),
        ("a.csv", b"good,bad\n\xff,x\n", "line 2: not UTF-8"),
        ("a.txt", b"B a.\nA b.\nB c.\n", "line 3: a sentence without another"),
        ("a.txt", b"", "the data set is empty"),
        ("a.gz", b"x", "files without a suffix are not read"),
        ("a.jsonl.gz", b"x", "not a whole gzip file"),
        ("a.parquet", b"x", "a.parquet: could not be read"),
        ("b.csv", None, "no such file"),
    ],
)
def test_files_that_are_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_pairs(str(tmp_path / name))
    assert said in str(raised.value)
    assert str(raised.value).count("\n") < 3


def test_sentences_that_are_refused(tmp_path: Path) -> None:
    tokenizer = char(["abc"])
    with pytest.raises(UserError, match="a sentence of 27 tokens is longer than the 16 positions of the model"):
        sentences_of(tokenizer, tmp_path, [Pair("abc" * 9, ("a",), "x")], CausalLM(), 16)
    with pytest.raises(UserError, match="is for causal and masked models: masked_perplexity is not"):
        sentences_of(tokenizer, tmp_path, [Pair("ab", ("b",), "x")], MaskedLM(tokenizer), 16)
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(UserError, match='"b" is a single token, and this tokenizer has none that opens a text'):
        sentences_of(tokenizer, tmp_path, [Pair("ab", ("b",), "x")], CausalLM(), 16)
