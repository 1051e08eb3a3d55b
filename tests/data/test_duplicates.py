"""Documents that occur a second time, by their definition in plain Python."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lmlab.data import duplicates
from lmlab.data.duplicates import (
    EQUAL_HELD_OUT,
    KEPT,
    NEAR_HELD_OUT,
    NEARLY_REPEATED,
    REPEATED,
    TEST_ITEM,
    Words,
    mark_documents,
    signatures,
)
from lmlab.data.mixture import mix
from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared, prepare
from lmlab.data.sources import load_files
from lmlab.data.tokenizers import char
from lmlab.errors import UserError

DRAW = random.Random(0)
VOCABULARY = [f"word{number}" for number in range(3000)]


def text(words: int = 100) -> str:
    return " ".join(DRAW.choices(VOCABULARY, k=words))


def changed(text: str, *places: int) -> str:
    """The text with other words at these places."""
    words = text.split()
    for place in places:
        words[place] = f"other{place}"
    return " ".join(words)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def marks(training: list[str], held_out: list[str], items: list[str], folder: Path, similarity: float = 0.8) -> list:
    return mark_documents([iter(training)], iter(held_out), items, similarity, folder)[0].tolist()


def test_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind; the first of a group stays, and what is short or only related is no duplicate."""
    held, seen, item = text(), text(), text(20)
    near, far = changed(seen, 50), changed(seen, 10, 30, 50, 70, 90)
    assert jaccard(near, seen) > 0.85
    assert jaccard(far, seen) < 0.7
    short = "too short to count"
    training = [
        (seen, KEPT),
        (held, EQUAL_HELD_OUT),
        (changed(held, 3), NEAR_HELD_OUT),
        (held.upper().replace(" ", ",  "), NEAR_HELD_OUT),
        (near, NEARLY_REPEATED),
        (seen, REPEATED),
        (far, KEPT),
        (f"{text(40)} {' '.join(item.split()[4:17])} {text(40)}", TEST_ITEM),
        (f"{text(40)} {' '.join(item.split()[4:16])} {text(40)}", KEPT),  # twelve words
        (short, KEPT),
        (short, KEPT),
        (changed(near, 80), NEARLY_REPEATED),  # near to one that is near
        ("", KEPT),
        (text(), KEPT),
    ]
    documents, wanted = [document for document, _ in training], [mark for _, mark in training]
    assert marks(documents, [held, short], [item], tmp_path) == wanted
    assert [*tmp_path.iterdir()] == []
    # How many documents are read at once changes nothing.
    monkeypatch.setattr(duplicates, "CHUNK", 700)
    assert marks(documents, [held, short], [item], tmp_path) == wanted


@pytest.mark.parametrize(("words", "found"), [(7, False), (8, True), (12, True)])
def test_short_items(words: int, found: bool, tmp_path: Path) -> None:
    """An item of 8 to 12 words counts as a whole, in other case and punctuation too; a shorter one never."""
    item = text(words)
    inside = [f"{text(20)}. {item.title()}! {text(20)}", f"{text(20)} {changed(item, 2)} {text(20)}"]
    # Not where one document ends and the next begins.
    across = [f"{text(20)} {item.split()[0]}", f"{' '.join(item.split()[1:])} {text(20)}"]
    assert marks(inside + across, [], [text(30), item], tmp_path) == [TEST_ITEM if found else KEPT, KEPT, KEPT, KEPT]


def test_characters_are_words(tmp_path: Path) -> None:
    """Chinese has no spaces; two of its texts that differ in a character of a hundred are near-duplicates."""
    one = "".join(chr(0x4E00 + DRAW.randrange(5000)) for _ in range(100))
    assert marks([one, one[:50] + "一" + one[51:], one[:50] + one[:50]], [], [], tmp_path) == [
        KEPT,
        NEARLY_REPEATED,
        KEPT,
    ]


