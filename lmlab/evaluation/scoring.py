"""Scores windows: from them to the nll of every target, summed document by document.

Validation in training and `lmlab.evaluate` use the same rows, batches and sums.

Shapes: B rows, T positions, U of a decoder beside an encoder, N scored positions of the batch, n of one row, S
stretches of the documents (parts of them, or whole ones).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric
from transformers import PreTrainedModel

from lmlab.data.datamodule import decoder_ids_of, document_positions_of, draws_of, pad_rows, prefix_of
from lmlab.data.documents import COUNTS
from lmlab.evaluation.rows import ElboRows, PseudoRows, WindowRows
from lmlab.evaluation.token_scores import TokenScores
from lmlab.models.adapters import merged_in_evaluation
from lmlab.models.efficiency import shard
from lmlab.models.loss import Scores, score
from lmlab.models.teacher import Teacher


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
    tokens: Tensor
    """[N] int64: the number of each target among the documents' tokens."""
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
    document_positions: Tensor | None = None
    """[B, T] int64: the position of each token in its document, where it sees no other; None if each row is one text.
    A document begins where it is 0, and each token of padding is one."""
    hidden: Tensor | None = None
    """[K] int64 indices of the targets whose tokens a generator fills in; None without one."""
    draws: Tensor | None = None
    """[K] float64: the uniform random number by which each of these tokens is drawn."""


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
            row, nothing = self.rows.row(int(self.order[-1])), np.zeros(0, np.int64)
            row = row._replace(positions=nothing, targets=nothing, tokens=nothing, counted=None, textless=None)
            rows = [row._replace(draws=None if row.draws is None else np.zeros(0))]
        tokens = np.concatenate([row.tokens for row in rows])
        counted = np.concatenate([row.tokens if row.counted is None else row.counted for row in rows])
        counts = documents.counts(counted)
        if any(row.textless is not None for row in rows):
            textless = [np.zeros(len(row.tokens), bool) if row.textless is None else row.textless for row in rows]
            counts[np.concatenate(textless), 1:] = 0
        hidden, drawn = draws_of(rows)
        batch = ScoringBatch(
            *pad_rows(rows, self.pad_id),
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(documents.stretch_of(tokens)),
            torch.from_numpy(documents.stretch_of(counted)),
            torch.from_numpy(counts),
            prefix_of(rows),
            decoder_ids=decoder_ids_of(rows, self.pad_id),
            document_positions=document_positions_of(rows),
            hidden=hidden,
            draws=drawn,
        )
        if not isinstance(self.rows, ElboRows):
            return batch
        factors, halves = (
            torch.from_numpy(np.repeat([getattr(row, name) for row in rows], [len(row.tokens) for row in rows]))
            for name in ("factor", "half")
        )
        return batch._replace(factors=factors, halves=halves)

    @property
    def causal(self) -> bool:
        """True if each target is predicted from the tokens before it."""
        return isinstance(self.rows, WindowRows) and not self.rows.objective.bidirectional

    @property
    def losses(self) -> Callable[..., Scores] | None:
        """`Objective.losses` of the objective whose targets the rows have; None where it has none."""
        return getattr(self.rows.objective, "losses", None) if isinstance(self.rows, WindowRows) else None

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


def added_up(state: Tensor, group: Any = None) -> list[Tensor]:
    """Adds a state up over all ranks, in place, as torchmetrics has kept a copy; returns the tensors it has to sum.

    Its own function gathers the states of all ranks on each of them.
    """
    torch.distributed.all_reduce(state, group=group)
    return [state]


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
        super().__init__(dist_sync_fn=added_up)
        self.stretches, self.windows = stretches, windows
        # Empty until the first batch of a validation, as torchmetrics keeps a copy of what a state begins with.
        for name in ("nll", "counts", "halves"):
            self.add_state(name, torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, batch: ScoringBatch) -> None:
        """Adds the nll [N] of a batch's targets; N may be 0."""
        nll = nll.detach().double()
        if not len(self.nll):
            self.nll = nll.new_zeros(self.stretches, 2)
            self.counts = batch.counts.new_zeros(self.stretches, len(COUNTS))
            self.halves = nll.new_zeros(0 if self.windows is None else 2 * len(self.windows))
        if batch.factors is not None and batch.halves is not None:
            nll = nll * batch.factors
            self.halves.index_add_(0, batch.halves, nll)
        self.nll.index_add_(0, batch.stretches, torch.stack([nll, nll.square()], dim=1))
        self.counts.index_add_(0, batch.counted, batch.counts)

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

    def __init__(
        self,
        model: PreTrainedModel,
        sums: DocumentSums,
        chunk_size: int | None = None,
        held_out_losses: Callable[..., Scores] | None = None,
        token_scores: TokenScores | None = None,
    ):
        """Keeps a model to score with.

        Args:
            sums: the metric that adds up the nll of the rows: see `HeldOut.sums`.
            chunk_size: the number of scored positions whose logits are in memory at once; None for all.
            held_out_losses: how the rows are scored: see `HeldOut.losses`.
            token_scores: what keeps the scores of each token too.
        """
        super().__init__()
        self.model, self.chunk_size = model, chunk_size
        self.sums, self.held_out_losses, self.token_scores = sums, held_out_losses, token_scores
        self.result: tuple[np.ndarray, np.ndarray]
        self.of_tokens: dict[str, np.ndarray] = {}

    def configure_model(self) -> None:
        if self._device_mesh is not None:
            # The norms of a CPU take no float32 with weights in bf16.
            bf16 = self.trainer.precision == "bf16-mixed" and self._device_mesh.device_type == "cuda"
            shard(self.model, self._device_mesh, bf16)

    def score(
        self,
        batch: Any,
        losses: Callable[..., Scores] | None = None,
        scale: Tensor | None = None,
        teacher: Teacher | None = None,
        observe: Callable[[slice, Tensor], None] | None = None,
        z_loss: float = 0.0,
    ) -> Scores:
        """Returns the losses of a batch's targets, by an objective's own `losses` or by `lmlab.models.loss.score`.

        For `scale`, `teacher`, `observe` and `z_loss` see that.
        """
        with merged_in_evaluation(self.model):
            if losses is not None:
                return losses(self.model, batch, self.chunk_size, scale)
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
                batch.document_positions,
                observe,
                z_loss,
            )

    def validation_step(self, batch: ScoringBatch, batch_idx: int) -> None:
        observe = None if self.token_scores is None else self.token_scores.observe
        nll = self.score(batch, self.held_out_losses, observe=observe).nll
        self.sums.update(nll, batch)
        if self.token_scores is not None:
            self.token_scores.update(nll, batch)

    def on_validation_epoch_end(self) -> None:
        nll, counts = self.sums.compute()
        self.result = nll.cpu().numpy(), counts.cpu().numpy()
        self.sums.reset()
        if self.token_scores is not None:
            self.of_tokens = {name: values.cpu().numpy() for name, values in self.token_scores.compute().items()}
