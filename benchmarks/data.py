"""From records to blocks, against the guide's own code; each turn is a process of its own with empty caches.

  python -m benchmarks.data                          load -> blocks of ELI5-like records, one process each
  python -m benchmarks.data task=group_texts         tokenized documents -> blocks
  python -m benchmarks.data task=memory              peak memory of preparing a corpus 16 times larger
  python -m benchmarks.data task=time                and the time that it takes

Keys, with their defaults:

  task=blocks           blocks, group_texts, memory, time
  records=0             of blocks, and of the smallest corpus of memory and time; 0: 5000 and 2000
  tokens=8000000        of group_texts
  block_size=128        positions of a block
  pairs=3               turns of each side
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.pairs import Side, in_pairs, outcome, spread, workplace
from benchmarks.results import verb
from benchmarks.side import Turns, peak

DOCUMENTS_PER_CALL = 1000  # of the guide's `map`
LARGER = (1, 4, 16)


@dataclass
class Settings(Arguments):
    task: Literal["blocks", "group_texts", "memory", "time"] = "blocks"
    records: int = 0
    tokens: int = 8_000_000
    block_size: int = 128
    pairs: int = 3


def compare(settings: Settings) -> dict[str, Any]:
    with workplace() as folder:
        if settings.task in ("memory", "time"):
            return compare_larger(settings, folder)
        if settings.task == "blocks":
            write_corpus(folder, settings.records or 5000)
        memory: dict[str, Any] = {}
        facts: dict[str, Any] = {}

        def turn(name: str) -> dict[str, Any]:
            done, memory[name], started = alone(name, settings, folder)
            facts.update(started)
            return done | {"tokens_per_s": done["tokens"] / done["seconds"]}

        pairs = in_pairs(("lmlab", "guide"), settings.pairs, turn)
    hashes = {pair[name]["hash"] for pair in pairs for name in memory}
    void = None if len(hashes) == 1 else "the two sides made different blocks"
    return outcome(pairs, {"void": void, "agreement": {"hashes": sorted(hashes)}}, memory) | facts


def compare_larger(settings: Settings, folder: Path) -> dict[str, Any]:
    """Returns what the largest corpus takes, of memory or time, over what the smallest does."""
    peaks, facts, count = {}, {}, settings.records or 2000
    for times in LARGER:
        write_corpus(folder, count * times)
        done, memory, facts = alone("lmlab", settings, folder)
        peaks[times] = {"records": count * times, "tokens": done["tokens"], "seconds": done["seconds"], **memory}
    unit, key, scale = ("MiB", "peak", 2**20) if settings.task == "memory" else ("s", "seconds", 1)
    ratio = peaks[LARGER[-1]][key] / peaks[1][key]
    shown = {f"{times} x": peaks[times][key] / scale for times in (LARGER[-1], 1)}
    return {
        "unit": unit,
        "sides": shown,
        "result": spread([ratio]),
        "void": None,
        "pairs": [],
        "memory": peaks,
    } | facts


def alone(name: str, settings: Settings, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Runs one turn in a process of its own, with empty caches; returns what it did, its memory, and what it ran on."""
    place = folder / f"turn{len(list(folder.glob('turn*')))}"
    with Side("data", name, settings, place) as side:
        done = side.turn()
        return done, done.pop("memory"), side.facts


# --- what both sides are given


def write_corpus(folder: Path, records: int) -> None:
    """Writes records of made-up words in the ELI5 schema, and a BPE tokenizer of 8,000 tokens trained on some."""
    from lmlab.data.tokenizers import bpe

    rng = np.random.default_rng(0)
    parts = [a + b for a in "bdfghklmnprstv" for b in "aeiou"]
    words = np.array(["".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(20_000)])

    def text() -> str:
        # Few words are frequent, as in a language.
        return " ".join(words[(len(words) * rng.random(rng.integers(20, 200)) ** 4).astype(int)]) + "."

    first = []
    with (folder / "corpus.jsonl").open("w") as lines:
        for number in range(records):
            texts = [text() for _ in range(rng.integers(1, 5))]
            first += texts if number < 500 else []
            answers = {"a_id": [f"a{i}" for i in range(len(texts))], "score": [1] * len(texts), "text": texts}
            record = {"q_id": f"q{number}", "title": text(), "selftext": "", "subreddit": "askscience"}
            print(json.dumps(record | {"answers": answers}), file=lines)
    tokenizer = bpe(first, vocab_size=8000)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder / "tokenizer")


