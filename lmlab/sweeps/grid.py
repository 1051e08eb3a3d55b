"""The sweeper that runs every combination of the swept values.

Hydra imports this at each start, so nothing heavy is imported at the top.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lmlab.config import compose, schema
from lmlab.config.changes import CHANGEABLE, GROUPS, length
from lmlab.distributed import ranks
from lmlab.distributed.slurm import SLURM, check_reachable, submits
from lmlab.errors import Stopped, UserError
from lmlab.runs import status
from lmlab.runs.choices import is_in
from lmlab.runs.directory import RunDirectory
from lmlab.runs.log import redact_logger
from lmlab.secrets import MARK, override_key, redacted_command
from lmlab.sweeps import parameters
from lmlab.sweeps.outcome import conclude, resume_command
from lmlab.sweeps.points import Point, add_points, begin_sweep, point_identity, read_points, read_sweep


class GridSweeper(Sweeper):
    """Runs every combination of the swept values, each as a run of its own.

    Given again with the same hydra.sweep.dir, it runs the points that have not come to their end, and new ones.

    Args:
        params: values by key, swept or fixed; the command line wins.
    """

    launcher: Launcher
    config: DictConfig
    hydra_context: HydraContext

    def __init__(self, params: dict[str, Any] | None = None):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        swept, shared = parameters.overrides(self.params, arguments, self.hydra_context.config_loader)
        choices = [[f"{key}={value}" for value in parameters.values(override)] for key, override in swept.items()]
        points = [list(point) for point in itertools.product(*choices)]
        lengths = {length(cfg) for cfg in self.composed(points, shared)}
        with RunDirectory(self.folder).lock():
            begin_sweep(self.folder, **self.facts(shared))
            add_points(self.folder, points)
            left = [point for point in read_points(self.folder) if due(point, lengths)]
            if left:
                self.launch(left, shared)
        conclude(self.folder)

    def composed(self, points: Sequence[list[str]], shared: list[str]) -> Iterator[DictConfig]:
        """Yields the config that the job of each point would get; a run that has begun keeps its own.

        Raises:
            UserError: a point would be refused.
        """
        launcher = self.config.hydra.launcher._target_
        if launcher == SLURM:
            check_reachable()
        submitted = submits(launcher)
        if ranks.rank() is not None and not submitted:
            raise UserError("-m under torchrun: run the command without it, as lmlab starts the ranks of each job.")
        begun = {point_identity(point.overrides) for point in read_points(self.folder) if point.run.begun()}
        for point in points:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*shared, *point])
            if point_identity(point) not in begun:
                compose.name_directory(cfg, swept=True)
                try:
                    schema.check_run(compose.job_config(cfg), here=not submitted)
                except UserError as error:
                    raise UserError(f"the point {' '.join(point)} is refused: {error}") from error
            yield cfg

    def facts(self, shared: list[str], constant: tuple[str, ...] = (), **facts: Any) -> dict[str, Any]:
        """Returns what the file of the sweep is to hold, which may not change on the way.

        Args:
            shared: the overrides that all points share.
            constant: keys of the config that may not change either, beside those that make a run.

        Raises:
            UserError: the folder holds a sweep that was begun with other facts.
        """
        before, shared = read_sweep(self.folder), redacted_command(shared)
        facts["kind"] = type(self).__name__.lower()
        # A secret that is not kept may be another, and part of what stands beside it.
        differ = {*redacted_command(before.get("shared", shared))} ^ {*shared}
        keys = {override_key(word) for word in differ if MARK not in word}
        changed = {key for key in keys if key in constant or not is_in(key, (*GROUPS, *CHANGEABLE))}
        changed |= {name for name, value in facts.items() if before.get(name, value) != value}
        if changed:
            raise UserError(
                f"{self.folder} holds a sweep that was begun with other choices: {', '.join(sorted(changed))}.\n"
                "Choose another: hydra.sweep.dir=DIR"
            )
        return {"shared": shared, **facts}

    def launch(self, points: Sequence[Point], shared: list[str]) -> None:
        """Runs points, each in its directory, and leaves there what kept one from beginning."""
        batch = [
            [*shared, *self.added(point), *point.overrides, f"hydra.sweep.subdir={point.number}"] for point in points
        ]
        try:
            with lost_jobs_answered(self.launcher), redact_logger(type(self.launcher).__module__):
                results = self.launcher.launch(batch, initial_job_idx=points[0].number)
        except Stopped as stop:
            stop.kept = None
            jobs = "; submitted jobs go on" if submits(self.config.hydra.launcher._target_) else ""
            print(f"The sweep was stopped{jobs}. To go on: {resume_command(self.folder)}")
            raise
        if not read_sweep(self.folder):  # it is gone, and is not to be made again
            return
        for point, result in zip(points, results, strict=True):
            if result.status is JobStatus.FAILED and status.read_status(point.run).name == "waiting":
                point.run.path.mkdir(parents=True, exist_ok=True)
                status.write_failure(point.run, result._return_value)

    def added(self, point: Point) -> list[str]:
        """Returns overrides that the sweeper adds to those of a point."""
        return []


def due(point: Point, lengths: set[Any]) -> bool:
    """Returns whether a point has not come to its end, or to one of another length than those asked for."""
    if status.read_status(point.run).name not in status.ENDED:
        return True
    try:
        return length(compose.read_config(point.run.path)) not in lengths
    except UserError:  # of a damaged config, which its own job will name
        return True


@contextmanager
def lost_jobs_answered(launcher: Launcher) -> Iterator[None]:
    """Lets a cluster's job that was lost count as failed, where submitit's launcher would end for all of them."""
    if not submits(type(launcher).__module__):
        yield
        return
    from submitit import Job
    from submitit.core.utils import UncompletedJobError

    # Jobs lie there as they were submitted, secrets and all.
    folder: str = launcher.params["submitit_folder"]  # type: ignore[attr-defined]
    Path(folder.partition("%")[0]).mkdir(mode=0o700, parents=True, exist_ok=True)
    results = Job.results

    def answered(job: Any) -> list[Any]:
        try:
            return results(job)
        except UncompletedJobError:
            error = UserError(f"job {job.job_id} ended without a word. Its log: {job.paths.stdout}", "killed")
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]

    Job.results = answered  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Job.results = results  # type: ignore[method-assign]
