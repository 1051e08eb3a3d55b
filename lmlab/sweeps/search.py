"""The search of a sweep: points that an algorithm of Optuna chooses by the results of those before.

Hydra imports this at each start, so nothing heavy is imported at the top.
"""

import uuid
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lmlab.errors import UserError
from lmlab.io import content, empty_folders_removed, held, kept_locked, locked, take_back
from lmlab.runs import status
from lmlab.secrets import redacted
from lmlab.sweeps.grid import GridSweeper
from lmlab.sweeps.outcome import conclude
from lmlab.sweeps.points import Point, begin_sweep, read_points, read_sweep, updated_sweep

LENGTH = ("trainer.max_steps", "trainer.max_epochs")


class SearchSweeper(GridSweeper):
    """Points that an algorithm of Optuna chooses by what came of those before.

    The study lies in a database, so that the search goes on after a stop, and in several processes at once.
    """

    def __init__(
        self,
        n_trials: int = 20,
        n_jobs: int = 1,
        metric: str = "val/loss",
        direction: str = "minimize",
        sampler: Any = None,
        pruner: Any = None,
        storage: str | None = None,
        params: dict[str, Any] | None = None,
    ):
        """Makes a study, or takes up the one that is there.

        Args:
            n_trials: in all, those of other processes and of before a stop included.
            n_jobs: given to the launcher at a time; without a cluster one waits for the other all the same.
            metric: of a run's validations; val/bits_per_byte where tokenizers differ.
            sampler: `name` of a class of optuna.samplers, and its arguments. From `seed` follows that of each trial.
            pruner: the same of optuna.pruners, which knows validations by their number; None prunes nothing.
            storage: a URL of a database; None for study.db in the folder of the sweep.
        """
        super().__init__(params)
        self.n_trials, self.n_jobs, self.metric, self.direction = n_trials, n_jobs, metric, direction
        self.sampler, self.pruner, self.storage = plain(sampler, "TPESampler"), plain(pruner, "NopPruner"), storage

    def sweep(self, arguments: list[str]) -> None:
        from optuna.distributions import distribution_to_json

        from lmlab.sweeps import parameters, study

        for key, count in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
            if type(count) is not int or count < 1:
                raise UserError(f"hydra.sweeper.{key} is a whole number, 1 or more, not {count}.")
        swept, shared = parameters.overrides(self.params, arguments, self.hydra_context.config_loader)
        if not swept:
            raise UserError("nothing to search: add KEY='interval(1e-4,1e-2)', KEY='range(1,5)' or KEY=a,b.")
        space = {key: distribution(override) for key, override in swept.items()}
        list(self.composed(shared, [[f"{key}={text(first(space[key]))}" for key in space]]))
        study.check(self.sampler, self.pruner, self.direction, space)
        values = {key: distribution_to_json(found) for key, found in space.items()}
        before = content(self.folder)
        with empty_folders_removed(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with locked(self.folder / ".study.lock"):
                    known = read_sweep(self.folder).get("study")
                    self.name = known or f"lmlab-{uuid.uuid4().hex[:8]}"
                    facts = self.checked(shared, LENGTH, study=self.name, values=values, direction=self.direction)
                    self.storage = self.storage or f"sqlite:///{self.folder}/study.db"
                    self.study = study.opened(self.storage, self.name, self.direction)
                    self.check_study()
                    begin_sweep(self.folder, **facts, trials=self.n_trials)
            except UserError:
                take_back(self.folder, before)
                raise
        with kept_locked(self.folder / ".search" / uuid.uuid4().hex) as own:
            while numbers := self.next_trials(own, space):
                points = [point for point in read_points(self.folder) if point.number in numbers]
                left = [point for point in points if status.read_status(point.run).name not in status.ENDED]
                if left:
                    self.launch(left, [[*shared, *self.pruning(point.number)] for point in left])
                found = [self.tell(point) for point in points]
                if any(state.cause == "bad config" for state in found) and not self.trials(ended=True):
                    break  # and so would the others end
        conclude(self.folder)

    def trials(self, ended: bool = False) -> list[Any]:
        """The trials of the study, by their numbers; or those that came to something."""
        from optuna.trial import TrialState

        some = (TrialState.COMPLETE, TrialState.PRUNED) if ended else None
        return self.study.get_trials(deepcopy=False, states=some)

    def check_study(self) -> None:
        """Refuse a study that is not that of the runs in the folder: what a trial is told would be another's."""
        there, drawn = read_sweep(self.folder).get("points", []), [words(trial) for trial in self.trials()]
        if drawn[: len(there)] != there:
            raise UserError(
                f"{redacted(self.storage)} does not hold the search that the runs in {self.folder} are of.\n"
                "Bring it back, or begin another search: hydra.sweep.dir=DIR"
            )

    def next_trials(self, own: Path, space: dict[str, Any]) -> list[int]:
        """The numbers of trials for this process to run: those that others left when they ended, then new ones."""
        from optuna.trial import TrialState

        from lmlab.sweeps import study

        with updated_sweep(self.folder) as content:
            owners, trials = content.setdefault("owners", {}), self.trials()
            numbers = []
            for trial in trials:
                place = own.with_name(owners.get(str(trial.number), "nobody's"))
                # What this process itself has left open, it has tried.
                if trial.state is TrialState.RUNNING and place != own and not held(place):
                    numbers.append(trial.number)
            del numbers[self.n_jobs :]
            while len(numbers) < self.n_jobs and len(trials) < self.n_trials:
                self.study.sampler = study.sampler(self.sampler, len(trials))
                numbers.append(self.study.ask(space).number)
                trials = self.trials()
            owners |= {str(number): own.name for number in numbers}
            content["points"] = [words(trial) for trial in trials]
        return numbers

    def pruning(self, number: int) -> list[str]:
        """What a run is given, to report to its trial."""
        from lmlab.sweeps.parameters import quoted

        block: dict[str, Any] = {
            "_target_": "lmlab.sweeps.pruning.Prune",
            "storage": self.storage,
            "study": self.name,
        }
        block |= {"trial": number, "metric": self.metric, "pruner": self.pruner}
        return [f"+callbacks.pruning={quoted(block)}"]

    def tell(self, point: Point) -> status.Status:
        """Tell the study what came of a trial. One that failed, or was stopped, stays open, to be gone on with."""
        from optuna.trial import TrialState

        state = status.read_status(point.run)
        if state.name == "done":
            self.study.tell(point.number, point.run.read_summary()[self.metric], skip_if_finished=True)
        elif state.name == "pruned":
            self.study.tell(point.number, state=TrialState.PRUNED, skip_if_finished=True)
        return state


def plain(block: Any, usual: str) -> dict[str, Any]:
    """A block of a config without what OmegaConf adds; a name alone is one too."""
    if block is None or isinstance(block, str):
        return {"name": block or usual}
    return OmegaConf.to_container(block) if isinstance(block, DictConfig) else dict(block)  # type: ignore[return-value]


def words(trial: Any) -> list[str]:
    """What a trial of Optuna's drew, as overrides."""
    return [f"{key}={text(value)}" for key, value in trial.params.items()]


def distribution(override: Override) -> Any:
    """What Optuna is to draw for a swept override.

    Raises:
        UserError: a tag that says nothing there.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    log = "log" in value.tags
    if value.tags - {"log"} or (log and override.is_choice_sweep()):
        raise UserError(f"{override.input_line}: a tag is log, and for an interval or a range.")
    if override.is_interval_sweep():
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log=log)
    if override.is_range_sweep() and not value.shuffle:
        numbers, step = sorted(value.range()), abs(value.step)
        whole = all(isinstance(number, int) for number in numbers)
        if log and not (whole and step == 1):
            raise UserError(f"{override.input_line}: by magnitude a range goes in whole steps of 1; or use interval.")
        if whole:
            return IntDistribution(numbers[0], numbers[-1], log=log, step=step)
        return FloatDistribution(numbers[0], numbers[-1], step=step)
    choices = list(override.sweep_string_iterator())
    return CategoricalDistribution(sorted(choices) if value.shuffle else choices)


def first(drawn: Any) -> Any:
    """Some value of a distribution."""
    return drawn.choices[0] if hasattr(drawn, "choices") else drawn.low


def text(value: Any) -> str:
    """A value that Optuna drew, as it is typed; choices are kept as they were."""
    return value if isinstance(value, str) else repr(value)
