"""Lays windows over held-out documents: which tokens a model is shown at once, and which of them it is scored on.

The documents' tokens are laid end to end; a window is a slice of them. Each token is a target in one window at most.

Shapes: W windows, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmlab.data.documents import Documents
from lmlab.errors import UserError, nearest
from lmlab.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # a config is checked without waiting for it

    from lmlab.data.preprocess import Bounds

CONTEXTS = ("blocks", "document", "sliding", "rolling", "fixed_length")
STRIDES = ("document", "sliding", "fixed_length")
"""The contexts whose windows overlap by as much as a stride leaves; for models that do not see ahead."""


@dataclass(frozen=True)
class Context:
    """The rule that says how much of the text before a token (or around it) a model sees."""

    name: str = "blocks"
    """The name of the rule, one of `CONTEXTS`.

    blocks: as in training, by default across documents; a causal model is not scored on a block's first token.
    document: each document on its own, with the tokenizer's special tokens around it; one that is longer than a block
    in several windows.
    sliding: all documents as one text; windows overlap, so that every token is scored, with at least
    block_size - stride tokens before it if there are so many.
    rolling: each document on its own, in windows that share no more than a token; the last one of several begins early
    enough to be full. These are the windows of `loglikelihood_rolling` of lm-evaluation-harness.
    fixed_length: all documents as one text without a special token before it, whose first token is not scored; windows
    overlap as in sliding, and end with the last token that they score. These are the windows of "Perplexity of
    fixed-length models" in the documentation of transformers."""
    block_size: int = 128
    """The number of positions that the model is given at once."""
    stride: int | None = None
    """The number of tokens from one window to the next, for sliding and for long documents; None is half a block."""
    document_attention: bool = False
    """True if the documents of a block do not see one another: then a causal model is not scored on the first token of
    each. It changes nothing where each document is on its own."""

    def __post_init__(self) -> None:
        if self.name not in CONTEXTS:
            raise UserError(
                f'context is one of {", ".join(CONTEXTS)}, not "{self.name}".{nearest(str(self.name), CONTEXTS)}'
            )
        if type(self.block_size) is not int or self.block_size < 2:
            raise UserError(f"preprocess.block_size must be at least 2, not {self.block_size}: 1 token has no context.")
        if self.name not in STRIDES and self.stride is not None:
            raise UserError(
                f"stride is for context={', '.join(STRIDES)}: the windows of context={self.name} follow on one another."
            )
        if self.document_attention and self.name in ("sliding", "fixed_length"):
            raise UserError(
                f"context={self.name} lets a model see the documents before its own, and "
                "preprocess.document_attention=true does not.\n"
                "Choose context=document or blocks, or preprocess.document_attention=false."
            )
        if self.stride is not None and (type(self.stride) is not int or not 1 <= self.stride <= self.block_size):
            raise UserError(
                f"stride={self.stride}: it must be from 1 to preprocess.block_size={self.block_size}, "
                "or tokens between two windows would not be scored."
            )

    @property
    def step(self) -> int:
        """The number of tokens from one window to the next."""
        if self.name == "rolling":
            return self.block_size
        return self.stride if self.stride is not None else self.block_size // 2


@dataclass(frozen=True)
class Windows:
    """Windows over the documents' tokens."""

    starts: np.ndarray
    """[W] int64: the first token of each."""
    ends: np.ndarray
    """[W] int64: the token after the last of each."""
    scored: np.ndarray
    """[W] int64: the first token of each that may be a target; those before it are context alone."""
    framed: np.ndarray
    """[W] bool: True if special tokens are put around the window."""
    head: list[int]
    """The id put before a framed window; empty if there is none."""
    tail: list[int]
    """The id put after a framed window; empty if there is none."""
    document_attention: bool = False
    """True if the documents of a window do not see one another. No window is framed then."""

    @property
    def lengths(self) -> np.ndarray:
        """[W] the number of tokens of each, without special ones around it."""
        lengths: np.ndarray = self.ends - self.starts
        return lengths

    def __len__(self) -> int:
        return len(self.starts)


def windows(
    context: Context,
    documents: Documents,
    bounds: "Bounds",
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    score_end: bool = True,
) -> Windows:
    """Returns the windows of a context.

    Args:
        bounds: the first token of each block that `group_texts` cuts, and the one after its last.
        objective: the objective; windows overlap only if it does not let the model see the tokens after a position.
        tokenizer: the tokenizer, which has the special tokens that begin and end a text.
        score_end: False if tokens that end documents are not scored: none needs a place at the end of a window then.
    """
    if context.name == "blocks":
        shift = objective.target_shift
        starts, ends = np.asarray(bounds).T
        fits = ends - starts > shift  # the last block may be too short for a target
        starts, ends = starts[fits], ends[fits]
        framed = np.zeros(len(starts), bool)
        return Windows(starts, ends, starts + shift, framed, [], [], context.document_attention)
    if objective.bidirectional:
        if context.name != "document":
            raise UserError(
                f"context={context.name} is for causal models, and this one sees the tokens after a position.\n"
                "Choose context=document or blocks."
            )
        if context.stride is not None:
            raise UserError(
                "stride is for causal models: one that sees the tokens after a position is shown pieces that do not "
                "overlap.\nLeave it out."
            )
        # T5's encoder reads no token before a text.
        begins = ("cls", "bos") if objective.auto_class == "AutoModelForSeq2SeqLM" else ("cls", "bos", "eos")
        opening, closing = special_ids(tokenizer, *begins), special_ids(tokenizer, "sep", "eos")
        return disjoint_windows(context.block_size, documents, opening, closing)
    whole = context.name in ("sliding", "fixed_length")
    edges = np.array([0, len(documents.tokens)]) if whole else documents.edges
    first, last = edges[:-1], edges[1:]
    if not score_end:
        last = last - ((last > first) & documents.ends(last - 1))
    opening = [] if context.name == "fixed_length" else special_ids(tokenizer, "bos", "eos")
    return overlapping_windows(context, documents.tokens, first, last, opening)


