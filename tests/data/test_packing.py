"""Best-fit packing cuts no document that fits into a block, loses no token, and needs no more blocks than it has to."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as some

from lmlab.data.options import Preprocessing
from lmlab.data.packing import pack_documents
from lmlab.data.prepared import prepare
from lmlab.data.tokenizers import bpe, encode

from ..conftest import TINY_MLM, metrics
from .test_preprocess import HARD, corpus_of, entries, random_texts


def fills(lengths: list[int], block_size: int) -> list[int]:
    """The tokens of each block by best-fit decreasing, one piece at a time."""
    pieces = [min(block_size, length - cut) for length in lengths for cut in range(0, length, block_size)]
    blocks: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fit = [number for number, tokens in enumerate(blocks) if tokens + piece <= block_size]
        if fit:
            blocks[max(fit, key=blocks.__getitem__)] += piece
        else:
            blocks.append(piece)
    return blocks


@given(some.lists(some.integers(0, 40), max_size=60), some.integers(2, 30))
@example([3, 5, 2, 1], 4)
@example([], 4)
@example([0, 0], 4)
@settings(max_examples=300, deadline=None)
def test_best_fit(lengths: list[int], block_size: int) -> None:
    pieces, edges = pack_documents(np.array(lengths, np.int64), block_size)
    assert (pieces.dtype, pieces.shape[1:], edges.dtype) == (np.int64, (2,), np.int64)
    blocks = [pieces[first:last].tolist() for first, last in pairwise(edges)]
    assert sorted(sum(end - start for start, end in block) for block in blocks) == sorted(fills(lengths, block_size))
    assert all(block == sorted(block) for block in blocks)
    # Each document is one piece if it can be, and no piece has tokens of two.
    starts = np.cumsum([0, *lengths]).tolist()
    wanted = [
        [start + cut, min(start + cut + block_size, end)]
        for start, end in pairwise(starts)
        for cut in range(0, end - start, block_size)
    ]
    assert sorted(piece for block in blocks for piece in block) == wanted


def test_blocks_and_ledger(tmp_path: Path) -> None:
    """Blocks are of the tokens that are kept for other cuts; held-out text is not packed."""
    tokenizer, size = bpe(HARD, 300), 90
    texts = [text for text in HARD + random_texts(random.Random(0), 100) if text]
    corpus = corpus_of(texts, texts[:9])
    both = (Preprocessing(size, packing=each, document_attention=True) for each in ("concatenated", "best_fit"))
    plain, packed = (prepare(corpus, choices, lambda texts: tokenizer, None, tmp_path, words=True) for choices in both)
    assert len(entries(tmp_path)) == 3
    documents = [[*ids, tokenizer.eos_token_id] for ids, _ in encode(texts, tokenizer)]
    long = [ids for ids in documents if len(ids) > size]
    assert 5 < len(long) < len(documents) / 2

    blocks, count = [block.tolist() for block in packed.train], len(packed.train)
    assert sorted(map(len, blocks)) == sorted(fills([*map(len, documents)], size))
    assert packed.train.lengths.tolist() == sorted({*map(len, blocks)})
    assert packed.train[-1].tolist() == blocks[-1]
    pieces = [packed.train.pieces(block).tolist() for block in range(count)]
    tokens, words = (
        np.concatenate([read(row) for row in range(len(plain.train))])
        for read in (plain.train.__getitem__, plain.train.continues)
    )
    for block in range(count):
        own = np.concatenate([np.arange(*piece) for piece in pieces[block]])
        assert blocks[block] == tokens[own].tolist()
        assert packed.train.continues(block).tolist() == words[own].tolist()
        assert packed.train.documents(block).tolist() == [end - start for start, end in pieces[block]]
    found = [tokens[start:end].tolist() for block in pieces for start, end in block]
    assert sorted(found) == sorted(ids[cut : cut + size] for ids in documents for cut in range(0, len(ids), size))

    ledger = packed.ledger["train"]
    assert (ledger.tokens, ledger.tokens_dropped, ledger.blocks) == (packed.train.kept, 0, count)
    assert ledger.documents_cut == len(long)
    assert ledger.share_of_positions_filled == round(len(tokens) / (size * count), 6)
    assert plain.ledger["train"].documents_cut is plain.ledger["train"].share_of_positions_filled is None
    assert packed.ledger["validation"] == plain.ledger["validation"]
    np.testing.assert_array_equal(packed.bounds, plain.bounds)


def test_a_run(train: Callable[..., Path], tmp_path: Path) -> None:
    """Of two sources, each packed on its own, by an objective that asks where words begin."""
    for name, word in (("web", "net"), ("books", "page")):
        lines = (f"{word} {i} of the {name}, and {i * i} more" for i in range(100))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    each = (f"{name}: {{train: {tmp_path}/{name}.txt, document: line, weight: 1}}" for name in ("web", "books"))
    packed = ["data=mixture", f"data.sources={{{', '.join(each)}}}", "preprocess.packing=best_fit"]
    run = train(*TINY_MLM, *packed, "objective.whole_word=true")
    ledger = json.loads((run / "ledger.json").read_text())
    for name in ("web", "books"):
        counts = ledger[f"train/{name}"]
        filled = counts["tokens"] / (32 * counts["blocks"])
        assert counts["share_of_positions_filled"] == round(filled, 6) > 0.8
        assert (counts["documents_cut"], counts["samples_drawn"]) == (0, 16)
        assert ledger[f"validation/{name}"]["documents_cut"] is None
    assert metrics(run)[-1]["val/loss"] > 0
