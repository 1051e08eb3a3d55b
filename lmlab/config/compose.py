"""From a command line to a composed config, and what Hydra finds wrong with it in words.

Nothing heavy is imported here at the top: `--help` and `--cfg job` come through.
"""

import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmlab.errors import UserError, check_place, first_line, nearest, plainly, shown_plainly
from lmlab.runs.files import empty_folders_removed
from lmlab.runs.stopping import SIGNALS

PACKAGE = Path(__file__).parent.parent
# Beside the package in a checkout, inside it when installed.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

# What a launcher asks a cluster for, per node.
OmegaConf.register_new_resolver("gpus", lambda accelerator, devices: None if accelerator == "cpu" else devices)


class RunFolder(Callback):
    """Sees to it that what Hydra makes for a run does not outlive it empty: no folder stays of a typo."""

    made = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.made.enter_context(empty_folders_removed(Path(config.hydra.run.dir)))


def run_verb(job: Callable[[DictConfig], Any], name: str) -> None:
    """Compose `conf/<name>.yaml` with the command line and call `job` with it, plainly failing."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text(name))
        return
    if sys.argv[1:2] in (["-sc"], ["--shell-completion"]):
        from lmlab.config import completing

        if completing.answer(name):
            return
    debug = "debug=true" in sys.argv
    # Hydra then raises instead of printing, and what it raises is explained here.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    begun = False

    def plain_job(cfg: DictConfig) -> Any:
        nonlocal begun
        begun = True
        logging.getLogger().setLevel(logging.WARNING)  # Hydra shows its own news; those of libraries are for nobody
        try:
            return job(cfg)
        except Exception as error:
            message = plainly(error)
            submitted = "SUBMITIT_EXECUTOR" in os.environ  # then the error alone gets to who submitted the job
            if debug or message is None:
                if submitted:
                    traceback.print_exc()
                raise
            print(f"error: {message}", file=sys.stderr)
            if submitted:
                raise UserError(message) from error
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                sys.exit(1)
            # An exception, unlike an exit, lets the other jobs of the sweep go on.
            raise UserError("a job of the sweep failed; its error is above. The other jobs were run.") from error

    with shown_plainly(debug), SIGNALS.heeded(), RunFolder.made:
        read_command()
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(plain_job)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(explain(error, name)) from error
        except (ValueError, RuntimeError) as error:
            if begun:  # a defect; before that, Hydra's word on a group's option, or submitit's on a job
                raise
            raise UserError(explain(error, name)) from error
        except OSError as error:
            if begun:
                raise
            raise UserError(
                f"the run directory {error.filename} can't be made: {error.strerror}.\n"
                "Choose another: hydra.run.dir=DIR"
            ) from error


def read_command() -> Namespace:
    """The command line as Hydra reads it.

    Raises:
        UserError: an option that is none.
    """
    # Which keys a model's config has is for its architecture to say (models/loading.py), so
    # setting one that the YAML file does not list needs no +.
    sys.argv[1:] = [f"++{word}" if word.startswith("model.config.") else word for word in sys.argv[1:]]
    # argparse would print its usage, all of it.
    given, unknown = get_args_parser().parse_known_args()
    if unknown:
        raise UserError(
            f"can't make sense of {' '.join(unknown)}.\n"
            "An override is KEY=VALUE, without dashes; options such as --config-dir DIR come before all overrides."
        )
    return given


def help_text(name: str) -> str:
    """What `--help` shows. Hydra would compose every file of conf/ twice only to list their names."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    listed = [f"{group.name}: {', '.join(sorted(file.stem for file in group.glob('*.yaml')))}" for group in groups]
    return (PACKAGE / f"{name}.txt").read_text().replace("{groups}", "\n".join(listed))


def explain(error: Exception, name: str) -> str:
    """What Hydra found wrong, with the nearest right name."""
    override = getattr(error, "override", None)
    if override:
        return f"can't read the override {override}: {first_line(error)}\nFor the shell, put quotes around it."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}.\nTo run the command for each value add -m; a list is KEY=[a,b]."
    missing = getattr(error, "missing_cfg_file", None)
    if "hydra/launcher/submitit" in str(missing):
        return "submitting jobs to SLURM takes a plugin of Hydra's that is not installed:\npip install 'lmlab[slurm]'"
    options = getattr(error, "options", None)
    if missing and options:
        group, _, option = str(missing).rpartition("/")
        return f"{group}={option}: no such option.{nearest(option, options)} Options: {', '.join(sorted(options))}."
    if lines and lines[0].startswith(("Could not override", "Key '")):
        wrong = lines[0].split("'")[1]
        meant = nearest(wrong, known_keys(name)) or f" For those there are: python -m lmlab.{name} --help"
        return f'there is no key "{wrong}".{meant}'
    if lines and lines[0].startswith("Error merging override") and error.__cause__:
        return f"{lines[0]}: {first_line(error.__cause__)}"
    return "\n".join(lines[:3]) or first_line(error.__cause__ or error)


