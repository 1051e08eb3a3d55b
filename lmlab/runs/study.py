"""The study of a search: a database of Optuna's, which the processes that search and their runs share."""

import inspect
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from sqlalchemy.exc import SQLAlchemyError

from lmlab.errors import UserError, first_line, nearest

optuna.logging.set_verbosity(optuna.logging.WARNING)
PATIENCE = 60  # seconds that a process waits for another's write to an SQLite file


def opened(storage: str, name: str, direction: Any = "minimize", pruned: dict[str, Any] | None = None) -> optuna.Study:
    """A study, begun if it is not there.

    Raises:
        UserError: its database can't be opened.
    """
    options = {"connect_args": {"timeout": PATIENCE}} if storage.startswith("sqlite") else {}
    try:
        return optuna.create_study(
            storage=optuna.storages.RDBStorage(storage, engine_kwargs=options),
            study_name=name,
            direction=direction,
            load_if_exists=True,
            pruner=pruner(pruned) if pruned else None,
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, ValueError) as error:
        raise UserError(
            f"the study {storage} can't be opened: {first_line(error)}\nGive its URL: hydra.sweeper.storage=…"
        ) from error


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
    known = {n: found for n, found in classes.items() if issubclass(found, kind) and not n.startswith("Base")}
    name = block.get("name")
    if name not in known:
        raise UserError(
            f'hydra.sweeper.{key}.name is one of {", ".join(sorted(known))}, not "{name}".{nearest(str(name), known)}'
        )
    try:
        return known[name](**{option: value for option, value in block.items() if option != "name"})
    except (TypeError, ValueError) as error:
        raise UserError(f"hydra.sweeper.{key}: {name} does not take that: {first_line(error)}") from error
