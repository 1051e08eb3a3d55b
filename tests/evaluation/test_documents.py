"""Documents by name, which text their tokens stand for, and the records that are kept of them."""

import hashlib
import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmlab.data.blocks import write_split
from lmlab.data.documents import (
    CONTINUES,
    COUNTS,
    END,
    FEW,
    FLAGS,
    START,
    STRETCH,
    UNKNOWN,
    Documents,
    read_lengths,
    spans,
    stretches,
)
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import prepare
from lmlab.data.preprocess import Tokens, tokenize
from lmlab.data.sources import Corpus
from lmlab.data.tokenizers import bpe, char
from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.evaluation.metrics import compute_metrics, sum_totals

from . import reference
from .test_property import documents_of
from .test_scoring import HARD, LEARNED, tokenizer_named, wordpiece

TEXTS = [
    *HARD,
    *LEARNED,
    "CRLF\r\nthen CR\rthen LF\n\x0b\x0c\x1c\x1d\x1e\x1f\x85all\u1680of\u2000them\u202fare\u205fspaces\u3000",
    "no spaces: \u200b \ufeff \u180e \x00",
    "<|endoftext|> spelled <mask> out <pad> [SEP]",
    "e\u0327\u0301 and \u1e69 and s\u0307\u0323, ﬁ ligature, Ⅷ, İstanbul ẞ",
    "   leading and trailing   ",
    "नमस्ते क्षत्रिय",
    "a" * 300 + " " + "👍🏽" * 20,
]


