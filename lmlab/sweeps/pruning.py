"""The callback of a trial, which reports its validations and ends it where it is hopeless."""

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from optuna.exceptions import OptunaError
from optuna.trial import Trial
from sqlalchemy.exc import SQLAlchemyError

from lmlab.errors import first_line
from lmlab.secrets import redacted
from lmlab.sweeps.study import load
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)


class Prune(Callback):
    """Reports each validation to a trial of Optuna, and ends the run where the study's pruner gives it up.

    The run then comes to its end as one that stops early, weights, certificate and all.

    Args:
        storage: URL of the study's database.
        study: name of the study.
        trial: number of the trial.
        metric: the metric of a validation that the trial is judged by.
        pruner: `name` of a class of optuna.pruners, and its arguments.
    """

    def __init__(
        self, storage: str, study: str, trial: int, metric: str = "val/loss", pruner: dict[str, Any] | None = None
    ):
        self.storage, self.study, self.trial, self.monitor = storage, study, trial, metric
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
        """Reports a validation, and returns whether the run is hopeless; not so if the study can't be reached."""
        try:
            found = load(self.storage, self.study, self.pruner)
            frozen = found.get_trials(deepcopy=False)[self.trial]
            if frozen.state.is_finished():  # the run is trained longer than the search asked for
                return False
            trial = Trial(found, frozen._trial_id)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a run that goes on may report a validation again
                trial.report(module.validations[module.global_step][self.monitor], number)
            return trial.should_prune()
        except (LookupError, SQLAlchemyError, OptunaError) as error:
            LOG.warning("the study %s could not be told: %s", redacted(self.storage), first_line(error))
            return False
