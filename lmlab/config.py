"""The only room that sees a config: composes it, checks it, and builds objects from it.

Nothing heavy is imported here at the top: `--help` and `--cfg job` come through.
"""

import inspect
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmlab.errors import UserError, first_line, nearest, plainly, shown_plainly

PACKAGE = Path(__file__).parent
# Beside the package in a checkout, inside it when installed.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
# What lmlab itself hands to the targets of a group, beside the keys of the block.
SUPPLIED = {
    "tokenizer": ("texts",),
    "model": ("tokenizer", "causal"),
    "objective": ("tokenizer",),
    "logger": ("run_dir", "run_id", "config"),
    "trainer": (
        "callbacks",
        "check_val_every_n_epoch",
        "default_root_dir",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "gradient_clip_algorithm",
        "limit_train_batches",
        "limit_val_batches",
        "logger",
        "max_time",
        "num_sanity_val_steps",
        "plugins",
        "use_distributed_sampler",
    ),
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")


def run_verb(job: Callable[[DictConfig], Any], name: str) -> None:
    """Compose `conf/<name>.yaml` with the command line and call `job` with it, plainly failing."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text(name))
        return
    debug = "debug=true" in sys.argv
    # Hydra then raises instead of printing, and what it raises is explained here.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    # Which keys a model's config has is for its architecture to say (models/loading.py), so
    # setting one that the YAML file does not list needs no +.
    sys.argv[1:] = [f"++{word}" if word.startswith("model.config.") else word for word in sys.argv[1:]]

    begun = False

    def plain_job(cfg: DictConfig) -> Any:
        nonlocal begun
        begun = True
        try:
            return job(cfg)
        except Exception as error:
            message = plainly(error)
            if debug or message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                sys.exit(1)
            # An exception, unlike an exit, lets the other jobs of the sweep go on.
            raise UserError("a job of the sweep failed; its error is above. The other jobs were run.") from error

    with shown_plainly(debug):
        # argparse would print its usage, all of it.
        unknown = get_args_parser().parse_known_args()[1]
        if unknown:
            raise UserError(
                f"can't make sense of {' '.join(unknown)}.\n"
                "An override is KEY=VALUE, without dashes; options such as --config-dir DIR come before all overrides."
            )
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(plain_job)()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(explain(error, name)) from error
        except ValueError as error:
            if begun:  # a defect; before that, Hydra's word on a group's option
                raise
            raise UserError(explain(error, name)) from error
        except OSError as error:
            if begun:
                raise
            raise UserError(
                f"the run directory {error.filename} can't be made: {error.strerror}.\n"
                "Choose another: hydra.run.dir=DIR"
            ) from error


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
        return f"{lines[0]}.\nTo train a model for each value add -m; a list is KEY=[a,b]."
    missing = getattr(error, "missing_cfg_file", None)
    options = getattr(error, "options", None)
    if missing and options:
        group, _, option = str(missing).rpartition("/")
        return f"{group}={option}: no such option.{nearest(option, options)} Options: {', '.join(sorted(options))}."
    if lines and lines[0].startswith(("Could not override", "Key '")):
        wrong = lines[0].split("'")[1]
        return f'there is no key "{wrong}".{nearest(wrong, known_keys(name))}'
    return "\n".join(lines[:3]) or first_line(error.__cause__ or error)


def known_keys(name: str) -> set[str]:
    """Groups, and dotted keys of the config that the command line's group choices compose."""
    groups = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}
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


def freeze(cfg: DictConfig) -> DictConfig:
    """The config with every interpolation resolved: what the run directory keeps and ranks read."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} has to be given: add {missing[0]}=… to the command.")
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} does not resolve: {first_line(error)}.") from error
    return cfg


def read_config(run_dir: Path) -> DictConfig:
    """The composed config of a run directory."""
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def target(block: DictConfig, key: str) -> Callable[..., Any]:
    """What a block's `_target_` names."""
    name = block.get("_target_") if isinstance(block, DictConfig) else None
    if name is None:
        raise UserError(f"{key} has no _target_: it is a new block, or its name is misspelt.")
    try:
        return hydra.utils.get_object(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}._target_={name} can't be imported: {first_line(error)}") from error


