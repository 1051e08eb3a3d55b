"""The grid of a sweep: every combination of the swept values.

Hydra imports this at each start, so nothing heavy is imported at the top.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lmlab.console import command
from lmlab.errors import Stopped, UserError
from lmlab.io import from_here
from lmlab.runs import status
from lmlab.runs.choices import under
from lmlab.runs.directory import RunDirectory
from lmlab.runs.log import shown_without_secrets
from lmlab.secrets import MARK, override_key, redacted_command
from lmlab.sweeps.outcome import conclude
from lmlab.sweeps.points import Point, add_points, begin_sweep, point_identity, read_points, read_sweep


class GridSweeper(Sweeper):
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
        from lmlab.config.changes import length
        from lmlab.sweeps import parameters

        swept, shared = parameters.overrides(self.params, arguments, self.hydra_context.config_loader)
        choices = [[f"{key}={value}" for value in parameters.values(override)] for key, override in swept.items()]
        wanted = [list(point) for point in itertools.product(*choices)]
        lengths = {length(cfg) for cfg in self.composed(shared, wanted)}
        with RunDirectory(self.folder).lock():
            begin_sweep(self.folder, **self.checked(shared))
            add_points(self.folder, wanted)
            left = [point for point in read_points(self.folder) if due(point, lengths)]
            if left:
                self.launch(left, [shared] * len(left))
        conclude(self.folder)

    def composed(self, shared: list[str], wanted: Sequence[list[str]]) -> Iterator[DictConfig]:
        """The config that the job of each point would get. One that is there already is as it was begun.

        Raises:
            UserError: a point would be refused.
        """
        from lmlab.config import compose, schema
        from lmlab.distributed import ranks
        from lmlab.sweeps import parameters

        launcher = self.config.hydra.launcher._target_
        submitted = launcher.startswith(parameters.SUBMITIT)
        if launcher == parameters.SLURM and not shutil.which("srun"):
            raise UserError("there is no SLURM here, as there is no srun: give the command where jobs are submitted.")
        if ranks.rank() is not None and not submitted:
            with ranks.leading():
                raise UserError("-m under torchrun: run the command without it, as lmlab starts the ranks of each job.")
        begun = {point_identity(p.overrides) for p in read_points(self.folder) if p.run.begun()}
        for point in wanted:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*shared, *point])
            if point_identity(point) not in begun:
                compose.name_directory(cfg, swept=True)
                try:
                    schema.check_run(compose.job_config(cfg), here=not submitted)
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
        from lmlab.config.changes import CHANGEABLE, GROUPS

        then, shared = read_sweep(self.folder), redacted_command(shared)
        facts["kind"] = type(self).__name__.lower()
        # A secret that is not kept may be another, and part of what stands beside it.
        differ = {*redacted_command(then.get("shared", shared))} ^ {*shared}
        changed = {override_key(word) for word in differ if MARK not in word}
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
        if not read_sweep(self.folder):  # it is gone, and is not to be made again
            return
        for point, result in zip(points, results, strict=True):
            if result.status is JobStatus.FAILED and status.read_status(point.run).name == "waiting":
                point.run.path.mkdir(parents=True, exist_ok=True)
                status.write_failure(point.run, result._return_value)


def due(point: Point, lengths: set[Any]) -> bool:
    """Whether a point has not come to its end, or to one of another length."""
    from lmlab.config.changes import length
    from lmlab.config.compose import read_config

    if status.read_status(point.run).name not in status.ENDED:
        return True
    try:
        return length(read_config(point.run.path)) not in lengths
    except UserError:  # of a damaged config, which its own job will name
        return True


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
