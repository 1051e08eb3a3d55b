"""A directory that was prepared in shards holds what preparing all at once gives; a shard is whole or made anew."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lmlab.config.build import prepare_data
from lmlab.config.files import CONF
from lmlab.data.documents import FEW
from lmlab.data.options import Preprocessing
from lmlab.data.preparation import Preparation
from lmlab.data.prepared import Prepared, prepare
from lmlab.data.shards import load_prepared
from lmlab.data.sources import Corpus
from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError

from ..conftest import TINY, Refused, blocks_of, losses, run_verb
from .test_preprocess import HARD, corpus_of, random_texts

WHERE = "python -m lmlab.prepare …"


def preparation(folder: Path, corpus: Corpus, shards: int = 3, words: bool = False, **choices: Any) -> Preparation:
    """A preparation with a tokenizer that is learned."""

    def learn(texts: Any) -> PreTrainedTokenizerBase:
        return bpe(texts, 300)

    return Preparation(folder, corpus, Preprocessing(**choices), learn, {"kind": "bpe"}, words, shards, WHERE)


def finish(made: Preparation) -> list[str]:
    """Makes all shards and the index; returns what was done."""
    made.begin()
    done = [made.make(*shard) for shard in made.all_shards()]
    assert made.merge(any(done))
    return [line for line in done if line]


def read(made: Preparation, **choices: Any) -> Prepared:
    directory = load_prepared(str(made.folder))
    return directory.prepared(
        ("train", "validation"), Preprocessing(**choices), made.tokenizer, made.folder, made.words
    )


def same(one: Prepared, other: Prepared) -> None:
    """All of the data is the same, to the byte."""
    assert one.ledger == other.ledger
    assert one.identity == other.identity
    for name in ("train", "validation"):
        blocks = [[block.tolist() for block in blocks_of(data, name)] for data in (one, other)]
        assert blocks[0] == blocks[1]
    assert one.validation.domains == other.validation.domains
    for field in ("tokens", "spans", "edges", "stretches"):
        np.testing.assert_array_equal(getattr(one.validation, field), getattr(other.validation, field))
    for field in ("names", "parts", "starts"):
        assert getattr(one.validation, field).to_pylist() == getattr(other.validation, field).to_pylist()
    assert one.validation.hash == other.validation.hash


@pytest.mark.parametrize("held_out", [FEW - 1, FEW + 30])
@pytest.mark.parametrize("shards", [1, 3, 80])
def test_shards_are_the_whole(shards: int, held_out: int, tmp_path: Path) -> None:
    """Blocks run on over shards, and held-out documents are named, cut and counted as if there were none."""
    draw = random.Random(shards)
    long = ["\n\n".join(["A paragraph of many words. " * 30] * 4), "the same text, of 32 bytes or more"]
    texts = ["", *HARD, *random_texts(draw, 60), *long]
    corpus = corpus_of(texts, ["", *long, *random_texts(draw, held_out - 4), long[1]])
    for choices in ({"block_size": 8}, {"block_size": 5, "drop_remainder_every": 4}):
        made = preparation(tmp_path / f"{choices['block_size']}", corpus, shards, words=True, **choices)
        finish(made)
        found = read(made, **choices)
        learn, key = made.make_tokenizer, made.tokenizer_key
        whole = prepare(corpus, made.choices, learn, key, tmp_path / "cache", words=True)
        same(found, whole)
        assert found.ledger["validation"].documents_in_training == 3
        for block in range(len(whole.train)):
            assert found.train.continues(block).tolist() == whole.train.continues(block).tolist()


def test_what_is_drawn_from_one_file(tmp_path: Path) -> None:
    """Held out by a draw: shards come in the order of the split, of which the records are read in their file's."""
    corpus = corpus_of(random_texts(random.Random(0), 120))
    made = preparation(tmp_path / "made", corpus, test_size=0.3)
    assert len(finish(made)) == 6
    for packing in ("concatenated", "best_fit"):  # which is the choice of the run
        choices = {"test_size": 0.3, "block_size": 16, "packing": packing}
        whole = prepare(corpus, Preprocessing(**choices), made.make_tokenizer, {"k": 1}, tmp_path / "cache")
        same(read(made, **choices), whole)


