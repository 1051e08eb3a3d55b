"""A source that is another one on rank 1, as where the files of two nodes differ."""

import os

from lmlab.data.sources import Corpus, fingerprint, load_sample


def other_on_rank_1(text: str) -> Corpus:
    """The shipped corpus, with another hash on rank 1."""
    corpus = load_sample(text)
    corpus.fingerprint = fingerprint(corpus.fingerprint, os.environ.get("RANK") == "1")
    return corpus