def known_keys(name: str) -> set[str]:
    """Groups, and dotted keys of the config that the command line's group choices compose."""
    listed = OmegaConf.load(CONF / f"{name}.yaml").defaults
    groups = {group for entry in listed if isinstance(entry, DictConfig) for group in map(str, entry)}
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, chosen)
    return groups | set(dotted(cfg))


def dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys in a config."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from dotted(value, f"{prefix}{key}.")


def freeze(cfg: DictConfig, whole: bool = True) -> DictConfig:
    """The config with every interpolation resolved: what the run directory keeps and ranks read.

    Unless it is the `whole` one, values may still be missing.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg)) if whole else []
        if missing:
            raise UserError(f"{missing[0]} has to be given: add {missing[0]}=… to the command.")
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} does not resolve: {first_line(error)}.") from error
    return cfg


def completed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of an evaluation, with what the run that it evaluates says where the command does not.

    Args:
        overrides: of the command line, to tell a choice from a default.
    """
    from lmlab.runs.directory import RunDirectory

    if OmegaConf.is_missing(cfg.model, "name") or not cfg.model.get("name"):
        raise UserError("model has to be given: add model=RUN_DIRECTORY, or an exported directory, or a hub id.")
    run = RunDirectory(cfg.model.name)
    trained = read_config(run.path) if run.manifest.is_file() and run.config.is_file() else None
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if trained is not None:
        if not run.model.is_dir():
            raise UserError(
                f"{run.path} holds no model: it is an evaluation, or a run that did not come to its end.\n"
                "Name a run that did: model=RUN_DIRECTORY"
            )
        cfg.model.name = str(run.model)
    elif cfg.model.name.endswith(".ckpt"):
        raise UserError(f"{cfg.model.name} is a checkpoint of a run: name the run's directory, model=RUN_DIRECTORY")
    else:
        check_place(f'model "{cfg.model.name}"', "model")
    if "data" not in cfg:
        if trained is None:
            raise UserError(
                "data has to be given, as the model is not a run of lmlab: add data=wikitext2 (or another group),\n"
                "data=hub data.path=ID, or data=files data.validation=FILE to the command."
            )
        for word in overrides:
            if word.lstrip("+~").startswith("preprocess") and not word.startswith("preprocess.block_size="):
                raise UserError(f"{word} is for text that is named by data=…; the run's own is prepared as it was.")
        cfg.data = trained.data
        cfg.preprocess = OmegaConf.merge(trained.preprocess, {"block_size": cfg.preprocess.block_size})
    if cfg.preprocess.block_size is None and trained is not None:
        cfg.preprocess.block_size = trained.preprocess.block_size
    if OmegaConf.is_missing(cfg.data, "train"):
        cfg.data.train = None
    if "objective" not in cfg:
        cfg.objective = trained.objective if trained is not None else objective_of(cfg)
    if cfg.context is None:
        cfg.context = "document" if cfg.score == "pseudo" else "blocks"
    return cfg


def objective_of(cfg: DictConfig) -> DictConfig:
    """The objective that a model, by its own config, was trained with."""
    from lmlab.models.loading import is_causal

    name = "clm" if is_causal(cfg.model.name, cfg.model.revision) else "mlm"
    block = OmegaConf.load(CONF / "objective" / f"{name}.yaml")
    assert isinstance(block, DictConfig)
    block.pop("defaults", None)
    return block


def elsewhere(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """The same config with some values changed, for a directory in its own."""
    other = OmegaConf.merge(cfg, changes, {"run_dir": f"{cfg.run_dir}/check"})
    assert isinstance(other, DictConfig)
    return other


def read_config(run_dir: Path) -> DictConfig:
    """The composed config of a run directory."""
    place = run_dir / "config.yaml"
    try:
        cfg = OmegaConf.load(place)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{place} can't be read: {first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{place} is damaged: it is not the config of a run or an evaluation.")
    return cfg
