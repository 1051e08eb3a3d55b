"""Parameter groups: the learning rate and the weight decay of parameters by the patterns of their names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lmlab.errors import UserError, nearest

Settings = Mapping[str, Mapping[str, Any]]
"""What holds for the parameters whose names match a pattern, such as `*.wte.*`: lr, weight_decay, freeze."""
KEYS = {"lr": (int, float), "weight_decay": (int, float), "freeze": (bool,)}
"""The keys of each pattern, and their types."""


def check_settings(settings: Settings) -> None:
    """Refuses keys that are none, and values that they can't have.

    Raises:
        UserError: there is one.
    """
    for pattern, own in settings.items():
        for key, value in own.items():
            if key not in KEYS:
                raise UserError(
                    f'optim.groups: "{pattern}" has no key {key}.{nearest(key, KEYS)} Keys: {", ".join(KEYS)}.'
                )
            if type(value) not in KEYS[key] or value < 0:
                kind = "true or false" if key == "freeze" else "a number, 0 or more"
                raise UserError(f'optim.groups: {key} of "{pattern}" is {kind}, not {value!r}.')


def match(model: nn.Module, settings: Settings) -> dict[str, str | None]:
    """Returns the pattern of each parameter by its name, None where none matches.

    Raises:
        UserError: a pattern matches nothing, or two match the same parameter.
    """
    names = [name_of(name) for name, _ in model.named_parameters()]
    patterns = {name: [pattern for pattern in settings if fnmatchcase(name, pattern)] for name in names}
    for pattern in settings:
        if not any(pattern in found for found in patterns.values()):
            raise UserError(
                f'optim.groups: "{pattern}" matches no parameter.{nearest(pattern.strip("*."), names)}\n'
                f"Parameters are named like {names[0]} and {names[-1]}; * stands for any characters."
            )
    for name, found in patterns.items():
        if len(found) > 1:
            raise UserError(f'optim.groups: {name} is matched by "{found[0]}" and by "{found[1]}". Let one match it.')
    return {name: found[0] if found else None for name, found in patterns.items()}


def name_of(name: str) -> str:
    """Returns the name of a parameter without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def freeze(model: nn.Module, settings: Settings) -> None:
    """Takes the parameters that are to stay as they are out of training.

    Raises:
        UserError: as of `match`; or no parameter is left.
    """
    pattern_of = match(model, settings)
    for name, parameter in model.named_parameters():
        pattern = pattern_of[name_of(name)]
        if pattern is not None and settings[pattern].get("freeze"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.groups freezes all parameters, so that there is nothing to train.")


def make_groups(model: nn.Module, lr: float, weight_decay: float, settings: Settings) -> list[dict[str, Any]]:
    """Returns the groups of the trained parameters, as torch's optimizers take them.

    First come matrices and embeddings, then norms and biases, which are the vectors and do not decay, and then both of
    each pattern.
    """
    pattern_of = match(model, settings)
    groups: dict[tuple[str | None, bool], dict[str, Any]] = {}
    for pattern in (None, *settings):
        own: Mapping[str, Any] = {} if pattern is None else settings[pattern]
        for is_vector in (False, True):
            decay = own.get("weight_decay", 0.0 if is_vector else weight_decay)
            groups[pattern, is_vector] = {"params": [], "lr": own.get("lr", lr), "weight_decay": decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[pattern_of[name_of(name)], parameter.ndim < 2]["params"].append(parameter)
    return [group for (pattern, _), group in groups.items() if group["params"] or pattern is None]
