"""Composes the config of a command with Hydra; reads, writes and freezes composed configs.

Nothing heavy is imported here at the top, as `--help` and `--cfg job` come through.
"""

import copy
import json
import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from lmlab import secrets
from lmlab.config import completion
from lmlab.config.explain import NO_FOLDER, explain
from lmlab.config.files import CONF, PACKAGE, files_of
from lmlab.config.overrides import readable
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import UserError, cause_of, first_line, plainly, shown_plainly
from lmlab.io import empty_folders_removed, write_text
from lmlab.runs.choices import of_this_version
from lmlab.runs.directory import RunDirectory

OF_SWEEPS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep")
"""The beginnings of the overrides that mean nothing without a sweep."""
BLOCKS = ("preprocess", "data", "tokenizer", "model", "objective", "trainer")
"""Blocks that the config of a run and that of an evaluation both have."""
SHORT_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
"""Short names of precisions, as Lightning takes them."""
SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
"""The target by which configs of older versions name trainer.strategy=fsdp."""
SECRETS_VARIABLE = "LMLAB_SECRETS"
"""The environment variable in which a process is handed the secrets of the config that it reads."""

# What a launcher asks a cluster for, per node.
OmegaConf.register_new_resolver("gpus", lambda accelerator, devices: None if accelerator == "cpu" else devices)
# A path that is to stay the same where a run is resumed from another directory.
OmegaConf.register_new_resolver("absolute", lambda path: str(Path(path).absolute()))


class RunFolder(Callback):
    """Removes the folders that Hydra makes for a run if they are empty at the end, as those of a refused command are.

    `made` belongs to the class, as Hydra makes the object and `run_command` has to close it.
    """

    made = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.made.enter_context(empty_folders_removed(Path(config.hydra.run.dir)))


@contextmanager
def create_hydra(conf: str = str(CONF), folder: str | Path | None = None) -> Iterator[Hydra]:
    """Sets up Hydra as a command of lmlab does, with the `folder` of its --config-dir searched before `conf`.

    Raises:
        UserError: there is no such folder.
    """
    path = create_config_search_path(conf)
    if folder is not None:
        folder = Path(folder).absolute()
        if not folder.is_dir():
            raise UserError(NO_FOLDER.format(folder))
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    try:
        yield Hydra.create_main_hydra2("train", path)
    finally:
        GlobalHydra.instance().clear()


def run_command(job: Callable[[DictConfig], Any], name: str) -> None:
    """Composes `conf/<name>.yaml` with the command line and calls `job` with it; errors are printed without traceback.

    In a sweep, `job` is called with the config of each point.
    """
    debug = "debug=true" in sys.argv
    # Hydra then raises instead of printing, and what it raises is explained here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    begun = False

    def task(cfg: DictConfig) -> Any:
        nonlocal begun
        begun = True
        return call_job(job, cfg, debug)

    with shown_plainly(debug), SIGNALS.heeded(), RunFolder.made:
        if "--help" in sys.argv or "-h" in sys.argv:
            print(help_text(name))
            return
        if sys.argv[1:2] in (["-sc"], ["--shell-completion"]) and completion.answer(name):
            return
        read_command()
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(explain(error, name)) from error
        except (ValueError, RuntimeError, OSError) as error:
            if begun:  # a defect; before that, Hydra's word on a group's option, or submitit's on a job
                raise
            raise UserError(explain(error, name)) from error


def call_job(job: Callable[[DictConfig], Any], cfg: DictConfig, debug: bool) -> Any:
    """Calls `job` within Hydra, which gets to know of an error as it needs to: a sweep goes on after it."""
    # Hydra has set the root logger to INFO, at which libraries say much.
    logging.getLogger().setLevel(logging.WARNING)
    hydra = HydraConfig.get()
    try:
        if hydra.mode is not RunMode.MULTIRUN:
            refuse_sweep_overrides(hydra.overrides.hydra)
        return job(cfg)
    except Exception as error:
        message = plainly(error)
        submitted = "SUBMITIT_EXECUTOR" in os.environ  # then the error alone gets to who submitted the job
        if debug or message is None:
            if submitted:
                traceback.print_exc()
            raise
        message = secrets.redacted_text(message)
        print(f"error: {message}", file=sys.stderr)
        if submitted:
            raise UserError(message) from error
        if hydra.mode is not RunMode.MULTIRUN:
            sys.exit(1)
        # An exception, unlike an exit, lets the other jobs of the sweep go on.
        told = "a job of the sweep failed; its error is above. The other jobs were run."
        raise UserError(told, cause_of(error)) from error


def refuse_sweep_overrides(words: Sequence[str]) -> None:
    """Refuses the overrides of a command without a sweep if one of them is for a sweep."""
    for word in words:
        if word.lstrip("+~").startswith(OF_SWEEPS):
            raise UserError(f"{word} is for a sweep: add -m to the command.")


def read_command() -> Namespace:
    """Parses the command line, and puts it back with its overrides made ready for Hydra and the options behind them.

    Raises:
        UserError: an option that is none, or a word that is no override.
    """
    # argparse would print its usage, all of it, and ends an override's words at the first option between them.
    parser = get_args_parser()
    parser.error = wrong_option  # type: ignore[method-assign]
    given, unknown = parser.parse_known_intermixed_args()
    if unknown:
        wrong_option(f"can't make sense of {' '.join(word for word in unknown if word.startswith('-'))}")
    options = list(sys.argv[1:])
    for word in given.overrides:
        options.remove(word)
    given.overrides = readable(given.overrides, searches=given.config_name is not None)
    sys.argv[1:] = [*given.overrides, *options]
    refuse_redacted(secrets.redacted_keys_of_command(sys.argv[1:]))
    return given