def test_estimates() -> None:
    """The share of equal minima is the Jaccard similarity, without a bias."""
    errors = []
    for number in range(40):
        one = text(200)
        other = changed(one, *range(0, 200, 5 + 2 * number))
        minima = signatures(Words([one, other, text(4), ""]), 4)
        errors.append((minima[0] == minima[1]).mean() - jaccard(one, other))
        assert not (minima[0] == minima[2]).any()
        assert not minima[3].any()
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def test_pairs_are_found(tmp_path: Path) -> None:
    """Nearly all pairs above the threshold are found, and hardly one below it, for any threshold."""
    for similarity, far in ((0.8, 0.6), (0.5, 0.25)):
        groups = [text(150) for _ in range(150)]
        close = [changed(one, *range(0, 150, 75 if similarity > 0.7 else 20)) for one in groups]
        distant = [changed(one, *range(0, 150, 18 if similarity > 0.7 else 7)) for one in groups]
        assert min(map(jaccard, groups, close)) > similarity + 0.04
        assert max(map(jaccard, groups, distant)) < far + 0.02
        found = marks(groups + close + distant, [], [], tmp_path, similarity)
        assert found[:150] == [KEPT] * 150
        assert found[150:300].count(NEARLY_REPEATED) >= 142
        assert found[300:].count(NEARLY_REPEATED) <= 2


def test_several_sources(tmp_path: Path) -> None:
    """Are compared as if they were one, in their order."""
    held, seen, other = text(), text(), text()
    sources = [[seen, changed(held, 3)], [], [other, seen, held], [changed(other, 3), text()]]
    found = mark_documents(sources, [held], [], 0.8, tmp_path)
    assert [each.tolist() for each in found] == [
        [KEPT, NEAR_HELD_OUT],
        [],
        [KEPT, REPEATED, EQUAL_HELD_OUT],
        [NEARLY_REPEATED, KEPT],
    ]


# --- In the steps of a run ---


