"""Sweeps as Hydra sees them: every combination of values, or a search by Optuna.

Hydra takes sweepers from this package alone, and imports it at each start: nothing heavy at the top.
"""

import itertools
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lmlab.errors import Stopped, UserError
from lmlab.runs import states, sweep
from lmlab.runs.choices import under
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import content, empty_folders_removed, from_here, held, kept_locked, locked, take_back
from lmlab.runs.log import shown_without_secrets
from lmlab.runs.secrets import MARK, bare, redacted, redacted_command
from lmlab.runs.sweep import Point
from lmlab.shell import command
from lmlab.sweep import conclude

LENGTH = ("trainer.max_steps", "trainer.max_epochs")


class Grid(Sweeper):
    """Every combination of the swept values.

    Given again with the same hydra.sweep.dir, it runs those that have not come to their end, and new ones.
    """

    launcher: Launcher
    config: DictConfig
    hydra_context: HydraContext

    def __init__(self, params: dict[str, Any] | None = None):
        """`params`: values by key, swept or fixed; the command line wins."""
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from lmlab.config import sweeping
        from lmlab.config.resuming import length

        swept, shared = sweeping.overrides(self.params, arguments, self.hydra_context.config_loader)
        choices = [[f"{key}={value}" for value in sweeping.values(override)] for key, override in swept.items()]
        wanted = [list(point) for point in itertools.product(*choices)]
        lengths = {length(cfg) for cfg in self.composed(shared, wanted)}
        with RunDirectory(self.folder).lock():
            sweep.begin(self.folder, **self.checked(shared))
            sweep.add(self.folder, wanted)
            left = [point for point in sweep.points(self.folder) if due(point, lengths)]
            if left:
                self.launch(left, [shared] * len(left))
        conclude(self.folder)

    def composed(self, shared: list[str], wanted: Sequence[list[str]]) -> Iterator[DictConfig]:
        """The config that the job of each point would get. One that is there already is as it was begun.

        Raises:
            UserError: a point would be refused.
        """
        from lmlab.config import check, planning, sweeping
        from lmlab.training import launch

        launcher = self.config.hydra.launcher._target_
        submitted = launcher.startswith(sweeping.SUBMITIT)
        if launcher == sweeping.SLURM and not shutil.which("srun"):
            raise UserError("there is no SLURM here, as there is no srun: give the command where jobs are submitted.")
        if launch.rank() is not None and not submitted:
            with launch.leading():
                raise UserError("-m under torchrun: run the command without it, as lmlab starts the ranks of each job.")
        begun = {sweep.identity(p.overrides) for p in sweep.points(self.folder) if p.run.begun()}
        for point in wanted:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*shared, *point])
            if sweep.identity(point) not in begun:
                planning.name_directory(cfg, swept=True)
                try:
                    check.check_run(planning.job(cfg), here=not submitted)
                except UserError as error:
                    raise UserError(f"the point {' '.join(point)} is refused: {error}") from error
            yield cfg

    def checked(self, shared: list[str], fixed: tuple[str, ...] = (), **facts: Any) -> dict[str, Any]:
        """What to keep of a sweep.

        Args:
            fixed: keys that do not change on the way, beside those that make a run.
            facts: what is not to change either.

        Raises:
            UserError: the folder holds another one.
        """
        from lmlab.config.resuming import CHANGEABLE, GROUPS

        then, shared = sweep.facts(self.folder), redacted_command(shared)
        facts["kind"] = type(self).__name__.lower()
        # A secret that is not kept may be another, and part of what stands beside it.
        differ = {*redacted_command(then.get("shared", shared))} ^ {*shared}
        changed = {bare(word) for word in differ if MARK not in word}
        own = {key for key in changed if key in fixed or not under(key, (*GROUPS, *CHANGEABLE))}
        own |= {name for name, value in facts.items() if then.get(name, value) != value}
        if own:
            raise UserError(
                f"{self.folder} holds a sweep that was begun with other choices: {', '.join(sorted(own))}.\n"
                "Choose another: hydra.sweep.dir=DIR"
            )
        return {"shared": shared, **facts}

    def launch(self, points: Sequence[Point], shared: Sequence[list[str]]) -> None:
        """Run points, each in its directory, where what keeps one from beginning is left as well."""
        batch = [
            [*fixed, *point.overrides, f"hydra.sweep.subdir={point.number}"]
            for point, fixed in zip(points, shared, strict=True)
        ]
        try:
            with every_job_heard(self.launcher), shown_without_secrets(type(self.launcher).__module__):
                results = self.launcher.launch(batch, initial_job_idx=points[0].number)
        except Stopped as stop:
            stop.kept = None
            again = command("python", "-m", "lmlab.sweep", "resume", from_here(self.folder))
            print(f"The sweep was stopped; jobs of a cluster go on. To go on: {again}")
            raise
        if not sweep.facts(self.folder):  # it is gone, and is not to be made again
            return
        for point, result in zip(points, results, strict=True):
            if result.status is JobStatus.FAILED and states.state_of(point.run).name == "waiting":
                point.run.path.mkdir(parents=True, exist_ok=True)
                states.keep_failure(point.run, result._return_value)