def test_domains(tmp_path: Path) -> None:
    """Each has shards of its own, and its own documents that occur in the training text."""
    texts = random_texts(random.Random(0), 60)
    domains = {"news": [*random_texts(random.Random(1), 9), "a text of the news, 32 bytes or more"]}
    domains["law"] = [*random_texts(random.Random(2), 5), *["a text of the law, with 32 bytes or more"] * 2]
    texts += [domain[-1] for domain in domains.values()]
    held_out = {name: Dataset.from_dict({"text": own}) for name, own in domains.items()}
    corpus = Corpus(Dataset.from_dict({"text": texts}), held_out, "text", "two domains")
    made = preparation(tmp_path / "made", corpus, decontaminate="report")
    finish(made)
    whole = prepare(corpus, made.choices, made.make_tokenizer, made.tokenizer_key, tmp_path / "cache")
    same(read(made), whole)
    counts = [whole.ledger[f"validation/{name}"].documents_in_training for name in domains]
    assert counts == [1, 2]
    assert {*whole.validation.domains} == {*domains}
    (made.folder / "validation.law" / "validation.tokens").unlink()
    with pytest.raises(UserError, match=r"validation\.law/validation\.tokens is not what it was"):
        load_prepared(str(made.folder))
    assert finish(made) == []
    same(read(made), whole)


def test_duplicates_across_shards(tmp_path: Path) -> None:
    """Are found as in the whole text, also by several tasks, and left out of the tokenizer's text and of the shards."""
    texts = random_texts(random.Random(0), 90)
    again = [f"the same text in other shards, number {i} of ten" for i in range(10)]
    corpus = corpus_of([*texts[:40], *again, *texts[40:], *again, texts[3]], [*texts[60:], again[0]])
    for choice in ("report", "drop"):
        choices = {"decontaminate": choice}
        made = [preparation(tmp_path / choice, corpus, **choices) for _ in range(2)]
        for task in (0, 1):
            made[task].begin()
            assert all(made[task].sign(*shard) for shard in made[task].all_shards()[task:5:2])  # one is left
        finish(made[1])
        found = read(made[0])
        learn, key = made[0].make_tokenizer, made[0].tokenizer_key
        whole = prepare(corpus, Preprocessing(**choices), learn, key, tmp_path / f"cache {choice}")
        if choice == "drop":
            assert found.data_fingerprint != whole.data_fingerprint  # the same text gives other blocks
            found = replace(found, data_fingerprint=whole.data_fingerprint)
        same(found, whole)
        assert found.ledger["train"].documents_repeated >= 9
        assert finish(made[0]) == []
        assert not [*(tmp_path / choice).glob("*signatures*")]
        with pytest.raises(UserError, match=r"holds another preparation: its preprocess\.decontaminate"):
            preparation(tmp_path / choice, corpus).begin()
    with pytest.raises(UserError, match="this data is tokenized already"):
        prepare(load_prepared(str(tmp_path / "drop")), Preprocessing(**choices), learn, None, tmp_path)


def test_a_damaged_shard_is_made_anew_and_no_other(tmp_path: Path) -> None:
    corpus = corpus_of(random_texts(random.Random(0), 90))
    made = preparation(tmp_path, corpus)
    finish(made)
    whole = prepare(corpus, made.choices, made.make_tokenizer, {"kind": "bpe"}, tmp_path.with_name("cache"))
    shard = tmp_path / "train-00001-of-00003"
    before = {path: path.stat().st_ino for path in tmp_path.glob("*-of-*")}
    content = bytearray((shard / "train.tokens").read_bytes())
    content[5] ^= 1
    (shard / "train.tokens").write_bytes(content)
    with pytest.raises(UserError, match="train-00001-of-00003/train.tokens is not what it was .*\n.*" + WHERE):
        load_prepared(str(tmp_path))
    (line,) = finish(preparation(tmp_path, corpus))
    assert line.startswith("train-00001-of-00003: ")
    assert "train.tokens had another checksum" in line
    assert [path for path, inode in before.items() if path.stat().st_ino != inode] == [shard]
    same(read(made), whole)
    # What was killed leaves a partial folder at most, and the shard is missing.
    shard.rename(tmp_path / ".train-00001-of-00003.partial")
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match=f"is half prepared. To finish it: {WHERE}"):
        load_prepared(str(tmp_path))
    assert len(finish(preparation(tmp_path, corpus))) == 1
    same(read(made), whole)
    # Nor is an index that was cut short, or a tokenizer that is gone, a reason to make a shard.
    (tmp_path / "index.json").write_text('{"train": [')
    with pytest.raises(UserError, match=f"has a damaged index. To finish it: {WHERE}"):
        load_prepared(str(tmp_path))
    assert finish(preparation(tmp_path, corpus)) == []
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="/tokenizer is not what it was when it was written"):
        load_prepared(str(tmp_path))
    assert finish(preparation(tmp_path, corpus)) == []
    same(read(made), whole)


