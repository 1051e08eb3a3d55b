"""From windows to the negative log-likelihood of every target, document by document.

The same rows, batches and sums serve `val/perplexity` in training and `lmlab.evaluate`.

Shapes: B rows, T positions, N scored positions of the whole batch, S stretches of the documents.
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

from lmlab.data.datamodule import Objective, pad_rows
from lmlab.data.documents import CONTINUES, COUNTS, FLAGS, Documents
from lmlab.data.sampler import EVALUATION
from lmlab.errors import UserError
from lmlab.evaluation.windows import Windows
from lmlab.models.efficiency import shard
from lmlab.models.loss import Scores, score
from lmlab.objectives.mlm import lots, uniform


class Targets(NamedTuple):
    """What one rank scores at once."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor | None
    """[B, T] int64, 0 on padding; None where no row is padded."""
    positions: Tensor
    """[N] int64, into the B·T positions: those that are scored."""
    targets: Tensor
    """[N] int64: the token to predict there."""
    stretches: Tensor
    """[N] int64: the stretch of the documents that each belongs to."""
    units: Tensor
    """[N, 7] int64: `documents.COUNTS` of each target."""


class Row(NamedTuple):
    """One window as the model gets it."""

    inputs: np.ndarray
    """[T]."""
    positions: np.ndarray
    """[n], of T: those that are scored."""
    targets: np.ndarray
    """[n] ids."""
    tokens: np.ndarray
    """[n]: which of the documents' tokens each target is."""


@dataclass(frozen=True)
class Labelled:
    """One row per window: the objective says what is a target in it."""

    documents: Documents
    windows: Windows
    objective: Objective
    causal: bool
    seed: int
    """Of masks; apart from a run's, so that runs of several seeds are scored on the same positions."""

    @property
    def lengths(self) -> np.ndarray:
        return self.windows.ends - self.windows.starts

    def row(self, index: int) -> Row:
        w = self.windows
        start, end, framed = int(w.starts[index]), int(w.ends[index]), bool(w.framed[index])
        head = w.head if framed else []
        if self.causal:
            ids = np.concatenate([np.array(head, np.int32), self.documents.tokens[start:end]])
            key = (self.seed, EVALUATION, index)
            inputs, positions, targets = self.objective(ids, key)
            tokens = start - len(head) + positions + 1
            kept = tokens >= w.scored[index]
            # Nothing is predicted from the last token.
            return Row(inputs[:-1], positions[kept], targets[kept], tokens[kept])
        pieces = [self.masked(*piece) for piece in self.pieces(start, end)]
        inputs, targets, tokens = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        tail = w.tail if framed else []
        return Row(np.array([*head, *inputs, *tail]), tokens - start + len(head), targets, tokens)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The documents that have tokens in a window, and the stretch of each."""
        edges = self.documents.edges
        document = int(np.searchsorted(edges, start, side="right")) - 1
        while start < end:
            stop = min(end, int(edges[document + 1]))
            if stop > start:
                yield document, start, stop
            start, document = stop, document + 1

    def masked(self, document: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and which tokens these are; a mask is a function of (seed, document, position)."""
        key = (self.seed, EVALUATION, document)
        first = start - int(self.documents.edges[document])
        inputs, positions, targets = self.objective(self.documents.tokens[start:end], key, first)
        return inputs, targets, start + positions

    def __len__(self) -> int:
        return len(self.windows)


def check_targets(objective: Objective, causal: bool, ids: np.ndarray) -> None:
    """Refuse an objective whose targets are not tokens of the text, each in its place.

    Every target's bytes and document are those of the token it is: the one after its position where
    the objective is causal, else the one at it. Looked at for one block, `ids` [T].

    Raises:
        UserError: names a position.
    """
    _, positions, targets = objective(ids, (0, EVALUATION, 0))
    tokens = positions + causal
    inside = tokens < len(ids)
    wrong = np.flatnonzero(~inside | (ids[np.where(inside, tokens, 0)] != targets))
    if len(wrong):
        position, target = positions[wrong[0]], targets[wrong[0]]
        wanted = "the token after it" if causal else "the token there"
        raise UserError(
            f"{type(objective).__name__} asks for token {target} at position {position} of a block, and {wanted} is "
            "another:\nwhich document and bytes it scores can't be known. Return targets that are the text's tokens."
        )