def wrong_option(message: str) -> NoReturn:
    """Raises the error for an option that is none, as an argument parser words it."""
    raise UserError(
        f"{message}.\nAn override is KEY=VALUE, without dashes; options are such as -m and --config-dir DIR."
    )


def help_text(name: str) -> str:
    """Returns the text of `--help`. Hydra would compose every file of conf/ twice only to list their names."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    listed = [f"{group.name}: {', '.join(files_of(group.name))}" for group in groups]
    return (PACKAGE / f"{name}.txt").read_text().replace("{groups}", "\n".join(listed))


def freeze(cfg: DictConfig, whole: bool = True) -> DictConfig:
    """Resolves every interpolation of a config, in place, and returns it: the run directory keeps it and ranks read it.

    Args:
        whole: refuse values that are still missing.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg)) if whole else []
        if missing:
            raise UserError(f"{missing[0]} has to be given: add {missing[0]}=… to the command.")
        OmegaConf.resolve(cfg)
    except InterpolationToMissingValueError as error:
        key = first_line(error).rpartition(" ")[2]
        raise UserError(f"{key} has to be given: add {key}=… to the command.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} does not resolve: {first_line(error)}.") from error
    check_secrets(cfg)
    return normalize_trainer(cfg)


def name_directory(cfg: DictConfig, swept: bool) -> None:
    """Sets mode, number and output directory as Hydra does for a job, and lets `${hydra:…}` resolve by this config."""
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.mode = RunMode.MULTIRUN if swept else RunMode.RUN
        cfg.hydra.job.id, cfg.hydra.job.num = "0", 0
        path = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir) if swept else Path(cfg.hydra.run.dir)
        cfg.hydra.runtime.output_dir = str(path.absolute())
    HydraConfig.instance().set_config(cfg)


def job_config(cfg: DictConfig) -> DictConfig:
    """Returns the part of a composed config that a job gets, frozen."""
    cfg = copy.deepcopy(cfg)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return freeze(cfg)


def normalize_trainer(cfg: DictConfig) -> DictConfig:
    """Gives precision and number of steps their full names as Lightning has them, in place, and returns the config."""
    trainer = cfg.get("trainer")
    if isinstance(trainer, DictConfig) and "precision" in trainer:
        trainer.precision = SHORT_PRECISIONS.get(str(trainer.precision), trainer.precision)
    if isinstance(trainer, DictConfig) and trainer.get("max_steps", 0) is None:
        trainer.max_steps = -1
    return cfg


def check_secrets(cfg: DictConfig) -> None:
    """Refuses a config whose secrets were not kept. Those of any other are kept out of messages from now on."""
    values = OmegaConf.to_container(cfg)
    refuse_redacted(secrets.redacted_keys(values))
    secrets.redacted(values)


def refuse_redacted(keys: list[str], prefix: str = "") -> None:
    """Refuses keys whose secrets were not kept.

    Args:
        prefix: `+` where the command has to add them to be able to give them again.
    """
    if keys:
        raise UserError(
            f"{', '.join(keys)} held a secret, which was not kept.\n"
            f"Give it again: add {' '.join(f'{prefix}{key}=…' for key in keys)} to the command."
        )


def without_secrets(cfg: DictConfig) -> DictConfig:
    """Returns the same config with its secrets redacted."""
    return OmegaConf.create(secrets.redacted(OmegaConf.to_container(cfg)))


def config_yaml(cfg: DictConfig) -> str:
    """Returns a composed config as its run directory keeps it, without its secrets."""
    return OmegaConf.to_yaml(without_secrets(cfg))


def overrides_yaml(overrides: list[str]) -> str:
    """Returns the overrides of a command as a run directory keeps them, without their secrets."""
    return OmegaConf.to_yaml(secrets.redacted_command(overrides))


def write_config(cfg: DictConfig, run_dir: Path) -> None:
    """Writes the composed config into a run directory."""
    write_text(RunDirectory(run_dir).config, config_yaml(cfg))


def handed_over(cfg: DictConfig) -> dict[str, str]:
    """Returns the environment variables for a process that reads the config where `write_config` wrote it.

    They hold the secrets of the config, which are not there.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    values = list(secrets.secret_values(config))
    return {SECRETS_VARIABLE: json.dumps(values)} if values else {}


def read_config(run_dir: Path) -> DictConfig:
    """Reads the composed config of a run directory, with the secrets that this process was handed over.

    That of an older version gets the keys of this one.

    Raises:
        UserError: the file can't be read, or is damaged.
    """
    path = RunDirectory(run_dir).config
    try:
        cfg = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is damaged: it is not the config of a run or an evaluation.")
    for key in BLOCKS:
        if key in cfg and not isinstance(cfg[key], DictConfig):
            raise UserError(f"{path} is damaged: {key} is no mapping in it. Bring back what it was.")
    values = of_this_version(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    for keys, secret in json.loads(os.environ.pop(SECRETS_VARIABLE, "[]")):  # they are taken once
        holder = values
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = secret
    secrets.redacted(values)  # to know them
    cfg = OmegaConf.create(values)
    if OmegaConf.select(cfg, "trainer.strategy._target_") == SHARDED:
        cfg.trainer.strategy = "fsdp"
    return cfg


def config_of(run: RunDirectory) -> DictConfig:
    """Reads the composed config of a run.

    Raises:
        UserError: the directory holds an evaluation, or the file is damaged.
    """
    cfg = read_config(run.path)
    if not {*BLOCKS, "run_dir"} <= set(cfg):
        raise UserError(f"{run.config} is damaged: it is not the config of a run.")
    if "optim" not in cfg:
        raise UserError(f"{run.path} holds an evaluation.\nChoose another directory: hydra.run.dir=DIR")
    return cfg
