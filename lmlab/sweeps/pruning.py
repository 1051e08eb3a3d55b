"""A run of a search: what it reports, and when it ends for being hopeless."""

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmlab.errors import first_line
from lmlab.secrets import redacted
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)


class Prune(Callback):
    """Reports each validation to a trial of Optuna, and ends the run where the study's pruner gives it up.

    The run then comes to its end as one that stops early, weights, certificate and all.
    """

    def __init__(self, storage: str, study: str, trial: int, metric: str = "val/loss", pruner: dict | None = None):
        """`trial` is its number; `monitor` one of the figures of a validation."""
        self.storage, self.study, self.number, self.monitor = storage, study, trial, metric
        self.pruner = pruner or {"name": "NopPruner"}
        self.pruned: int | None = None
        """The step after which the run was given up."""

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pruned = state["pruned"]

    def on_train_batch_start(self, *args: Any) -> None:
        self.pruned = None  # it is trained longer, after all

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        number = len(module.validations) - 1  # the one before training says nothing yet
        if number < 1 or trainer.state.fn != TrainerFn.FITTING:
            return
        hopeless = trainer.strategy.broadcast(trainer.is_global_zero and self.report(module, number))
        if hopeless and trainer.global_step < module.steps:
            self.pruned = trainer.global_step
            trainer.should_stop = True
            if trainer.is_global_zero:
                LOG.info("Pruned at step %d: others of the search were better by then.", self.pruned)

    def report(self, module: LMModule, number: int) -> bool:
        """Tell the study, and ask it. A study that can't be reached ends no run."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        from lmlab.sweeps import study

        figures = module.validations[module.global_step]
        try:
            mine = study.joined(self.storage, self.study, self.pruner)
            frozen = mine.get_trials(deepcopy=False)[self.number]
            if frozen.state.is_finished():  # the run is trained longer than the search asked for
                return False
            trial = optuna.trial.Trial(mine, frozen._trial_id)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a run that goes on may report a validation again
                trial.report(figures[self.monitor], number)
            return trial.should_prune()
        except (LookupError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            LOG.warning("the study %s could not be told: %s", redacted(self.storage), first_line(error))
            return False
