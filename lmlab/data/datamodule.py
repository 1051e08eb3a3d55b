"""Batches of blocks, and the loaders that give them (guide, `DataCollatorForLanguageModeling`).

Shapes: B samples, T positions, U of a decoder beside an encoder, N scored positions of the whole batch.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lmlab.data.blocks import Blocks
from lmlab.data.mixture import MixedBlocks, order_of
from lmlab.data.sampler import Draw, EvaluationSampler, TrainSampler, micro_batch_size
from lmlab.data.warmup import BatchSizes, BlockLengths
from lmlab.distributed.signals import signals_blocked
from lmlab.objectives import Objective, make_example


class Batch(NamedTuple):
    """The micro batch that one rank trains on at once."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor | None
    """[B, T] int64, 0 on padding; None if no row is padded."""
    positions: Tensor
    """[N] int64 indices of the scored positions in the flattened [B·T], or [B·U] with `decoder_ids`."""
    targets: Tensor
    """[N] int64 ids of the tokens to predict there."""
    tokens: int
    """The number of tokens of the batch, without padding; those that a decoder beside an encoder reads included."""
    number: int
    """The number of micro batches of this rank before this one in the whole run."""
    divisor: int
    """The number of tokens that the sum of the losses stands for: see `Example.divisor`."""
    weights: Tensor | None = None
    """[N] float32: the factor of the nll of each target; None is 1 for each."""
    prefix: Tensor | None = None
    """[B] int64: the number of first positions that every position of a row may attend to; None is 0 for each."""
    decoder_ids: Tensor | None = None
    """[B, U] int64: what the decoder of an encoder-decoder reads; None for other models."""
    document_positions: Tensor | None = None
    """[B, T] int64: the position of each token in its document, where it sees no other; None if each row is one text.
    A document begins where it is 0, and each token of padding is one."""
    hidden: Tensor | None = None
    """[K] int64 indices of the targets whose tokens a generator fills in; None without one."""
    draws: Tensor | None = None
    """[K] float64: the uniform random number by which each of these tokens is drawn."""


class Batches(Dataset[Batch]):
    """The data set whose items are whole batches, each made in the worker process that draws it."""

    def __init__(
        self,
        blocks: Blocks | MixedBlocks,
        objective: Objective,
        seed: int,
        pad_id: int,
        steps: int,
        accumulate: int,
        lengths: BlockLengths | None = None,
    ):
        """Takes the blocks, the objective, and what its draws depend on.

        Args:
            steps: the number of optimizer steps of the whole run.
            accumulate: the number of micro batches of an optimizer step.
            lengths: the length of the rows of each step, where blocks are cut; None leaves them whole.
        """
        self.lengths = lengths
        self.blocks, self.objective, self.seed, self.pad_id = blocks, objective, seed, pad_id
        self.steps, self.accumulate = steps, accumulate

    def __getitem__(self, item: tuple[int, list[Draw]]) -> Batch:
        number, draws = item
        step = number // self.accumulate
        length = None if self.lengths is None else self.lengths.of(step)
        return collate(self.blocks, draws, self.objective, self.seed, self.pad_id, number, step / self.steps, length)