def metaspace() -> PreTrainedTokenizerBase:
    """As Llama's and XLNet's: spaces are written ▁, and the text is normalized, which changes its length."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz", "the", "▁the", "▁a"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", -20.0), *((letter, -2.0 - len(letter)) for letter in letters)], 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")


def trimmed() -> PreTrainedTokenizerBase:
    """As RoBERTa's: offsets leave out the space that a token begins with."""
    tokenizer = bpe(LEARNED, vocab_size=290)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def composed() -> PreTrainedTokenizerBase:
    """As ModernBERT's: composed characters first, so that one token's letter is two of the text."""
    tokenizer = bpe(LEARNED, vocab_size=290)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bpe": lambda: bpe(LEARNED, vocab_size=290),
    "char": lambda: char(LEARNED),
    "wordpiece": wordpiece,
    "metaspace": metaspace,
    "trimmed": trimmed,
    "composed": composed,
    "no offsets": ByT5Tokenizer,
}


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, **choices: Any) -> list[Tokens]:
    return list(tokenize([texts], tokenizer, Preprocessing(**choices), held_out=True))


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(name: str, special_tokens: bool) -> None:
    for each in tokens_of(TEXTS, TOKENIZERS[name](), special_tokens=special_tokens):
        assert each.spans is not None
        assert each.spans.shape == (len(each.ids), 5)
        assert (each.spans >= 0).all()
        if len(each.ids) > (3 if special_tokens else 1):  # a text of no token of its own has no bytes to share out
            assert each.spans[:, 0].sum() == len(each.text.encode())
            assert each.spans[:, 1].sum() == len(each.text.split())
            last_line = not each.text.endswith("\n")
            assert each.spans[:, 2].sum() == each.text.count("\n") + last_line
            assert each.spans[-1].tolist() == [0, 0, last_line, END, 0]  # the end-of-text token
            if special_tokens and name == "wordpiece":
                assert not each.spans[[0, -2]].any()


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "no offsets"])
def test_each_byte_and_word_belongs_where_the_definition_says(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for each, wanted in zip(tokens_of(TEXTS, tokenizer), reference.tokenized(TEXTS, tokenizer), strict=True):
        assert each.spans is not None
        assert each.ids.tolist() == [token.id for token in wanted]
        assert each.spans[:, :2].tolist() == [[token.bytes, token.words] for token in wanted]
        goes_on = [
            before.pretoken is not None and before.pretoken == token.pretoken
            for before, token in zip([reference.Token(0, 0), *wanted], wanted, strict=False)
        ]
        assert (each.spans[:, 3] & CONTINUES).tolist() == goes_on


def test_spans_by_hand() -> None:
    """A dropped space goes to the token behind it, a split character to the first of its tokens."""
    text = "ab  é👍 \n"
    offsets = [(0, 2), (4, 5), (5, 6), (5, 6), (5, 6)]
    whole = spans(text, offsets, [0, 1, 2, 2, 2], 5)
    assert whole[:, :4].tolist() == [[2, 1, 0, 0], [4, 1, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1], [2, 0, 1, 1]]
    assert not whole[:, 4].any()
    cut = spans(text, offsets, [0, 1, 2, 2, 2], 5, lost=1)
    assert cut[:, 0].tolist() == [2, 4, 4, 0, 0]
    assert spans("", None, None, 0).shape == (0, 5)
    # Special tokens around a text have none of it, and the last token before them has the rest.
    framed = spans("a b ", [(0, 0), (0, 1), (2, 3), (0, 0)], [None, 0, 1, None], 4)
    assert framed.tolist() == [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [3, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_offsets_that_go_back() -> None:
    """A normalizer may put marks in another order; no byte is lost or counted twice for it."""
    found = spans("abcd", [(0, 1), (2, 3), (1, 2), (3, 4)], [0, 0, 0, 0], 4)
    assert found[:, 0].tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("name", ["bpe", "char", "trimmed"])
@pytest.mark.parametrize("end_of_text", [False, True])
def test_a_text_that_was_cut_counts_up_to_the_cut(name: str, end_of_text: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    text = "The cat sat on 👍🏽 the mat  and more words after it"
    every = tokens_of([text], tokenizer, end_of_text=False)[0]
    tokenizer.model_max_length = 9
    cut = tokens_of([text, "The cat"], tokenizer, truncation=True, end_of_text=end_of_text)
    assert cut[0].lost == len(every.ids) - 9
    assert cut[0].spans is not None
    assert every.spans is not None
    np.testing.assert_array_equal(cut[0].spans[:9], every.spans[:9])
    assert 0 < cut[0].spans[:, 0].sum() < len(text.encode()) / 2
    # One that fits counts in full.
    assert cut[1].spans is not None
    assert cut[1].spans[:, 0].sum() == len("The cat")


def test_a_text_cut_on_the_left_counts_from_the_cut_on() -> None:
    """`truncation_side` is the tokenizer's to say; what it cuts off is no token's, on either side."""
    tokenizer = char(LEARNED)
    tokenizer.truncation_side, tokenizer.model_max_length = "left", 4
    cut = tokens_of(["The cat sat on the mat"], tokenizer, truncation=True)[0]
    assert tokenizer.decode(cut.ids[:-1]) == " mat"
    assert cut.spans is not None
    assert cut.spans[:, 0].tolist() == [1, 1, 1, 1, 0]
    assert cut.spans[:, 1].sum() == 1


def test_a_cut_text_of_a_tokenizer_without_offsets() -> None:
    """Even shares of the text go to all its tokens, those that were cut off among them."""
    tokenizer = ByT5Tokenizer()
    tokenizer.model_max_length = 10
    cut = tokens_of(["a" * 100], tokenizer, truncation=True, end_of_text=False)[0]
    assert (len(cut.ids), cut.lost) == (10, 90)
    assert cut.spans is not None
    assert cut.spans[:, 0].sum() == 10


def test_a_tokenizer_without_offsets() -> None:
    """All tokens get even shares of the characters, in order, and none is lost."""
    found = spans("añb 👍 x", None, None, 3)
    assert found.tolist() == [[3, 1, 0, 0, 0], [2, 0, 0, 0, 0], [6, 2, 0, 0, 0]]
    assert spans("ab", None, None, 5)[:, 0].sum() == 2
    assert spans("abcdef", None, None, 3)[:, 0].tolist() == [2, 2, 2]


def test_names_come_from_texts_alone(tmp_path: Path) -> None:
    """Equal texts have names of their own, in order; the tokenizer and the place of a text do not matter."""
    texts = ["same", "other", "same", "", "same", ""]
    found = {}
    for name in ("bpe", "char", "wordpiece", "bare"):
        place = tmp_path / name
        place.mkdir()
        found[name] = documents_of(texts, name, place)
    ids = found["bpe"].names.to_pylist()
    assert len(set(ids)) == len(texts)
    assert len({name.split("-")[0] for name in ids}) == 3
    assert [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"] == [ids[0], ids[2], ids[4]]
    assert all(each.names.to_pylist() == ids for each in found.values())
    assert len({each.hash for each in found.values()}) == 1
    # A text keeps its name among others, and the hash is that of all in their order.
    turned = documents_of(["new", "", "other", "same"], "char", tmp_path / "char")
    assert turned.names.to_pylist()[1:] == [ids[3], ids[1], ids[0]]
    assert turned.hash != found["char"].hash
    assert documents_of(["ab", "c"], "char", tmp_path / "char").hash != (
        documents_of(["a", "bc"], "char", tmp_path / "char").hash
    )


def test_beginnings_are_one_short_line(tmp_path: Path) -> None:
    texts = ["  two\n\twords ", "👍" * 500, "x\u2028y", "", "long " * 1000]
    documents = documents_of(texts, "bpe", tmp_path)
    starts = [
        start
        for start, part in zip(documents.starts.to_pylist(), documents.parts.to_pylist(), strict=True)
        if part == 0
    ]
    assert starts == ["two words", "👍" * START, "x y", "", ("long " * START)[:START]]
    assert len(documents) == len(texts)


PARAGRAPHS = "\n\n".join(f"Paragraph {i}: " + "the cat sat on the mat. " * (5 + i % 9) for i in range(40))


def test_few_documents_are_cut_into_stretches(tmp_path: Path) -> None:
    """At ends of paragraphs, wherever the tokenizer puts its tokens; each token lies in one of them."""
    found = {}
    for name in ("bpe", "char", "wordpiece"):
        (tmp_path / name).mkdir()
        found[name] = documents_of([PARAGRAPHS, "short"], name, tmp_path / name)
    documents = found["bpe"]
    begins = [0, *stretches(PARAGRAPHS)]
    assert len(begins) > 10
    assert documents.parts.to_pylist() == [*range(len(begins)), 0]
    assert len(set(documents.names.to_pylist())) == len(documents) == 2
    assert all(start.startswith("Paragraph") for start in documents.starts.to_pylist()[:-1])
    sizes = np.diff([*begins, len(PARAGRAPHS)])
    assert (sizes >= STRETCH).all()
    assert (sizes < 4 * STRETCH).all()
    for name, each in found.items():
        assert (each.names, each.parts, each.starts) == (documents.names, documents.parts, documents.starts)
        assert len(each.stretches) == len(each.names) + 1
        assert {*each.edges.tolist()} <= {*each.stretches.tolist()}
        of_each = [each.spans[slice(*each.stretches[i : i + 2]), 0].sum() for i in range(len(each.names))]
        if name != "wordpiece":  # where a dropped blank line belongs to the word after it
            assert of_each[:-1] == sizes.tolist()
        assert sum(of_each) == len(PARAGRAPHS) + len("short")


def test_text_without_paragraphs_is_cut_at_lines_or_words() -> None:
    for sign in ("\n", " "):
        text = sign.join(["a word" if sign == "\n" else "word"] * 1000)
        begins = [*stretches(text)]
        assert len(begins) >= 8
        assert all(text[begin - 1] == sign for begin in begins)
    assert [*stretches("x" * 2000)] == [2000 - 4 * STRETCH + 4 * STRETCH] or [*stretches("x" * 2000)] == []
    assert [*stretches("one\n\n" * 100)] == []  # not two of the least length


def test_many_documents_are_whole(tmp_path: Path) -> None:
    documents = documents_of([PARAGRAPHS, *(f"text {i}" for i in range(FEW - 1))], "bpe", tmp_path)
    assert documents.parts.to_pylist() == [0] * FEW
    assert documents.stretches.tolist() == documents.edges.tolist()


def test_ends_lines_and_unknown_tokens_are_counted(tmp_path: Path) -> None:
    """A document's end is that of its last line, unless the text ends with one."""
    documents = documents_of(["The cat\nsat", "on the\nmat\n", "你 cat"], "char", tmp_path)
    counts = documents.counts(np.arange(len(documents.tokens)))
    owners = np.searchsorted(documents.edges, np.arange(len(counts)), side="right") - 1
    sums = [dict(zip(COUNTS, counts[owners == i].sum(axis=0).tolist(), strict=True)) for i in range(3)]
    assert [(s["words"], s["ends"], s["lines"]) for s in sums] == [(3, 1, 2), (3, 1, 2), (2, 1, 1)]
    assert [(s["unknown_tokens"], s["unknown_bytes"]) for s in sums] == [(0, 0), (0, 0), (1, 3)]


EOT = "<end>"
WORDS_OF = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3, EOT: 4}


def word_level(unknown: str = "[UNK]", at: Any = None, normalizer: Any = None, **named: str) -> PreTrainedTokenizerBase:
    model = Tokenizer(models.WordLevel(WORDS_OF, unk_token=unknown))
    model.pre_tokenizer = at or pre_tokenizers.Whitespace()
    if normalizer:
        model.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOT, **named)


def unknown(spans: np.ndarray) -> tuple[int, int]:
    """The tokens that do not spell all of their text, and the bytes that they leave unspelled."""
    return int((spans[:, UNKNOWN] > 0).sum()), int(spans[:, UNKNOWN].sum())


def vanishing() -> PreTrainedTokenizerBase:
    """A tokenizer of characters that leaves out those it does not know."""
    model = Tokenizer(models.BPE({EOT: 0} | {character: i for i, character in enumerate("thecas", 1)}, []))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOT)


@pytest.mark.parametrize(
    ("make", "replaced"),
    [
        (lambda: word_level(unk_token="[UNK]"), 7),
        (lambda: word_level(), 7),  # its wrapper in transformers was not told
        (lambda: word_level(EOT, unk_token=EOT), 7),  # it also ends texts
        (vanishing, 6),
        (lambda: word_level(normalizer=normalizers.Replace(Regex(r"[^\x00-\x7F]"), "")), 6),
    ],
)
def test_text_that_no_token_spells_is_unknown(make: Callable[[], PreTrainedTokenizerBase], replaced: int) -> None:
    """Whatever the tokenizer calls it, and whether it is replaced (with the space before it) or left out."""
    texts = ["the cat 你好 sat", "你好", "the cat", " \n"]
    found = [each.spans for each in tokens_of(texts, make())]
    assert [*map(unknown, found)] == [(1, replaced), (1, 6), (0, 0), (0, 0)]
    assert found[1] is not None
    assert found[1][:, 0].sum() == 6  # of bytes that count, also where nothing but the end is left


def test_a_text_may_spell_the_unknown_token_out() -> None:
    tokenizer = word_level(at=pre_tokenizers.WhitespaceSplit(), unk_token="[UNK]")
    found = tokens_of(["the [UNK] sat", "the dog sat"], tokenizer)
    assert [unknown(each.spans) for each in found] == [(0, 0), (1, 4)]


def test_edges_and_lengths(tmp_path: Path) -> None:
    """Documents are found where they were put, the empty ones between them too."""
    documents = documents_of(HARD, "bpe", tmp_path)
    wanted = reference.tokenized(HARD, tokenizer_named("bpe"))
    assert documents.lengths.tolist() == [len(tokens) for tokens in wanted]
    for first, last, tokens in zip(documents.edges, documents.edges[1:], wanted, strict=False):
        assert documents.tokens[first:last].tolist() == [token.id for token in tokens]
        assert documents.spans[first:last, 0].tolist() == [token.bytes for token in tokens]


def test_surrogates_do_no_harm(tmp_path: Path) -> None:
    """JSON may spell half a character; it has a name, a beginning, and a size."""
    half = "\ud83d and"
    found = spans(half, [(0, 1), (1, 5)], [0, 1], 2)
    assert found[:, 0].tolist() == [3, 4]
    write_split(tmp_path, "validation", [["a"]], char(["a"]), Preprocessing())
    assert read_lengths(tmp_path, "validation").tolist() == [2]


NEW = [name for name, (_, since) in records.COLUMNS.items() if since > 1]
"""Columns that records of version 1 do not have."""
FACTS = {
    "figure": "perplexity",
    "policy": {"pseudo": None},
    "precision": "32-true",
    "data_hash": "text",
    "tokenizer_hash": "tokens",
    "weights_hash": "weights",
    "model": "model",
    "run": None,
    "units": "text",
}


def documents_for(nll: np.ndarray) -> Documents:
    names = [f"{i:016x}" for i in range(len(nll))]
    none, edges = np.zeros(0, np.int32), np.zeros(len(nll) + 1, np.int64)
    return Documents(none, none.reshape(0, 5), edges, edges, *map(pa.array, (names, [0] * len(nll), names)), "")


def some_sums(count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Of very different sizes, so that the order of adding would show in the last bits."""
    draw = np.random.default_rng(0)
    nll = draw.gamma(0.3, 10.0 ** draw.uniform(-8, 8, (count, 1)), (count, 2))
    counts = draw.integers(0, 10**6, (count, len(COUNTS)))
    nll[::7], counts[::7] = 0, 0
    return nll, counts


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with an evaluation in it."""
    nll, counts = some_sums()
    records.write(tmp_path, documents_for(nll), nll, counts, FACTS)
    return tmp_path


def test_the_hash_of_records_is_that_of_whole_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are in memory at once, as certificates of earlier versions have it."""
    for rows in (0, 1, 6, 7):
        table = pa.table({"document": [f"é{row}" for row in range(rows)], "nll": [row / 3 for row in range(rows)]})
        wanted = hashlib.sha256(b"".join(json.dumps(column.to_pylist()).encode() for column in table.columns))
        for at_once in (3, 100):
            monkeypatch.setattr(records, "ROWS_AT_ONCE", at_once)
            assert records.rows_hash(table) == wanted.hexdigest()[:32]


def test_records_come_back_bit_by_bit(tmp_path: Path) -> None:
    nll, counts = some_sums()
    records.write(tmp_path, documents_for(nll), nll, counts, FACTS)
    found = records.read(tmp_path)
    assert found.certificate.items() >= FACTS.items()
    assert found.certificate["figures"] == compute_metrics(sum_totals(nll, counts))
    assert found.certificate["totals"] == sum_totals(nll, counts)
    assert found.certificate["totals"]["nll"] == math.fsum(nll[:, 0])
    assert found.certificate["totals"]["documents_scored"] == (counts[:, 0] > 0).sum()
    np.testing.assert_array_equal(found.sums[0], nll)
    np.testing.assert_array_equal(found.sums[1], counts)
    assert found.table["document"].to_pylist() == documents_for(nll).names.to_pylist()
    # Totals do not hang on the order of the documents; a plain sum of these would.
    orders = [np.random.default_rng(seed).permutation(len(nll)) for seed in range(20)]
    assert len({float(nll[order, 0].sum()) for order in orders}) > 1
    for order in orders:
        assert sum_totals(nll[order], counts[order]) == found.certificate["totals"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["certificate.json", "records.parquet"]


def refused(place: Path) -> str:
    """The message of a refusal: short, and it says what to do."""
    with pytest.raises(UserError) as caught:
        records.read(place)
    lines = str(caught.value).splitlines()
    assert 1 <= len(lines) <= 3
    assert all(lines)
    assert "valuate again" in lines[-1]
    assert str(place) in lines[0]
    return str(caught.value)


def test_an_evaluation_that_is_not_there(written: Path, tmp_path: Path) -> None:
    assert "certificate.json" in refused(tmp_path / "nowhere")
    (written / "records.parquet").unlink()
    assert "records.parquet" in refused(written)


@pytest.mark.parametrize("column", ["nll", "nll_squared", *COUNTS])
def test_a_changed_value(written: Path, column: str) -> None:
    """The least there is: one unit, or the last bits of one document."""
    table = pq.read_table(written / "records.parquet")
    values = table[column].to_pylist()
    place = max(range(len(values)), key=values.__getitem__)
    values[place] += 1 if isinstance(values[place], int) else 1e-12 * values[place]
    number = table.schema.get_field_index(column)
    table = table.set_column(number, table.schema.field(number), pa.array(values, table.schema.field(number).type))
    pq.write_table(table, written / "records.parquet")
    assert "the records add up to" in refused(written)


def test_a_document_that_was_taken_out(written: Path) -> None:
    table = pq.read_table(written / "records.parquet")
    pq.write_table(table.slice(1), written / "records.parquet")  # the first has nothing to score
    assert "documents=499" in refused(written)


@pytest.mark.parametrize("column", ["nll", "start"])
def test_documents_that_changed_places(written: Path, column: str) -> None:
    """The sums are the same, and a comparison document by document is not."""
    table = pq.read_table(written / "records.parquet")
    number = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    values[1], values[2] = values[2], values[1] if values[1] != values[2] else "another"
    field = table.schema.field(number)
    pq.write_table(table.set_column(number, field, pa.array(values, field.type)), written / "records.parquet")
    assert "the same totals in other rows" in refused(written)


@pytest.mark.parametrize(("part", "name"), [("totals", "nll"), ("totals", "documents"), ("figures", "perplexity")])
def test_a_changed_certificate(written: Path, part: str, name: str) -> None:
    """By the last bit of a number."""
    certificate = json.loads((written / "certificate.json").read_text())
    value = certificate[part][name]
    certificate[part][name] = value - 1 if isinstance(value, int) else math.nextafter(value, 0)
    (written / "certificate.json").write_text(json.dumps(certificate))
    assert f"{name}={value}, and the certificate says" in refused(written)


@pytest.mark.parametrize("length", [0, 3, 100, -1, -9])
def test_records_cut_short(written: Path, length: int) -> None:
    whole = (written / "records.parquet").read_bytes()
    (written / "records.parquet").write_bytes(whole[:length])
    assert "damaged or cut short" in refused(written)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'"a"', b"3", b"\xff\xfe\x00{"])
def test_a_certificate_that_is_none(written: Path, content: bytes) -> None:
    (written / "certificate.json").write_bytes(content)
    refused(written)


@pytest.mark.parametrize("missing", ["totals", "figures", "policy", "figure", "data_hash"])
def test_a_certificate_without_a_part(written: Path, missing: str) -> None:
    certificate = json.loads((written / "certificate.json").read_text())
    del certificate[missing]
    (written / "certificate.json").write_text(json.dumps(certificate))
    refused(written)


@pytest.mark.parametrize("version", [records.FORMAT + 1, 0, -1, None])
def test_another_version(written: Path, version: Any) -> None:
    certificate = json.loads((written / "certificate.json").read_text())
    (written / "certificate.json").write_text(json.dumps(certificate | {"format": version}))
    message = f"records of version {version}, and this lmlab reads versions up to {records.FORMAT}"
    with pytest.raises(UserError, match=message) as caught:
        records.read(written)
    assert len(str(caught.value).splitlines()) <= 3


def of_version_1(place: Path) -> None:
    """Make an evaluation one that an older lmlab has left."""
    found = records.read(place)
    found = found.by_document()
    table = found.table.drop_columns(NEW).cast(records.SCHEMAS[1])
    certificate = {key: value for key, value in found.certificate.items() if key not in ("units", "words")}
    totals = {key: value for key, value in sum_totals(*found.sums).items() if key not in NEW}
    figures = compute_metrics(totals, certificate["figure"])
    certificate |= {"format": 1, "totals": totals, "figures": figures, "records_hash": records.rows_hash(table)}
    pq.write_table(table, place / "records.parquet")
    (place / "certificate.json").write_text(json.dumps(certificate))


def test_an_older_evaluation_is_read(written: Path) -> None:
    """By what it counted: words without the ends of documents, and no unknown token."""
    before = records.read(written)
    of_version_1(written)
    found = records.read(written)
    np.testing.assert_array_equal(found.sums[0], before.sums[0])
    np.testing.assert_array_equal(found.sums[1][:, :3], before.sums[1][:, :3])
    assert not found.sums[1][:, 3:].any()
    totals = found.certificate["totals"]
    per_word = totals["nll"] / totals["words"]
    assert found.certificate["figures"]["bits_per_word"] == per_word / math.log(2)
    table = pq.read_table(written / "records.parquet")
    pq.write_table(table.slice(1), written / "records.parquet")
    assert "documents=499" in refused(written)


def test_words_as_the_literature_counts_them() -> None:
    """Penn Treebank's test set: 78,669 words in 3,761 lines, whose ends count on both sides."""
    lines = {"nll": 576212.0, "nll_squared": 0.0, "tokens": 100_000, "bytes": 449_945, "words": 78_669}
    lines |= {"unknown_tokens": 0, "unknown_bytes": 0}
    by_line, whole = lines | {"ends": 3761, "lines": 3761}, lines | {"ends": 1, "lines": 3761}
    literature = math.exp(576212 / (78_669 + 3761))
    assert round(literature) == 1086
    for totals in (by_line, whole):
        assert compute_metrics(totals, units="words")["word_perplexity"] == pytest.approx(literature)
    # As one document, its line ends are white space like any other.
    assert compute_metrics(by_line)["word_perplexity"] == pytest.approx(literature)
    assert compute_metrics(whole)["word_perplexity"] == pytest.approx(math.exp(576212 / 78_670))


@pytest.mark.parametrize("change", ["missing", "more", "order", "type", "metadata"])
def test_other_columns(written: Path, change: str) -> None:
    table = pq.read_table(written / "records.parquet")
    words = table.schema.get_field_index("words")
    other = {
        "missing": lambda: table.drop_columns(["words"]),
        "more": lambda: table.append_column("letters", table["bytes"]),
        "order": lambda: table.select(table.column_names[::-1]),
        "type": lambda: table.set_column(words, "words", table["words"].cast(pa.float64())),
        "metadata": lambda: table.replace_schema_metadata({"lmlab_records": "0"}),
    }[change]()
    pq.write_table(other, written / "records.parquet")
    assert "other columns" in refused(written)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_number(tmp_path: Path, value: float) -> None:
    """A diverged model's figures are no numbers, but nobody changed its records."""
    nll, counts = some_sums()
    nll[1] = value
    records.write(tmp_path, documents_for(nll), nll, counts, FACTS)
    message = ""
    try:
        records.read(tmp_path)
    except UserError as error:
        message = str(error)
    assert "changed" not in message


def test_a_mean_that_is_no_number_has_no_perplexity() -> None:
    """Not an infinite one either: that would be a claim."""
    totals = {"nll": math.nan, "nll_squared": math.nan, "tokens": 2, "bytes": 2, "words": 1}
    found = compute_metrics(totals)
    assert found["perplexity"] is None or math.isnan(found["perplexity"])


def twice(tmp_path: Path, precision: str = "32-true") -> tuple[records.Records, records.Records]:
    """Two evaluations that came to the same."""
    nll, counts = some_sums()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        records.write(tmp_path / name, documents_for(nll), nll, counts, {**FACTS, "precision": precision})
    return records.read(tmp_path / "one"), records.read(tmp_path / "other")


def changed(found: records.Records, name: str, values: np.ndarray) -> records.Records:
    """With another column."""
    number = found.table.schema.get_field_index(name)
    table = found.table.set_column(number, found.table.schema.field(number), pa.array(values))
    return records.Records(found.path, found.certificate, table)


@pytest.mark.parametrize(
    ("precision", "factor"), [("32-true", 1 + 5e-7), ("bf16-mixed", 1 + 5e-4), ("bf16-true", 1 - 5e-4)]
)
def test_the_check_allows_for_rounding(tmp_path: Path, precision: str, factor: float) -> None:
    one, other = twice(tmp_path, precision)
    other = changed(other, "nll", one.sums[0][:, 0] * factor)
    assert records.check_agreement(one, other)["total_moved_by"] == pytest.approx(abs(factor - 1), rel=1e-2)


@pytest.mark.parametrize(
    ("precision", "factor"), [("32-true", 1 + 2e-6), ("bf16-mixed", 1 - 2e-3), ("32-true", math.nan)]
)
def test_the_check_allows_no_more(tmp_path: Path, precision: str, factor: float) -> None:
    one, other = twice(tmp_path, precision)
    with pytest.raises(UserError, match="the check failed: at another batch size"):
        records.check_agreement(one, changed(other, "nll", one.sums[0][:, 0] * factor))


def test_the_check_sees_one_document(tmp_path: Path) -> None:
    """A small one that moved, though the total did not."""
    one, other = twice(tmp_path)
    nll = one.sums[0][:, 0].copy()
    place = int(np.argmin(np.where(nll > 1, nll, np.inf)))
    nll[place] *= 1 + 5e-5
    assert nll.sum() == pytest.approx(one.certificate["totals"]["nll"], rel=1e-9)
    with pytest.raises(UserError, match="one document's by 5"):
        records.check_agreement(one, changed(other, "nll", nll))


def test_the_check_counts_what_was_scored(tmp_path: Path) -> None:
    one, other = twice(tmp_path)
    sizes = one.sums[1][:, 1].copy()
    sizes[1] += 1
    with pytest.raises(UserError, match="scored other tokens"):
        records.check_agreement(one, changed(other, "bytes", sizes))


def test_the_check_of_a_model_that_is_certain(tmp_path: Path) -> None:
    """A total of nothing moved by nothing."""
    one, other = (changed(each, "nll", np.zeros(len(each.table))) for each in twice(tmp_path))
    assert records.check_agreement(one, other)["total_moved_by"] == 0


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "no offsets"])
def test_training_tokens_continue_words_as_their_tokenizer_says(
    name: str, special_tokens: bool, tmp_path: Path
) -> None:
    """Against the word ids of the tokenizer's own call, document by document."""
    tokenizer = TOKENIZERS[name]()
    corpus = Corpus(Dataset.from_dict({"text": TEXTS}), Dataset.from_dict({"text": TEXTS}), "text", "texts")
    choices = Preprocessing(block_size=7, special_tokens=special_tokens)
    data = prepare(corpus, choices, lambda texts: tokenizer, None, tmp_path, words=True)
    assert data.train is not None
    expected: list[bool] = []
    for text in TEXTS:
        encoding = tokenizer(text, add_special_tokens=special_tokens, split_special_tokens=not special_tokens)
        words = encoding.word_ids()
        expected += [i > 0 and word is not None and word == words[i - 1] for i, word in enumerate(words)]
        expected += [False] * (len(words) > 0 or bool(text.strip()))  # end of text
    found = [data.train.continues(block).tolist() for block in range(len(data.train))]
    assert list(chain.from_iterable(found)) == expected
    assert any(expected) is (name != "char")
    # Held-out documents know it in any case.
    flags = data.validation.spans[:, FLAGS] & CONTINUES
    assert flags.astype(bool).tolist() == expected