def test_tasks_of_an_array_share_the_shards_out(tmp_path: Path) -> None:
    """Each makes its own; the index is made by the last one, or the next that comes."""
    made = [preparation(tmp_path, corpus_of(random_texts(random.Random(0), 60))) for _ in range(2)]
    for task in (0, 1):
        made[task].begin()
        lines = [made[task].make(*shard) for shard in made[task].all_shards()[task::2]]
        assert len([line for line in lines if line]) == 3
        assert made[task].merge(True) is (task == 1)
    assert finish(preparation(tmp_path, corpus_of(random_texts(random.Random(0), 60)))) == []


def test_a_tokenizer_is_learned_from_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By shards and at once from the same texts, whatever the number of records."""
    seen: list[list[str]] = []

    def learn(texts: Any) -> PreTrainedTokenizerBase:
        seen.append([*texts])
        return bpe(seen[-1], 300)

    corpus = corpus_of([f"record {i} " + "word " * 20 for i in range(400)])
    monkeypatch.setattr("lmlab.data.prepared.LEARNED_BYTES", 10_000)
    made = Preparation(tmp_path / "made", corpus, Preprocessing(), learn, {"kind": "bpe"}, False, 2, WHERE)
    finish(made)
    same(read(made), prepare(corpus, Preprocessing(), learn, {"kind": "bpe"}, tmp_path / "cache"))
    assert seen[0] == seen[1]
    assert 8_000 < sum(map(len, seen[0])) < 12_000
    assert len({*seen[0]} & {f"record {i} " + "word " * 20 for i in range(200)}) > 20  # of all parts


# --- By commands ---


@pytest.mark.long
def test_a_prepared_directory_trains_as_its_data_does(
    train: Callable[..., Path], refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit; and what would be other data is refused in words."""
    words = [word for word in TINY if word.startswith(("tokenizer", "preprocess"))]
    place = tmp_path / "made"
    prepared = ["data=prepared", f"data.path={place}"]
    others = [word for word in TINY if not word.startswith("tokenizer")]
    assert f"data.path={place} is no directory that python -m lmlab.prepare made" in refused(
        "train", *others, *prepared
    )
    run_verb("prepare", *words, f"output={place}", "shards=2")
    assert f"To train: python -m lmlab.train data=prepared data.path={place}" in capsys.readouterr().out
    runs = [train(*TINY, run_dir=tmp_path / "a"), train(*others, *prepared, run_dir=tmp_path / "b")]
    assert losses(runs[0]) == losses(runs[1])
    manifests = [(run / "manifest.json").read_text() for run in runs]
    for name in ("data_fingerprint", "tokenizer_hash"):
        (_,) = {line for text in manifests for line in text.splitlines() if name in line}
    run_verb("evaluate", f"model={runs[1]}", f"hydra.run.dir={tmp_path}/e")
    assert (tmp_path / "e" / "records.parquet").read_bytes() == (runs[1] / "records.parquet").read_bytes()

    shown = refused("train", *others, *prepared, "preprocess=guide")
    assert "add to the command: preprocess.join=null preprocess.end_of_text=true" in shown
    assert "was prepared by another tokenizer" in refused(
        "train", *others, *prepared, "tokenizer=pretrained", f"tokenizer.name={other_tokenizer(tmp_path)}"
    )
    assert "tokenized already, and the tokenizer would have to be learned" in refused(
        "train", *others, *prepared, "tokenizer=char"
    )
    shown = refused("prepare", *words, f"output={place}", "shards=2", "preprocess.test_size=0.2")
    assert f"{place} holds another preparation: its preprocess.test_size is not of this command" in shown
    assert f"lmlab.prepare {' '.join(words)} output={place} shards=2" in shown
    (place / "index.json").unlink()
    shown = refused("train", *others, *prepared)
    assert f"half prepared. To finish it: python -m lmlab.prepare {' '.join(words)} output={place} shards=2" in shown
    moved = place.rename(tmp_path / "moved here")
    shown = refused("train", *others, "data=prepared", f"data.path={moved}")
    assert f"lmlab.prepare {' '.join(words)} 'output={moved}' shards=2" in shown
    assert "data.path has to be given" in refused("train", *others, "data=prepared")
    wrong = refused("prepare", *words, f"output={place}", "data.text=answers")
    assert "data.text=answers: no text there" in wrong
    assert not place.exists()
    assert 'Did you mean "data.text"?' in refused("prepare", f"output={place}", "data.txt=answers")
    assert "is not empty, and holds no preparation" in refused("prepare", f"output={runs[0]}")
    assert "output has to be given" in refused("prepare")


