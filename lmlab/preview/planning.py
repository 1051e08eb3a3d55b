"""What a command would run, without running it: the config of its first point, and how many points there are."""

import copy
from argparse import Namespace
from math import prod
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lmlab.config import changes
from lmlab.config.compose import create_hydra, job_config, name_directory
from lmlab.config.files import CONF
from lmlab.runs.choices import flat, said
from lmlab.sweeps import parameters


class Planned(NamedTuple):
    """What a command would run."""

    cfg: DictConfig
    """Of its first point, as a job would get it, every interpolation resolved."""
    default: DictConfig
    """The config of the command without any override."""
    points: int
    """Runs of the sweep; 1 without one."""
    swept: bool
    """Whether this is a sweep, which -m or the config says."""
    first: list[str]
    """What makes the first point of a sweep."""
    jobs: int | None
    """How many points a search, which chooses them as it goes, has run at a time; None where all are known before."""
    launcher: dict[str, Any] | None
    """The launcher's block; None where its plugin is not installed."""


def planned(given: Namespace) -> Planned:
    """What a command line, as Hydra reads it, would run with any launcher that there is."""
    try:
        return composed(given, given.overrides)
    except MissingConfigException as error:
        if "hydra/launcher/submitit" not in str(error.missing_cfg_file):
            raise
    own = ("hydra/launcher", "hydra.launcher", "+hydra.launcher", "++hydra.launcher")
    return composed(given, [word for word in given.overrides if not word.startswith(own)])._replace(launcher=None)


def composed(given: Namespace, overrides: list[str]) -> Planned:
    """Compose as `lmlab.train` would."""
    name = given.config_name or "train"
    with create_hydra(given.config_path or str(CONF), given.config_dir) as hydra:
        loader = hydra.config_loader
        swept = given.multirun or hydra.get_mode(name, overrides) is RunMode.MULTIRUN
        mode = RunMode.MULTIRUN if swept else RunMode.RUN
        whole = loader.load_configuration(name, overrides, mode)
        points, swept_to, jobs = 1, list[str](), None
        if swept:
            points, fixed, swept_to, jobs = sweep(whole, loader)
            one = loader.load_sweep_config(whole, [*fixed, *swept_to])
        else:
            one = copy.deepcopy(whole)
        name_directory(whole, swept)
        name_directory(one, swept)
        default = loader.load_configuration("train", [], RunMode.RUN)
        launcher: Any = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
        return Planned(job_config(one), job_config(default), points, swept, swept_to, jobs, launcher)


def sweep(whole: DictConfig, loader: ConfigLoader) -> tuple[int, list[str], list[str], int | None]:
    """How many points a sweep has, what is fixed and what is swept of the first, and how many a search runs at a time.

    Raises:
        UserError: values without an end, and no search to choose of them.
    """
    sweeper = whole.hydra.sweeper
    swept, fixed = parameters.overrides(sweeper.get("params") or {}, whole.hydra.overrides.task, loader)
    if "n_trials" in sweeper:
        return sweeper.n_trials, fixed, [f"{key}={first(o)}" for key, o in swept.items()], sweeper.get("n_jobs", 1)
    points = prod(len(parameters.values(override)) for override in swept.values())
    return points, fixed, [f"{key}={first(o)}" for key, o in swept.items()], None


def first(override: Override) -> str:
    """Of the values that an override sweeps over; of an interval its start."""
    if override.is_discrete_sweep():
        return str(next(iter(override.sweep_string_iterator())))
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return str(interval.start)


def changed_keys(plan: Planned) -> dict[str, tuple[Any, Any]]:
    """Keys with another value than by default, with both."""
    moved = changes.moved(plan.cfg, plan.default.run_dir)
    now, default = (flat(OmegaConf.to_container(cfg)) for cfg in (moved, plan.default))
    missing = changes.NOT_THERE
    pairs = {key: (now.get(key, missing), default.get(key, missing)) for key in now | default}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def marked(plan: Planned) -> str:
    """The whole config in YAML, with the default beside what differs from it."""
    lines, path = list[str](), list[str]()
    changed = changed_keys(plan)
    for line in OmegaConf.to_yaml(plan.cfg).splitlines():
        indent, key = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        if not key.startswith("-"):
            path[indent:] = [key]
        name = ".".join(path)
        lines.append(f"{line}   # default: {said(changed.pop(name)[1])}" if name in changed else line)
    gone = (f"# default, and not here: {key}={said(pair[1])}" for key, pair in sorted(changed.items()))
    return "\n".join([*lines, *gone])
