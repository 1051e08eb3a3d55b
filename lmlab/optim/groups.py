"""Parameter groups: the learning rate and the weight decay of parameters by the patterns of their names."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lmlab.errors import UserError, nearest

Settings = Mapping[str, Mapping[str, Any]]
"""The lr, weight_decay or freeze of the parameters whose names match a pattern such as `*.wte.*`, by the patterns."""
KEYS = {"lr": (int, float), "weight_decay": (int, float), "freeze": (bool,)}
"""The keys that a pattern can have, and the types of their values."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses unknown keys, and values that a key can't have.

    Raises:
        UserError: there is one.
    """
    for pattern, own in settings.items():
        if not isinstance(own, Mapping):
            raise UserError(
                f'optim.groups: "{pattern}" has to be a mapping of {", ".join(KEYS)}, not {own!r}.\n'
                f"In a shell: 'optim.groups={{{pattern}: {{lr: 1e-4}}}}'"
            )
        for key, value in own.items():
            if key not in KEYS:
                raise UserError(
                    f'optim.groups: "{pattern}" has no key {key}.{nearest(key, KEYS)} Keys: {", ".join(KEYS)}.'
                )
            if type(value) not in KEYS[key] or not 0 <= value < math.inf:
                kind = "true or false" if key == "freeze" else "a number, 0 or more"
                raise UserError(f'optim.groups: {key} of "{pattern}" has to be {kind}, not {value!r}.')


def match(model: nn.Module, settings: Settings) -> dict[str, str | None]:
    """Returns the pattern that the name of each parameter matches, by this name; None if it matches none.

    Raises:
        UserError: a pattern matches no parameter, or two match the same one.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name: [pattern for pattern in settings if fnmatchcase(name, pattern)] for name in names}
    for pattern in settings:
        if not any(pattern in patterns for patterns in found.values()):
            raise UserError(
                f'optim.groups: "{pattern}" matches no parameter.{nearest(pattern.strip("*."), names)}\n'
                f"Parameters are named like {names[0]} and {names[-1]}; * stands for any characters."
            )
    for name, patterns in found.items():
        if len(patterns) > 1:
            raise UserError(
                f'optim.groups: both "{patterns[0]}" and "{patterns[1]}" match {name}. Let one of them match it.'
            )
    return {name: patterns[0] if patterns else None for name, patterns in found.items()}


def freeze(model: nn.Module, settings: Settings) -> None:
    """Takes the parameters that a pattern freezes out of training.

    Raises:
        UserError: as `match` does; no parameter is left to train, or none of those of a pattern that does not freeze.
    """
    pattern_of = match(model, settings)
    for name, pattern in pattern_of.items():
        if pattern is not None and settings[pattern].get("freeze"):
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.groups freezes all parameters, so that there is nothing to train.")
    trained = {pattern_of[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern, own in settings.items():
        if pattern not in trained and not own.get("freeze"):
            raise UserError(
                f'optim.groups: "{pattern}" matches no parameter that is trained: beside an adapter those of its base '
                "are not.\nLet it match those of the adapter, such as *.lora_A.*, or leave it out."
            )


def make_groups(
    model: nn.Module, lr: float, weight_decay: float, settings: Settings, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Returns the groups of the trained parameters, as torch's optimizers take them.

    The parameters that no pattern matches come first, and then those of each pattern. Of either, matrices and
    embeddings come before vectors (norms and biases), which do not decay unless their pattern says so.

    Args:
        factors: those of the rate of some parameters, by their names; of their decay they are the divisors.
    """
    pattern_of = match(model, settings)
    groups: dict[tuple[str | None, bool, float], dict[str, Any]] = {}
    for pattern in (None, *settings):
        own: Mapping[str, Any] = {} if pattern is None else settings[pattern]
        for factor in sorted({1.0, *factors.values()}, reverse=True):
            for is_vector in (False, True):
                decay = own.get("weight_decay", 0.0 if is_vector else weight_decay) / factor
                group = {"params": [], "lr": own.get("lr", lr) * factor, "weight_decay": decay}
                groups[pattern, is_vector, factor] = group
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[pattern_of[name], parameter.ndim < 2, factors.get(name, 1.0)]["params"].append(parameter)
    # The first two are kept even if they are empty, as checkpoints of runs without patterns have both.
    return [group for (pattern, *_), group in groups.items() if group["params"] or pattern is None]


def describe_groups(
    model: nn.Module, lr: float, weight_decay: float, settings: Settings, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Returns what holds for the parameters of each pattern, and for all others, whose pattern is "".

    Those whose rate has a factor (see `make_groups`) have a row of their own.
    """
    pattern_of, rows = match(model, settings), list[dict[str, Any]]()
    for pattern in (*settings, None):
        own: Mapping[str, Any] = {} if pattern is None else settings[pattern]
        held = {"lr": lr, "weight_decay": weight_decay, "freeze": False, **own}
        for factor in sorted({1.0, *factors.values()}, reverse=True):
            # Beside an adapter those of its base are not trained, whatever the pattern says.
            named = [
                p
                for name, p in model.named_parameters()
                if pattern_of[name] == pattern and factors.get(name, 1.0) == factor
            ]
            count = sum(p.numel() for p in named if p.requires_grad or own.get("freeze"))
            if count or factor == 1:
                by_width = {"lr": held["lr"] * factor, "weight_decay": held["weight_decay"] / factor}
                rows.append({"pattern": pattern or "", "parameters": count, **held, **by_width})
    return rows


def layer_matrices(model: nn.Module) -> set[int]:
    """Returns the `id` of each matrix of a model that is neither an embedding nor the projection to the vocabulary."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        apart.add(id(head.weight))
    return {id(p) for p in model.parameters() if p.ndim == 2} - apart
