"""Corpora larger than memory: how preparing divides over processes, and how soon a large one can be read.

  python -m benchmarks.scale                         the same corpus prepared by one process / by two, a core each
  python -m benchmarks.scale task=start              seconds to have prepared data at the second start, after imports
  python -m benchmarks.scale task=index              seconds to the first batch of 10⁹ blocks, after imports
  python -m benchmarks.scale task=index of=memory    and the memory that it takes, in MiB

Keys, with their defaults:

  task=processes        processes, start, index
  records=0             of the corpus; 0: 200,000, about 500 MB, and of start 320,000
  blocks=1000000000     of index
  of=time               time, memory
  pairs=3               repetitions
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.data import write_corpus
from benchmarks.pairs import ROOT, spread, workplace
from benchmarks.results import verb
from benchmarks.side import memory
from lmlab.errors import UserError

BLOCK, BATCH = 128, 8


@dataclass
class Settings(Arguments):
    task: Literal["processes", "start", "index"] = "processes"
    records: int = 0
    blocks: int = 1_000_000_000
    of: Literal["time", "memory"] = "time"
    pairs: int = 3


def compare(settings: Settings) -> dict[str, Any]:
    with workplace() as folder:
        if settings.task == "processes":
            write_corpus(folder, settings.records or 200_000)
            pairs = [{n: prepare(folder, n, f"{turn}-{n}") for n in (1, 2)} for turn in range(settings.pairs)]
            sides = {f"{n} processes": spread([pair[n] for pair in pairs])["median"] for n in (2, 1)}
            result = spread([pair[1] / pair[2] for pair in pairs])
            return {"unit": "s", "sides": sides, "result": result, "void": None, "pairs": pairs}
        if settings.task == "start":
            write_corpus(folder, settings.records or 320_000)
            call(folder, "have_data", folder)  # fills the cache
            found = [call(folder, "have_data", folder) for _ in range(settings.pairs)]
        else:
            with (folder / "tokens").open("wb") as file:
                file.truncate(settings.blocks * BLOCK * 2)  # zeros, which take no room
            found = [call(folder, "first_batch", folder / "tokens") for _ in range(settings.pairs)]
        unit, key = ("MiB", "mebibytes") if settings.of == "memory" else ("s", "seconds")
        result = spread([each[key] for each in found])
        return {"unit": unit, "sides": {"lmlab": result["median"]}, "result": result, "void": None, "pairs": found}


def prepare(folder: Path, processes: int, name: str) -> float:
    """Returns the seconds of `python -m lmlab.prepare` by some processes, with a core for each and empty caches."""
    words = ["data=files", f"data.train={folder}/corpus.jsonl", "data.text=answers.text", "preprocess.test_size=0.01"]
    words += ["tokenizer=pretrained", f"tokenizer.name={folder}/tokenizer", f"output={folder}/{name}", "shards=16"]
    began = time.perf_counter()
    cores = sorted(os.sched_getaffinity(0))[:processes]
    if len(cores) < processes:
        raise UserError(f"there are not {processes} cores for {processes} processes.")
    command = [sys.executable, "-m", "lmlab.prepare", *words, f"processes={processes}"]
    run(folder / f"caches-{name}", ["taskset", "--cpu-list", ",".join(map(str, cores)), *command])
    return time.perf_counter() - began


def call(folder: Path, function: str, path: Path) -> dict[str, float]:
    """Returns what a function of this file prints in a process of its own, which has the caches of those before."""
    code = f"from benchmarks.scale import {function}; {function}({str(path)!r})"
    found: dict[str, float] = json.loads(run(folder / "caches", [sys.executable, "-c", code]).splitlines()[-1])
    return found


def run(caches: Path, command: list[str]) -> str:
    places = {"LMLAB_CACHE": f"{caches}/lmlab", "HF_HOME": f"{caches}/hf", "HF_DATASETS_CACHE": f"{caches}/hf/datasets"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | places, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def have_data(folder: str) -> None:
    """Prints the seconds to have the data of a run: its blocks, its documents and its tokenizer."""
    import datasets  # noqa: F401
    from transformers import AutoTokenizer

    from lmlab.data.options import Preprocessing
    from lmlab.data.prepared import prepare
    from lmlab.data.sources import load_files

    began, before = time.perf_counter(), memory("VmRSS")
    corpus = load_files(f"{folder}/corpus.jsonl", "answers.text")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    data = prepare(corpus, Preprocessing(test_size=0.01), lambda texts: tokenizer, None, Path(folder, "prepared"))
    assert data.train is not None
    data.train[0]
    show(began, before)


def first_batch(file: str) -> None:
    """Prints the seconds to the first batch of a file of tokens."""
    from lmlab.data.blocks import Blocks
    from lmlab.data.datamodule import collate
    from lmlab.data.preprocess import group_texts
    from lmlab.data.sampler import TrainSampler
    from lmlab.data.tokens import FlatFile, FlatFiles
    from lmlab.data.warmup import BatchSizes
    from lmlab.objectives.clm import CausalLM

    began, before = time.perf_counter(), memory("VmRSS")
    tokens = FlatFiles(FlatFile(Path(file), "uint16"))
    blocks = Blocks(tokens, group_texts(np.array([len(tokens)]), BLOCK))
    number, draws = next(iter(TrainSampler(len(blocks), BatchSizes(BATCH), 100, 0)))
    assert collate(blocks, draws, CausalLM(), 0, 0, number).input_ids.shape == (BATCH, BLOCK)
    show(began, before)


def show(began: float, before: int) -> None:
    taken = max(0, memory("VmHWM") - before) / 2**20
    print(json.dumps({"seconds": time.perf_counter() - began, "mebibytes": taken}))


if __name__ == "__main__":
    verb("scale", __doc__, Settings, compare)
