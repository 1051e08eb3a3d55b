"""A cooldown: a run that goes on from a step of another one at its full learning rate, and decays that to the end."""

import math
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config import changes, schema
from lmlab.config.compose import config_yaml, overrides_yaml
from lmlab.config.targets import build
from lmlab.errors import UserError
from lmlab.io import from_here, replaced, write_text
from lmlab.runs.choices import is_in
from lmlab.runs.directory import RunDirectory
from lmlab.runs.manifest import environment

DECAYING = "one_minus_sqrt"
"""The schedule of a cooldown of a run with a constant learning rate."""
SCHEDULE = ("optim.schedule", "optim.final_ratio", "optim.decay_steps", "optim.warmup_steps")
"""The keys that a cooldown may change, beside those that a resumed run may change."""


def begin(
    run: RunDirectory, previous: DictConfig, cfg: DictConfig, steps: int, step: int | None, overrides: list[str]
) -> DictConfig:
    """Makes the directory of a cooldown, as if the run in it had been stopped at a step of another run.

    Its last weights are those that a run from the start would have with as many steps and the same `optim.decay_steps`.

    Args:
        run: the directory of the other run, which stays as it is.
        previous: its config.
        cfg: the same with the run directory and the overrides of the cooldown.
        steps: the steps over which the learning rate decays.
        step: the step of the checkpoint to go on from; None for the last one.
        overrides: those of the command.

    Returns:
        The config of the cooldown.

    Raises:
        UserError: there is no such checkpoint, the learning rate is not the full one there, or something is in the
            way of the directory.
    """
    from lmlab.training.checkpoint_io import best_values, load_checkpoint

    directory = Path(cfg.run_dir)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"{directory} is there already, and not an empty directory. Choose another: --into DIR")
    manifest, checkpoint = run.read_manifest(), find_checkpoint(run, step)
    step = run.step_of(checkpoint)
    check_full_rate(previous, manifest["steps"], step)
    changed = changes.changed_values(cfg, previous)
    lengths = [text for key, text in changed.items() if key in changes.LENGTH]
    if lengths:
        raise UserError(f"{', '.join(lengths)}: a cooldown takes the steps of --cooldown. Leave that out.")
    free = (*changes.CHANGEABLE, *changes.LOCATED, *SCHEDULE)
    others = [text for key, text in changed.items() if not is_in(key, free)]
    if others:
        raise UserError(f"a cooldown of {from_here(run.path)} can't go on with {', '.join(others)}.\nLeave that out.")
    cfg = with_decay(cfg, manifest["steps"], step, steps)
    schema.check_run(cfg)
    of_this = ("run_id", "started", "command", "seeds", "repeats", *environment())
    facts = {key: value for key, value in manifest.items() if key not in of_this}
    facts["went_on"] = [one for one in manifest.get("went_on", ()) if one["step"] <= step]
    facts["cooldown"] = {"run_id": manifest["run_id"], "path": str(run.path), "step": step, "steps": steps}

    def write(folder: Path) -> None:
        new = RunDirectory(folder)
        new.start(manifest["seeds"], **facts)
        write_text(new.config, config_yaml(cfg))
        write_text(new.overrides, overrides_yaml(overrides))
        new.checkpoints.mkdir()
        best = map(run.best_at, best_values(load_checkpoint(checkpoint)))
        for path in (checkpoint, *best, run.ledger, run.metrics, run.samples, run.tokenizer):
            to = folder / path.relative_to(run.path)
            if path.is_dir():
                shutil.copytree(path, to)
            elif path.exists():
                shutil.copyfile(path, to)

    replaced(directory, write)
    return cfg


def find_checkpoint(run: RunDirectory, step: int | None) -> Path:
    """Returns the path of the checkpoint of a step, or without one of the last step that has a whole one.

    Raises:
        UserError: there is none.
    """
    from lmlab.training.checkpoint_io import damage

    there = run.checkpoint_files()[::-1]
    wanted = [path for path in there if step is None or run.step_of(path) == step]
    for path in wanted:
        if damage(path) is None:
            return path
    steps = ", ".join(str(run.step_of(path)) for path in there[::-1])
    raise UserError(
        f"{from_here(run.path)} has no whole checkpoint{'' if step is None else f' of step {step}'}. "
        f"{f'There are those of {steps}.' if steps else 'It has none at all.'}\n"
        "callbacks.checkpoints.keep_every=STEPS keeps those of every so many steps."
    )


def check_full_rate(cfg: DictConfig, length: int, step: int) -> None:
    """Refuses a step of a run at which the learning rate is not the full one.

    Args:
        length: the number of steps of the run.
    """
    from lmlab.optim import Scheduled, ScheduleFree

    optimizer: Any = build(cfg.optim, "optim")
    if not isinstance(optimizer, Scheduled):
        raise UserError(f"--cooldown is for the optimizers of lmlab.optim, and not for {cfg.optim._target_}.")
    if isinstance(optimizer, ScheduleFree):
        raise UserError("--cooldown: the weights of optim=schedule_free need none, as they are a running mean.")
    if not is_full(rate := optimizer.factor(step, length)):
        raise UserError(
            f"at step {step} the learning rate is {rate:.3g} of the full one, from which a cooldown begins.\n"
            "Train with optim.schedule=constant or warmup_stable_decay, and begin it in the stable part (--step N)."
        )


def is_full(factor: float) -> bool:
    """Returns whether a learning rate is the full one, up to the rounding of a schedule."""
    return math.isclose(factor, 1, rel_tol=1e-6)


def with_decay(cfg: DictConfig, length: int, step: int, steps: int) -> DictConfig:
    """Returns the config of a run whose learning rate decays over its last steps.

    Args:
        cfg: the config of the run from which the cooldown goes on, with the overrides of the cooldown.
        length: the number of steps of that run.
        step: its step from which the rate decays.
        steps: the number of steps over which it does.

    Raises:
        UserError: its schedule does not decay over these steps alone.
    """
    cfg = cfg.copy()
    given: dict[str, Any] = {"warmup_steps": build(cfg.optim, "optim").warmup(length), "decay_steps": steps}
    if cfg.optim.schedule == "constant":
        given["schedule"] = DECAYING
    for key, value in given.items():
        OmegaConf.update(cfg, f"optim.{key}", value, force_add=True)
    for key in cfg.get("budget") or ():
        cfg.budget[key] = None
    cfg.trainer.max_steps = step + steps
    decaying: Any = build(cfg.optim, "optim")
    if not is_full(decaying.factor(step, step + steps)) or is_full(decaying.factor(step + steps, step + steps)):
        raise UserError(
            f"optim.schedule={cfg.optim.schedule} does not decay over the last {steps} steps alone.\n"
            "Use optim.schedule=one_minus_sqrt or warmup_stable_decay."
        )
    return cfg