def test_a_prepared_directory_as_a_source_of_a_mixture(tmp_path: Path) -> None:
    """Beside files, with its tokenizer: its blocks and its held-out text are those that it has alone."""
    words = [word for word in TINY if word.startswith(("tokenizer", "preprocess"))]
    place, text = tmp_path / "made", tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of another text, and {i * i} more\n" for i in range(200)))
    run_verb("prepare", *words, f"output={place}", "shards=2")
    directory = f"{{_target_: lmlab.data.shards.load_prepared, path: {place}, weight: 3}}"
    sources = f"data.sources={{a: {directory}, b: {{train: {text}, document: line, weight: 1}}}}"
    own = ["tokenizer=pretrained", f"tokenizer.name={place}/tokenizer", "preprocess.block_size=32"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        mixed, alone = (
            prepare_data(hydra.compose("train", [*data, *own, f"cache_dir={tmp_path}", f"run_dir={tmp_path}"]))
            for data in (["data=mixture", sources], ["data=prepared", f"data.path={place}"])
        )
    assert [block.tolist() for block in mixed.train.sources["a"]] == [block.tolist() for block in alone.train]
    assert mixed.train.order(32).counts(32).tolist() == [24, 8]
    first, stop = mixed.validation.domains["a"]
    assert (first, stop) == (0, len(alone.validation))
    np.testing.assert_array_equal(mixed.validation.lengths[:stop], alone.validation.lengths)
    assert mixed.ledger["train/a"] == alone.ledger["train"]


def other_tokenizer(folder: Path) -> Path:
    bpe(["other text"], 280).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_a_full_disk(full_disk: Path, refused: Refused) -> None:
    """Names the command that goes on; no partial shard is left."""
    shown = refused("prepare", "tokenizer.vocab_size=300", f"output={full_disk}/made", "shards=4")
    assert f"output={full_disk}/made can't be written: No space left on device." in shown
    assert "go on: python -m lmlab.prepare tokenizer.vocab_size=300" in shown
    assert not [*full_disk.rglob("*.partial")]


@pytest.mark.long
def test_several_processes_that_are_killed(tmp_path: Path) -> None:
    """All of them at once, by SIGKILL; the same command goes on, and what is done stays."""
    place = tmp_path / "made"
    text = tmp_path / "text.txt"
    text.write_text("\n".join("some words to be tokenized again and again" * 20 for _ in range(6_000)))
    words = ["data=files", f"data.train={text}", "data.document=line", "tokenizer.vocab_size=300"]
    command = [sys.executable, "-m", "lmlab.prepare", *words, f"output={place}", "processes=2", "shards=8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(done := [*place.glob("train-*")]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert done
    assert not (place / "index.json").exists()
    inodes = {path: path.stat().st_ino for path in done}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {path: path.stat().st_ino for path in done} == inodes
    assert len([*place.glob("train-*")]) == 8
    assert load_prepared(str(place)).index["train"]