def data(folder: Path, cache: str = "cache", **choices: object) -> Prepared:
    corpus = load_files(str(folder / "train.jsonl"), "answers", str(folder / "held.jsonl"))
    given = Preprocessing(block_size=16, **choices)  # type: ignore[arg-type]
    return prepare(corpus, given, char, {"kind": "char"}, folder / cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    held, item = text(30), text(13)
    answers = [[held, text(30)], [text(30), f"{item} zzz"], [f"{held} one"], [text(30)]]
    answers.append([answers[0][1], answers[3][0]])
    for name, rows in (("train", answers), ("held", [[held]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"answers": row}) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": item, "choices": ["a", "b"], "answer": 1}))
    return tmp_path


def test_join(folder: Path) -> None:
    """With `preprocess.join` a record is one document, whose texts stay or go together."""
    rows = [json.loads(line)["answers"] for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps({"answers": row}) + "\n" for row in [*rows, rows[0], []]))
    kept = data(folder, decontaminate="drop", join=" ").ledger["train"]
    # That of the third record, which has one more word than the held-out document, and the second copy of the first.
    assert (kept.documents_near_held_out, kept.documents_repeated, kept.duplicate_bytes > 0) == (1, 1, True)
    assert (kept.records, kept.documents, kept.records_without_text) == (5, 5, 1)


def test_report_and_drop(folder: Path) -> None:
    """The ledger counts the documents, and by `drop` neither the tokenizer nor the model sees one of them."""
    plain = data(folder)
    test = str(folder / "*.jsonl").replace("*", "test")
    report = data(folder, decontaminate="report", benchmarks=test)
    drop = data(folder, decontaminate="drop", benchmarks=test)
    counts = report.ledger["train"]
    assert plain.ledger["train"].documents_repeated is None
    assert counts.documents == plain.ledger["train"].documents == 8
    assert [
        counts.documents_equal_to_held_out,
        counts.documents_near_held_out,
        counts.documents_with_test_items,
        counts.documents_repeated,
        counts.documents_nearly_repeated,
    ] == [1, 1, 1, 2, 0]
    assert [block.tolist() for block in report.train] == [block.tolist() for block in plain.train]
    kept = drop.ledger["train"]
    # The first record loses one of its two documents, the third and the last have none left.
    assert (kept.records, kept.documents) == (3, 3)
    assert kept.bytes + kept.duplicate_bytes == counts.bytes
    assert kept.tokens + kept.duplicate_tokens == counts.tokens
    assert drop.ledger["validation"].bytes == plain.ledger["validation"].bytes
    assert "z" in plain.tokenizer.get_vocab()
    assert "z" not in drop.tokenizer.get_vocab()
    contained = [each.ledger["validation"].documents_in_training for each in (plain, report, drop)]
    assert contained == [1, 1, 0]
    # It depends on nothing but the text.
    again = data(folder, "another cache", decontaminate="drop", benchmarks=test)
    assert again.ledger == drop.ledger
    assert [block.tolist() for block in again.train] == [block.tolist() for block in drop.train]


def test_mixture(tmp_path: Path) -> None:
    """Across sources: against the held-out text of all of them, and the first of equal documents stays."""
    held, other, seen, new = (text(30) for _ in range(4))
    texts = {"a": [[seen, other, text(30)], [held]], "b": [[seen, held, changed(seen, 3), new], [other]]}
    texts["c"] = texts["a"]  # also by the same file
    corpora = {}
    for name, parts in texts.items():
        files = {part: tmp_path / f"{name}.{part}.txt" for part in ("train", "validation")}
        for file, lines in zip(files.values(), parts, strict=True):
            file.write_text("".join(f"{line}\n" for line in lines))
        corpora[name] = load_files(str(files["train"]), validation=str(files["validation"]), document="line")
    blocks = {name: {"weight": 1} for name in texts}

    def prepared(names: str, **choices: object) -> Prepared:
        mixture = mix({name: blocks[name] for name in names}, {name: corpora[name] for name in names})
        given = Preprocessing(block_size=16, similarity=0.6, **choices)  # type: ignore[arg-type]
        return prepare(mixture, given, char, {"kind": "char"}, tmp_path / "cache")

    report, drop = prepared("ab", decontaminate="report"), prepared("ab", decontaminate="drop")
    a, b = report.ledger["train/a"], report.ledger["train/b"]
    assert (a.documents, a.documents_equal_to_held_out, a.documents_repeated) == (3, 1, 0)
    assert (b.documents, b.documents_equal_to_held_out, b.documents_repeated) == (4, 1, 1)
    assert b.documents_nearly_repeated == 1
    kept = drop.ledger["train/b"]
    assert (kept.documents, kept.documents_repeated) == (1, 1)
    assert (kept.bytes, kept.bytes + kept.duplicate_bytes) == (len(new), b.bytes)
    assert drop.ledger["train/a"].documents == 2
    assert [report.ledger[f"validation/{name}"].documents_in_training for name in "ab"] == [1, 1]
    assert [drop.ledger[f"validation/{name}"].documents_in_training for name in "ab"] == [0, 0]
    # In another order the other one stays.
    assert prepared("ba", decontaminate="drop").ledger["train/b"].documents == 2
    # Sources of equal content have marks of their own.
    twice = prepared("ac", decontaminate="report")
    assert [twice.ledger[f"train/{name}"].documents_repeated for name in "ac"] == [0, 3]
    with pytest.raises(UserError, match=r"data\.sources\.c .* in an earlier source.* none is left"):
        prepared("ac", decontaminate="drop")


def test_second_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it comes from the cache; and a text that nobody asks to compare is not read for it."""
    first = data(folder, decontaminate="drop")

    def never(*_: object) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr("lmlab.data.decontaminate.mark_documents", never)
    assert data(folder, decontaminate="drop").ledger == first.ledger
    data(folder)
    with pytest.raises(AssertionError, match="compared"):
        data(folder, decontaminate="drop", similarity=0.7)


def test_nothing_is_left(folder: Path) -> None:
    (folder / "train.jsonl").write_text((folder / "held.jsonl").read_text() * 2)
    with pytest.raises(UserError, match="none is left"):
        data(folder, decontaminate="drop")
    with pytest.raises(UserError, match=r"preprocess\.decontaminate=report or drop"):
        data(folder, benchmarks="*.jsonl")
    with pytest.raises(UserError, match=r"preprocess\.benchmarks=nothing\.jsonl: no such file"):
        data(folder, decontaminate="report", benchmarks="nothing.jsonl")
