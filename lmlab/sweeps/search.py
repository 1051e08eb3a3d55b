"""The sweeper whose points an algorithm of Optuna chooses by the results of those before.

Hydra imports this at each start, so nothing heavy is imported at the top.
"""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf

from lmlab.config.targets import check_value
from lmlab.errors import UserError
from lmlab.io import content, empty_folders_removed, held, kept_locked, locked, take_back
from lmlab.runs.status import ENDED, Status, read_status
from lmlab.secrets import redacted
from lmlab.sweeps import parameters
from lmlab.sweeps.grid import GridSweeper
from lmlab.sweeps.outcome import conclude
from lmlab.sweeps.points import Point, begin_sweep, read_points, read_sweep, updated_sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from lmlab.sweeps.study import Direction

COUNT = Annotated[int, Ge(1)]
LENGTH = ("trainer.max_steps", "trainer.max_epochs")


class SearchSweeper(GridSweeper):
    """Runs trials of an Optuna study, each a point of the sweep.

    The study lies in a database, so that the search goes on after a stop, and in several processes at once.

    Args:
        n_trials: the number of all trials, those of other processes and of before a stop included.
        n_jobs: the number of trials that the launcher is given at a time; without a cluster they run one by one.
        metric: the metric of a run's validations; val/bits_per_byte where tokenizers differ.
        direction: minimize or maximize.
        sampler: `name` of a class of optuna.samplers, and its arguments. From `seed` follows that of each trial.
        pruner: the same of optuna.pruners, which knows validations by their number; None prunes nothing.
        storage: URL of a database; None for study.db in the folder of the sweep.
        params: values by key, swept or fixed; the command line wins.
    """

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        metric: str = "val/loss",
        direction: "Direction" = "minimize",
        sampler: Any = None,
        pruner: Any = None,
        storage: str | None = None,
        params: dict[str, Any] | None = None,
    ):
        super().__init__(params)
        self.n_trials, self.n_jobs, self.metric, self.direction = n_trials, n_jobs, metric, direction
        self.sampler, self.pruner = named_block(sampler, "TPESampler"), named_block(pruner, "NopPruner")
        self.storage = storage

    def sweep(self, arguments: list[str]) -> None:
        from optuna.trial import TrialState

        from lmlab.sweeps import study

        for key, kind in {"n_trials": COUNT, "n_jobs": COUNT, "direction": study.Direction}.items():
            check_value(f"hydra.sweeper.{key}", getattr(self, key), kind)
        swept, shared = parameters.overrides(self.params, arguments, self.hydra_context.config_loader)
        if not swept:
            raise UserError("nothing to search: add KEY='interval(1e-4,1e-2)', KEY='range(1,5)' or KEY=a,b.")
        space = {key: study.distribution(override) for key, override in swept.items()}
        list(self.composed([[f"{key}={study.first_value(space[key])}" for key in space]], shared))
        study.check_search(self.sampler, self.pruner, self.direction, space)
        self.open_study(shared, space)
        with kept_locked(self.folder / ".search" / uuid.uuid4().hex) as own:
            while numbers := self.next_trials(own, space):
                points = [point for point in read_points(self.folder) if point.number in numbers]
                left = [point for point in points if read_status(point.run).name not in ENDED]
                if left:
                    self.launch(left, shared)
                statuses = [self.tell(point) for point in points]
                ended = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
                if any(found.cause == "bad config" for found in statuses) and not ended:
                    break  # and so would the others end
        conclude(self.folder)

    def open_study(self, shared: list[str], space: dict[str, "BaseDistribution"]) -> None:
        """Opens the study of the sweep's folder, or begins one; leaves nothing there if it is refused."""
        from optuna.distributions import distribution_to_json

        from lmlab.sweeps import study

        values = {key: distribution_to_json(distribution) for key, distribution in space.items()}
        before = content(self.folder)
        with empty_folders_removed(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with locked(self.folder / ".study.lock"):
                    known = read_sweep(self.folder)
                    self.name = known.get("study") or f"lmlab-{uuid.uuid4().hex[:8]}"
                    facts = self.facts(shared, LENGTH, study=self.name, values=values, direction=self.direction)
                    self.storage = self.storage or f"sqlite:///{self.folder}/study.db"
                    self.study = study.create(self.storage, self.name, self.direction)
                    points = list(map(study.overrides, self.study.get_trials(deepcopy=False)))
                    if points[: len(known.get("points", []))] != known.get("points", []):
                        raise UserError(
                            f"{redacted(self.storage)} does not hold the search that the runs in {self.folder} are of."
                            "\nBring it back, or begin another search: hydra.sweep.dir=DIR"
                        )
                    begin_sweep(self.folder, **facts, trials=self.n_trials)
            except UserError:
                take_back(self.folder, before)
                raise

    def next_trials(self, own: Path, space: dict[str, "BaseDistribution"]) -> list[int]:
        """Returns the numbers of trials for this process to run: first those that others left when they ended."""
        from optuna.trial import TrialState

        from lmlab.sweeps import study

        with updated_sweep(self.folder) as sweep:
            owners, trials = sweep.setdefault("owners", {}), self.study.get_trials(deepcopy=False)
            numbers = []
            for trial in trials:
                owner = own.with_name(owners.get(str(trial.number), "nobody"))
                # What this process itself has left open, it has tried.
                if trial.state is TrialState.RUNNING and owner != own and not held(owner):
                    numbers.append(trial.number)
            del numbers[self.n_jobs :]
            while len(numbers) < self.n_jobs and len(trials) < self.n_trials:
                self.study.sampler = study.sampler(self.sampler, len(trials))
                numbers.append(self.study.ask(space).number)
                trials = self.study.get_trials(deepcopy=False)
            owners |= {str(number): own.name for number in numbers}
            sweep["points"] = list(map(study.overrides, trials))
        return numbers

    def added(self, point: Point) -> list[str]:
        callback = {
            "_target_": "lmlab.sweeps.pruning.Prune",
            "storage": self.storage,
            "study": self.name,
            "trial": point.number,
            "metric": self.metric,
            "pruner": self.pruner,
        }
        return [f"+callbacks.pruning={parameters.quoted(callback)}"]

    def tell(self, point: Point) -> Status:
        """Tells the study what came of a trial; one that failed or was stopped stays open, to be run again."""
        from optuna.trial import TrialState

        status = read_status(point.run)
        if status.name == "done":
            self.study.tell(point.number, point.run.read_summary()[self.metric], skip_if_finished=True)
        elif status.name == "pruned":
            self.study.tell(point.number, state=TrialState.PRUNED, skip_if_finished=True)
        return status


def named_block(block: Any, default: str) -> dict[str, Any]:
    """Returns the block of a sampler or a pruner as a dictionary with a `name`, which may be given alone."""
    if block is None or isinstance(block, str):
        return {"name": block or default}
    return OmegaConf.to_container(block) if isinstance(block, DictConfig) else dict(block)  # type: ignore[return-value]
