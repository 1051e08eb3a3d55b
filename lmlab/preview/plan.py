"""The plan of a command: the config of its first run and the number of its runs, composed without running any."""

from argparse import Namespace
from math import prod
from typing import Any, NamedTuple, cast

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lmlab.config import changes
from lmlab.config.budget import check_lengths
from lmlab.config.compose import create_hydra, job_config, name_directory, refuse_sweep_overrides
from lmlab.config.files import CONF
from lmlab.console import console, counted
from lmlab.runs.choices import as_typed, flatten
from lmlab.sweeps import parameters


class Plan(NamedTuple):
    """The runs of a command."""

    cfg: DictConfig
    """The config of the first run, as its job would get it, every interpolation resolved."""
    default: DictConfig
    """The config of `lmlab.train` without any override."""
    points: int
    """The number of runs; 1 without a sweep."""
    first: list[str] | None
    """The overrides that make the first point of a sweep; None without one."""
    trials_at_once: int | None
    """The trials that a search runs at a time, as it chooses the next ones by their results; None without a search."""
    launcher: dict[str, Any]
    """The block of Hydra's launcher."""

    @property
    def jobs(self) -> int:
        """The number of runs that are handed to the launcher together."""
        return min(self.points, self.trials_at_once or self.points)

    @property
    def at_once(self) -> int:
        """The number of runs that train at the same time."""
        return min(self.jobs, self.launcher.get("array_parallelism", 1))


def plan_command(given: Namespace) -> Plan:
    """Composes the runs of a command line, as Hydra's parser reads it, like `lmlab.train` would.

    Raises:
        UserError: a sweep has no end of values, and there is no search to choose of them.
    """
    name = given.config_name or "train"
    with create_hydra(given.config_path or str(CONF), given.config_dir) as hydra:
        loader = hydra.config_loader
        swept = given.multirun or hydra.get_mode(name, given.overrides) is RunMode.MULTIRUN
        if not swept:
            refuse_sweep_overrides(given.overrides)
        mode = RunMode.MULTIRUN if swept else RunMode.RUN
        command = cfg = loader.load_configuration(name, given.overrides, mode)
        points, first, trials_at_once = 1, None, None
        if swept:
            sweeper = command.hydra.sweeper
            axes, fixed = parameters.overrides(sweeper.get("params") or {}, command.hydra.overrides.task, loader)
            if "n_trials" in sweeper:
                points, trials_at_once = sweeper.n_trials, sweeper.get("n_jobs", 1)
            else:
                points = prod(len(parameters.values(axis)) for axis in axes.values())
            first = [f"{key}={first_value(axis)}" for key, axis in axes.items()]
            cfg = loader.load_sweep_config(command, [*fixed, *first])
            name_directory(command, swept)
        name_directory(cfg, swept)
        launcher = cast(dict[str, Any], OmegaConf.to_container(command.hydra.launcher, resolve=True))
        default = loader.load_configuration("train", [], RunMode.RUN)
        plan = Plan(job_config(cfg), job_config(default), points, first, trials_at_once, launcher)
        check_lengths(plan.cfg, given.overrides)
        return plan


def first_value(override: Override) -> str:
    """Returns the first of the values that an override sweeps over, of an interval its start."""
    if override.is_discrete_sweep():
        return str(next(iter(override.sweep_string_iterator())))
    return str(cast(IntervalSweep, override.value()).start)


def changed_keys(plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values are not those by default, with both values."""
    cfg = changes.with_run_dir(plan.cfg, plan.default.run_dir)
    now, default = (flatten(OmegaConf.to_container(one)) for one in (cfg, plan.default))
    missing = changes.MISSING
    pairs = {key: (now.get(key, missing), default.get(key, missing)) for key in now | default}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def annotated_yaml(plan: Plan) -> str:
    """Returns the whole config in YAML, with the default beside each value that differs from it."""
    lines, path = list[str](), list[str]()
    changed = changed_keys(plan)
    for line in OmegaConf.to_yaml(plan.cfg).splitlines():
        depth, key = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        if not key.startswith("-"):
            path[depth:] = [key]
        name = ".".join(path)
        lines.append(f"{line}   # default: {as_typed(changed.pop(name)[1])}" if name in changed else line)
    missing = (f"# default, and not here: {key}={as_typed(default)}" for key, (_, default) in sorted(changed.items()))
    return "\n".join([*lines, *missing])


def show_config(plan: Plan) -> None:
    """Prints which run of a sweep is shown, and the keys that differ from the default."""
    from rich.text import Text

    if plan.first is not None:
        kind = "sweep" if plan.trials_at_once is None else "search"
        print(
            f"A {kind} of {counted(plan.points, 'point')}; shown: {' '.join(word.lstrip('+') for word in plan.first)}"
        )
    changed = changed_keys(plan)
    if not changed:
        print("Config: the default. All of it: --cfg job")
        return
    console().print(Text("Config, and in brackets the default; all of it: --cfg job", style="italic"))
    for key, (now, default) in changed.items():
        console().print(Text.assemble("  ", (key, "bold"), f": {as_typed(now)} ", (f"({as_typed(default)})", "dim")))
