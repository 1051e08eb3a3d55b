"""Blocks lose nothing by default, the ledger adds up, and the cache is keyed by all that went in."""

import json
import multiprocessing
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmlab.data import prepared as prepared_data
from lmlab.data import preprocess
from lmlab.data import texts as from_records
from lmlab.data.blocks import write_split
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared, prepare, prepare_validation
from lmlab.data.preprocess import group_texts, lengths_of, split
from lmlab.data.sources import Corpus, load_files
from lmlab.data.texts import flatten
from lmlab.data.tokenizers import bpe, char
from lmlab.data.tokens import DocumentEdges, FlatFile, FlatFiles
from lmlab.errors import UserError

from ..conftest import TINY, blocks_of

HARD = [
    "plain words",
    "a <mask> b<|endoftext|> spelled out <pad>",
    "",
    "emoji 👩‍🚀 🏳️‍🌈 👍🏽",
    "combining e\u0301 is not é, Zalgo Z̷̧̛",
    "CRLF\r\nthen CR\rthen LF\n",
    "",
    "  spaces  at the ends,\ttabs\t ",
    "\ufeffmark, nul \x00, no-break\u00a0space, separator\u2028",
    "नमस्ते, 你好, مرحبا",
    "\n",
    "",
]


def corpus_of(texts: list, validation: list | None = None, fingerprint: str = "texts", path: str = "text") -> Corpus:
    held_out = None if validation is None else Dataset.from_dict({"text": validation})
    return Corpus(Dataset.from_dict({"text": texts}), held_out, path, fingerprint)


def random_texts(draw: random.Random, count: int) -> list[str]:
    """Texts of 0 to 60 characters from all of Unicode; surrogates are no characters."""
    planes = [range(128), range(0x20, 0x250), range(0x300, 0x370), range(0x10000), range(0x1F300, 0x1FAFF)]
    points = [[point for point in plane if not 0xD800 <= point < 0xE000] for plane in planes]
    return ["".join(chr(draw.choice(draw.choice(points))) for _ in range(draw.randint(0, 60))) for _ in range(count)]


def documents(blocks: Iterable[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All blocks end to end, cut after each end-of-text token and decoded."""
    ids = np.concatenate(list(blocks))
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe(HARD, vocab_size=300)


@pytest.fixture
def run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Prepared]:
    """`prepare` with the tokenizer of this file and one cache per test."""

    def run(corpus: Corpus, tokenizer: PreTrainedTokenizerBase = tokenizer, **choices: Any) -> Prepared:
        choices = {"block_size": 8} | choices
        return prepare(corpus, Preprocessing(**choices), lambda texts: tokenizer, None, tmp_path)

    return run


# --- Nothing is lost ---


@pytest.mark.parametrize("block_size", [2, 7, 64, 10_000])
def test_lossless(run: Callable[..., Prepared], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Every document comes back byte for byte, with an end-of-text token after each."""
    draw = random.Random(block_size)
    parts = {"train": HARD + random_texts(draw, 200), "validation": random_texts(draw, 50) + HARD}
    prepared = run(corpus_of(parts["train"], parts["validation"]), block_size=block_size)
    for name, texts in parts.items():
        blocks, ledger = blocks_of(prepared, name), prepared.ledger[name]
        # An empty document has nothing to end.
        wanted = [text + tokenizer.eos_token for text in texts if text]
        assert [text.encode() for text in documents(blocks, tokenizer)] == [text.encode() for text in wanted]
        lengths = [len(block) for block in blocks]
        assert set(lengths[:-1]) <= {block_size}
        assert 1 <= lengths[-1] <= block_size
        assert (ledger.records, ledger.records_without_text, ledger.documents) == (len(texts), 0, len(texts))
        assert ledger.bytes == sum(len(text.encode()) for text in texts)
        assert (ledger.tokens, ledger.blocks) == (sum(lengths), len(lengths))
        assert ledger.tokens_dropped == ledger.tokens_truncated == 0


def test_ledger(run: Callable[..., Prepared]) -> None:
    """tokens = in blocks + dropped + truncated, whatever the choices; each counted here on its own."""
    draw = random.Random(0)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", model_max_length=9)
    losses = set()
    for _ in range(40):
        texts = [["x y é 👍 " * draw.randint(0, 4) for _ in range(draw.randint(0, 3))] for _ in range(30)]
        texts.append(["enough to fill a block"] * 3)
        choices = {
            "block_size": draw.randint(2, 9),
            "join": draw.choice([None, " "]),
            "end_of_text": draw.random() < 0.5,
            "special_tokens": draw.random() < 0.5,
            "truncation": draw.random() < 0.5,
            "drop_remainder_every": draw.choice([None, 1, 4, 1000]),
        }
        prepared = run(corpus_of(texts, texts, f"{texts}"), tokenizer, **choices)
        ledger = prepared.ledger["train"]
        in_blocks = sum(map(len, prepared.train))
        joined = [text for row in texts for text in row] if choices["join"] is None else [" ".join(r) for r in texts]
        counts = [len(text.split()) + 2 * choices["special_tokens"] for text in joined]
        kept = [min(count, 9) if choices["truncation"] else count for count in counts]
        ends = sum(count > 0 for count in counts) if choices["end_of_text"] else 0
        assert (ledger.records, ledger.records_without_text) == (len(texts), sum(not row for row in texts))
        assert ledger.documents == len(joined)
        assert ledger.bytes == sum(len(text.encode()) for text in joined)
        assert ledger.tokens == sum(counts) + ends
        assert ledger.tokens_truncated == sum(counts) - sum(kept)
        assert ledger.tokens == in_blocks + ledger.tokens_dropped + ledger.tokens_truncated
        assert ledger.blocks == len(prepared.train)
        losses.add((ledger.tokens_dropped > 0, ledger.tokens_truncated > 0))
    assert losses == {(a, b) for a in (False, True) for b in (False, True)}


def test_end_of_text_id(run: Callable[..., Prepared]) -> None:
    """The end-of-text token is eos, or sep where there is none; without either the choice is refused."""

    def last(**special: str) -> int:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "[SEP]": 1, "</s>": 2}, "<unk>")), **special
        )
        return int(run(corpus_of(["a"], ["a"]), tokenizer).train[0][-1])

    assert last(sep_token="[SEP]") == 1
    assert last(sep_token="[SEP]", eos_token="</s>") == 2
    with pytest.raises(UserError, match=r"preprocess\.end_of_text=false"):
        last()


