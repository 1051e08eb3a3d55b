"""The swept and the fixed overrides of a sweep, from its config and its command."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from lmlab.config.overrides import readable
from lmlab.errors import UserError
from lmlab.secrets import redacted_word


def overrides(
    params: Mapping[Any, Any], words: Sequence[str], loader: ConfigLoader
) -> tuple[dict[str, Override], list[str]]:
    """Merges the `params` of a sweeper with the overrides of a command, which win.

    Returns:
        the swept overrides by key, and the fixed ones as they would be typed.

    Raises:
        UserError: a secret is swept over.
    """
    given = [*readable([f"{key}={override_value(value)}" for key, value in params.items()]), *words]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    last = {override.get_key_element().lstrip("+"): override for override in parsed}
    swept, fixed = dict[str, Override](), list[str]()
    for override in last.values():
        key, word = override.get_key_element(), override.input_line or ""
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif redacted_word(word) != word:
            raise UserError(f"{key} is a secret, which is not kept, and so not to be swept over: give it one value.")
        else:
            swept[key] = override
    return swept, fixed


def values(override: Override) -> list[str]:
    """Returns the values that an override sweeps over, as they would be typed.

    Raises:
        UserError: there is no end of them.
    """
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line} has no end of values. To search it: hydra/sweeper=optuna")
    return list(override.sweep_string_iterator())


def override_value(value: Any) -> str:
    """Returns a value of `params` as it would be typed in an override; a list holds values to sweep over."""
    if isinstance(value, ListConfig | list):
        return ",".join(map(override_value, value))
    if isinstance(value, DictConfig):
        value = OmegaConf.to_object(value)
    return value if isinstance(value, str) else quoted(value)


def quoted(value: Any) -> str:
    """Returns a value in the grammar of overrides, with its strings in quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
