"""The rows of an evaluation, by its `score`: what a model is shown at once, and which tokens are its targets.

Shapes: T positions, U of a decoder beside an encoder, n scored positions of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmlab.data.documents import CONTINUES, FLAGS, Documents
from lmlab.data.sampler import EVALUATION
from lmlab.errors import UserError
from lmlab.evaluation.metrics import EXACT
from lmlab.evaluation.windows import Windows
from lmlab.objectives import Example, Objective, make_example
from lmlab.objectives.mlm import random_words, uniform


class Row(NamedTuple):
    """One window as the model gets it."""

    inputs: np.ndarray
    """[T] ids."""
    positions: np.ndarray
    """[n] the scored positions."""
    targets: np.ndarray
    """[n] the id to predict at each of them."""
    tokens: np.ndarray
    """[n] the number of each target among the documents' tokens; of one that is no token of the text, such as a
    sentinel, that of the token beside it."""
    prefix: int = 0
    """The number of first positions that every position may attend to."""
    counted: np.ndarray | None = None
    """The tokens that the row counts; None is its targets."""
    factor: float = 1.0
    """The factor of the nll of each target."""
    half: int = 0
    """The entry of `DocumentSums.halves` that the nll of the row is added to."""
    decoder_inputs: np.ndarray | None = None
    """[U] the ids that the decoder of an encoder-decoder reads."""
    textless: np.ndarray | None = None
    """[n] bool: the targets that are no token of the text. They count as targets, without bytes and words."""
    draws: np.ndarray | None = None
    """[n] the random numbers of `Example.draws`; None without a generator."""
    documents: np.ndarray | None = None
    """The number of positions of each document in the inputs, where they do not see one another; else None."""


@dataclass(frozen=True)
class WindowRows:
    """One row for each window, with the targets that the objective chooses in it."""

    documents: Documents
    windows: Windows
    objective: Objective
    seed: int
    """The seed of the objective's masks. It is not that of a run, so that runs of all seeds are scored on the same
    positions."""
    score_end: bool = True
    """False to leave out the targets that end a document."""

    @property
    def lengths(self) -> np.ndarray:
        """[rows] the number of tokens of each, without special ones around it."""
        return self.windows.lengths

    def row(self, index: int) -> Row:
        """Returns the row of a window.

        If the model does not see ahead, the objective is given the window as one text, and its targets without those
        of earlier windows are kept: window 1 of `overlapping_windows`' example becomes

        ```
        inputs      b  c  d  e             (nothing is predicted from the last token, f)
        positions         2  3
        targets           e  f
        ```

        Otherwise, and where documents do not see one another, it is given the part of each document on its own: what it
        draws for a token is then a function of (seed, document, position in it), whatever the windows are. For an
        encoder-decoder the window is one text.
        """
        w, shift = self.windows, self.objective.target_shift
        start, end = int(w.starts[index]), int(w.ends[index])
        head, tail = (w.head, w.tail) if w.framed[index] else ([], [])
        if self.objective.auto_class == "AutoModelForSeq2SeqLM":
            example = make_example(self.objective, self.documents.tokens[start:end], (self.seed, EVALUATION, index))
            tokens = targets_in_text(self.objective, example)
            row = Row(
                np.array([*head, *example.inputs, *tail]),
                example.positions,
                example.targets,
                start + beside_text(tokens),
                decoder_inputs=example.decoder_inputs,
                textless=tokens < 0,
            )
            return self.scored(row)
        if not self.objective.bidirectional and not w.document_attention:
            ids = np.concatenate([np.array(head, np.int32), self.documents.tokens[start:end]])
            continues = np.concatenate([np.zeros(len(head), bool), self.documents.continues(start, end)])
            key = (self.seed, EVALUATION, index)
            example = make_example(self.objective, ids, key, continues=continues)
            tokens = start - len(head) + example.positions + shift
            scored = tokens >= w.scored[index]
            # The last token is a target alone, unless positions before it see it.
            inputs = example.inputs[: max(len(example.inputs) - shift, example.prefix)]
            own, targets = example.positions[scored], example.targets[scored]
            return self.scored(Row(inputs, own, targets, tokens[scored], example.prefix))
        examples, draws = [], list[np.ndarray]()
        for document, first, stop in document_parts(self.documents, start, end):
            key, offset = (self.seed, EVALUATION, document), first - int(self.documents.edges[document])
            ids, continues = self.documents.tokens[first:stop], self.documents.continues(first, stop)
            example = make_example(self.objective, ids, key, offset, continues=continues)
            examples.append((example.inputs, example.targets, first + example.positions + shift))
            if example.draws is not None:
                draws.append(example.draws)
        inputs, targets, tokens = (np.concatenate(arrays) for arrays in zip(*examples, strict=True))
        ids = np.array([*head, *inputs, *tail])
        # A decoder that may see all of each part sees all of the window, as in training.
        prefix = len(ids) if example.prefix else 0
        own = tokens - shift - start + len(head)
        documents = documents_of(w, self.documents, start, end)
        row = Row(
            ids, own, targets, tokens, prefix, draws=np.concatenate(draws) if draws else None, documents=documents
        )
        return self.scored(row)

    def scored(self, row: Row) -> Row:
        """Returns a row with those of its targets that are scored: all, or without the ends of documents."""
        if self.score_end:
            return row
        kept = ~self.documents.ends(row.tokens)
        if row.textless is not None:
            kept |= row.textless
        of_targets = {name: getattr(row, name) for name in ("positions", "targets", "tokens", "textless", "draws")}
        return row._replace(**{name: array[kept] for name, array in of_targets.items() if array is not None})

    def __len__(self) -> int:
        return len(self.windows)


def document_parts(documents: Documents, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields the documents with tokens in start … end - 1, each with the first of them and one past the last."""
    edges = documents.edges
    for document in range(np.searchsorted(edges, start, side="right") - 1, np.searchsorted(edges, end)):
        first, stop = max(start, int(edges[document])), min(end, int(edges[document + 1]))
        if first < stop:
            yield document, first, stop