def collate(
    blocks: Blocks | MixedBlocks | Sequence[np.ndarray],
    draws: Sequence[Draw],
    objective: Objective,
    seed: int,
    pad_id: int,
    number: int = 0,
    progress: float = 0.0,
    length: int | None = None,
) -> Batch:
    """Makes a batch of the drawn blocks: the objective decides the targets, and only then rows are padded.

    Padding is therefore never a target, and an end-of-text token always can be, also where the two share an id.

    Two blocks, the second one short, under a causal objective and a masked one (B = 2, T = 4):

        blocks           The cat sat </s>    On it
                           5   6   7    2     8  9

        causal           input_ids   5 6 7 2     attention_mask  1 1 1 1
                                     8 9 0 0                     1 1 0 0
                         positions   0 1 2   4   in the flattened 2·4
                         targets     6 7 2   9

        masked           input_ids   5 3 7 2     positions       1   4
                                     3 9 0 0     targets         6   8

    Args:
        number: the number of micro batches of this rank before this one in the whole run.
        progress: the share of the optimizer steps of the run that were made before.
        length: the tokens of a row, into which blocks are cut; None for whole blocks.
    """
    rows = []
    for draw in draws:
        ids, continues, documents = blocks[draw.block], None, None
        if isinstance(blocks, Blocks | MixedBlocks):
            continues, documents = blocks.continues(draw.block), blocks.documents(draw.block)
        for start in range(0, len(ids), length or len(ids)):
            part = slice(start, start + (length or len(ids)))
            given: dict[str, Any] = {"progress": progress, "number": draw.number, "first": start}
            given["continues"] = None if continues is None else continues[part]
            given["documents"] = None if documents is None else lengths_within(documents, part)
            rows.append(make_example(objective, ids[part], (seed, draw.epoch, draw.block), **given))
    weights = None
    if any(row.weights is not None for row in rows):
        ones = (np.ones(len(row.targets)) if row.weights is None else row.weights for row in rows)
        weights = torch.from_numpy(np.concatenate([*ones]).astype(np.float32))
    tokens = sum(len(ids) for row in rows for ids in (row.inputs, row.decoder_inputs) if ids is not None)
    divisor = sum(len(row.targets) if row.divisor is None else row.divisor for row in rows)
    padded = pad_rows(rows, pad_id)
    others = prefix_of(rows), decoder_ids_of(rows, pad_id), document_positions_of(rows), *draws_of(rows)
    return Batch(*padded, tokens, number, divisor, weights, *others)


def lengths_within(documents: np.ndarray, part: slice) -> np.ndarray:
    """Returns the lengths of the documents in a part of a block, without those that have no token there.

    Args:
        documents: [D] the lengths of the documents of the whole block.
        part: the positions of the part in the block.
    """
    edges = np.concatenate([[0], np.cumsum(documents)]).clip(part.start, part.stop)
    lengths: np.ndarray = np.diff(edges)
    return lengths[lengths > 0]


