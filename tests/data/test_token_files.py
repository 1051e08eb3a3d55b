"""Token files of others give the blocks and documents that lmlab makes of the text, or are refused in words."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lmlab.data.options import Preprocessing
from lmlab.data.prepared import Prepared, prepare
from lmlab.data.token_files import load_tokens
from lmlab.data.tokenizers import bpe, encode
from lmlab.errors import UserError

from ..conftest import TINY, Refused, blocks_of, metrics
from .test_preprocess import HARD, corpus_of

TEXTS = {
    "train": [text for text in HARD if text] * 3,
    "validation": ["held out", "emoji 👩‍🚀 and more", "the last one"],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe(HARD, 300)


def documents(name: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, with the end-of-text token after it."""
    return [[*ids, tokenizer.eos_token_id] for ids, _ in encode(TEXTS[name], tokenizer)]


def nanogpt(file: Path, ids: list[list[int]]) -> None:
    np.array([token for each in ids for token in each], np.uint16).tofile(file)


def llmc(file: Path, ids: list[list[int]], wide: bool = False) -> None:
    tokens = np.array([token for each in ids for token in each], np.uint32 if wide else np.uint16)
    header = [20240801, 7, len(tokens)] if wide else [20240520, 1, len(tokens)]
    file.write_bytes(struct.pack("<256i", *header, *[0] * 253) + tokens.tobytes())


def llmc_wide(file: Path, ids: list[list[int]]) -> None:
    llmc(file, ids, wide=True)


def megatron(file: Path, ids: list[list[int]]) -> None:
    """As `IndexedDatasetBuilder` writes it, each document cut into two sequences."""
    parts = [part for each in ids for part in (each[:2], each[2:])]
    np.array([token for each in ids for token in each], np.int32).tofile(file)
    lengths = np.array([len(part) for part in parts], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64) * 4
    edges = np.arange(0, len(parts) + 1, 2, dtype=np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(parts), len(edges))
    file.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + edges.tobytes())


def read(folder: Path, tokenizer: PreTrainedTokenizerBase, **choices: Any) -> Prepared:
    source = load_tokens(str(folder / "train.bin"), str(folder / "validation.bin"))
    return prepare(source, Preprocessing(**choices), lambda texts: tokenizer, None, folder / "cache")


@pytest.mark.parametrize("write", [nanogpt, llmc, llmc_wide, megatron])
def test_they_are_what_their_text_gives(
    write: Callable[[Path, list[list[int]]], None], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name in TEXTS:
        write(tmp_path / f"{name}.bin", documents(name, tokenizer))
    corpus = corpus_of(TEXTS["train"], TEXTS["validation"])
    for choices in (
        {"block_size": 7},
        {"block_size": 5, "drop_remainder_every": 2},
        {"block_size": 9, "packing": "best_fit"},
    ):
        found = read(tmp_path, tokenizer, **choices)
        wanted = prepare(corpus, Preprocessing(**choices), lambda texts: tokenizer, None, tmp_path / "text")
        for name in TEXTS:
            ours, theirs = ([block.tolist() for block in blocks_of(each, name)] for each in (found, wanted))
            assert ours == theirs
            for key in ("documents", "tokens", "blocks", "documents_cut", "tokens_dropped"):
                assert getattr(found.ledger[name], key) == getattr(wanted.ledger[name], key)
        np.testing.assert_array_equal(found.validation.spans, wanted.validation.spans)
        assert found.validation.names.to_pylist() == wanted.validation.names.to_pylist()
        assert found.validation.hash == wanted.validation.hash
        assert found.ledger["validation"].bytes == wanted.ledger["validation"].bytes
        assert found.ledger["train"].bytes is None


def test_bytes_are_not_counted_where_they_are_not_known(
    tokenizer: PreTrainedTokenizerBase, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Ids that no text gives: a letter each, where the tokenizer would merge them."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    nanogpt(tmp_path / "train.bin", documents("train", tokenizer) * 9)
    letters = [[*map(tokenizer.convert_tokens_to_ids, "plainwords"), tokenizer.eos_token_id]]
    assert letters[0][:-1] != next(encode(["plainwords"], tokenizer))[0]
    nanogpt(tmp_path / "validation.bin", documents("validation", tokenizer) + letters)
    files = [f"data.train={tmp_path}/train.bin", f"data.validation={tmp_path}/validation.bin"]
    others = [word for word in TINY if not word.startswith("tokenizer")]
    run = train(*others, "data=tokens", *files, f"tokenizer.name={tmp_path}/tokenizer")
    last = [line for line in metrics(run) if "val/loss" in line][-1]
    assert last["val/perplexity"] > 1
    assert last.get("val/bits_per_byte") is last.get("val/word_perplexity") is None
    assert "there is no metric per byte or per word" in (run / "train.log").read_text()


def test_files_that_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, refused: Refused) -> None:
    for name in TEXTS:
        nanogpt(tmp_path / f"{name}.bin", documents(name, tokenizer))

    def said(**choices: Any) -> str:
        with pytest.raises(UserError) as error:
            read(tmp_path, tokenizer, **choices)
        return str(error.value)

    file = tmp_path / "train.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "train.bin: an odd number of bytes" in said()
    llmc(file, documents("train", tokenizer))
    file.write_bytes(file.read_bytes()[:-2])
    assert "train.bin: the header says" in said()
    nanogpt(file, [[5, 6, 300]])
    assert f"train.bin holds the id 300, read as uint16, and the tokenizer has 0 to {len(tokenizer) - 1}" in said()
    megatron(file, documents("train", tokenizer))
    file.write_bytes(file.read_bytes()[:-4])
    assert "the two do not belong together, or one is cut short" in said()
    file.with_suffix(".idx").write_bytes(b"something else" * 9)
    assert "train.idx is no index of Megatron" in said()
    file.with_suffix(".idx").unlink()
    nanogpt(file, documents("train", tokenizer))
    np.array([5, 6, 7] * 30, np.uint32).tofile(file)
    assert "train.bin: every second token is below 4, as in a file of 4-byte tokens" in said()
    file.write_bytes((tmp_path / "validation.bin").read_bytes())
    assert "have the same content: it would be trained on" in said()
    nanogpt(file, documents("train", tokenizer))
    assert "preprocess.max_records changes nothing in token files" in said(max_records=3)
    assert "preprocess.decontaminate compares texts, and this data is tokenized" in said(decontaminate="drop")
    words = ["data=tokens", f"data.train={file}"]
    assert "data.validation has to be given" in refused("train", *words, f"tokenizer.name={tmp_path}")
    words += [f"data.validation={tmp_path}/validation.bin"]
    assert "tokenizer=pretrained needs a name here" in refused("train", *words)
    assert "tokenized already" in refused("train", *words, "tokenizer=bpe")