def documents_of(windows: Windows, documents: Documents, start: int, end: int) -> np.ndarray | None:
    """Returns `Row.documents` of a window with the tokens start … end - 1."""
    if not windows.document_attention:
        return None
    return np.array([stop - first for _, first, stop in document_parts(documents, start, end)])


def targets_in_text(objective: Objective, example: Example) -> np.ndarray:
    """Returns the number of each target of an example among the ids it was made of, [N]; -1 for no token of them."""
    return example.positions + objective.target_shift if example.tokens is None else example.tokens


def beside_text(tokens: np.ndarray) -> np.ndarray:
    """Replaces each -1 among the numbers of tokens [N] by the number after it, behind the last one by that."""
    own = np.flatnonzero(tokens >= 0)
    nearest = np.searchsorted(own, np.arange(len(tokens))).clip(max=len(own) - 1)
    beside: np.ndarray = tokens[own[nearest]] if len(own) else np.zeros(len(tokens), np.int64)
    return beside


def check_targets(objective: Objective, documents: Documents, size: int) -> None:
    """Refuses an objective whose targets are not the text's own tokens.

    They have to be those that `Example.tokens` says, or those `target_shift` after their positions, of which it counts
    bytes and document.
    An objective whose metric is called "perplexity" has to score every token but the first.

    Args:
        size: the number of tokens of the documents to check it on.

    Raises:
        UserError: a target is another token; names its position.
    """
    ids, continues = documents.tokens[:size], documents.continues(0, size)
    example = make_example(objective, ids, (0, EVALUATION, 0), continues=continues)
    positions, targets = example.positions, example.targets
    tokens = targets_in_text(objective, example)
    inside = tokens < len(ids)
    textless = tokens < 0 if example.tokens is not None else np.zeros(len(tokens), bool)
    wrong = np.flatnonzero(~textless & (~inside | (ids[np.where(inside, tokens, 0)] != targets)))
    if len(wrong):
        position, target = positions[wrong[0]], targets[wrong[0]]
        expected = "the token after it" if objective.target_shift else "the token there"
        if example.tokens is not None:
            expected = f"token {tokens[wrong[0]]} of the block"
        raise UserError(
            f"{type(objective).__name__} asks for token {target} at position {position} of a block, and {expected} is "
            "another:\nwhich document and bytes it scores can't be known. Return targets that are the text's tokens."
        )
    scored, scorable = len(np.unique(positions)), len(ids) - objective.target_shift
    if objective.metric == EXACT and scored < scorable:
        raise UserError(
            f'{type(objective).__name__} calls its metric "{EXACT}", and scores {scored} of {scorable} tokens of a '
            "block: give the metric another name."
        )