class Search(Grid):
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

        from lmlab.config import sweeping
        from lmlab.runs import study

        for key, count in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
            if type(count) is not int or count < 1:
                raise UserError(f"hydra.sweeper.{key} is a whole number, 1 or more, not {count}.")
        swept, shared = sweeping.overrides(self.params, arguments, self.hydra_context.config_loader)
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
                    known = sweep.facts(self.folder).get("study")
                    self.name = known or f"lmlab-{uuid.uuid4().hex[:8]}"
                    facts = self.checked(shared, LENGTH, study=self.name, values=values, direction=self.direction)
                    self.storage = self.storage or f"sqlite:///{self.folder}/study.db"
                    self.study = study.opened(self.storage, self.name, self.direction)
                    self.check_study()
                    sweep.begin(self.folder, **facts, trials=self.n_trials)
            except UserError:
                take_back(self.folder, before)
                raise
        with kept_locked(self.folder / ".search" / uuid.uuid4().hex) as own:
            while numbers := self.next_trials(own, space):
                points = [point for point in sweep.points(self.folder) if point.number in numbers]
                left = [point for point in points if states.state_of(point.run).name not in states.ENDED]
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
        there, drawn = sweep.facts(self.folder).get("points", []), [words(trial) for trial in self.trials()]
        if drawn[: len(there)] != there:
            raise UserError(
                f"{redacted(self.storage)} does not hold the search that the runs in {self.folder} are of.\n"
                "Bring it back, or begin another search: hydra.sweep.dir=DIR"
            )

    def next_trials(self, own: Path, space: dict[str, Any]) -> list[int]:
        """The numbers of trials for this process to run: those that others left when they ended, then new ones."""
        from optuna.trial import TrialState

        from lmlab.runs import study

        with sweep.written(self.folder) as content:
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
        from lmlab.config.sweeping import quoted

        block: dict[str, Any] = {
            "_target_": "lmlab.training.pruning.Prune",
            "storage": self.storage,
            "study": self.name,
        }
        block |= {"trial": number, "metric": self.metric, "pruner": self.pruner}
        return [f"+callbacks.pruning={quoted(block)}"]

    def tell(self, point: Point) -> states.State:
        """Tell the study what came of a trial. One that failed, or was stopped, stays open, to be gone on with."""
        from optuna.trial import TrialState

        state = states.state_of(point.run)
        if state.name == "done":
            self.study.tell(point.number, point.run.result()[self.metric], skip_if_finished=True)
        elif state.name == "pruned":
            self.study.tell(point.number, state=TrialState.PRUNED, skip_if_finished=True)
        return state


def due(point: Point, lengths: set[Any]) -> bool:
    """Whether a point has not come to its end, or to one of another length."""
    from lmlab.config.compose import read_config
    from lmlab.config.resuming import length

    if states.state_of(point.run).name not in states.ENDED:
        return True
    try:
        return length(read_config(point.run.path)) not in lengths
    except UserError:  # of a damaged config, which its own job will name
        return True


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


@contextmanager
def every_job_heard(launcher: Launcher) -> Iterator[None]:
    """Wait for all jobs of a cluster: submitit's launcher ends at the first that gave no answer, as if all had."""
    if type(launcher).__module__ != "hydra_plugins.hydra_submitit_launcher.submitit_launcher":
        yield
        return
    import submitit

    # Jobs lie there as they were submitted, secrets and all.
    folder: str = launcher.params["submitit_folder"]  # type: ignore[attr-defined]
    Path(folder.partition("%")[0]).mkdir(mode=0o700, parents=True, exist_ok=True)

    class Heard(submitit.AutoExecutor):
        def map_array(self, *arguments: Any) -> list[Any]:
            return [Answer(job) for job in super().map_array(*arguments)]

    before, submitit.AutoExecutor = submitit.AutoExecutor, Heard  # type: ignore[misc]
    try:
        yield
    finally:
        submitit.AutoExecutor = before  # type: ignore[misc]


class Answer:
    """What became of a submitted job."""

    def __init__(self, job: Any):
        self.job = job

    def results(self) -> list[JobReturn]:
        from submitit.core.utils import UncompletedJobError

        try:
            return self.job.results()
        except UncompletedJobError:
            error = UserError(f"job {self.job.job_id} ended without a word. Its log: {self.job.paths.stdout}", "killed")
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]
