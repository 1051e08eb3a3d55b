"""Sources of two ranks: one that is another one on rank 1, as where the files of two nodes differ; one that waits."""

import os
import time
from pathlib import Path
from typing import Any

from lmlab.data.sources import Corpus, fingerprint, load_sample


def other_on_rank_1(text: str) -> Corpus:
    """The shipped corpus, with another hash on rank 1."""
    corpus = load_sample(text)
    corpus.fingerprint = fingerprint(corpus.fingerprint, os.environ.get("RANK") == "1")
    return corpus


def read_by_both_ranks_at_once(text: str, folder: str) -> Corpus:
    """The shipped corpus, whose records no rank gets before both have asked for them."""
    corpus = load_sample(text)

    def records() -> Any:
        Path(folder, os.environ["RANK"]).touch()
        until = time.monotonic() + 60
        while len([*Path(folder).iterdir()]) < 2:
            assert time.monotonic() < until, "the other rank waits for this one"
            time.sleep(0.01)
        return corpus.train

    return Corpus(records, None, text, corpus.fingerprint)
