"""Scores windows: from them to the nll of every target, summed document by document.

Validation in training and `lmlab.evaluate` use the same rows, batches and sums.

Shapes: B rows, T positions, U of a decoder beside an encoder, N scored positions of the batch, n of one row, S
stretches of the documents (parts of them, or whole ones).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric
from transformers import PreTrainedModel

from lmlab.data.datamodule import decoder_ids_of, pad_rows, prefix_of
from lmlab.data.documents import CONTINUES, COUNTS, FLAGS, Documents
from lmlab.data.sampler import EVALUATION
from lmlab.errors import UserError
from lmlab.evaluation.metrics import EXACT
from lmlab.evaluation.windows import Windows
from lmlab.models.efficiency import shard
from lmlab.models.loss import Scores, score
from lmlab.models.teacher import Teacher
from lmlab.objectives import Example, Objective, make_example
from lmlab.objectives.mlm import random_words, uniform


class ScoringBatch(NamedTuple):
    """The rows that one rank scores at once."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor | None
    """[B, T] int64, 0 on padding; None if no row is padded."""
    positions: Tensor
    """[N] int64 indices of the scored positions in the flattened [B·T], or [B·U] with `decoder_ids`."""
    targets: Tensor
    """[N] int64: the id to predict at each of them."""
    stretches: Tensor
    """[N] int64: the stretch of the documents that each target belongs to."""
    counted: Tensor
    """[M] int64: the stretch of each token that the batch counts; these are its targets, but for `ElboRows`."""
    counts: Tensor
    """[M, 7] int64: the `documents.COUNTS` of each of these tokens."""
    prefix: Tensor | None = None
    """[B] int64: the number of first positions that every position of a row may attend to; None is 0 for each."""
    factors: Tensor | None = None
    """[N] float64: the factor of the nll of each target; None is 1 for each."""
    halves: Tensor | None = None
    """[N] int64: the entry of `DocumentSums.halves` that each target is added to; None if there are none."""
    decoder_ids: Tensor | None = None
    """[B, U] int64: what the decoder of an encoder-decoder reads; None for other models."""


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


