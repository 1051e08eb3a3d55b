"""From a command line to a composed config, and what Hydra finds wrong with it in words.

Nothing heavy is imported here at the top: `--help` and `--cfg job` come through.
"""

import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmlab.config.overrides import meant, readable, unreadable
from lmlab.errors import UserError, cause_of, check_place, first_line, from_hub, nearest, plainly, shown_plainly
from lmlab.runs import secrets
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import empty_folders_removed, write_text
from lmlab.runs.stopping import SIGNALS

PACKAGE = Path(__file__).parent.parent
# Beside the package in a checkout, inside it when installed.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
SWEEPS = CONF.parent / "sweeps"
"""The sweeps and the batch file that come with lmlab."""
BLOCKS = ("preprocess", "data", "tokenizer", "model", "objective", "trainer")
"""What the config of a run and that of an evaluation both have, each a mapping."""
LIMITS = (
    "a share of the batches would give a metric over an arbitrary part of the text.\n"
    "For cheaper validations: validation.max_documents=N. For a shorter run: trainer.max_steps=N."
)
"""What to say of the keys of Lightning's that leave batches out."""
NO_FOLDER = "--config-dir {}: there is no such folder."
SHORT_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
"""Short names of precisions, as Lightning takes them."""

# What a launcher asks a cluster for, per node.
OmegaConf.register_new_resolver("gpus", lambda accelerator, devices: None if accelerator == "cpu" else devices)


class RunFolder(Callback):
    """Removes the folders that Hydra makes for a run if they are empty at the end, as those of a refused command are.

    `made` belongs to the class, as Hydra makes the object and `run_verb` has to close it.
    """

    made = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.made.enter_context(empty_folders_removed(Path(config.hydra.run.dir)))


@contextmanager
def hydra_of(conf: str = str(CONF), folder: str | Path | None = None) -> Iterator[Hydra]:
    """Hydra as a command of lmlab sets it up, with the `folder` of its --config-dir before `conf`.

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


def run_verb(job: Callable[[DictConfig], Any], name: str) -> None:
    """Compose `conf/<name>.yaml` with the command line and call `job` with it, plainly failing."""
    debug = "debug=true" in sys.argv
    # Hydra then raises instead of printing, and what it raises is explained here.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    begun = False

    def plain_job(cfg: DictConfig) -> Any:
        nonlocal begun
        begun = True
        # Hydra has set the root logger to INFO, at which libraries say much.
        logging.getLogger().setLevel(logging.WARNING)
        try:
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
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                sys.exit(1)
            # An exception, unlike an exit, lets the other jobs of the sweep go on.
            said = "a job of the sweep failed; its error is above. The other jobs were run."
            raise UserError(said, cause_of(error)) from error

    with shown_plainly(debug), SIGNALS.heeded(), RunFolder.made:
        if "--help" in sys.argv or "-h" in sys.argv:
            print(help_text(name))
            return
        if sys.argv[1:2] in (["-sc"], ["--shell-completion"]):
            from lmlab.config import completing

            if completing.answer(name):
                return
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
    """The command line as Hydra reads it, which gets it with its overrides made ready, and options behind them.

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
    refuse_lost(secrets.lost_of_command(sys.argv[1:]))
    return given


def wrong_option(message: str) -> NoReturn:
    raise UserError(
        f"{message}.\nAn override is KEY=VALUE, without dashes; options are such as -m and --config-dir DIR."
    )