def arguments(function: Callable[..., Any], block: DictConfig, key: str, **given: Any) -> dict[str, Any]:
    """A block's values as arguments of a function, unknown keys refused.

    `given` are those that lmlab supplies: passed on where the function takes them.
    """
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values: dict[str, Any] = OmegaConf.to_container(block)  # type: ignore[assignment]
    values.pop("_target_", None)
    theirs = [name for name in parameters if name not in given]
    for name in values:
        if name in given or not (anything or name in parameters):
            raise UserError(f'there is no key "{key}.{name}".{nearest(name, theirs)} Keys: {", ".join(theirs)}.')
        if name in parameters and not fits(values[name], parameters[name].annotation):
            wanted = inspect.formatannotation(parameters[name].annotation)
            raise UserError(f"{key}.{name}={values[name]}: it has to be {wanted}, not {type(values[name]).__name__}.")
    values |= {name: value for name, value in given.items() if anything or name in parameters}
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in values:
            raise UserError(f"{key}.{name} has to be given: add {key}.{name}=… to the command.")
    return values


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated plain type; True where the annotation says more than that."""
    kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
    if not kinds <= {bool, int, float, str, NoneType}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def build(block: DictConfig, key: str, **given: Any) -> Any:
    """Call a block's target with its values."""
    function = target(block, key)
    return function(**arguments(function, block, key, **given))


