"""Sweeps as Hydra sees them: every combination of values, or a search by Optuna.

Hydra takes sweepers from this package alone, and imports it at each start: nothing heavy at the top.
"""

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lmlab.errors import UserError
from lmlab.runs import states, sweep
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import held, kept_locked
from lmlab.runs.sweep import Point
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
        swept, shared = self.overrides(arguments)
        for override in swept:
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line} has no end of values. To search it: hydra/sweeper=optuna")
        wanted = [list(point) for point in itertools.product(*(override.sweep_string_iterator() for override in swept))]
        keys = [override.get_key_element() for override in swept]
        wanted = [[f"{key}={value}" for key, value in zip(keys, point, strict=True)] for point in wanted]
        self.validate_batch_is_legal([[*shared, *point] for point in wanted])
        with RunDirectory(self.folder).lock():
            longer = self.begin(shared)
            points = sweep.add(self.folder, wanted)
            left = [point for point in points if longer or states.state_of(point.run).name not in states.ENDED]
            if left:
                self.launch(left, [shared] * len(left))
        conclude(self.folder, points)

    def begin(self, shared: list[str]) -> bool:
        """Begin a sweep in its folder, or take up the one there; whether its runs are to be longer than they were.

        Raises:
            UserError: the folder holds another sweep.
        """
        from lmlab.config.resuming import GROUPS, MACHINERY

        facts = sweep.facts(self.folder)
        kind = type(self).__name__.lower()
        changed = {word.lstrip("+~").partition("=")[0] for word in set(facts.get("shared", shared)) ^ set(shared)}
        own = {
            key for key in changed if key not in GROUPS and not any(f"{key}.".startswith(f"{m}.") for m in MACHINERY)
        }
        if own or facts.get("kind", kind) != kind:
            other = facts.get("kind", kind) != kind
            what = f"another sweeper, {facts['kind']}" if other else f"other choices: {', '.join(sorted(own))}"
            raise UserError(
                f"{self.folder} holds a sweep that was begun with {what}.\nChoose another: hydra.sweep.dir=DIR"
            )
        sweep.begin(self.folder, {"kind": kind, "shared": shared})
        return not changed.isdisjoint(LENGTH)

    def overrides(self, arguments: list[str]) -> tuple[list[Override], list[str]]:
        """The swept overrides of the config and the command line, and the fixed ones as they are typed."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        last = {override.get_key_element(): override for override in parser.parse_overrides(words)}
        swept = [override for override in last.values() if override.is_sweep_override()]
        fixed = [override for override in last.values() if not override.is_sweep_override()]
        return swept, [f"{override.get_key_element()}={override.get_value_element_as_str()}" for override in fixed]

    def launch(self, points: Sequence[Point], shared: Sequence[list[str]]) -> None:
        """Run points, each in its directory, where what keeps one from beginning is left as well."""
        batch = [
            [*words, *point.overrides, f"hydra.sweep.subdir={point.number}"]
            for point, words in zip(points, shared, strict=True)
        ]
        with every_job_heard(self.launcher):
            results = self.launcher.launch(batch, initial_job_idx=points[0].number)
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
        sampler: dict[str, Any] | None = None,
        pruner: dict[str, Any] | None = None,
        storage: str | None = None,
        study_name: str = "lmlab",
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
        self.sampler, self.pruner = plain(sampler or {"name": "TPESampler"}), plain(pruner or {"name": "NopPruner"})
        self.storage, self.study_name = storage, study_name

    def sweep(self, arguments: list[str]) -> None:
        from lmlab.runs import study

        swept, shared = self.overrides(arguments)
        if not swept:
            raise UserError(
                "nothing to search: add KEY='interval(1e-4,1e-2)', KEY='range(1,5)' or KEY=a,b to the command."
            )
        space = {override.get_key_element(): distribution(override) for override in swept}
        self.validate_batch_is_legal([[*shared, *(f"{key}={text(first(space[key]))}" for key in space)]])
        study.sampler(self.sampler, 0), study.pruner(self.pruner)  # before anything is written
        self.begin(shared)
        self.storage = self.storage or f"sqlite:///{self.folder}/study.db"
        with sweep.written(self.folder):
            self.study = study.opened(self.storage, self.study_name, self.direction)
        with kept_locked(self.folder / ".search" / uuid.uuid4().hex) as own:
            while numbers := self.next_trials(own, space):
                points = [point for point in sweep.points(self.folder) if point.number in numbers]
                left = [point for point in points if states.state_of(point.run).name not in states.ENDED]
                if left:
                    self.launch(left, [[*shared, *self.pruning(point.number)] for point in left])
                for point in points:
                    self.tell(point)
        conclude(self.folder, sweep.points(self.folder))

    def next_trials(self, own: Path, space: dict[str, Any]) -> list[int]:
        """The numbers of trials for this process to run: those that others left when they ended, then new ones."""
        from optuna.trial import TrialState

        from lmlab.runs import study

        with sweep.written(self.folder) as content:
            owners, trials = content.setdefault("owners", {}), self.study.get_trials(deepcopy=False)
            running = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
            left = [number for number in running if not held(own.with_name(owners.get(str(number), "nobody's")))]
            numbers = left[: self.n_jobs]
            while len(numbers) < self.n_jobs and len(trials) < self.n_trials:
                self.study.sampler = study.sampler(self.sampler, len(trials))
                numbers.append(self.study.ask(space).number)
                trials = self.study.get_trials(deepcopy=False)
            owners |= {str(number): own.name for number in numbers}
            content["points"] = [[f"{key}={text(value)}" for key, value in t.params.items()] for t in trials]
        return numbers

    def pruning(self, number: int) -> list[str]:
        """What a run is given, to report to its trial."""
        block: dict[str, Any] = {
            "_target_": "lmlab.training.pruning.Prune",
            "storage": self.storage,
            "study": self.study_name,
        }
        block |= {"trial": number, "metric": self.metric, "pruner": self.pruner}
        return [f"+callbacks.pruning={quoted(block)}"]

    def tell(self, point: Point) -> None:
        """Tell the study what came of a trial; one that was stopped, or is still queued, stays open."""
        from optuna.trial import TrialState

        state = states.state_of(point.run).name
        if state == "done":
            self.study.tell(point.number, point.run.result()[self.metric], skip_if_finished=True)
        elif state == "pruned":
            self.study.tell(point.number, state=TrialState.PRUNED, skip_if_finished=True)
        elif state == "failed":
            self.study.tell(point.number, state=TrialState.FAIL, skip_if_finished=True)


def plain(block: Any) -> dict[str, Any]:
    """A block of a config without what OmegaConf adds."""
    return OmegaConf.to_container(block) if isinstance(block, DictConfig) else dict(block)  # type: ignore[return-value]


def distribution(override: Override) -> Any:
    """What Optuna is to draw for a swept override."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if override.is_interval_sweep():
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log="log" in value.tags)
    if override.is_range_sweep() and not value.shuffle:
        numbers = sorted(value.range())
        whole = all(isinstance(number, int) for number in numbers)
        return (IntDistribution if whole else FloatDistribution)(numbers[0], numbers[-1], step=abs(value.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def first(drawn: Any) -> Any:
    """Some value of a distribution."""
    return drawn.choices[0] if hasattr(drawn, "choices") else drawn.low


def text(value: Any) -> str:
    """A value that Optuna drew, as it is typed; choices are kept as they were."""
    return value if isinstance(value, str) else repr(value)


def quoted(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def every_job_heard(launcher: Launcher) -> Iterator[None]:
    """Wait for all jobs of a cluster: submitit's launcher ends at the first that gave no answer, as if all had."""
    if type(launcher).__module__ != "hydra_plugins.hydra_submitit_launcher.submitit_launcher":
        yield
        return
    import submitit

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
