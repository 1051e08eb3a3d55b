"""Accuracy on minimal pairs while a model is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback

from lmlab.data.options import Preprocessing
from lmlab.data.pairs import corpus_of, read_pairs
from lmlab.data.prepared import prepare_validation
from lmlab.data.sampler import EvaluationSampler
from lmlab.evaluation.certify import hold_out
from lmlab.evaluation.suites import minimal_pairs
from lmlab.evaluation.suites.minimal_pairs import ACCURACY, PairRecords
from lmlab.evaluation.windows import Context
from lmlab.training.module import LMModule

METRIC = "val/pairs/accuracy"


class Suites(Callback):
    """Logs at each validation the accuracy on minimal pairs, as `suite=minimal_pairs` of an evaluation measures it.

    `val/pairs/accuracy` is that of all pairs, `val/pairs/PHENOMENON/accuracy` that of each phenomenon. A run with it is
    the same to the last bit as one without.
    """

    def __init__(
        self,
        pairs: str | Sequence[str] | None = None,
        phenomenon: str | None = None,
        batch_size: Annotated[int, Ge(1)] = 64,
        cache_dir: str = "~/.cache/lmlab",
    ):
        """Reads the pairs.

        Args:
            pairs: files of them, by path or glob; None measures nothing.
            phenomenon: the column that names the phenomenon of a pair, see `read_pairs`.
            batch_size: the rows that a rank scores at once; it changes no accuracy.

        Raises:
            UserError: as of `read_pairs`.
        """
        self.pairs = [] if pairs is None else read_pairs(pairs, phenomenon)
        self.batch_size, self.cache = batch_size, Path(cache_dir).expanduser()
        names = dict.fromkeys(pair.phenomenon for pair in self.pairs)
        self.metrics = [METRIC, *(f"val/pairs/{name}/accuracy" for name in names)] if self.pairs else []
        """The names of the metrics that are logged."""

    def setup(self, trainer: L.Trainer, module: LMModule, stage: str) -> None:
        if not self.pairs or stage != "fit":  # the sentences of a validation after training are the same
            return
        data = trainer.datamodule
        tokenizer, block_size = data.tokenizer, module.block_size
        # Held-out text may be scored by another objective than the one that is trained.
        objective = getattr(data.held_out.rows, "objective", data.batches.objective)
        choices = Preprocessing(block_size=block_size, end_of_text=False)
        prepared = prepare_validation(corpus_of(self.pairs), choices, tokenizer, self.cache)
        pseudo = None
        if objective.auto_class == "AutoModelForMaskedLM":
            documents = prepared.validation
            within_word = bool(documents.continues(0, len(documents.tokens)).any())
            pseudo = {"within_word": within_word, "sample": None, "seed": None}
        self.held_out = hold_out(prepared, objective, Context("document", block_size), choices, pseudo=pseudo)
        minimal_pairs.check(self.pairs, self.held_out)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: LMModule) -> None:
        """Measures the accuracy, which the module logs with the metrics of held-out text. All ranks call this."""
        if not self.pairs:
            return
        nll, counts = self.score(trainer, module)
        parts = minimal_pairs.figures_and_totals(
            minimal_pairs.table_of(self.pairs, self.held_out.documents, nll, counts), {}
        )
        values = [parts, *parts[PairRecords.groups].values()]
        module.suite_metrics = dict(zip(self.metrics, (each["figures"][ACCURACY] for each in values), strict=True))

    @torch.no_grad()
    def score(self, trainer: L.Trainer, module: LMModule) -> tuple[np.ndarray, np.ndarray]:
        """Returns the nll [S, 2] and the counts [S, 7] of the sentences over all ranks, as `DocumentSums` has them."""
        sums = self.held_out.sums().to(module.device)
        for indices in EvaluationSampler(len(self.held_out), self.batch_size, trainer.global_rank, trainer.world_size):
            batch = trainer.strategy.batch_to_device(self.held_out[indices], module.device)
            with trainer.precision_plugin.forward_context():
                sums.update(module.score(batch).nll, batch)
        nll, counts = sums.compute()
        return nll.cpu().numpy(), counts.cpu().numpy()
