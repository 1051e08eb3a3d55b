"""The study of a search: a database of Optuna's, which the processes that search and their runs share."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from sqlalchemy.exc import SQLAlchemyError

from lmlab.errors import UserError, first_line, nearest
from lmlab.secrets import redacted, redacted_text

optuna.logging.set_verbosity(optuna.logging.WARNING)
DIRECTIONS = ("minimize", "maximize")
EVERY = ("BruteForceSampler", "GridSampler", "PartialFixedSampler")
"""Samplers of all combinations, for which there is the other sweeper."""
PATIENCE = 60  # seconds that a process waits for another's write to an SQLite file


def opened(storage: str, name: str, direction: Any) -> optuna.Study:
    """The study of a process that searches, begun if it is not there.

    Raises:
        UserError: its database can't be opened.
    """
    try:
        return optuna.create_study(storage=database(storage), study_name=name, direction=direction, load_if_exists=True)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError) as error:
        why = redacted_text(first_line(error))
        raise UserError(
            f"the study {redacted(storage)} can't be opened: {why}\nGive another URL: hydra.sweeper.storage=…"
        ) from error


def joined(storage: str, name: str, pruned: dict[str, Any]) -> optuna.Study:
    """The study of a run, which is there.

    Raises:
        LookupError: it is not.
    """
    file = storage.removeprefix("sqlite:///")
    if file != storage and not Path(file).is_file():  # SQLite would make one
        raise LookupError(f"there is no {file}")
    return optuna.load_study(storage=database(storage), study_name=name, pruner=pruner(pruned))


def database(storage: str) -> optuna.storages.RDBStorage:
    options = {"connect_args": {"timeout": PATIENCE}} if storage.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(storage, engine_kwargs=options)


def check(sampled: dict[str, Any], pruned: dict[str, Any], direction: Any, space: dict[str, Any]) -> None:
    """Refuse what a search could not go on with, before it begins.

    Raises:
        UserError: says which key of hydra.sweeper.
    """
    if direction not in DIRECTIONS:
        raise UserError(f'hydra.sweeper.direction is minimize or maximize, not "{direction}".')
    trial = optuna.create_study(direction=direction, pruner=pruner(pruned), sampler=sampler(sampled, 0))
    try:
        for _ in range(2):  # some draw at random first
            trial.tell(trial.ask(space), 0.0)
        trial.ask(space)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"hydra.sweeper.sampler: {sampled['name']} can't draw that: {first_line(error)}") from error


def sampler(block: dict[str, Any], number: int) -> BaseSampler:
    """The sampler for a trial, whose draws follow from (seed, number) alone: however often the search was stopped."""
    if block.get("seed") is not None:
        state = np.random.SeedSequence([block["seed"], number]).generate_state(1)
        block = block | {"seed": int(state[0])}
    return named(optuna.samplers, BaseSampler, "sampler", block)


def pruner(block: dict[str, Any]) -> BasePruner:
    """What gives up hopeless runs."""
    return named(optuna.pruners, BasePruner, "pruner", block)


def named(module: Any, kind: type, key: str, block: dict[str, Any]) -> Any:
    """An object of Optuna's by the name of its class, and its arguments.

    Raises:
        UserError: there is none of that name, or it does not take them.
    """
    classes = {name: found for name, found in vars(module).items() if inspect.isclass(found)}
    known = {n: c for n, c in classes.items() if issubclass(c, kind) and not n.startswith("Base") and n not in EVERY}
    name = block.get("name")
    if name not in known:
        raise UserError(
            f'hydra.sweeper.{key}.name is one of {", ".join(sorted(known))}, not "{name}".{nearest(str(name), known)}'
        )
    try:
        return known[name](**{option: value for option, value in block.items() if option != "name"})
    except (TypeError, ValueError) as error:
        raise UserError(f"hydra.sweeper.{key}: {name} does not take that: {first_line(error)}") from error