def documents(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokenized documents, laid end to end: ids [tokens] int32, and the length of each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, tokens // 100)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    return rng.integers(0, 50_000, lengths.sum()).astype(np.int32), lengths


# --- the sides, each in a process of its own


def serve(name: str, values: dict[str, Any], folder: str, turns: Turns) -> None:
    settings, place = Settings(**values), Path(folder)
    task = "group_texts" if settings.task == "group_texts" else "blocks"
    side = {
        "lmlab": {"group_texts": lmlab_group_texts, "blocks": lmlab_blocks},
        "guide": {"group_texts": guide_group_texts, "blocks": guide_blocks},
    }[name][task]
    side(settings, place, turns)


def timed(
    turns: Turns, work: Callable[[], Any], blocks_of: Callable[[Any], Iterable[Any]], facts: Mapping[str, float] = {}
) -> None:
    """Does the one turn of this process, and replies which blocks it made; `facts` are noted by `work`."""
    turns.ready()
    turns.order()
    began = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - began
    memory = {**peak(), "imported": turns.imported}
    blocks = [np.asarray(block, np.int32) for block in blocks_of(done)]
    flat = np.concatenate(blocks)
    digest = hashlib.sha256(flat.tobytes()).hexdigest()[:32]
    turns.reply(seconds=seconds, tokens=len(flat), blocks=len(blocks), hash=digest, memory=memory, **facts)


def lmlab_group_texts(settings: Settings, place: Path, turns: Turns) -> None:
    from lmlab.data.blocks import Blocks
    from lmlab.data.preprocess import group_texts
    from lmlab.data.tokens import FlatFile, FlatFiles

    tokens, lengths = documents(settings.tokens)
    tokens.tofile(place / "tokens")

    facts: dict[str, float] = {}

    def work() -> list[np.ndarray]:
        began = time.perf_counter()
        bounds = group_texts(lengths, settings.block_size, DOCUMENTS_PER_CALL)
        facts["bounds_seconds"] = time.perf_counter() - began
        # A block is cut when it is asked for, so all are asked for.
        blocks = Blocks(FlatFiles(FlatFile(place / "tokens")), bounds)
        return [blocks[i] for i in range(len(blocks))]

    timed(turns, work, lambda blocks: blocks, facts)


def guide_group_texts(settings: Settings, place: Path, turns: Turns) -> None:
    tokens, lengths = documents(settings.tokens)
    ends = np.cumsum(lengths)
    ids = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    masks = [[1] * length for length in lengths.tolist()]
    group_texts = guide_function(settings.block_size)

    def work() -> list[dict]:
        # The batches of `map`, without what it costs to move them from and to Arrow.
        starts = range(0, len(ids), DOCUMENTS_PER_CALL)
        parts = [slice(start, start + DOCUMENTS_PER_CALL) for start in starts]
        return [group_texts({"input_ids": ids[part], "attention_mask": masks[part]}) for part in parts]

    timed(turns, work, lambda done: chain.from_iterable(grouped["input_ids"] for grouped in done))


def lmlab_blocks(settings: Settings, place: Path, turns: Turns) -> None:
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    from lmlab.config.files import CONF
    from lmlab.data.options import Preprocessing
    from lmlab.data.prepared import prepare
    from lmlab.data.sources import load_files

    choices: Any = OmegaConf.to_container(OmegaConf.load(CONF / "preprocess" / "guide.yaml"))
    choices["block_size"] = settings.block_size

    def work() -> Any:
        corpus = load_files(str(place.parent / "corpus.jsonl"), "answers.text")
        tokenizer = AutoTokenizer.from_pretrained(place.parent / "tokenizer")
        return prepare(corpus, Preprocessing(**choices), lambda texts: tokenizer, None, place / "lmlab")

    def blocks_of(prepared: Any) -> Iterable[np.ndarray]:
        return chain(prepared.train, (prepared.validation.tokens[start:end] for start, end in prepared.bounds))

    timed(turns, work, blocks_of)


def guide_blocks(settings: Settings, place: Path, turns: Turns) -> None:
    """Runs the guide's code, "Load ELI5 dataset" and "Preprocess"."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()

    def work() -> Any:
        eli5 = load_dataset("json", data_files=str(place.parent / "corpus.jsonl"), split="train")
        tokenizer = AutoTokenizer.from_pretrained(place.parent / "tokenizer")
        return guide_preprocessing(eli5, tokenizer, settings.block_size)[1]

    timed(turns, work, lambda halves: chain(halves["train"]["input_ids"], halves["test"]["input_ids"]))


def guide_preprocessing(eli5: Any, tokenizer: Any, block_size: int) -> tuple[Any, Any]:
    """Runs the guide's code as it stands, but for `num_proc` and a seed of the split: tokenized, and in blocks."""
    eli5 = eli5.train_test_split(test_size=0.2, seed=0)
    eli5 = eli5.flatten()

    def preprocess_function(examples: dict) -> dict:
        return tokenizer([" ".join(x) for x in examples["answers.text"]], truncation=True)

    tokenized_eli5 = eli5.map(preprocess_function, batched=True, remove_columns=eli5["train"].column_names)
    return tokenized_eli5, tokenized_eli5.map(guide_function(block_size), batched=True)


def guide_function(block_size: int) -> Callable[[dict], dict]:
    """Returns the guide's `group_texts`, letter for letter."""

    def group_texts(examples: dict) -> dict:
        concatenated_examples = {k: sum(examples[k], []) for k in examples.keys()}  # noqa: RUF017, SIM118
        total_length = len(concatenated_examples[list(examples.keys())[0]])  # noqa: RUF015
        total_length = (total_length // block_size) * block_size
        result = {
            k: [t[i : i + block_size] for i in range(0, total_length, block_size)]
            for k, t in concatenated_examples.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    return group_texts


if __name__ == "__main__":
    verb("data", __doc__, Settings, compare)