class PseudoRows:
    """One row for each token, hidden in its window: pseudo-log-likelihood (Salazar et al. 2020, section 2).

    ```
    document   The  cat  sat
    row 0      C  <mask>  cat   sat   S         target The
    row 1      C   The  <mask>  sat   S         target cat
    row 2      C   The   cat  <mask>  S         target sat
    ```
    """

    def __init__(
        self,
        documents: Documents,
        windows: Windows,
        mask_id: int,
        special_ids: list[int],
        within_word: bool = False,
        sample: float | None = None,
        seed: int | None = None,
        score_end: bool = True,
    ):
        """Chooses the tokens to score.

        Args:
            mask_id: the id that hides a token.
            special_ids: the ids that are never scored.
            within_word: True to hide the rest of the token's word as well (PLL-word-l2r, Kauf and Ivanova 2023).
            sample: the probability with which each token is scored, drawn from (seed, document, position); None scores
                all.
            score_end: False to leave out the tokens that end a document also where the id is none of `special_ids`.
        """
        self.documents, self.windows, self.mask_id, self.within_word = documents, windows, mask_id, within_word
        candidates = ~np.isin(documents.tokens, special_ids)
        if not score_end:
            candidates &= ~documents.ends(np.arange(len(candidates)))
        if sample is not None:
            # The fourth word of each position: masks are decided by the others.
            words = (
                random_words((seed or 0, EVALUATION, document), 0, int(length))[3]
                for document, length in enumerate(documents.lengths)
            )
            candidates &= np.concatenate([uniform(word) < sample for word in words])
        parts = [np.flatnonzero(candidates[a:b]) + a for a, b in zip(windows.starts, windows.ends, strict=True)]
        self.tokens = np.concatenate([np.zeros(0, np.int64), *parts])
        self.window_of = np.repeat(np.arange(len(parts)), np.array([len(part) for part in parts], np.int64))
        self.lengths: np.ndarray = windows.lengths[self.window_of]

    def row(self, index: int) -> Row:
        """Returns the row of a token."""
        w, token, window = self.windows, int(self.tokens[index]), int(self.window_of[index])
        start, end = int(w.starts[window]), int(w.ends[window])
        ids = np.array(self.documents.tokens[start:end])
        hidden = token + 1
        if self.within_word:
            while hidden < end and self.documents.spans[hidden, FLAGS] & CONTINUES:
                hidden += 1
        ids[token - start : hidden - start] = self.mask_id
        head, tail = (w.head, w.tail) if w.framed[window] else ([], [])
        tokens = np.array([token])
        return Row(
            np.array([*head, *ids, *tail]),
            tokens - start + len(head),
            self.documents.tokens[tokens],
            tokens,
            documents=documents_of(w, self.documents, start, end),
        )

    def __len__(self) -> int:
        return len(self.tokens)


class ElboRows:
    """Several rows for each window, in which random tokens are hidden: the evidence lower bound (ELBO) in any order.

    A model that predicts hidden tokens from all others can write a text of L tokens in any order, one token after the
    other. The nll of the text under a random order is at most the mean of the nll over all orders. Of that mean only
    the number k of hidden tokens and which ones they are matter (Uria et al. 2014; Hoogeboom et al. 2022):

    ```
    -log p(x)  ≤  Σ over k = 1 … L of  1/k · mean over sets M of k tokens of  Σ over i in M of  -log p(x_i | others)
               =  mean over k and M of  L/k · Σ over i in M of  -log p(x_i | others)           others: those not in M
    ```

    A row draws a k and a set M, so that the mean over rows has the bound as its expected value, exactly:

    ```
    document           The     cat     sat    on
    k = 1, M = {2}     The     cat   <mask>   on       4/1 · nll(sat)
    k = 3, M = {0,1,3} <mask> <mask>   sat  <mask>     4/3 · (nll(The) + nll(cat) + nll(on))
    ```

    The rows of a window are two independent halves, whose difference tells the error that is due to the draws. Within a
    half the k are spread evenly over 1 … L. Whatever is drawn is a function of (seed, window, row).
    """

    def __init__(
        self, documents: Documents, windows: Windows, mask_id: int, draws: int, seed: int, score_end: bool = True
    ):
        """Takes the windows, in which each token is scored.

        Args:
            mask_id: the id that hides a token.
            draws: the number of rows for each window; an even one.
            score_end: False to bound the nll of the text given the tokens that end documents: these are never hidden.
        """
        if draws % 2:
            raise UserError(f"draws={draws}: it has to be an even number, as two halves are compared for the error.")
        self.documents, self.windows, self.mask_id, self.draws, self.seed = documents, windows, mask_id, draws, seed
        self.score_end = score_end
        self.lengths: np.ndarray = np.tile(windows.lengths, draws)

    def row(self, index: int) -> Row:
        """Returns the row of a draw: those of the first draw of all windows come first."""
        w, (draw, window) = self.windows, divmod(index, len(self.windows))
        start, end = int(w.starts[window]), int(w.ends[window])
        own = np.arange(start, end)
        if not self.score_end:
            own = own[~self.documents.ends(own)]
        length, (half, stratum) = len(own), divmod(draw, self.draws // 2)
        # The counter keeps these words apart from those of masks, whose third is 0, and of orders, whose last is.
        stream = np.random.Philox(key=np.array([self.seed, EVALUATION], np.uint64), counter=[0, draw, 1, window + 1])
        random = np.random.Generator(stream)
        hidden = min(length, 1 + int(length * (stratum + random.random()) / (self.draws // 2)))
        chosen = own[np.sort(random.permutation(length)[:hidden])] - start
        ids = np.array(self.documents.tokens[start:end])
        targets = ids[chosen]
        ids[chosen] = self.mask_id
        head, tail = (w.head, w.tail) if w.framed[window] else ([], [])
        return Row(
            np.array([*head, *ids, *tail]),
            chosen + len(head),
            targets,
            start + chosen,
            counted=own if draw == 0 else own[:0],
            factor=length / (max(1, hidden) * self.draws),
            half=2 * window + half,
            documents=documents_of(w, self.documents, start, end),
        )

    def __len__(self) -> int:
        return len(self.lengths)