class Pseudo:
    """One row per token, hidden in its window (pseudo-log-likelihood, Salazar et al. 2020, section 2)."""

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
        """`within_word` also hides the rest of the word (PLL-word-l2r, Kauf and Ivanova 2023).

        `sample` takes each token with this probability, decided by (seed, document, position).
        """
        self.documents, self.windows, self.mask_id, self.within_word = documents, windows, mask_id, within_word
        tokens, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        chosen = None if sample is None else self.chosen(sample, seed or 0)
        for place, (start, end) in enumerate(zip(windows.starts, windows.ends, strict=True)):
            scored = ~np.isin(documents.tokens[start:end], special_ids)
            if chosen is not None:
                scored &= chosen[start:end]
            tokens.append(start + np.flatnonzero(scored))
            places.append(np.full(len(tokens[-1]), place))
        self.tokens, self.places = np.concatenate(tokens), np.concatenate(places)

    def chosen(self, sample: float, seed: int) -> np.ndarray:
        """[tokens] bool."""
        drawn = [
            # The words that decide masks are others.
            uniform(lots((seed, EVALUATION, document), 0, int(length))[3]) < sample
            for document, length in enumerate(self.documents.lengths)
        ]
        return np.concatenate(drawn)

    @property
    def lengths(self) -> np.ndarray:
        return (self.windows.ends - self.windows.starts)[self.places]

    def row(self, index: int) -> Row:
        w, token, place = self.windows, int(self.tokens[index]), int(self.places[index])
        start, end = int(w.starts[place]), int(w.ends[place])
        ids = np.array(self.documents.tokens[start:end])
        hidden = token + 1
        if self.within_word:
            while hidden < end and self.documents.spans[hidden, FLAGS] & CONTINUES:
                hidden += 1
        ids[token - start : hidden - start] = self.mask_id
        head, tail = (w.head, w.tail) if w.framed[place] else ([], [])
        scored = np.array([token])
        return Row(np.array([*head, *ids, *tail]), scored - start + len(head), self.documents.tokens[scored], scored)

    def __len__(self) -> int:
        return len(self.tokens)


class HeldOut(Dataset):
    """What is evaluated: rows by the batch.

    Long ones come first, so that little is padding and a lack of memory shows at once.
    """

    def __init__(self, rows: Labelled | Pseudo, pad_id: int, facts: dict[str, Any]):
        """`facts` are all that the figures depend on but the model: see records.py."""
        self.rows, self.documents, self.pad_id, self.facts = rows, rows.documents, pad_id, facts
        self.order = np.argsort(-rows.lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> Targets:
        """No index gives a row without targets: for a rank that has no row left."""
        documents = self.documents
        rows = [self.rows.row(int(self.order[index])) for index in indices]
        if not rows:
            nothing = np.zeros(0, np.int64)
            rows = [Row(self.rows.row(int(self.order[-1])).inputs, nothing, nothing, nothing)]
        input_ids, attention_mask, positions = pad_rows([(row.inputs, row.positions) for row in rows], self.pad_id)
        tokens = np.concatenate([row.tokens for row in rows])
        return Targets(
            input_ids,
            attention_mask,
            positions,
            torch.from_numpy(np.concatenate([row.targets for row in rows]).astype(np.int64)),
            torch.from_numpy(np.searchsorted(documents.stretches, tokens, side="right") - 1),
            torch.from_numpy(documents.counts(tokens)),
        )


class DocumentSums(Metric):
    """Sums per stretch of the documents over batches and ranks: nll in float64, what was scored as integers.

    Neither the batch size nor the number of devices moves them beyond rounding (promise 2).
    """

    full_state_update = False
    nll: Tensor
    units: Tensor

    def __init__(self, stretches: int):
        super().__init__()
        self.add_state("nll", torch.zeros((stretches, 2), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros((stretches, len(COUNTS)), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, batch: Targets) -> None:
        """`nll` [N] of the batch's targets; N may be 0."""
        nll = nll.detach().double()
        # Not in place: a validation under inference mode may have made the state. In float64: a trainer in
        # bf16-true casts the empty state with the weights.
        self.nll = self.nll.double().index_add(0, batch.stretches, torch.stack([nll, nll.square()], dim=1))
        self.units = self.units.index_add(0, batch.stretches, batch.units)

    def compute(self) -> tuple[Tensor, Tensor]:
        """[S, 2] float64: Σ nll and Σ nll²; [S, 7] int64: `documents.COUNTS` of what was scored."""
        return self.nll, self.units


class Scorer(L.LightningModule):
    """Scores held-out documents with one model."""

    def __init__(self, model: PreTrainedModel, stretches: int, rows: int | None = None):
        """`stretches` of the documents are summed apart; `rows` of logits are held at once (see `rows_at_once`)."""
        super().__init__()
        self.model, self.rows = model, rows
        self.sums = DocumentSums(stretches)

    def configure_model(self) -> None:
        if self._device_mesh is not None:
            shard(self.model, self._device_mesh["data_parallel"])

    def score(self, batch: Any) -> Scores:
        """Score a batch's targets."""
        return score(self.model, batch.input_ids, batch.attention_mask, batch.positions, batch.targets, self.rows)

    def validation_step(self, batch: Targets, batch_idx: int) -> None:
        self.sums.update(self.score(batch).nll, batch)

    def on_validation_epoch_end(self) -> None:
        nll, units = self.sums.compute()
        self.result = nll.cpu().numpy(), units.cpu().numpy()
        self.sums.reset()
