"""What a command sweeps over, and what is fixed in it: for the sweep itself, and for what is said of it before."""

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

# Hydra's launchers that bring jobs to a cluster, and that to SLURM.
SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
SLURM = f"{SUBMITIT}.submitit_launcher.SlurmLauncher"


def overrides(
    params: Mapping[Any, Any], words: Sequence[str], loader: ConfigLoader
) -> tuple[dict[str, Override], list[str]]:
    """The swept overrides of a sweeper's `params` and a command, which wins, by key; the fixed ones as typed."""
    given = [*readable([f"{key}={typed(value)}" for key, value in params.items()]), *words]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    last = {override.get_key_element().lstrip("+"): override for override in parsed}
    both = {override.get_key_element(): override for override in last.values()}
    for key, override in both.items():
        word = override.input_line or ""
        if override.is_sweep_override() and redacted_word(word) != word:
            raise UserError(f"{key} is a secret, which is not kept, and so not to be swept over: give it one value.")
    fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in both.items() if not o.is_sweep_override()]
    return {key: override for key, override in both.items() if override.is_sweep_override()}, fixed


def values(override: Override) -> list[str]:
    """The values that an override sweeps over, as typed.

    Raises:
        UserError: there is no end of them.
    """
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line} has no end of values. To search it: hydra/sweeper=optuna")
    return list(override.sweep_string_iterator())


def typed(value: Any) -> str:
    """A value of `params` as on the command line; a list is one of values to sweep over."""
    if isinstance(value, ListConfig | list):
        return ",".join(map(typed, value))
    if isinstance(value, DictConfig):
        value = OmegaConf.to_object(value)
    return value if isinstance(value, str) else quoted(value)


def quoted(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
