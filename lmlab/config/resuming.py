"""A run that goes on: what of its config may change, and what its batches are at another width."""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lmlab.config.check import world
from lmlab.config.compose import CONF, dotted, explain, name_precision
from lmlab.config.overrides import readable
from lmlab.errors import UserError, nearest
from lmlab.training import launch

# Blocks and keys that change how and how far a run goes, not what it is.
MACHINERY = (
    "run_dir",
    "cache_dir",
    "debug",
    "profile",
    "num_workers",
    "compile",
    "activation_checkpointing",
    "loss_rows",
    "attention",
    "callbacks",
    "logger",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.val_check_interval",
)
# Those that a run that goes on may choose another of.
GROUPS = ("trainer", "callbacks", "logger")
# What another `trainer=` brings to a run that has one: where it runs.
PLACES = ("accelerator", "devices", "num_nodes", "strategy")


def continued(kept: DictConfig, run_dir: Path, words: list[str]) -> DictConfig:
    """The composed config of a run, for a directory, with the overrides of a command.

    Raises:
        UserError: an override that can't be read, or of what a run does not change.
    """
    cfg = moved(kept, run_dir)
    overrides = [(word, parsed(word)) for word in readable(words)]
    # Groups first: what is said of their keys is said on top.
    for word, override in sorted(overrides, key=lambda pair: pair[1].key_or_group not in GROUPS):
        key, known = override.key_or_group, set(dotted(cfg))
        if key == "run_dir" or key.startswith("hydra."):
            raise UserError("a run goes on in its own directory. To run it again in another: --fresh --into DIR")
        if override.is_delete():
            if key not in known or key in GROUPS:
                raise UserError(f"{word}: there is nothing of that name to leave out.{nearest(key, known)}")
            holder, _, leaf = key.rpartition(".")
            OmegaConf.select(cfg, holder).pop(leaf) if holder else cfg.pop(leaf)
        elif key in GROUPS and not isinstance(override.value(), dict):
            block = composed(key, word, run_dir)
            cfg[key] = OmegaConf.merge(cfg[key], {k: block[k] for k in PLACES}) if key == "trainer" else block
        elif isinstance(cfg.get(key), DictConfig) and key not in GROUPS:
            raise UserError(f"{word}: a run's {key} can't change. Another experiment is another run.")
        elif key not in known and not (override.is_add() or override.is_force_add()):
            raise UserError(f'there is no key "{key}".{nearest(key, known)} A new one is +{word}.')
        else:
            OmegaConf.update(cfg, key, override.value(), force_add=True)
    return name_precision(cfg)


def parsed(word: str) -> Override:
    """An override of a command."""
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise UserError(explain(error, "train")) from error
    if override.is_sweep_override():
        raise UserError(f"{word}: a run goes on with one value. A list is KEY=[a,b].")
    return override


def composed(group: str, word: str, run_dir: Path) -> Any:
    """A group's block, as a new run would have it."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", [word, f"run_dir={run_dir}"])
    except (HydraException, ValueError) as error:
        raise UserError(explain(error, "train")) from error
    OmegaConf.resolve(cfg[group])
    return cfg[group]


def moved(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """The same config for another run directory: where it was named, the new one is."""
    old, new = str(cfg.run_dir), str(run_dir)

    def replace(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replace(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replace(value) for value in node]
        if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
            return new + node[len(old) :]
        return node

    return OmegaConf.create(replace(OmegaConf.to_container(cfg)))


def check_same(cfg: DictConfig, kept: DictConfig) -> None:
    """Refuse a config that is another experiment than the run that was begun.

    Raises:
        UserError: names the keys.
    """
    now, then = values(cfg), values(moved(kept, Path(cfg.run_dir)))
    changed = [
        f"{key}={now.get(key, 'not there')} (it was {then.get(key, 'not there')})"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not any(key == m or key.startswith(f"{m}.") for m in MACHINERY)
    ]
    if changed:
        raise UserError(
            f"{cfg.run_dir} was begun with other choices, and can't go on with {', '.join(changed)}.\n"
            "Choose another directory by hydra.run.dir=DIR; "
            "to begin there with this run's weights: model=pretrained model.name=RUN/model"
        )


def values(cfg: DictConfig) -> dict[str, Any]:
    """The values of a config, by their dotted names."""
    found = {}
    for key in dotted(cfg):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, DictConfig):
            found[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return found


def settle_width(cfg: DictConfig, kept: DictConfig | None = None) -> None:
    """Take the ranks that torchrun or srun started for the config's; accumulate as they need it.

    A run that goes on keeps its batch of one device where it can, and never has a larger one.

    Raises:
        UserError: the config says another number of ranks, or the batch does not divide over them.
    """
    trainer = cfg.trainer
    if launch.rank() is not None:
        started = launch.width()
        if world(trainer) == 1:
            trainer.devices, trainer.num_nodes = started
        if (trainer.devices, trainer.get("num_nodes", 1)) != started:
            raise UserError(
                f"{started[0]} × {started[1]} ranks were started (per node × nodes), and the config has "
                f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.get('num_nodes', 1)}.\n"
                "Leave both out to take those that were started."
            )
    if kept is None or world(trainer) == world(kept.trainer):
        return
    if trainer.accumulate_grad_batches != kept.trainer.accumulate_grad_batches:  # as the command says
        return
    most = cfg.batch_size // (world(kept.trainer) * kept.trainer.accumulate_grad_batches)
    for accumulate in range(1, cfg.batch_size + 1):
        share, rest = divmod(cfg.batch_size, world(trainer) * accumulate)
        if not rest and share <= most:
            trainer.accumulate_grad_batches = accumulate
            return
    divisors = [str(n) for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0]
    raise UserError(
        f"batch_size={cfg.batch_size} does not divide over {world(trainer)} ranks.\n"
        f"This run can go on with {', '.join(divisors[:-1])} or {divisors[-1]} of them."
    )


def length(cfg: DictConfig) -> tuple[Any, Any]:
    """How long a run is to be."""
    return cfg.trainer.max_epochs, cfg.trainer.max_steps
