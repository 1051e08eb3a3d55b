"""Lets lmlab's own training run in turns: a Lightning callback, named by the run's config."""

from typing import Any

from lightning.pytorch.callbacks import Callback

from benchmarks.side import Turns


class InTurns(Callback):
    turns: Turns
    """The turns of this process, set before the run begins."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.turns.start(module.model)

    # A step's loss is its share of the sums that lmlab logs its own from.

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = module.train_nll.nll.clone(), module.train_nll.targets.clone()

    def on_before_optimizer_step(self, trainer: Any, module: Any, *args: Any) -> None:
        nll, targets = self.before
        self.loss = (module.train_nll.nll - nll) / (module.train_nll.targets - targets)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.turns.step(self.loss):
            self.turns.start(module.model)