@dataclass(frozen=True)
class WindowRows:
    """One row for each window, with the targets that the objective chooses in it."""

    documents: Documents
    windows: Windows
    objective: Objective
    seed: int
    """The seed of the objective's masks. It is not that of a run, so that runs of all seeds are scored on the same
    positions."""

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

        Otherwise it is given the part of each document on its own: what it draws for a token is then a function of
        (seed, document, position in it), whatever the windows are. For an encoder-decoder the window is one text.
        """
        w, shift = self.windows, self.objective.target_shift
        start, end = int(w.starts[index]), int(w.ends[index])
        head, tail = (w.head, w.tail) if w.framed[index] else ([], [])
        if self.objective.auto_class == "AutoModelForSeq2SeqLM":
            example = make_example(self.objective, self.documents.tokens[start:end], (self.seed, EVALUATION, index))
            tokens = targets_in_text(self.objective, example)
            return Row(
                np.array([*head, *example.inputs, *tail]),
                example.positions,
                example.targets,
                start + beside_text(tokens),
                decoder_inputs=example.decoder_inputs,
                textless=tokens < 0,
            )
        if not self.objective.bidirectional:
            ids = np.concatenate([np.array(head, np.int32), self.documents.tokens[start:end]])
            continues = np.concatenate([np.zeros(len(head), bool), self.documents.continues(start, end)])
            key = (self.seed, EVALUATION, index)
            example = make_example(self.objective, ids, key, continues=continues)
            tokens = start - len(head) + example.positions + shift
            scored = tokens >= w.scored[index]
            # The last token is a target alone, unless positions before it see it.
            inputs = example.inputs[: max(len(example.inputs) - shift, example.prefix)]
            return Row(inputs, example.positions[scored], example.targets[scored], tokens[scored], example.prefix)
        parts = []
        for document, first, stop in self.parts(start, end):
            key, offset = (self.seed, EVALUATION, document), first - int(self.documents.edges[document])
            ids, continues = self.documents.tokens[first:stop], self.documents.continues(first, stop)
            example = make_example(self.objective, ids, key, offset, continues=continues)
            parts.append((example.inputs, example.targets, first + example.positions + shift))
        inputs, targets, tokens = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        ids = np.array([*head, *inputs, *tail])
        # A decoder that may see all of each part sees all of the window, as in training.
        return Row(ids, tokens - shift - start + len(head), targets, tokens, len(ids) if example.prefix else 0)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yields the documents with tokens in start … end - 1, each with the first of them and one past the last."""
        edges = self.documents.edges
        for document in range(np.searchsorted(edges, start, side="right") - 1, np.searchsorted(edges, end)):
            first, stop = max(start, int(edges[document])), min(end, int(edges[document + 1]))
            if first < stop:
                yield document, first, stop

    def __len__(self) -> int:
        return len(self.windows)


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
    ):
        """Chooses the tokens to score.

        Args:
            mask_id: the id that hides a token.
            special_ids: the ids that are never scored.
            within_word: True to hide the rest of the token's word as well (PLL-word-l2r, Kauf and Ivanova 2023).
            sample: the probability with which each token is scored, drawn from (seed, document, position); None scores
                all.
        """
        self.documents, self.windows, self.mask_id, self.within_word = documents, windows, mask_id, within_word
        candidates = ~np.isin(documents.tokens, special_ids)
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
        return Row(np.array([*head, *ids, *tail]), tokens - start + len(head), self.documents.tokens[tokens], tokens)

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

    def __init__(self, documents: Documents, windows: Windows, mask_id: int, draws: int, seed: int):
        """Takes the windows, in which each token is scored.

        Args:
            mask_id: the id that hides a token.
            draws: the number of rows for each window; an even one.
        """
        if draws % 2:
            raise UserError(f"draws={draws}: it has to be an even number, as two halves are compared for the error.")
        self.documents, self.windows, self.mask_id, self.draws, self.seed = documents, windows, mask_id, draws, seed
        self.lengths: np.ndarray = np.tile(windows.lengths, draws)

    def row(self, index: int) -> Row:
        """Returns the row of a draw: those of the first draw of all windows come first."""
        w, (draw, window) = self.windows, divmod(index, len(self.windows))
        start, end = int(w.starts[window]), int(w.ends[window])
        length, (half, stratum) = end - start, divmod(draw, self.draws // 2)
        # The counter keeps these words apart from those of masks, whose third is 0, and of orders, whose last is.
        stream = np.random.Philox(key=np.array([self.seed, EVALUATION], np.uint64), counter=[0, draw, 1, window + 1])
        random = np.random.Generator(stream)
        hidden = min(length, 1 + int(length * (stratum + random.random()) / (self.draws // 2)))
        chosen = np.sort(random.permutation(length)[:hidden])
        ids = np.array(self.documents.tokens[start:end])
        targets = ids[chosen]
        ids[chosen] = self.mask_id
        head, tail = (w.head, w.tail) if w.framed[window] else ([], [])
        return Row(
            np.array([*head, *ids, *tail]),
            chosen + len(head),
            targets,
            start + chosen,
            counted=np.arange(start, end) if draw == 0 else np.zeros(0, np.int64),
            factor=length / (hidden * self.draws),
            half=2 * window + half,
        )

    def __len__(self) -> int:
        return len(self.lengths)


class HeldOut(Dataset[ScoringBatch]):
    """The data set of an evaluation: an item is a batch, by the indices of its rows.

    Long rows come first, so that little is padding and a lack of memory shows at once.
    """

    def __init__(self, rows: WindowRows | PseudoRows | ElboRows, pad_id: int, facts: dict[str, Any]):
        """Orders the rows.

        Args:
            facts: all that the metrics depend on but the model, for the certificate (records.py).
        """
        self.rows, self.documents, self.pad_id, self.facts = rows, rows.documents, pad_id, facts
        self.order = np.argsort(-rows.lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> ScoringBatch:
        """Returns the batch of some rows; without an index a row without targets, for a rank that has no row left."""
        documents = self.documents
        rows = [self.rows.row(int(self.order[index])) for index in indices]
        if not rows:
            nothing = np.zeros(0, np.int64)
            row = self.rows.row(int(self.order[-1]))
            rows = [Row(row.inputs, nothing, nothing, nothing, decoder_inputs=row.decoder_inputs)]
        tokens = np.concatenate([row.tokens for row in rows])
        counted = np.concatenate([row.tokens if row.counted is None else row.counted for row in rows])
        counts = documents.counts(counted)
        if any(row.textless is not None for row in rows):
            textless = [np.zeros(len(row.tokens), bool) if row.textless is None else row.textless for row in rows]
            counts[np.concatenate(textless), 1:] = 0
        batch = ScoringBatch(
            *pad_rows(rows, self.pad_id),
            torch.from_numpy(documents.stretch_of(tokens)),
            torch.from_numpy(documents.stretch_of(counted)),
            torch.from_numpy(counts),
            prefix_of(rows),
            decoder_ids=decoder_ids_of(rows, self.pad_id),
        )
        if not isinstance(self.rows, ElboRows):
            return batch
        factors, halves = (
            torch.from_numpy(np.repeat([getattr(row, name) for row in rows], [len(row.tokens) for row in rows]))
            for name in ("factor", "half")
        )
        return batch._replace(factors=factors, halves=halves)

    def sums(self) -> "DocumentSums":
        """Returns the metric that adds up the nll of these rows."""
        documents, rows = self.documents, self.rows
        windows = documents.stretch_of(rows.windows.starts) if isinstance(rows, ElboRows) else None
        return DocumentSums(len(documents.names), windows)


class MeanNLL(Metric):
    """The mean nll per target, in nats, over batches and ranks; its exponential is the perplexity.

    Both sums are kept apart and exact: nll in float64, targets as integers. Neither the batch size nor the number of
    devices moves the mean (promise 2).
    """

    full_state_update = False
    nll: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, count: int | None = None) -> None:
        """Adds the nll [N] of scored positions; N may be 0.

        Args:
            count: the number of targets that weighted nll stand for, see `Example.divisor`; None is N.
        """
        # Not in place: a validation under inference mode may have made the state.
        self.nll = self.nll + nll.detach().double().sum()
        self.targets = self.targets + (nll.numel() if count is None else count)

    def compute(self) -> Tensor:
        """Returns the mean, a float64 scalar; nan where nothing was scored."""
        return self.nll / self.targets


class DocumentSums(Metric):
    """Sums for each stretch of the documents over batches and ranks: nll in float64, what was scored as integers.

    Neither the batch size nor the number of devices moves them beyond rounding (promise 2).
    """

    full_state_update = False
    nll: Tensor
    counts: Tensor
    halves: Tensor

    def __init__(self, stretches: int, windows: np.ndarray | None = None):
        """Takes the number of stretches.

        Args:
            windows: [W] of `ElboRows`, the stretch in which each window begins; None for other rows.
        """
        super().__init__()
        self.windows = windows
        self.add_state("nll", torch.zeros((stretches, 2), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros((stretches, len(COUNTS)), dtype=torch.int64), dist_reduce_fx="sum")
        halves = torch.zeros(0 if windows is None else 2 * len(windows), dtype=torch.float64)
        self.add_state("halves", halves, dist_reduce_fx="sum")

    def update(self, nll: Tensor, batch: ScoringBatch) -> None:
        """Adds the nll [N] of a batch's targets; N may be 0."""
        nll = nll.detach().double()
        if batch.factors is not None and batch.halves is not None:
            nll = nll * batch.factors
            self.halves = self.halves.double().index_add(0, batch.halves, nll)
        # Not in place: a validation under inference mode may have made the state. In float64: a trainer in
        # bf16-true casts the empty state with the weights.
        self.nll = self.nll.double().index_add(0, batch.stretches, torch.stack([nll, nll.square()], dim=1))
        self.counts = self.counts.index_add(0, batch.counted, batch.counts)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns Σ nll and Σ nll² [S, 2] float64, and `documents.COUNTS` of what was scored [S, 7] int64.

        Of `ElboRows`, the second sum is the variance of the first: that of a window is the squared difference of the
        two halves of its draws, and is added to the stretch in which the window begins.
        """
        if self.windows is None:
            return self.nll, self.counts
        nll = self.nll.clone()
        stretches = torch.from_numpy(self.windows).to(nll.device)
        nll[:, 1] = 0
        nll[:, 1].index_add_(0, stretches, self.halves.view(-1, 2).diff(dim=1)[:, 0].square())
        return nll, self.counts


class Scorer(L.LightningModule):
    """Scores held-out documents with one model; its `result` is what `DocumentSums` computes, as arrays."""

    def __init__(self, model: PreTrainedModel, sums: DocumentSums, chunk_size: int | None = None):
        """Keeps a model to score with.

        Args:
            sums: the metric that adds up the nll of the rows: see `HeldOut.sums`.
            chunk_size: the number of scored positions whose logits are in memory at once; None for all.
        """
        super().__init__()
        self.model, self.chunk_size = model, chunk_size
        self.sums = sums
        self.result: tuple[np.ndarray, np.ndarray]

    def configure_model(self) -> None:
        if self._device_mesh is not None:
            # The norms of a CPU take no float32 with weights in bf16.
            bf16 = self.trainer.precision == "bf16-mixed" and self._device_mesh.device_type == "cuda"
            shard(self.model, self._device_mesh, bf16)

    def score(self, batch: Any, scale: Tensor | None = None, teacher: Teacher | None = None) -> Scores:
        """Returns the losses of a batch's targets; for `scale` and `teacher` see `lmlab.models.loss.score`."""
        return score(
            self.model,
            batch.input_ids,
            batch.attention_mask,
            batch.positions,
            batch.targets,
            self.chunk_size,
            scale,
            getattr(batch, "weights", None),
            batch.prefix,
            teacher,
            batch.decoder_ids,
        )

    def validation_step(self, batch: ScoringBatch, batch_idx: int) -> None:
        self.sums.update(self.score(batch).nll, batch)

    def on_validation_epoch_end(self) -> None:
        nll, counts = self.sums.compute()
        self.result = nll.cpu().numpy(), counts.cpu().numpy()
        self.sums.reset()
