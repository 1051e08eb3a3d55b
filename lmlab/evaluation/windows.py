"""Context policies: which tokens a model is shown at once, and which of them it is scored on.

A window is a stretch of the documents' tokens, laid end to end. Each token is a target in
one window at most.

Shapes: W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmlab.data.documents import Documents
from lmlab.errors import UserError, nearest

CONTEXTS = ("blocks", "document", "sliding")


@dataclass(frozen=True)
class Context:
    """How much a model sees of what stands before a token (or around it)."""

    name: str = "blocks"
    """blocks: as in training, across documents; a block's first token is not scored by a causal model.
    document: each document on its own, framed by the tokenizer's special tokens; one that is
    longer than a block by windows within it.
    sliding: all documents as one text; windows overlap, so that every token is scored, with at
    least block_size - stride tokens before it where there are so many."""
    block_size: int = 128
    """Positions the model is given at once."""
    stride: int | None = None
    """Tokens from one window to the next, of sliding and of long documents; null is half a block."""

    def __post_init__(self) -> None:
        if self.name not in CONTEXTS:
            raise UserError(
                f'context is one of {", ".join(CONTEXTS)}, not "{self.name}".{nearest(str(self.name), CONTEXTS)}'
            )
        if type(self.block_size) is not int or self.block_size < 2:
            raise UserError(f"preprocess.block_size must be at least 2, not {self.block_size}: 1 token has no context.")
        if self.name == "blocks" and self.stride is not None:
            raise UserError("stride is for context=sliding and context=document: blocks do not overlap.")
        if self.stride is not None and (type(self.stride) is not int or not 1 <= self.stride <= self.block_size):
            raise UserError(
                f"stride={self.stride}: it must be from 1 to preprocess.block_size={self.block_size}, "
                "or tokens between two windows would not be scored."
            )

    @property
    def step(self) -> int:
        """Tokens from one window to the next."""
        return self.stride if self.stride is not None else self.block_size // 2


@dataclass(frozen=True)
class Windows:
    """What is scored, window by window."""

    starts: np.ndarray
    """[W] int64: the first token of each."""
    ends: np.ndarray
    """[W] the one past its last."""
    scored: np.ndarray
    """[W] the first that may be a target."""
    framed: np.ndarray
    """[W] bool: whether special tokens frame it."""
    head: list[int]
    """Ids put before a framed window, 0 or 1 of them."""
    tail: list[int]
    """Ids put after it."""

    def __len__(self) -> int:
        return len(self.starts)


def windows(
    context: Context,
    documents: Documents,
    bounds: np.ndarray,
    causal: bool,
    opening: Sequence[int] = (),
    closing: Sequence[int] = (),
) -> Windows:
    """The windows of a policy.

    Args:
        bounds: [blocks, 2] the blocks that `group_texts` cuts.
        causal: whether a token is predicted from those before it; else from both sides.
        opening: the special tokens a text may begin with, the one to put there first.
        closing: those it may end with; only masked models need one.
    """
    if context.name == "blocks":
        starts, ends = bounds[bounds[:, 1] - bounds[:, 0] > causal].T  # a last block may be a single token
        return Windows(starts, ends, starts + causal, np.zeros(len(starts), bool), [], [])
    if not causal:
        if context.name == "sliding":
            raise UserError("context=sliding is for causal models. For a masked one: context=document or blocks.")
        if context.stride is not None:
            raise UserError(
                "stride is for causal models: a masked one is shown pieces that do not overlap. Leave it out."
            )
        return chunks(context.block_size, documents, opening, closing)
    edges = np.array([0, len(documents.tokens)]) if context.name == "sliding" else documents.edges
    return causal_windows(context, documents.tokens, edges, opening)


def causal_windows(context: Context, tokens: np.ndarray, edges: np.ndarray, opening: Sequence[int]) -> Windows:
    """Windows that overlap, within each text; a text has the tokens edges[i] … edges[i + 1] - 1.

    The last token of a window is a target only, so one of block_size + 1 tokens needs
    block_size positions.
    """
    first, last = edges[:-1], edges[1:]
    # A text that begins with a special token already needs no second one.
    framed = (last > first) & ~at(tokens, first, opening) if opening else np.zeros(len(first), bool)
    length = last - first + framed
    beyond = np.maximum(0, length - context.block_size - 1)
    count = np.where(length > 1, 1 + -(-beyond // context.step), 0)
    text = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    # From here on places are counted from the head, where there is one.
    start = number * context.step
    end = np.minimum(start + context.block_size + 1, length[text])
    scored = np.where(number == 0, 1, start - context.step + context.block_size + 1)
    origin = first[text] - framed[text]
    opens = (number == 0) & framed[text]
    return Windows(origin + start + opens, origin + end, origin + scored, opens, list(opening[:1]), [])


def chunks(block_size: int, documents: Documents, opening: Sequence[int], closing: Sequence[int]) -> Windows:
    """Documents in pieces that do not overlap, each framed."""
    head, tail = list(opening[:1]), list(closing[:1])
    room = block_size - len(head) - len(tail)
    if room < 1:
        raise UserError(
            f"preprocess.block_size={block_size} has no room for a token between the special ones. Use more than 2."
        )
    first, last = documents.edges[:-1], documents.edges[1:]
    # The frame takes the place of those that a document has already.
    first = first + ((last > first) & at(documents.tokens, first, opening))
    last = last - ((last > first) & at(documents.tokens, last - 1, closing))
    count = -(-(last - first) // room)
    text = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    starts = first[text] + number * room
    ends = np.minimum(starts + room, last[text])
    return Windows(starts, ends, starts, np.ones(len(starts), bool), head, tail)


def at(tokens: np.ndarray, places: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """Whether the token at each place is one of those; a place beyond the last token is taken for that."""
    return np.isin(tokens[np.clip(places, 0, len(tokens) - 1)], wanted)