def help_text(name: str) -> str:
    """What `--help` shows. Hydra would compose every file of conf/ twice only to list their names."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    listed = [f"{group.name}: {', '.join(files_of(group.name))}" for group in groups]
    return (PACKAGE / f"{name}.txt").read_text().replace("{groups}", "\n".join(listed))


def explain(error: Exception, name: str) -> str:
    """What Hydra found wrong, with the nearest right name."""
    override = getattr(error, "override", None)
    if override:
        return unreadable(override, error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}.\nTo run the command for each value add -m; a list is KEY=[a,b]."
    missing = getattr(error, "missing_cfg_file", None)
    if "hydra/launcher/submitit" in str(missing):
        return "submitting jobs to SLURM takes a plugin of Hydra's that is not installed:\npip install 'lmlab[slurm]'"
    if missing and "/" in str(missing):
        return no_option(str(missing), getattr(error, "options", None), name)
    if lines and lines[0].startswith("Additional config directory"):
        return NO_FOLDER.format(lines[0].split("'")[1])
    if lines and lines[0].startswith(("Could not override", "Key '")):
        # Of a mapping that was given as one, the key that is not in it.
        wrong, inner = lines[0].split("'")[1], str(getattr(error.__cause__, "full_key", ""))
        wrong = inner if inner.startswith(f"{wrong}.") else wrong
        if wrong.startswith("trainer.limit_"):
            return f"{wrong}: {LIMITS}"
        return f'there is no key "{wrong}".{chosen_otherwise(wrong, name) or nearest_key(wrong, name)}'
    if lines and lines[0].startswith("Error merging override") and error.__cause__:
        return f"{lines[0]}: {first_line(error.__cause__)}"
    return "\n".join(lines[:3]) or first_line(error.__cause__ or error)


def no_option(missing: str, options: list[str] | None, name: str) -> str:
    """What to say of an option that a group does not have, both in one path."""
    given = (word.lstrip("+").partition("=") for word in sys.argv[1:])
    group, option = next(
        ((key, value) for key, _, value in given if f"{key}/{value}" == missing),
        (missing.rpartition("/")[0], missing.rpartition("/")[2]),
    )
    options = options or files_of(group)
    said = f"{group}={option}: no such option.{nearest(option, options)} Options: {', '.join(sorted(options))}."
    if group == "optim":
        return f"{said}\nAnother optimizer is a class of yours, optim._target_=…: see lmlab/training/optim.py."
    hint = meant(group, option, "data.validation" if name == "evaluate" else "data.train")
    return f"{said}\n{hint}" if hint else said


def files_of(group: str) -> list[str]:
    """The options of a group, lmlab's own."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def chosen_otherwise(key: str, verb: str) -> str | None:
    """Where a key is one of other options of a group that the command has: which, and how it is chosen."""
    group, *path = key.split(".")
    leaf = path.pop() if path else ""
    there = []
    for option in files_of(group) if group in groups_of(verb) else ():
        block: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
        for name in path:
            block = block.get(name) if isinstance(block, dict) else None
        if isinstance(block, dict) and {"_target_", leaf} <= block.keys():
            there.append(f"{group}={option}")
    if not there:
        return None
    value = next((word.partition("=")[2] for word in sys.argv[1:] if word.startswith(f"{key}=")), "")
    hint = meant(group, value, key) or "Choose that in the command."
    return f" It is one of {' and of '.join(there)}.\n{hint}"


def nearest_key(wrong: str, name: str) -> str:
    """The key of a config that is nearest to a wrong one, or how to see all."""
    return nearest(wrong, known_keys(name)) or f" For those there are: python -m lmlab.{name} --help"


def groups_of(name: str) -> set[str]:
    """The groups of which a command chooses options."""
    listed = OmegaConf.load(CONF / f"{name}.yaml").defaults
    return {group for entry in listed if isinstance(entry, DictConfig) for group in map(str, entry)}


def known_keys(name: str) -> set[str]:
    """Groups, and dotted keys of the config that the command line's group choices compose."""
    groups = groups_of(name)
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
    check_secrets(cfg)
    return name_precision(cfg)


def name_precision(cfg: DictConfig) -> DictConfig:
    """Give the precision of a config its full name, and return it."""
    trainer = cfg.get("trainer")
    if isinstance(trainer, DictConfig) and "precision" in trainer:
        trainer.precision = SHORT_PRECISIONS.get(str(trainer.precision), trainer.precision)
    return cfg


def check_secrets(cfg: DictConfig) -> None:
    """Refuse a config whose secrets were not kept. Those of any other are kept out of messages from now on."""
    values = OmegaConf.to_container(cfg)
    refuse_lost(secrets.lost(values))
    secrets.redacted(values)


def refuse_lost(keys: list[str], prefix: str = "") -> None:
    """Refuse what has these keys, whose secrets were not kept; they are given again with a prefix."""
    if keys:
        raise UserError(
            f"{', '.join(keys)} held a secret, which was not kept.\n"
            f"Give it again: add {' '.join(f'{prefix}{key}=…' for key in keys)} to the command."
        )


