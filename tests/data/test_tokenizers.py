"""Trained tokenizers spell any text and survive a save; the content hash knows what decides their output."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmlab.data.sources import load_sample
from lmlab.data.tokenizers import PAD, bpe, char, content_hash, encode
from lmlab.errors import UserError

TEXTS = [
    "",
    "It's  a test , isn't it ? No , it is n't .",
    "emoji 👩‍🚀 🏳️‍🌈 and combining e\u0301 é",
    "CRLF\r\nCR\rLF\n\n\ttab  two spaces ",
    "\ufeffmark, nul \x00, no-break\u00a0space, separator\u2028",
    "नमस्ते, 你好, مرحبا",
]


@pytest.fixture(scope="module")
def answers() -> list[str]:
    return [text for texts in load_sample().train["answers"] for text in texts["text"]]


@pytest.fixture(scope="module")
def bpe_400(answers: list[str]) -> PreTrainedTokenizerBase:
    return bpe(answers, vocab_size=400)


def saved(tokenizer: PreTrainedTokenizerBase, place: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(place)
    return AutoTokenizer.from_pretrained(place)


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("make", [char, lambda texts, *more: bpe(texts, 300, *more)])
def test_extra_tokens(make: Callable[..., PreTrainedTokenizerBase], answers: list[str], tmp_path: Path) -> None:
    """Special tokens behind all others, so that text keeps its ids; also after a save. None changes nothing."""
    plain, more = make(answers), make(answers, ["<one>", "<two>"])
    assert content_hash(make(answers, None)) == content_hash(make(answers, [])) == content_hash(plain)
    assert content_hash(more) != content_hash(plain)
    for tokenizer in (more, saved(more, tmp_path)):
        assert tokenizer.convert_tokens_to_ids(["<one>", "<two>"]) == [len(plain), len(plain) + 1]
        assert {len(plain), len(plain) + 1} <= {*tokenizer.all_special_ids}
        assert tokenizer("<two>a").input_ids == [len(plain) + 1, *plain("a").input_ids]
        # A document that spells one out is text.
        for text in [*answers[:20], "<one>"]:
            assert next(encode([text], tokenizer))[0] == next(encode([text], plain))[0]
    for token, said in {PAD: "a token already", "e": "a token already", "": "no token"}.items():
        with pytest.raises(UserError, match=f'"{token}" is {said}'):
            make(answers, [token])


# --- bpe ---


def test_bpe_spells_any_text(bpe_400: PreTrainedTokenizerBase, answers: list[str], tmp_path: Path) -> None:
    """Also characters it was not trained on, before and after a save."""
    draw = random.Random(0)
    points = [point for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    strange = ["".join(map(chr, draw.sample(points, 20))) for _ in range(200)]
    for tokenizer in (bpe_400, saved(bpe_400, tmp_path)):
        for text in TEXTS + strange + answers:
            assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("vocab_size", [259, 300, 1000])
def test_bpe_size(answers: list[str], vocab_size: int) -> None:
    """All ids below the size, special ones included: a model's embedding has so many rows."""
    tokenizer = bpe(answers, vocab_size)
    assert len(tokenizer) == tokenizer.vocab_size == vocab_size
    assert set(tokenizer.get_vocab().values()) == set(range(vocab_size))


def test_bpe_of_few_texts() -> None:
    """Where no more merges are to be had the vocabulary is smaller, and every byte is in it."""
    tokenizer = bpe(["ab"], vocab_size=1000)
    assert len(tokenizer) == 260
    assert round_trip(tokenizer, TEXTS[2]) == TEXTS[2]


def test_bpe_too_small() -> None:
    with pytest.raises(UserError, match="at least 259"):
        bpe(["ab"], vocab_size=258)


def test_bpe_is_the_same_each_time(answers: list[str], bpe_400: PreTrainedTokenizerBase) -> None:
    assert content_hash(bpe(iter(answers), vocab_size=400)) == content_hash(bpe_400)