class Unpadded(Protocol):
    """A row that is still of its own length."""

    @property
    def inputs(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def prefix(self) -> int: ...
    @property
    def decoder_inputs(self) -> np.ndarray | None: ...
    @property
    def draws(self) -> np.ndarray | None: ...
    @property
    def documents(self) -> np.ndarray | None: ...


def pad_rows(rows: Sequence[Unpadded], pad_id: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Pads rows on the right, to the longest of them.

    Returns:
        input_ids [B, T], attention_mask [B, T] or None, positions [N] in the flattened [B·T] or [B·U], and targets [N].
    """
    input_ids, attention_mask = padded([row.inputs for row in rows], pad_id)
    length = max(len(row.inputs if row.decoder_inputs is None else row.decoder_inputs) for row in rows)
    positions = np.concatenate([i * length + row.positions for i, row in enumerate(rows)]).astype(np.int64)
    targets = np.concatenate([row.targets for row in rows]).astype(np.int64)
    mask = None if attention_mask.all() else torch.from_numpy(attention_mask)
    return torch.from_numpy(input_ids), mask, torch.from_numpy(positions), torch.from_numpy(targets)


def padded(texts: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts padded on the right to the longest of them, and a mask that is 0 on padding: [B, T] int64 each."""
    length = max(map(len, texts))
    ids, mask = np.full((len(texts), length), pad_id, np.int64), np.zeros((len(texts), length), np.int64)
    for number, text in enumerate(texts):
        ids[number, : len(text)] = text
        mask[number, : len(text)] = 1
    return ids, mask


def decoder_ids_of(rows: Sequence[Unpadded], pad_id: int) -> Tensor | None:
    """Returns what the decoder of an encoder-decoder reads, [B, U] int64; None for other models.

    It needs no mask: a decoder's positions do not see the padding after them.
    """
    texts = [row.decoder_inputs for row in rows if row.decoder_inputs is not None]
    return torch.from_numpy(padded(texts, pad_id)[0]) if texts else None


def prefix_of(rows: Sequence[Unpadded]) -> Tensor | None:
    """Returns the prefix of each row, [B] int64; None where all are 0, as then no mask has to be made."""
    return torch.tensor([row.prefix for row in rows]) if any(row.prefix for row in rows) else None


def document_positions_of(rows: Sequence[Unpadded]) -> Tensor | None:
    """Returns the position of each token in its document, [B, T] int64, 0 on padding.

    None where no row has two documents, as then no mask has to be made:

    ```
    documents   2 3      positions   0 1 0 1 2
                4                    0 1 2 3 0
    ```
    """
    lengths = [np.array([len(row.inputs)]) if row.documents is None else row.documents for row in rows]
    if all(len(of_row) < 2 for of_row in lengths):
        return None
    positions = np.zeros((len(rows), max(len(row.inputs) for row in rows)), np.int64)
    for number, of_row in enumerate(lengths):
        starts = np.repeat(np.cumsum(of_row) - of_row, of_row)
        positions[number, : len(starts)] = np.arange(len(starts)) - starts
    return torch.from_numpy(positions)


def draws_of(rows: Sequence[Unpadded]) -> tuple[Tensor | None, Tensor | None]:
    """Returns the targets whose tokens a generator fills in, and the draw of each: `hidden` and `draws` of a batch."""
    if all(row.draws is None for row in rows):
        return None, None
    draws = np.concatenate([np.full(len(row.positions), -1.0) if row.draws is None else row.draws for row in rows])
    hidden = np.flatnonzero(draws >= 0)
    return torch.from_numpy(hidden), torch.from_numpy(draws[hidden])


class Rows(Protocol):
    """A held-out data set whose items are batches, each asked for by the indices of its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> NamedTuple: ...


class TimedLoader(DataLoader[Any]):
    """A loader that counts the seconds for which its reader waits for batches."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with signals_blocked():
            batches = super().__iter__()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class HeldOutData(L.LightningDataModule):
    """The data module of an evaluation; it knows its rank from the trainer that it is attached to.

    Args:
        batch_size: the number of rows of a batch of one rank.
    """

    def __init__(self, held_out: Rows, batch_size: int, num_workers: int = 0):
        super().__init__()
        self.held_out, self.rows_at_once, self.num_workers = held_out, batch_size, num_workers

    def val_dataloader(self) -> TimedLoader:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = EvaluationSampler(len(self.held_out), self.rows_at_once, rank, world_size)
        return self.make_loader(self.held_out, sampler)

    def make_loader(self, batches: Batches | Rows, sampler: TrainSampler | EvaluationSampler) -> TimedLoader:
        """Returns a loader of the batches that a sampler asks for."""
        return TimedLoader(
            batches,  # type: ignore[arg-type]
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            # A run on the CPU of a machine with a GPU needs no pinned memory.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )


class BlocksDataModule(HeldOutData):
    """The data module of a run: training batches by step, and the held-out rows.

    Args:
        batch_size: the number of samples of an optimizer step, over all ranks and accumulated micro batches.
        steps: the number of optimizer steps of the whole run.
        accumulate: the number of micro batches of an optimizer step.
        tokenizer: the tokenizer for callbacks that read or generate text.
        whole: all held-out rows, if `held_out` is a part of them; they are scored once, after training.
        sizes: the samples of each step, where they grow to `batch_size`.
        lengths: the length of the rows of each step, where blocks are cut; None leaves them whole.
    """

    def __init__(
        self,
        train: Blocks | MixedBlocks,
        held_out: Rows,
        objective: Objective,
        pad_id: int,
        batch_size: int,
        steps: int,
        seed: int,
        *,
        accumulate: int = 1,
        num_workers: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        whole: Rows | None = None,
        sizes: BatchSizes | None = None,
        lengths: BlockLengths | None = None,
    ):
        super().__init__(held_out, batch_size, num_workers)
        self.train, self.tokenizer, self.whole = train, tokenizer, whole
        self.sizes = sizes or BatchSizes(batch_size)
        self.batches = Batches(train, objective, seed, pad_id, steps, accumulate, lengths)
        self.batch_size, self.steps, self.seed, self.accumulate = batch_size, steps, seed, accumulate
        self.order = order_of(train, self.sizes.before(steps))

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        # As many rows at once as in training.
        self.rows_at_once = micro_batch_size(self.batch_size, self.trainer.world_size, self.accumulate)

    def train_dataloader(self) -> TimedLoader:
        assert self.trainer is not None
        self.training_loader = self.make_loader(
            self.batches,
            TrainSampler(
                self.order,
                self.sizes,
                self.steps,
                self.seed,
                self.trainer.global_rank,
                self.trainer.world_size,
                self.accumulate,
                start=self.trainer.global_step * self.accumulate,
            ),
        )
        return self.training_loader

    @property
    def waited(self) -> float:
        """Seconds for which training has waited for batches."""
        return self.training_loader.waited
