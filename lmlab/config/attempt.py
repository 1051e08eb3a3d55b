"""An attempt at a run: it begins in its directory, or goes on there, on all of its ranks."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, changes, compose
from lmlab.config.budget import STEPS, check_lengths
from lmlab.config.held_out import build_validation
from lmlab.config.models import build_objective
from lmlab.config.rank import on_all_ranks
from lmlab.config.schema import world
from lmlab.console import command, duration
from lmlab.distributed import ranks
from lmlab.errors import UserError, first_line
from lmlab.io import from_here
from lmlab.runs import lifecycle
from lmlab.runs.directory import RunDirectory
from lmlab.runs.log import log_to

if TYPE_CHECKING:
    from lmlab.sharing.push import Destination

LOG = logging.getLogger(__name__)


def attempt(
    train: Callable[..., None],
    cfg: DictConfig,
    overrides: list[str],
    in_sweep: bool = False,
    apart: bool = False,
    **facts: Any,
) -> float:
    """Begins the run of a config in its directory, or goes on with the run that is there.

    Args:
        train: called with the config and, to go on, the path of a checkpoint; on every rank.
        overrides: those of the command.
        in_sweep: record a failure in the directory even if the run was refused.
        apart: train in a new process, so that the next run of a sweep bears neither its memory nor its end.
        facts: more of a new run's manifest.

    Returns:
        the val/loss of the run.
    """
    run = RunDirectory(cfg.run_dir)
    with lifecycle.failure_recorded(run, in_sweep):
        previous = compose.config_of(run) if run.begun() else None
        changes.check(cfg, previous, run)
        check_lengths(cfg, overrides)
        destination = destination_of(cfg)
        if previous is not None and run.finished() and not changes.lengthens(cfg, previous, run):
            if run.unsent.exists():
                with log_to(run.log):
                    build.send_rest(cfg)
            print(lifecycle.describe_finished(run))
            ranks.send_arguments([])  # the other ranks have nothing to do
            return run.read_summary()["val/loss"]
        if destination is not None:
            from lmlab.sharing.push import check_before_training

            check_before_training(run, destination)
        with log_to(run.log), lifecycle.stop_reported(run):
            config, checkpoint = compose.config_yaml(cfg), None
            if previous is None:
                facts = facts if STEPS in facts else measured_budget(cfg) | facts
                seeds = {"run": cfg.seed, "split": cfg.preprocess.split_seed}
                this = lifecycle.new(run, config, compose.overrides_yaml(overrides), seeds, **facts)
            else:
                from lmlab.training.checkpoint import last_checkpoint

                checkpoint = last_checkpoint(run)
                changes.check_data(cfg, previous, run, checkpoint)
                about: dict[str, Any] = {"devices": world(cfg.trainer)}
                if changes.length(cfg) != changes.length(previous):
                    about["length_before"] = changes.length(previous)
                this = lifecycle.resumed(run, config, checkpoint, **about)
            with this:
                nodes = 1 if ranks.rank() is None else ranks.width()[1]
                if (world(cfg.trainer) > 1 or apart) and nodes == 1:
                    build.prepare_data(cfg)  # once: the ranks find it in the cache
                # On several nodes the cache may lie on a disk of each: all prepare at once, and of those that share a
                # cache one does it and the others wait, before there is a process group that could time out.
                again = command("python", "-m", "lmlab.resume", run.path)
                advice = f"\nThe run can go on from its last checkpoint: {again}"
                arguments = [str(checkpoint)] if checkpoint else []
                on_all_ranks("train", train, cfg, *arguments, apart=apart, advice=advice)
    if destination is not None:
        push_finished(run, destination)
    return run.read_summary()["val/loss"]


def measured_budget(cfg: DictConfig) -> dict[str, int]:
    """Returns the steps that the `budget.hours` of a new run come to, as its manifest keeps them; {} without hours.

    Raises:
        UserError: as of `measure` and `steps_of_hours`.
    """
    hours = OmegaConf.select(cfg, "budget.hours")
    if hours is None:
        return {}
    from lmlab.config.short_run import SHORT, measure, steps_of_hours

    measured, data = measure(cfg, SHORT), build.prepare_data(cfg)
    held_out, whole = build_validation(cfg, data, build_objective(cfg, data.tokenizer))
    steps = steps_of_hours(cfg, data, measured, hours, len(held_out), len(whole or ()))
    LOG.info("budget.hours=%g: %s steps, each of %s in a short run.", hours, f"{steps:,}", duration(measured.step))
    return {STEPS: steps}


def destination_of(cfg: DictConfig) -> "Destination | None":
    """Returns where a run is pushed to at its end; None if its config names no repository."""
    logger: dict[str, Any] = OmegaConf.to_container(cfg.get("logger") or OmegaConf.create())  # type: ignore[assignment]
    if not logger.get("push"):
        return None
    if logger.get("push_series") and OmegaConf.select(cfg, "callbacks.series.steps") is None:
        raise UserError("logger.push_series=true, and the run keeps no series of models: add callbacks.series=log")
    from lmlab.sharing.push import Destination

    given = {key: logger[f"push_{key}"] for key in ("license", "private", "series") if f"push_{key}" in logger}
    return Destination(logger["push"], **{"license": None} | given)


def push_finished(run: RunDirectory, destination: "Destination") -> None:
    """Pushes a run that has just finished. If the hub does not take it, the run is finished all the same.

    Raises:
        UserError: the push failed; says why, and how it is made again.
    """
    from lmlab.sharing.push import push

    options = ["--private"] * destination.private + ["--series"] * destination.series
    again = [from_here(run.path), destination.repository, "--license", destination.license, *options]
    try:
        print(push(run, destination))
    except UserError as error:
        raise UserError(
            f"the run is finished, but its push failed: {first_line(error)}\n"
            f"To push it again: {command('python', '-m', 'lmlab.push', *again)}"
        ) from error