def blocks(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The blocks that name a target, with their dotted keys."""
    for name in ("data", "tokenizer", "model", "objective", "optim", "trainer"):
        yield name, cfg[name]
    for group in ("callbacks", "logger"):
        for name, block in (cfg[group] or {}).items():
            if block:
                yield f"{group}.{name}", block


def check(cfg: DictConfig, name: str) -> None:
    """Refuse, before anything is done, what can be seen to be wrong in a config."""
    check_keys(cfg, name)
    for key in ("seed", "num_workers", "batch_size"):
        least = 1 if key == "batch_size" else 0
        if type(cfg[key]) is not int or not least <= cfg[key] < 2**63:
            raise UserError(f"{key} is a whole number, {least} or more, not {cfg[key]}.")
    for key in ("accumulate_grad_batches", "log_every_n_steps"):
        value = cfg.trainer.get(key, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"trainer.{key} is a whole number, 1 or more, not {value}.")
    clip = cfg.trainer.get("gradient_clip_val")
    if clip is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val is 0 or more, or null for no clipping, not {clip}.")
    if not isinstance(cfg.cache_dir, str):
        raise UserError(f"cache_dir is a directory, not {cfg.cache_dir}.")
    check_devices(cfg.trainer)

    from lmlab.data.sampler import share_of

    share_of(cfg.batch_size, cfg.trainer.devices, cfg.trainer.accumulate_grad_batches)


def check_keys(cfg: DictConfig, name: str) -> None:
    """Refuse keys that an experiment file made up: at the top, or in a block."""
    known = set(OmegaConf.load(CONF / f"{name}.yaml")) - {"defaults", "hydra"}
    known |= {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "experiment"}
    for key in map(str, cfg):
        if key not in known:
            raise UserError(f'there is no key "{key}".{nearest(key, known)} Keys: {", ".join(sorted(known))}.')
    for key, block in blocks(cfg):
        arguments(target(block, key), block, key, **dict.fromkeys(SUPPLIED.get(key.split(".")[0], ())))
    preprocessing(cfg)


def check_devices(trainer: DictConfig) -> None:
    """Refuse devices that are not there and precisions they do not have."""
    import torch

    precision, devices = str(trainer.precision), trainer.devices
    if "LOCAL_RANK" in os.environ:
        raise UserError("this process is a rank of torchrun. Run the command without it: lmlab starts the ranks.")
    if precision not in PRECISIONS:
        raise UserError(
            f'trainer.precision is one of {", ".join(PRECISIONS)}, not "{precision}".{nearest(precision, PRECISIONS)}'
        )
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices is a number of devices, 1 or more, not {devices}.")
    gpus = torch.cuda.device_count()
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and gpus > 0)
    if on_gpu and devices > gpus:
        raise UserError(
            f"trainer.devices={devices} GPUs asked for, and this machine has {gpus}.\n"
            f"Use trainer=cpu, or trainer.devices={max(gpus, 1)} or less."
        )
    if not on_gpu and precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU. On a CPU use bf16-mixed or 32-true.")


def training_steps(trainer: DictConfig, blocks: int, batch_size: int) -> tuple[int, int]:
    """Optimizer steps of the run, and between two validations.

    Epochs run on into one another: a batch may hold the end of one and the start of the
    next, so n epochs are ⌈n · blocks / batch_size⌉ full steps.
    """
    steps = trainer.max_steps
    if steps is None or steps == -1:
        if trainer.max_epochs is None or trainer.max_epochs <= 0:
            raise UserError("the run has no end: set trainer.max_epochs or trainer.max_steps.")
        steps = math.ceil(trainer.max_epochs * blocks / batch_size)
    if steps < 1:
        raise UserError(f"trainer.max_steps is a number of steps, or -1 to go by trainer.max_epochs, not {steps}.")
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval > 0:
        interval = max(1, round(interval * blocks / batch_size))
    if not isinstance(interval, int) or interval < 1:
        raise UserError(f"trainer.val_check_interval counts epochs (1.0) or steps (100), not {interval}.")
    return steps, min(interval, steps)


def preprocessing(cfg: DictConfig) -> Any:
    """The choices of a config that turn records into blocks."""
    from lmlab.data.preprocess import Preprocessing

    return Preprocessing(**arguments(Preprocessing, cfg.preprocess, "preprocess"))


def prepare_data(cfg: DictConfig) -> Any:
    """The `Prepared` data of a config: from the cache where it is there."""
    from datasets import disable_progress_bars

    from lmlab.data.preprocess import prepare

    disable_progress_bars()
    corpus = build(cfg.data, "data")
    learned = "texts" in inspect.signature(target(cfg.tokenizer, "tokenizer")).parameters
    return prepare(
        corpus,
        preprocessing(cfg),
        lambda texts: build(cfg.tokenizer, "tokenizer", texts=texts),
        OmegaConf.to_container(cfg.tokenizer) if learned else None,
        Path(cfg.cache_dir).expanduser(),
    )


def build_model(cfg: DictConfig, data: Any) -> tuple[Any, Any]:
    """The objective and the model of a config, checked against the data."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from lmlab.models.loading import check

    # What a run has to say, it says itself.
    disable_progress_bar()
    set_verbosity_error()
    objective = build(cfg.objective, "objective", tokenizer=data.tokenizer)
    torch.manual_seed(cfg.seed)
    model = build(cfg.model, "model", tokenizer=data.tokenizer, causal=objective.causal)
    check(model, data.tokenizer, cfg.preprocess.block_size, objective.causal)
    return objective, model


def build_trainer(cfg: DictConfig, steps: int, interval: int, run_id: str) -> Any:
    """The Lightning trainer of a config, with its callbacks and loggers.

    `steps` and `interval` (between validations) count optimizer steps.
    """
    import lightning as L
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lmlab.training.callbacks import Measure
    from lmlab.training.checkpoint import AtomicCheckpoints

    # Lightning's greetings and hints; what a run has to say, it says itself.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    callbacks: list[Any] = [Measure()]
    callbacks += [build(block, key) for key, block in blocks(cfg) if key.startswith("callbacks.")]
    options = arguments(L.Trainer, cfg.trainer, "trainer") | {
        "max_epochs": 1,  # one long row of batches; see data/sampler.py
        "max_steps": steps,
        "val_check_interval": interval * cfg.trainer.accumulate_grad_batches,
        "check_val_every_n_epoch": None,
        # Without one Lightning would add its own, elsewhere.
        # Lightning would start a process group for one rank, and leave its variables behind.
        "strategy": "auto" if cfg.trainer.devices == 1 and cfg.trainer.strategy == "ddp" else cfg.trainer.strategy,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }
    # Last, since W&B begins a run.
    given = {"run_dir": cfg.run_dir, "run_id": run_id, "config": OmegaConf.to_container(cfg)}
    loggers = [build(block, key, **given) for key, block in blocks(cfg) if key.startswith("logger.")]
    try:
        return L.Trainer(
            **options,
            callbacks=callbacks,
            # Null would make Lightning add a logger of its own.
            logger=loggers or False,
            plugins=[AtomicCheckpoints()],
            default_root_dir=cfg.run_dir,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
