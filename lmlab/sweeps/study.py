"""The Optuna study of a search: its database, what its trials draw, and the algorithms that choose them."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import optuna
from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from lmlab.errors import UserError, first_line, nearest
from lmlab.secrets import redacted, redacted_text

optuna.logging.set_verbosity(optuna.logging.WARNING)
Direction = Literal["minimize", "maximize"]
EXHAUSTIVE = ("BruteForceSampler", "GridSampler", "PartialFixedSampler")
"""Samplers of all combinations, for which there is the grid."""
LOCK_TIMEOUT = 60  # seconds that a process waits for another's write to an SQLite file


def create(storage: str, name: str, direction: Direction) -> optuna.Study:
    """Opens a study for a process that searches; begins it if it is not there.

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


def load(storage: str, name: str, pruner_block: dict[str, Any]) -> optuna.Study:
    """Opens the study of a run.

    Raises:
        LookupError: it is not there.
    """
    file = storage.removeprefix("sqlite:///")
    if file != storage and not Path(file).is_file():  # SQLite would make one
        raise LookupError(f"there is no {file}")
    return optuna.load_study(storage=database(storage), study_name=name, pruner=pruner(pruner_block))


def database(storage: str) -> optuna.storages.RDBStorage:
    """Returns the database of a URL."""
    options = {"connect_args": {"timeout": LOCK_TIMEOUT}} if storage.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(storage, engine_kwargs=options)


def distribution(override: Override) -> BaseDistribution:
    """Returns the distribution that Optuna draws the values of a swept override from.

    Raises:
        UserError: a tag has no meaning there.
    """
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


def first_value(drawn_from: Any) -> str:
    """Returns a value of a distribution, as it would be typed."""
    return value_text(drawn_from.choices[0] if hasattr(drawn_from, "choices") else drawn_from.low)


def overrides(trial: FrozenTrial) -> list[str]:
    """Returns what a trial drew, as overrides."""
    return [f"{key}={value_text(value)}" for key, value in trial.params.items()]


def value_text(value: Any) -> str:
    """Returns a value that Optuna drew, as it would be typed; choices are texts already."""
    return value if isinstance(value, str) else repr(value)


def check_search(
    sampler_block: dict[str, Any],
    pruner_block: dict[str, Any],
    direction: Direction,
    space: dict[str, BaseDistribution],
) -> None:
    """Refuses a search that could not go on, before it begins.

    Raises:
        UserError: names the key of hydra.sweeper.
    """
    trial = optuna.create_study(direction=direction, pruner=pruner(pruner_block), sampler=sampler(sampler_block, 0))
    try:
        for _ in range(2):  # some draw at random first
            trial.tell(trial.ask(space), 0.0)
        trial.ask(space)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        name = sampler_block["name"]
        raise UserError(f"hydra.sweeper.sampler: {name} can't draw that: {first_line(error)}") from error


def sampler(block: dict[str, Any], number: int) -> BaseSampler:
    """Returns the sampler of a trial, whose draws follow from (seed, number), however often the search was stopped."""
    if block.get("seed") is not None:
        state = np.random.SeedSequence([block["seed"], number]).generate_state(1)
        block = block | {"seed": int(state[0])}
    return built(optuna.samplers, BaseSampler, "sampler", block)


def pruner(block: dict[str, Any]) -> BasePruner:
    """Returns the pruner, which gives up hopeless trials."""
    return built(optuna.pruners, BasePruner, "pruner", block)


def built(module: ModuleType, kind: type, key: str, block: dict[str, Any]) -> Any:
    """Returns an object of the class that `name` says, with the other keys of the block as its arguments.

    Raises:
        UserError: there is no class of that name, or it does not take the arguments.
    """
    arguments = dict(block)
    name = str(arguments.pop("name", None))
    classes = dict(inspect.getmembers(module, lambda found: inspect.isclass(found) and issubclass(found, kind)))
    known = [name for name in classes if not name.startswith("Base") and name not in EXHAUSTIVE]
    if name not in known:
        raise UserError(f'hydra.sweeper.{key}.name is one of {", ".join(known)}, not "{name}".{nearest(name, known)}')
    try:
        return classes[name](**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"hydra.sweeper.{key}: {name} does not take that: {first_line(error)}") from error
