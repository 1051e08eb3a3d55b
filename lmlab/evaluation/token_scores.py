"""The scores of each token of the held-out text: its nll, how sure the model was, and whether a word could begin there.

Shapes: V vocabulary, N scored positions of a batch, R of them.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase


class TokenScores(Metric):
    """Keeps what a model says of each token of the documents, over batches and ranks.

    A token is a target once at most, so the sums over ranks are the values themselves.
    """

    full_state_update = False
    nll: Tensor
    scored: Tensor
    confidence: Tensor
    hits: Tensor
    boundary: Tensor

    def __init__(self, tokens: int, boundaries: Tensor | None = None):
        """Makes room for the tokens.

        Args:
            tokens: the number of tokens of all documents.
            boundaries: [V] bool, the tokens before which a word ends, to keep their probability together before each
                token; None does without.
        """
        super().__init__()
        self.boundaries = boundaries
        for name in ("nll", "confidence", "boundary"):
            self.add_state(name, torch.zeros(tokens, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("scored", "hits"):
            self.add_state(name, torch.zeros(tokens, dtype=torch.int64), dist_reduce_fx="sum")
        self.observed: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, part: slice, logits: Tensor) -> None:
        """Takes the logits [R, V] of some of the positions of a batch, in their order, before they are forgotten."""
        log_probabilities = logits.double().log_softmax(1)
        best, token = log_probabilities.max(1)
        boundary = torch.zeros_like(best)
        if self.boundaries is not None:
            boundary = log_probabilities[:, self.boundaries.nonzero().flatten().to(logits.device)].logsumexp(1)
        self.observed.append((best.exp(), token, boundary))

    def update(self, nll: Tensor, batch: Any) -> None:
        """Adds the nll [N] of the targets of a `lmlab.evaluation.scoring.ScoringBatch`, and what was observed."""
        if not self.observed:  # a batch without targets
            return
        confidence, token, boundary = (torch.cat(parts) for parts in zip(*self.observed, strict=True))
        self.observed = []
        for name, values in (("nll", nll), ("confidence", confidence), ("boundary", boundary)):
            setattr(self, name, getattr(self, name).double().index_add(0, batch.tokens, values.detach().double()))
        for name, values in (("scored", torch.ones_like(token)), ("hits", (token == batch.targets).long())):
            setattr(self, name, getattr(self, name).index_add(0, batch.tokens, values))

    def compute(self) -> dict[str, Tensor]:
        """Returns for each token of the documents [tokens]: nll in nats, 0 where it was not `scored`; `confidence`, the
        probability of the most probable token; `hits`, whether that was the token; and the log-probability of a word's
        end before it, `boundary`."""
        return {name: getattr(self, name) for name in ("nll", "scored", "confidence", "hits", "boundary")}


class WhiteSpace(NamedTuple):
    """The tokens of a vocabulary that have white space, [V] bool each."""

    last: np.ndarray
    """True for tokens that end with it."""
    alone: np.ndarray
    """True for tokens of nothing else."""
    boundaries: np.ndarray
    """True for tokens before which a word ends: those that begin with white space, and special ones."""


def white_space(tokenizer: PreTrainedTokenizerBase) -> WhiteSpace:
    """Finds where the tokens of a tokenizer have white space, which some leave out at the beginning of a text."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    rows = [[*anchor, token] for token in range(len(tokenizer))]
    texts = [text[before:] for text in tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)]
    special = set(tokenizer.all_special_ids)
    return WhiteSpace(
        np.array([text[-1:].isspace() for text in texts]),
        np.array([text.isspace() for text in texts]),
        np.array([text[:1].isspace() or token in special for token, text in enumerate(texts)]),
    )