def test_calls_of_the_tokenizer(
    run: Callable[..., Prepared], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many documents go into one call changes nothing."""
    texts = random_texts(random.Random(0), 50)
    whole = np.concatenate(list(run(corpus_of(texts, texts)).train))
    monkeypatch.setattr(preprocess, "DOCUMENTS_PER_CALL", 7)
    again = run(corpus_of(texts, texts, "another")).train
    np.testing.assert_array_equal(np.concatenate(list(again)), whole)


# --- What gives reason to doubt a metric ---


def test_records_without_a_text(run: Callable[..., Prepared]) -> None:
    """Null, missing, or no text in a list; an empty text is a text. More than one in a hundred is worth a word."""
    rows: list[dict] = [{"text": ""}, *({"text": f"number {i}"} for i in range(199))]
    for without, doubts in (
        ([{}, {"text": None}], []),
        ([{}, {"text": None}, {"a": 1}], ["3 of the 203 train records"]),
    ):
        corpus = Corpus(Dataset.from_list([*rows, *without]), Dataset.from_list(rows), "text", f"{without}")
        ledger = run(corpus).ledger["train"]
        counts = (ledger.records, ledger.records_without_text, ledger.documents)
        assert counts == (200 + len(without), len(without), 200)
        wanted = [f"{doubt} have no text at data.text: it is null or missing, or an empty list." for doubt in doubts]
        assert list(ledger.doubts("train")) == wanted
    lists = Dataset.from_dict({"a": [{"text": ["x", "y"]}, {"text": []}, None, {"text": [None]}, {"text": [None, ""]}]})
    ledger = run(Corpus(lists, lists, "a.text", "lists")).ledger["validation"]
    assert (ledger.records, ledger.records_without_text, ledger.documents) == (5, 3, 3)
    for join in (None, " "):
        with pytest.raises(UserError, match=r"none of the 2 train records has a text.*\n.*data\.text="):
            run(Corpus(lists.select([1, 2]), lists, "a.text", f"none {join}"), join=join)


@pytest.mark.parametrize("join", [None, "\n"])
def test_documents_in_the_training_text(run: Callable[..., Prepared], join: str | None) -> None:
    """Whole documents, as the choices make them of records; whatever the source, and also where it has no split."""
    texts = [f"a text of its own, and not too short, with the number {i} in it" for i in range(300)]
    known = [f"Before. {texts[0]} After.", texts[1], texts[2][:-1] + "~"]
    corpus = corpus_of([[text] for text in [*known, *texts[100:]]], [[text] for text in texts[:100]], f"{join}")
    ledger = run(corpus, join=join).ledger
    assert (ledger["train"].documents_in_training, ledger["validation"].documents_in_training) == (None, 2)
    assert not list(ledger["train"].doubts("train"))
    assert [*ledger["validation"].doubts("validation")] == [
        "2 of the 100 validation documents occur whole in the training text, which flatters the metric. "
        "Leave them out of one of the two."
    ]
    twice = run(corpus_of([[text] for text in texts * 2], None, f"twice {join}"), join=join).ledger["validation"]
    assert 40 < twice.documents_in_training < twice.documents == 60  # some have their like in the same split
    # Joined, the texts of a record are one document.
    corpus = corpus_of([texts[:2]], [texts[1:3], texts[:2], texts[:1]], f"pairs {join}")
    assert run(corpus, join=join).ledger["validation"].documents_in_training == (4 if join is None else 2)


def test_commands_say_it(
    train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for a run, and for an evaluation what concerns it; and the run's ledger keeps it."""
    rows = [{"text": f"a text of its own, and not too short, with the number {i} in it"} for i in range(60)]
    for name, part in (("train", rows), ("held", [*rows[:1], *rows[40:], {"text": None}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    held_out = ["data=files", f"data.validation={tmp_path}/held.jsonl"]
    run = train(*TINY, *held_out, f"data.train={tmp_path}/train.jsonl")
    said, alike = "1 of the 22 validation records have no text", "21 of the 21 validation documents occur whole"
    shown = capsys.readouterr().out
    assert (shown.count(said), shown.count(alike)) == (1, 1)
    assert (run / "train.log").read_text().count(alike) == 1
    ledger = json.loads((run / "ledger.json").read_text())
    assert (ledger["train"]["documents_in_training"], ledger["train"]["records_without_text"]) == (None, 0)
    assert (
        ledger["validation"].items() >= {"documents_in_training": 21, "records": 22, "records_without_text": 1}.items()
    )
    evaluate(f"model={run}", *held_out)
    shown = "".join(capsys.readouterr())
    assert (shown.count(said), shown.count(alike)) == (1, 0)


# --- Blocks ---


def naive(lengths: list[int], block_size: int, every: int | None) -> tuple[list[list[int]], int]:
    """The guide's `group_texts` on lists, tokens numbered through; and how many it drops."""
    tokens = iter(range(sum(lengths)))
    rows = [[next(tokens) for _ in range(length)] for length in lengths]
    if every is None:
        all_tokens = [token for row in rows for token in row]
        return [all_tokens[i : i + block_size] for i in range(0, len(all_tokens), block_size)], 0
    blocks, dropped = [], 0
    for start in range(0, len(rows), every):
        group = [token for row in rows[start : start + every] for token in row]
        total = len(group) // block_size * block_size
        blocks += [group[i : i + block_size] for i in range(0, total, block_size)]
        dropped += len(group) - total
    return blocks, dropped


def test_group_texts() -> None:
    draw = random.Random(0)
    cases: list[tuple[list[int], int, int | None]] = [
        ([], 4, None),
        ([], 4, 3),
        ([0], 4, None),
        ([0, 0, 0], 4, 2),
        ([3], 4, 1),
        ([4], 4, 1),
        ([4, 4], 4, None),
        ([9], 4, None),
        ([9, 0], 4, 1),
        ([5, 5, 5], 4, 3),
        ([5, 5, 5], 4, 4),
    ]
    for _ in range(500):
        lengths = [draw.choice([0, 1, draw.randint(0, 30)]) for _ in range(draw.randint(0, 12))]
        cases.append((lengths, draw.randint(2, 12), draw.choice([None, 1, 2, 3, len(lengths) or 1, 100])))
    for lengths, block_size, every in cases:
        made = group_texts(np.array(lengths, np.int64), block_size, every)
        bounds = np.asarray(made)
        assert (len(made), [*map(tuple, made)]) == (len(bounds), [*map(tuple, bounds.tolist())])
        assert lengths_of(made).tolist() == sorted({*(bounds[:, 1] - bounds[:, 0]).tolist()}) if len(made) else True
        assert (bounds.dtype, bounds.shape[1:]) == (np.int64, (2,))
        blocks, dropped = naive(lengths, block_size, every)
        assert [list(range(*bound)) for bound in bounds.tolist()] == blocks, (lengths, block_size, every)
        assert sum(lengths) - (bounds[:, 1] - bounds[:, 0]).sum() == dropped


def test_blocks_pickle_by_path(run: Callable[..., Prepared]) -> None:
    """int32 slices of a file; what travels to a worker is its path and the number of its tokens."""
    blocks = run(corpus_of(["some words to fill the blocks"] * 2000, ["x"]), block_size=128).train
    assert blocks[0].dtype == np.int32
    sent = pickle.dumps(blocks)
    assert 2 * len(blocks.tokens) > 20 * len(sent)
    received = pickle.loads(sent)
    assert len(received) == len(blocks) == len(blocks.bounds)
    for one, other in zip(received, blocks, strict=True):
        np.testing.assert_array_equal(one, other)


# --- Records to documents ---


def test_flatten_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled records of a file, which let go of what was read; those in memory are not copied."""
    monkeypatch.setattr(from_records, "RECORDS_AT_ONCE", 7)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"a": {"b": [f"{i}", "x"]}, "c": i}) + "\n" for i in range(100)))
    records = load_files(str(file)).train
    shuffled = records.train_test_split(test_size=20, seed=3)["train"]
    assert list(flatten(shuffled, "a.b")) == [[f"{i}", "x"] for i in shuffled["c"]]
    for some in ([*range(49), *range(51, 100)], range(0, 100, 7), [5, 5, 6, 4, 99, 0]):
        assert list(flatten(records.select(some), "a.b")) == [[f"{i}", "x"] for i in some]
    for kept, files in ((shuffled, 1), (records.select(range(9, 20)), 1), (concatenate_datasets([records] * 2), 2)):
        again, mappings = from_records.map_files(kept)
        assert again[:] == kept[:]
        assert len(mappings) == files
    for other in (Dataset.from_dict({"text": ["a"]}), records.flatten()):
        again, mappings = from_records.map_files(other)
        assert again is other
        assert mappings == []


def test_flatten() -> None:
    """A struct of lists, a list of structs, a flattened column and one plain list hold the same texts."""
    texts = [[f"answer {i}.{j}" for j in range(i % 4)] for i in range(2500)]
    struct_of_lists = Dataset.from_list([{"answers": {"text": row, "score": [1] * len(row)}} for row in texts])
    list_of_structs = Dataset.from_list([{"answers": [{"text": text, "score": 1} for text in row]} for row in texts])
    deep = Dataset.from_list([{"a": {"b": [{"c": [text]} for text in row]}} for row in texts])
    assert "answers.text" in struct_of_lists.flatten().column_names
    assert list(flatten(struct_of_lists, "answers.text")) == texts
    assert list(flatten(list_of_structs, "answers.text")) == texts
    assert list(flatten(struct_of_lists.flatten(), "answers.text")) == texts
    assert list(flatten(deep, "a.b.c")) == texts
    assert list(flatten(Dataset.from_dict({"answers": texts}), "answers")) == texts
    # A missing text is no document; an empty one is.
    assert list(flatten(Dataset.from_dict({"text": ["a", None, ""]}), "text")) == [["a"], [], [""]]


@pytest.mark.parametrize("path", ["answers.txt", "answer.text", "answers", "answers.text.x", "answers.score"])
def test_flatten_finds_no_text(path: str) -> None:
    """A wrong path is refused, and where the texts are is said."""
    records = Dataset.from_list([{"answers": {"text": ["a"], "score": [1]}}])
    with pytest.raises(UserError, match=r"Texts are at: answers\.text\.$"):
        list(flatten(records, path))


def test_join(run: Callable[..., Prepared], tokenizer: PreTrainedTokenizerBase) -> None:
    records = [["one", "two"], [], ["three"], ["", "four"]]
    apart = run(corpus_of(records, records), join=None)
    assert documents(apart.train, tokenizer) == [f"{text}<|endoftext|>" for text in ("one", "two", "three", "four")]
    assert apart.ledger["train"].documents == 5
    joined = run(corpus_of(records, records), join=" + ")
    assert documents(joined.train, tokenizer) == [f"{x}<|endoftext|>" for x in ("one + two", "three", " + four")]
    assert joined.ledger["train"].documents == 4


# --- The split ---


def test_split_shares_no_record() -> None:
    texts = [str(i) for i in range(100)]
    parts = split(corpus_of(texts), Preprocessing(test_size=0.2))
    assert len(parts.validation[""]) == 20
    assert sorted([*parts.train["text"], *parts.validation[""]["text"]]) == sorted(texts)
    same = split(corpus_of(texts), Preprocessing(test_size=0.2))
    other = split(corpus_of(texts), Preprocessing(test_size=0.2, split_seed=1))
    assert parts.validation[""]["text"][:] == same.validation[""]["text"][:]
    assert parts.validation[""]["text"][:] != other.validation[""]["text"][:]


def test_max_records() -> None:
    """Counts the training records, before a part of them is held out; a validation split stays whole."""
    texts = [str(i) for i in range(100)]
    parts = split(corpus_of(texts), Preprocessing(max_records=10, test_size=0.2))
    assert sorted([*parts.train["text"], *parts.validation[""]["text"]]) == texts[:10]
    parts = split(corpus_of(texts, texts), Preprocessing(max_records=10))
    assert parts.train["text"][:] == texts[:10]
    assert parts.validation[""]["text"][:] == texts
    assert len(split(corpus_of(texts, texts), Preprocessing(max_records=1000)).train) == 100


def test_split_by_hash() -> None:
    """Each text alone decides its side: more data, or data in another order, moves none from one to the other."""
    texts = [f"text {i}" for i in range(2000)]
    choices = Preprocessing(split_by="hash", test_size=0.1)
    parts, grown = (
        split(corpus_of(texts), choices),
        split(corpus_of(texts[::-1] + [f"new {i}" for i in texts]), choices),
    )
    held_out, later = {*parts.validation[""]["text"]}, {*grown.validation[""]["text"]}
    assert 150 < len(held_out) < 250
    assert held_out == later & {*texts}
    assert [*parts.train["text"]] == [text for text in texts if text not in held_out]
    assert [*parts.validation[""]["text"]] != sorted(held_out)  # those of the least hashes come first
    other = split(corpus_of(texts), replace(choices, split_seed=1))
    assert len(held_out & {*other.validation[""]["text"]}) < 50


@pytest.mark.parametrize("by", ["hash", "shuffle"])
def test_held_out_text_is_limited(by: str, run: Callable[..., Prepared]) -> None:
    """Records over `max_test_bytes` are neither trained on nor scored, and the ledger counts them."""
    texts = [f"text number {i:05}" for i in range(2000)]
    whole = split(corpus_of(texts), Preprocessing(split_by=by))
    few = split(corpus_of(texts), Preprocessing(split_by=by, max_test_bytes=17 * 20 + 16))
    assert few.train["text"][:] == whole.train["text"][:]
    assert few.validation[""]["text"][:] == whole.validation[""]["text"][:20]
    assert few.unused == len(whole.validation[""]) - 20
    assert len(split(corpus_of(texts), Preprocessing(split_by=by, max_test_bytes=1)).validation[""]) == 1
    ledger = run(corpus_of(texts), split_by=by, max_test_bytes=340).ledger["validation"]
    assert (ledger.records, ledger.bytes, ledger.records_unused) == (20, 340, few.unused)
    assert any("Lower preprocess.test_size" in doubt for doubt in ledger.doubts("validation"))


@pytest.mark.parametrize(("count", "test_size", "held_out"), [(2, 0.9, 1), (3, 0.99, 2), (2, 0.5, 1), (7, 0.1, 1)])
def test_split_of_few(count: int, test_size: float, held_out: int) -> None:
    parts = split(corpus_of(["a"] * count), Preprocessing(test_size=test_size))
    assert (len(parts.train), len(parts.validation[""])) == (count - held_out, held_out)


def test_nothing_to_train_or_measure_on(run: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match="data set is empty"):
        run(corpus_of([]))
    with pytest.raises(UserError, match="validation split is empty"):
        run(corpus_of(["a"] * 4))
    with pytest.raises(UserError, match="train split gives no token: its 2 texts are empty"):
        run(corpus_of(["", ""], ["a"]))
    with pytest.raises(UserError, match="validation split gives no block"):
        run(corpus_of(["some words"] * 9, ["a"]), drop_remainder_every=9)


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_size", 1), ("test_size", 0), ("test_size", 1), ("drop_remainder_every", 0), ("max_records", 0)],
)
def test_senseless_choices(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        Preprocessing(**{key: value})


# --- The tokenizer ---


def test_tokenizer_sees_only_the_training_split(tmp_path: Path) -> None:
    """A character that only validation holds is unknown; no validation text reaches the training."""
    texts = [f"number {i}" for i in range(50)]
    seen: list[str] = []

    def make(texts: Iterable[str]) -> PreTrainedTokenizerBase:
        seen.extend(texts)
        return char(seen)

    choices = Preprocessing(test_size=0.2)
    prepare(corpus_of(texts), choices, make, {"kind": "char"}, tmp_path)
    parts = split(corpus_of(texts), choices)
    assert seen == parts.train["text"][:]
    assert not {*seen} & {*parts.validation[""]["text"]}

    prepared = prepare(corpus_of(["abc"], ["abcd"], "abc"), choices, char, {"kind": "char"}, tmp_path)
    ids = prepared.validation.tokens.tolist()
    assert ids[3] == prepared.tokenizer.unk_token_id
    assert prepared.tokenizer.unk_token_id not in ids[:3]


# --- The cache ---

OTHER = {
    "block_size": 16,
    "join": " ",
    "end_of_text": False,
    "special_tokens": True,
    "truncation": True,
    "packing": "best_fit",
    "drop_remainder_every": 2,
    "document_attention": True,
    "test_size": 0.3,
    "split_by": "hash",
    "split_seed": 1,
    "max_test_bytes": 50,
    "max_records": 50,
}
"""Another value for each choice."""
CUTS = {"block_size", "packing", "drop_remainder_every", "document_attention"}
"""Those that decide how tokens are cut into blocks, and what these see, and nothing else."""
DUPLICATES = {"decontaminate", "similarity", "benchmarks"}
"""Those that decide which documents are left out, see test_duplicates.py."""


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


def never(*args: Any) -> Any:
    raise AssertionError("made again")


def test_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is read, and is what was written: no tokenizer trained, no text tokenized."""
    texts = random_texts(random.Random(0), 100)
    first = prepare(corpus_of(texts), Preprocessing(block_size=8), bpe, {"kind": "bpe"}, tmp_path)
    kept = entries(tmp_path)
    monkeypatch.setattr("lmlab.data.blocks.tokenize", never)
    second = prepare(corpus_of(texts), Preprocessing(block_size=8), never, {"kind": "bpe"}, tmp_path)
    assert entries(tmp_path) == kept
    assert second.ledger == first.ledger
    assert second.tokenizer_hash == first.tokenizer_hash
    for name in ("train", "validation"):
        ours, theirs = blocks_of(second, name), blocks_of(first, name)
        assert [block.tolist() for block in ours] == [block.tolist() for block in theirs]
    assert (second.validation.names, second.validation.hash) == (first.validation.names, first.validation.hash)
    np.testing.assert_array_equal(second.validation.spans, first.validation.spans)


def test_key_of_tokens(run: Callable[..., Prepared], tmp_path: Path) -> None:
    """Every choice that decides the tokens, the data, the path of the text and the tokenizer make entries of their own.

    One entry holds one split, and one more what the two have in common, which no tokenizer changes.
    """
    assert OTHER.keys() | DUPLICATES == {field.name for field in fields(Preprocessing)}
    defaults = asdict(Preprocessing(block_size=8))
    assert all(value != defaults[key] for key, value in OTHER.items())
    texts = [f"number {i}" for i in range(100)]
    run(corpus_of(texts))
    # How the tokens are cut is decided when they are read.
    for cut in CUTS:
        run(corpus_of(texts), **{cut: OTHER[cut]})
        assert len(entries(tmp_path)) == 3

    def entry(key: str) -> None:
        run(corpus_of(texts), **{key: OTHER[key]})

    both = {key: partial(entry, key) for key in ("join", "test_size", "split_by", "split_seed", "max_records")}
    both["data"] = lambda: run(corpus_of(texts, fingerprint="changed"))
    both["text"] = lambda: run(Corpus(Dataset.from_dict({"other": texts}), None, "other", "texts"))
    tokens = {key: partial(entry, key) for key in OTHER.keys() - CUTS - both.keys()}
    tokens["tokenizer"] = lambda: run(corpus_of(texts), bpe(texts, vocab_size=260))
    for calls, made in ((both, 3), (tokens, 2)):
        for name, call in calls.items():
            before = entries(tmp_path)
            call()
            assert len(entries(tmp_path) - before) == made, name


@pytest.mark.parametrize("files", [1, 3])
def test_documents_of_a_block(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths are, of which a few edges are kept: against all edges at once."""
    monkeypatch.setattr("lmlab.data.tokens.STRIDE", 4)
    draw = np.random.default_rng(0)
    lengths = draw.choice([0, 0, 1, 2, 3, 50], 1000)
    flat = []
    for number, part in enumerate(np.array_split(lengths, files)):
        part.astype(np.int64).tofile(tmp_path / f"{number}.lengths")
        flat.append(FlatFile(tmp_path / f"{number}.lengths", "int64"))
    edges, document = DocumentEdges(FlatFiles(*flat)), np.repeat(np.arange(1000), lengths)
    for start in draw.integers(0, len(document) - 1, 300).tolist():
        end = min(start + int(draw.integers(1, 200)), len(document))
        assert edges.within(start, end).tolist() == np.unique(document[start:end], return_counts=True)[1].tolist()
    assert len(edges.edges) < 300


@pytest.mark.parametrize("packing", ["concatenated", "best_fit"])
def test_blocks_name_their_documents_where_these_are_kept_apart(packing: str, run: Callable[..., Prepared]) -> None:
    texts = random_texts(random.Random(0), 100)
    across, apart = (
        run(corpus_of(texts), block_size=16, document_attention=each, packing=packing) for each in (False, True)
    )
    assert across.train.documents(0) is None
    for number, block in enumerate(blocks_of(apart, "train")):
        ends = np.flatnonzero(block == apart.tokenizer.eos_token_id) + 1
        assert np.cumsum(apart.train.documents(number)).tolist() == sorted({*ends.tolist(), len(block)})


def test_another_cut_of_what_is_kept(
    run: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks cut from a cache that another block size filled are those that would be made afresh."""
    texts = random_texts(random.Random(0), 100)
    run(corpus_of(texts), block_size=64)
    monkeypatch.setattr("lmlab.data.blocks.tokenize", never)
    for block_size, every in ((2, None), (7, None), (7, 3), (10_000, None)):
        prepared = run(corpus_of(texts), block_size=block_size, drop_remainder_every=every)
        for name in ("train", "validation"):
            train, validation = prepared.train.tokens, prepared.validation.tokens
            tokens = train.part(0, len(train)) if name == "train" else validation
            lengths = np.fromfile(next(tmp_path.glob(f"*/{name}.lengths")), np.int64)
            wanted, dropped = naive(lengths.tolist(), block_size, every)
            assert [block.tolist() for block in blocks_of(prepared, name)] == [tokens[b].tolist() for b in wanted]
            ledger = prepared.ledger[name]
            assert (ledger.blocks, ledger.tokens_dropped) == (len(wanted), dropped)
            assert ledger.tokens == len(tokens) == lengths.sum()


def test_an_evaluation_reads_what_a_run_kept(
    run: Callable[..., Prepared], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out part alone: that of the run, from its cache; or all there is, where there is nothing to train on."""
    texts = random_texts(random.Random(0), 100)
    whole = run(corpus_of(texts))
    kept = entries(tmp_path)
    choices = Preprocessing(block_size=8)
    with monkeypatch.context() as patched:
        patched.setattr("lmlab.data.blocks.tokenize", never)
        part = prepare_validation(corpus_of(texts), choices, tokenizer, tmp_path)
    assert entries(tmp_path) == kept
    assert part.train is None
    # It does not read the training text, so it can't say what of it is held out.
    assert part.ledger == {"validation": replace(whole.ledger["validation"], documents_in_training=None)}
    assert (part.validation.names, part.validation.hash) == (whole.validation.names, whole.validation.hash)
    np.testing.assert_array_equal(part.validation.tokens, whole.validation.tokens)
    np.testing.assert_array_equal(part.bounds, whole.bounds)

    alone = Corpus(None, Dataset.from_dict({"text": texts}), "text", "alone")
    part = prepare_validation(alone, choices, tokenizer, tmp_path)
    assert documents(blocks_of(part, "validation"), tokenizer) == [f"{text}<|endoftext|>" for text in texts if text]


def test_key_of_tokenizers(tmp_path: Path) -> None:
    """A trained tokenizer is kept by its settings and its training split; the other choices do not move it."""
    texts = [f"number {i}" for i in range(100)]

    def kept(corpus: Corpus, key: Any, **choices: Any) -> int:
        prepare(corpus, Preprocessing(**choices), lambda texts: bpe(texts, key["vocab_size"]), key, tmp_path)
        return sum(name.startswith("tokenizer-") for name in entries(tmp_path))

    key = {"vocab_size": 260}
    assert kept(corpus_of(texts), key) == 1
    assert kept(corpus_of(texts), key, block_size=4, end_of_text=False) == 1
    assert kept(corpus_of(texts), {"vocab_size": 261}) == 2
    assert kept(corpus_of(texts, fingerprint="changed"), key) == 3
    for number, choice in enumerate(("test_size", "split_by", "split_seed", "max_records"), 4):
        assert kept(corpus_of(texts), key, **{choice: OTHER[choice]}) == number


def test_writer_that_fails(run: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an entry is never kept, and the next writer starts afresh."""
    texts = random_texts(random.Random(0), 100)
    real = preprocess.tokenize

    def halfway(*args: Any) -> Iterator:
        rows = real(*args)
        yield from (next(rows) for _ in range(10))
        raise OSError("disk full")

    monkeypatch.setattr("lmlab.data.blocks.tokenize", halfway)
    with pytest.raises(OSError, match="disk full"):
        run(corpus_of(texts))
    assert entries(tmp_path) == set()
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        prepare(corpus_of(texts), Preprocessing(), lambda texts: 1 / 0, {"kind": "bpe"}, tmp_path)  # type: ignore
    assert entries(tmp_path) == set()
    made = run(corpus_of(texts))
    assert made.ledger["train"].documents == 90


def test_what_is_on_disk(run: Callable[..., Prepared], tmp_path: Path) -> None:
    """Every byte: an id is 2, a held-out one 4, a length 8, its span 20; no mask and no label, which are implied."""
    draw = random.Random(0)
    prepared = run(corpus_of(random_texts(draw, 100), random_texts(draw, 50)))
    assert prepared.train[0].dtype == prepared.validation.tokens.dtype == np.int32
    for name, size, tokens in (("train", 2, prepared.train.tokens), ("validation", 4, prepared.validation.tokens)):
        (folder,) = tmp_path.glob(f"*/{name}.tokens")
        files = {path.name.removeprefix(f"{name}."): path for path in folder.parent.iterdir()}
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        wanted = {"tokens": size * len(tokens), "lengths": 8 * prepared.ledger[name].documents}
        if name == "validation":
            wanted["spans"] = 20 * len(tokens)
            assert pq.read_schema(files.pop("documents.parquet")).names == ["digest", "start", "cuts", "starts"]
            assert files.pop("hash").read_text() == prepared.validation.hash
            assert files.pop("stretches.arrow").is_file()
        assert json.loads(files["counts.json"].read_text()).keys() <= {"dtype", *asdict(prepared.ledger[name])}
        assert files.keys() == {*wanted, "counts.json"}
        assert {kind: sizes[kind] for kind in wanted} == wanted


@pytest.mark.parametrize("name", ["train", "validation"])
def test_memory_is_flat_in_the_corpus(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the records take no more at once; of what is allocated here, not of what the machine says."""
    monkeypatch.setattr(preprocess, "DOCUMENTS_PER_CALL", 10)
    monkeypatch.setattr("lmlab.data.documents.ROWS_AT_ONCE", 10)

    def peak(count: int) -> int:
        texts = ([f"{i} " + "some words " * 100] for i in range(count))
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        write_split(tmp_path / str(count), name, texts, tokenizer, Preprocessing())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(20)  # what is made once and kept
    small, large = peak(50), peak(400)
    ids = (tmp_path / "400" / f"{name}.tokens").stat().st_size
    assert ids > 2 * small, "too little data to tell"
    assert large < 1.3 * small


def test_long_documents_go_fewer_at_once() -> None:
    texts = ["a" * n for n in [10] * 1001 + [2**19] * 3 + [2**22, 1]]
    found = list(from_records.batches(texts, 1000, 2**20))
    assert [text for batch in found for text in batch] == texts
    assert [len(batch) for batch in found] == [1000, 3, 2, 1]
    assert list(from_records.batches([], 1000, 2**20)) == []


def test_a_filled_cache_is_only_read(run: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """No record is loaded and no lock taken, so that it may lie where nothing can be written."""
    texts = random_texts(random.Random(0), 100)
    first = run(corpus_of(texts))
    monkeypatch.setattr("lmlab.io.locked", never)
    second = run(Corpus(never, None, "text", "texts"))
    assert second.ledger == first.ledger


def test_leftovers_of_a_killed_writer(
    run: Callable[..., Prepared], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`kill -9` lets nobody tidy up: what it left beside the entry never becomes part of one."""
    texts = random_texts(random.Random(0), 100)
    elsewhere = tmp_path / "elsewhere"
    wanted = prepare(corpus_of(texts), Preprocessing(block_size=8), lambda texts: tokenizer, None, elsewhere)
    names = entries(elsewhere)
    assert len(names) == 3
    for name in names:
        beside = tmp_path / f".{name}.partial"
        beside.mkdir()
        for half in ("train.tokens", "validation.spans", "documents"):
            (beside / half).write_bytes(b"half")
        (beside / "extra").write_bytes(b"")
    made = run(corpus_of(texts))
    assert entries(tmp_path) == {*names, "elsewhere"}
    for name in names:
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (elsewhere / name).iterdir()
        }
    for name in ("train", "validation"):
        ours, theirs = blocks_of(made, name), blocks_of(wanted, name)
        assert [block.tolist() for block in ours] == [block.tolist() for block in theirs]


def prepare_slowly(cache: Path, log: Path, start: Any) -> None:
    """One of several processes: all start at once, and who writes notes it down."""
    real = prepared_data.write_split

    def note(line: str) -> None:
        with log.open("a") as stream:
            stream.write(f"{line}\n")
        time.sleep(0.3)  # So that the others come along while this one is at it.

    def write_split(place: Path, name: str, *args: Any, **more: Any) -> None:
        note(name)
        real(place, name, *args, **more)

    def make(texts: Iterable[str]) -> PreTrainedTokenizerBase:
        note("tokenizer")
        return bpe(texts, 300)

    prepared_data.write_split = write_split
    start.wait(60)
    prepared = prepare(corpus_of(HARD * 9), Preprocessing(block_size=8), make, {"kind": "bpe"}, cache)
    note(json.dumps([prepared.tokenizer_hash, *(block.tolist() for block in prepared.train)]))


def test_two_processes(tmp_path: Path) -> None:
    """Of two that prepare the same at once one writes, and both get it."""
    # Not "spawn": importing it all again, twice, takes longer than all other tests here.
    context = multiprocessing.get_context("fork")
    start, log = context.Barrier(2), tmp_path / "log"
    both = [context.Process(target=prepare_slowly, args=(tmp_path / "cache", log, start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    *written, one, other = log.read_text().splitlines()
    assert written == ["tokenizer", "train", "validation"]
    assert one == other


@pytest.mark.parametrize("join", [None, "\n"])
def test_held_out_records_are_read_in_the_order_of_their_file(
    join: str | None, run: Callable[..., Prepared], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept in the order of the split, which was drawn."""
    draw = random.Random(0)
    records = [[f"{i}, text {n}" for n in range(draw.randint(0, 3))] for i in range(100)]
    corpus = corpus_of(records)
    read = []
    monkeypatch.setattr(
        prepared_data, "flatten", lambda part, path: read.append(part) or from_records.flatten(part, path)
    )
    prepared = run(corpus, join=join, test_size=0.3)
    held_out = next(part for part in read if part._indices is not None and len(part) == 30)
    order = held_out._indices.column(0).to_pylist()
    assert order == sorted(order)
    choices = Preprocessing(join=join, test_size=0.3)
    drawn = split(corpus, choices).validation[""]
    assert drawn._indices.column(0).to_pylist() != order
    texts = list(preprocess.join_texts(drawn["text"], join))
    whole = [f"{text}{tokenizer.eos_token}" for text in texts if text]
    assert documents(blocks_of(prepared, "validation"), tokenizer) == whole
    assert prepared.validation.starts.to_pylist() == [" ".join(text.split()) for text in texts]