def special_ids(tokenizer: "PreTrainedTokenizerBase", *names: str) -> list[int]:
    """Returns the ids of the special tokens of these names that the tokenizer has."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in names)
    return [token for token in ids if token is not None]


def overlapping_windows(
    context: Context, tokens: np.ndarray, first: np.ndarray, last: np.ndarray, opening: Sequence[int]
) -> Windows:
    """Returns windows within each text for next-token prediction, as with block_size=4 and stride=2 for a text a … g:

    ```
    number      0  1  2  3  4  5  6  7
    text        S  a  b  c  d  e  f  g          S: the special token that opens a text
    window 0   [S  a  b  c] d                   targets a b c d
    window 1         [b  c  d  e] f             targets e f
    window 2               [d  e  f] g          targets g
    ```

    In brackets are the inputs. The last token of a window is a target only, so that a window of block_size + 1 tokens
    needs block_size positions. Two contexts differ from that, here with block_size=4 and a text a … f:

    ```
    number      0  1  2  3  4  5  6
    rolling     S  a  b  c  d  e  f
    window 0   [S  a  b  c] d                   targets a b c d
    window 1         [b  c  d  e] f             targets e f: it would begin with d, and have room for two more

    number      0  1  2  3  4  5
    fixed       a  b  c  d  e  f                stride=2; the last token of a window is one of its block_size tokens
    window 0   [a  b  c] d                      targets b c d
    window 1         [c  d  e] f                targets e f
    ```

    Args:
        tokens: the tokens of all texts, end to end.
        first: [texts] the first token of each.
        last: [texts] the one past its last.
        opening: the special tokens that a text may begin with already; if it begins with none, the first is put there.
    """
    framed = (last > first) & ~is_one_of(opening, tokens, first) if opening else np.zeros(len(first), bool)
    length = last - first + framed
    size = context.block_size + (context.name != "fixed_length")  # of a window, with the last target
    beyond = np.maximum(0, length - size)
    count = np.where(length > 1, 1 + -(-beyond // context.step), 0)
    text, number = numbered(count)
    # Counted from the special token, where there is one.
    start = number * context.step
    end = np.minimum(start + size, length[text])
    scored = np.where(number == 0, 1, start - context.step + size)
    if context.name == "rolling":
        start = np.minimum(start, beyond[text])
    origin = first[text] - framed[text]
    opens = (number == 0) & framed[text]
    return Windows(origin + start + opens, origin + end, origin + scored, opens, list(opening[:1]), [])


def disjoint_windows(block_size: int, documents: Documents, opening: Sequence[int], closing: Sequence[int]) -> Windows:
    """Returns pieces of each document that do not overlap, each between special tokens, as with block_size=4:

    ```
    document   a  b  c  d  e
    window 0   C  a  b  S               C: the special token that opens a text
    window 1   C  c  d  S               S: the one that closes it
    window 2   C  e  S
    ```

    Args:
        opening: the special tokens that a document may begin with already; the first is put before each piece.
        closing: the special tokens that it may end with already; the first is put after each piece.
    """
    head, tail = list(opening[:1]), list(closing[:1])
    room = block_size - len(head) - len(tail)
    if room < 1:
        raise UserError(
            f"preprocess.block_size={block_size} has no room for a token between the special ones. Use more than 2."
        )
    first, last = documents.edges[:-1], documents.edges[1:]
    # Special tokens that a document has already are replaced by those put around its pieces.
    first = first + ((last > first) & is_one_of(opening, documents.tokens, first))
    last = last - ((last > first) & is_one_of(closing, documents.tokens, last - 1))
    document, number = numbered(-(-(last - first) // room))
    starts = first[document] + number * room
    ends = np.minimum(starts + room, last[document])
    return Windows(starts, ends, starts, np.ones(len(starts), bool), head, tail)


def numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each window the number of its text, and its own within that text, from the windows of each [D]."""
    text = np.repeat(np.arange(len(counts)), counts)
    return text, np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)


def is_one_of(ids: Sequence[int], tokens: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns whether the token at each index is one of `ids`; an index past either end stands for the token there."""
    return np.isin(tokens[np.clip(indices, 0, len(tokens) - 1)], ids)