def completed(cfg: DictConfig, overrides: list[str], trusted: Collection[str] = ()) -> DictConfig:
    """The config of an evaluation, with what the run that it evaluates says where the command does not.

    Args:
        overrides: of the command line, to tell a choice from a default.
        trusted: packages, modules or what is in them, that the config of the run may name.
    """
    from lmlab.config import trust

    if OmegaConf.is_missing(cfg.model, "name") or not cfg.model.get("name"):
        raise UserError("model has to be given: add model=RUN_DIRECTORY, or an exported directory, or a hub id.")
    run = RunDirectory(cfg.model.name)
    trained = read_config(run.path) if run.manifest.is_file() and run.config.is_file() else None
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if trained is not None:
        if not run.model.is_dir():
            raise UserError(f"{run.path} holds no model: it is an evaluation. Name a run: model=RUN_DIRECTORY")
        cfg.model.name = str(run.model)
    elif cfg.model.name.endswith(".ckpt"):
        raise UserError(f"{cfg.model.name} is a checkpoint of a run: name the run's directory, model=RUN_DIRECTORY")
    else:
        check_place(f'model "{cfg.model.name}"', "model")
    taken = list[str]()  # from the run
    if "_target_" not in (cfg.get("data") or {}):
        if trained is None:
            name = cfg.model.name
            raise UserError(
                ("" if Path(name).exists() else f'there is no directory "{name}", which may be a hub id.\n')
                + "data has to be given, as the model is not a run of lmlab: add data=wikitext2 (or another group),\n"
                "data=hub data.path=ID, or data=files data.validation=FILE to the command."
            )
        for word in overrides:
            if word.lstrip("+~").startswith("preprocess") and not word.startswith("preprocess.block_size="):
                raise UserError(f"{word} is for text that is named by data=…; the run's own is prepared as it was.")
        cfg.data = OmegaConf.merge(trained.data, cfg.get("data") or {})  # it may lie elsewhere, or have a secret
        cfg.preprocess = OmegaConf.merge(trained.preprocess, {"block_size": cfg.preprocess.block_size})
        named = {word.lstrip("+").partition("=")[0] for word in overrides}
        files = cfg.data._target_ == "lmlab.data.sources.load_files"
        if files and cfg.data.train is not None and "data.validation" in named and "data.train" not in named:
            from lmlab.data.sources import find

            try:
                find(cfg.data.train, "train")
            except UserError:  # of what is scored it could only tell what was trained on
                cfg.data.train = None
        taken += ["data", "preprocess"]
    if cfg.preprocess.block_size is None and trained is not None:
        cfg.preprocess.block_size = trained.preprocess.block_size
    if OmegaConf.is_missing(cfg.data, "train"):
        cfg.data.train = None
    if "objective" not in cfg:
        cfg.objective = trained.objective if trained is not None else objective_of(cfg)
        taken += ["objective"] if trained is not None else []
    cfg.pop("trust")
    trust.check_trusted(OmegaConf.masked_copy(cfg, taken), trusted)
    refuse_lost(secrets.lost(OmegaConf.to_container(OmegaConf.masked_copy(cfg, taken))), "+")
    if cfg.context is None:
        cfg.context = "document" if cfg.score == "pseudo" else "blocks"
    return cfg


def objective_of(cfg: DictConfig) -> DictConfig:
    """The objective that a model, by its own config, was trained with."""
    from lmlab.models.loading import is_causal

    with from_hub(f'model "{cfg.model.name}"', "model"):
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


def config_of(run: RunDirectory) -> DictConfig:
    """The composed config of a run.

    Raises:
        UserError: the directory holds an evaluation, or the file is damaged.
    """
    cfg = read_config(run.path)
    if not {*BLOCKS, "run_dir"} <= set(cfg):
        raise UserError(f"{run.config} is damaged: it is not the config of a run.")
    if "optim" not in cfg:
        raise UserError(f"{run.path} holds an evaluation.\nChoose another directory: hydra.run.dir=DIR")
    return cfg


def without_secrets(cfg: DictConfig) -> DictConfig:
    """The same config with its secrets redacted."""
    return OmegaConf.create(secrets.redacted(OmegaConf.to_container(cfg)))


def write_config(cfg: DictConfig, run_dir: Path) -> None:
    """Keep the composed config in a run directory, without its secrets."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(without_secrets(cfg)))


def handed_over(cfg: DictConfig) -> dict[str, str]:
    """Variables for a process that reads the config where `write_config` wrote it."""
    return secrets.handed_over(OmegaConf.to_container(cfg))


def read_config(run_dir: Path) -> DictConfig:
    """The composed config of a run directory, with the secrets that this process was handed over."""
    place = run_dir / "config.yaml"
    try:
        cfg = OmegaConf.load(place)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{place} can't be read: {first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{place} is damaged: it is not the config of a run or an evaluation.")
    for key in BLOCKS:
        if key in cfg and not isinstance(cfg[key], DictConfig):
            raise UserError(f"{place} is damaged: {key} is no mapping in it. Bring back what it was.")
    return OmegaConf.create(secrets.taken_over(OmegaConf.to_container(cfg)))