def test_mask_takes_the_space_before_it(bpe_400: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As a word would; a mask saved as a plain string would leave a lone space."""
    for tokenizer in (bpe_400, saved(bpe_400, tmp_path)):
        wanted = [*tokenizer("a")["input_ids"], tokenizer.mask_token_id, *tokenizer(" galaxy")["input_ids"]]
        assert tokenizer("a <mask> galaxy")["input_ids"] == wanted


def test_special_tokens(bpe_400: PreTrainedTokenizerBase) -> None:
    """None is added to a text, and each has an id of its own, but that text begins and ends with one token."""
    assert bpe_400("a")["input_ids"] == bpe_400("a", add_special_tokens=False)["input_ids"]
    assert bpe_400.bos_token_id == bpe_400.eos_token_id
    assert len({bpe_400.eos_token_id, bpe_400.pad_token_id, bpe_400.mask_token_id}) == 3


# --- char ---


def test_char(tmp_path: Path) -> None:
    """One id per character, whitespace and line ends included, before and after a save."""
    made = char(iter(TEXTS))
    assert len(made) == 4 + len(set("".join(TEXTS)))
    for tokenizer in (made, saved(made, tmp_path)):
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_char_unknown(tmp_path: Path) -> None:
    made = char(["abc"])
    for tokenizer in (made, saved(made, tmp_path)):
        a, b, _ = tokenizer("abc")["input_ids"]
        assert tokenizer("aßb\U0001f469")["input_ids"] == [a, tokenizer.unk_token_id, b, tokenizer.unk_token_id]


def test_char_special_tokens() -> None:
    """Spelled out in a prompt they are one token, not their characters."""
    tokenizer = char(["<|endoftext|><pad><mask><unk> ab"])
    a, space, mask, b = tokenizer("a <mask>b")["input_ids"]
    assert mask == tokenizer.mask_token_id
    assert tokenizer.decode([a, space, b]) == "a b"
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id}
    assert len(ids) == 4
    assert not ids & {a, space, b}


# --- encode ---


class Shouting(PreTrainedTokenizerFast):
    """Does something of its own to a text, as a few models' tokenizers do."""

    def _encode_plus(self, text: list[str], *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([each.upper() for each in text], *args, **kwargs)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("located", [False, True])
def test_encode_is_the_call(special_tokens: bool, located: bool) -> None:
    """The same ids and places, whatever a call before has left set; a text's special tokens are text or tokens."""
    texts = [*TEXTS, "a <mask> b<|endoftext|> <pad>"]
    plain = bpe(TEXTS, vocab_size=300)
    own = Shouting(tokenizer_object=bpe(TEXTS, vocab_size=300).backend_tokenizer, pad_token=PAD)
    for tokenizer in (plain, own, ByT5Tokenizer()):
        options = {"add_special_tokens": special_tokens, "split_special_tokens": not special_tokens}
        wanted = tokenizer(texts, return_offsets_mapping=tokenizer.is_fast, **options)
        if tokenizer.is_fast:
            tokenizer(texts, padding="max_length", truncation=True, max_length=4, split_special_tokens=special_tokens)
        found = list(encode(texts, tokenizer, special_tokens, located))
        assert [ids for ids, _ in found] == wanted["input_ids"]
        if tokenizer.is_fast and located:
            assert [encoding.offsets for _, encoding in found] == wanted["offset_mapping"]
            assert [encoding.word_ids for _, encoding in found] == [wanted.word_ids(i) for i in range(len(texts))]


# --- content_hash ---


@pytest.mark.parametrize("make", [char, lambda texts: bpe(texts, 300)])
def test_hash_of_a_copy(make: Callable[[list[str]], PreTrainedTokenizerBase], tmp_path: Path) -> None:
    """Equal after a save, a move and another save."""
    made = make(TEXTS)
    loaded = saved(made, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere")
    moved = AutoTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert content_hash(made) == content_hash(loaded) == content_hash(moved)
    assert content_hash(saved(moved, tmp_path / "again")) == content_hash(made)


def test_hash_after_calls() -> None:
    """A call's padding and truncation stay set in the backend, and are none of the hash's business."""
    tokenizer = bpe(TEXTS, vocab_size=300)
    before = content_hash(tokenizer)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert content_hash(tokenizer) == before


def test_hash_of_another_tokenizer(tmp_path: Path) -> None:
    """A merge less, other orders, another special token or longest input: each changes some output, so the hash."""
    tokenizer = bpe(["the theme then the"] * 3, vocab_size=263)
    tokenizer.save_pretrained(tmp_path)
    files = {name: json.loads((tmp_path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    model, added = (files["tokenizer.json"][key] for key in ("model", "added_tokens"))
    merges, vocabulary = model["merges"], model["vocab"]
    last, other = sorted(vocabulary, key=vocabulary.__getitem__)[-1:-3:-1]
    swapped = vocabulary | {last: vocabulary[other], other: vocabulary[last]}
    strict = [token | {"lstrip": False} for token in added]
    hashes = [content_hash(tokenizer)]
    for name, change in [
        ("tokenizer.json", {"model": model | {"merges": merges[:-1]}}),
        ("tokenizer.json", {"model": model | {"merges": merges[::-1]}}),
        ("tokenizer.json", {"model": model | {"vocab": swapped}}),
        ("tokenizer.json", {"added_tokens": strict}),
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
        ("tokenizer_config.json", {"model_max_length": 10}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
    ]:
        place = tmp_path / str(len(hashes))
        place.mkdir()
        for file, content in files.items():
            (place / file).write_text(json.dumps(content | (change if file == name else {})))
        hashes.append(content_hash(AutoTokenizer.from_pretrained(place)))
    assert hashes[0] == content_hash(AutoTokenizer.from_pretrained(tmp_path))
    assert len(set(hashes)) == len(hashes)
