"""A run that goes on: what of its config may change, and what its batches are at another width."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmlab.config import signatures
from lmlab.config.compose import create_hydra, name_precision, without_secrets
from lmlab.config.explain import dotted, explain
from lmlab.config.files import CONF
from lmlab.config.overrides import literal, readable
from lmlab.config.schema import world
from lmlab.console import command
from lmlab.distributed import ranks
from lmlab.errors import UserError, first_line, nearest
from lmlab.runs.choices import MACHINERY, flat, said, under
from lmlab.secrets import MARK

CHANGEABLE = (*MACHINERY, "callbacks", "trainer.max_epochs", "trainer.max_steps", "trainer.val_check_interval")
"""Keys and blocks that a run that goes on may change: how it runs, its length, and its callbacks."""
LOCATED = ("data", "tokenizer.name", "model.name")
"""Keys and blocks that say where things lie. They may move, as the hashes in the manifest tell what lies there."""
# Groups of which a run that goes on may choose another option.
GROUPS = ("trainer", "callbacks", "logger")
NOT_THERE = "not there"
# What another `trainer=` brings to a run that has one: where it runs.
PLACES = ("accelerator", "devices", "num_nodes", "strategy")


def continued(kept: DictConfig, run_dir: Path, words: list[str], folder: Path | None = None) -> DictConfig:
    """The composed config of a run, for a directory, with the overrides of a command and the options in a `folder`.

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
            block = composed(key, word, run_dir, folder)
            cfg[key] = OmegaConf.merge(cfg[key], {k: block[k] for k in PLACES}) if key == "trainer" else block
        elif isinstance(cfg.get(key), DictConfig) and key not in GROUPS:
            raise UserError(f"{word}: a run's {key} can't change. Another experiment is another run.")
        elif key not in known and not (override.is_add() or override.is_force_add()):
            raise UserError(f'there is no key "{key}".{nearest(key, known)}{of_its_block(cfg, key, word)}')
        else:
            OmegaConf.update(cfg, key, override.value(), force_add=True)
            OmegaConf.update(cfg, key, resolved(cfg, key))
    # A pretrained model brings its tokenizer.
    if kept.model.get("name") and kept.model.name == kept.tokenizer.get("name") == cfg.tokenizer.get("name"):
        cfg.tokenizer.name = cfg.model.name
    return name_precision(cfg)


def of_its_block(cfg: DictConfig, key: str, word: str) -> str:
    """What to say of a key that is not in a config: how it is added where its block takes it, else the block's keys."""
    holder, _, name = key.rpartition(".")
    block = OmegaConf.select(cfg, holder) if holder else OmegaConf.load(CONF / "train.yaml")
    target = block.get("_target_") if isinstance(block, DictConfig) else None
    if target and target.startswith(signatures.READ):  # another's would have to be imported, before it is trusted
        takes = signatures.parameters(target)
        new = name in takes or any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    else:
        new = holder.split(".")[0] in ("callbacks", "logger") or (not holder and name in block)
    if new:
        return f" A new one is +{word}."
    return f" Keys of {holder}: {', '.join(sorted({*map(str, block)} - {'_target_'}))}." if target else ""


def resolved(cfg: DictConfig, key: str) -> Any:
    """The value of a key, with what it takes from the environment, or from elsewhere, in its place."""
    try:
        value = OmegaConf.select(cfg, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{key} does not resolve: {first_line(error)}.") from error


def parsed(word: str) -> Override:
    """An override of a command."""
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise UserError(explain(error, "train")) from error
    if override.is_sweep_override():
        raise UserError(f"{word}: a run goes on with one value. A list is KEY=[a,b].")
    return override


def composed(group: str, word: str, run_dir: Path, folder: Path | None) -> Any:
    """A group's block, as a new run would have it."""
    try:
        with create_hydra(folder=folder) as hydra:
            words = [word, f"run_dir={run_dir}"]
            cfg = hydra.config_loader.load_configuration("train", words, RunMode.RUN)
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


def places(cfg: DictConfig, kept: DictConfig, scored: bool = False) -> list[str]:
    """The overrides that say where what a run names lies now: as the config has it where that is new, else `PATH`.

    Args:
        scored: only of the text that an evaluation scores.
    """
    names = ("path",) if kept.data.get("path") else ("train", "validation")
    keys = [f"data.{name}" for name in names if kept.data.get(name)]
    if scored:
        keys = keys[-1:]
    else:
        same = kept.model.get("name") == kept.tokenizer.get("name")  # a pretrained model brings its tokenizer
        keys += ["model.name"] if same else ["model.name", "tokenizer.name"]
    words = []
    for key in keys:
        now, then = OmegaConf.select(cfg, key), OmegaConf.select(kept, key)
        if None not in (now, then):
            value = f"[{','.join(map(literal, now))}]" if isinstance(now, ListConfig) else literal(str(now))
            words.append(command(f"{key}={'PATH' if now == then else value}"))
    return words


@contextmanager
def where_they_lie(again: str, words: list[str]) -> Iterator[None]:
    """Add to what is wrong with data or a tokenizer the command that says where they lie, if that has a `PATH` to fill.

    Args:
        again: the command, without
        words: the overrides that name places.
    """
    try:
        yield
    except UserError as error:
        if "\n" in str(error) or not any(word.endswith("=PATH") for word in words):
            raise
        raise UserError(f"{error}\nIf they lie elsewhere now: {again} {' '.join(words)}", error.cause) from error


def check_same(cfg: DictConfig, kept: DictConfig, located: bool = True) -> None:
    """Refuse a config that is another experiment than the run that was begun.

    Args:
        located: whether what `LOCATED` names may lie elsewhere, as its content will be compared.

    Raises:
        UserError: names the keys.
    """
    free = (*CHANGEABLE, *LOCATED) if located else CHANGEABLE
    changed = {key: words for key, words in differing(cfg, kept).items() if key == "data.text" or not under(key, free)}
    if changed:
        raise UserError(
            f"{cfg.run_dir} was begun with other choices, and can't go on with {', '.join(changed.values())}.\n"
            "Choose another directory by hydra.run.dir=DIR; "
            "to begin there with this run's weights: model=pretrained model.name=RUN/model"
        )


def differing(cfg: DictConfig, kept: DictConfig) -> dict[str, str]:
    """The keys in which a config differs from the one that a run was begun with, each with both values in words.

    A secret that the run was begun with is not kept, and so may be another.
    """
    now, then = (flat(OmegaConf.to_container(without_secrets(one))) for one in (cfg, moved(kept, Path(cfg.run_dir))))
    then |= {key: now[key] for key, value in then.items() if MARK in str(value) and now.get(key) is not None}
    return {
        key: f"{key}={said(now.get(key, NOT_THERE))} (it was {said(then.get(key, NOT_THERE))})"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    }


def settle_width(cfg: DictConfig, kept: DictConfig | None = None) -> None:
    """Take the ranks that torchrun or srun started for the config's; accumulate as they need it.

    A run that goes on keeps its batch of one device where it can, and never has a larger one.

    Raises:
        UserError: the config says another number of ranks, or the batch does not divide over them.
    """
    trainer = cfg.trainer
    if ranks.rank() is not None:
        started = ranks.width()
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
