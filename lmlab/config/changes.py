"""The changes that a run which goes on may make to its config, and its batches at another number of ranks."""

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

from lmlab.config import build, schema
from lmlab.config.compose import create_hydra, normalize_trainer, without_secrets
from lmlab.config.explain import dotted, explain
from lmlab.config.overrides import literal, readable
from lmlab.config.schema import world
from lmlab.config.targets import source_blocks, sources
from lmlab.console import command
from lmlab.distributed import ranks
from lmlab.errors import UserError, first_line, nearest
from lmlab.io import from_here
from lmlab.runs.choices import MACHINERY, as_typed, flatten, is_in
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import MARK

BUDGETS = ("budget.tokens", "budget.tokens_per_parameter", "budget.flops", "budget.hours")
LENGTH = ("trainer.max_epochs", "trainer.max_steps", *BUDGETS)
CHANGEABLE = (*MACHINERY, "callbacks", *LENGTH, "trainer.val_check_interval")
"""Keys and blocks that a run that goes on may change: how it runs, its length, and its callbacks."""
LOCATED = ("data", "tokenizer.name", "model.name", "distill.model")
"""Keys and blocks that name files, which may move: hashes in the manifest tell whether data, tokenizer and teacher are
the same, and the weights of a model come from the checkpoint."""
GROUPS = ("trainer", "callbacks", "logger")
"""Groups of which a run that goes on may choose another option."""
HARDWARE = ("accelerator", "devices", "num_nodes", "strategy")
"""The keys that another option of `trainer` changes in a run that goes on."""
MISSING = "not there"


def apply_overrides(
    previous: DictConfig, run_dir: Path, words: list[str], config_dir: Path | None = None
) -> DictConfig:
    """Applies the overrides of a command to the composed config of a run.

    Args:
        previous: the config of the run.
        run_dir: the directory in which the run goes on, or is repeated.
        words: the overrides.
        config_dir: a folder with more options of the groups.

    Raises:
        UserError: an override can't be read, or changes what a run keeps.
    """
    cfg = with_run_dir(previous, run_dir)
    overrides = [(word, parse_override(word)) for word in readable(words)]
    # Groups first, so that an override of one of their keys changes the option that was chosen.
    for word, override in sorted(overrides, key=lambda pair: pair[1].key_or_group not in GROUPS):
        key, known = override.key_or_group, set(dotted(cfg))
        if key == "run_dir" or key.startswith("hydra."):
            raise UserError("a run goes on in its own directory. To run it again in another: --fresh --into DIR")
        if override.is_delete():
            if key not in known or key in GROUPS:
                raise UserError(f"{word}: there is nothing of that name to leave out.{nearest(key, known)}")
            parent, _, name = key.rpartition(".")
            (OmegaConf.select(cfg, parent) if parent else cfg).pop(name)
        elif key in GROUPS and not isinstance(override.value(), dict):
            block = compose_group(key, word, run_dir, config_dir)
            cfg[key] = OmegaConf.merge(cfg[key], {k: block[k] for k in HARDWARE}) if key == "trainer" else block
        elif key in ("distill", "adapter") or (isinstance(cfg.get(key), DictConfig) and key not in GROUPS):
            raise UserError(f"{word}: a run's {key} can't change. Another experiment is another run.")
        elif key not in known and not (override.is_add() or override.is_force_add()):
            raise UserError(f'there is no key "{key}".{nearest(key, known)} A key that is to be added: +KEY=VALUE')
        else:
            OmegaConf.update(cfg, key, override.value(), force_add=True)
            OmegaConf.update(cfg, key, resolve(cfg, key))
    # A pretrained model brings its tokenizer.
    if previous.model.get("name") and previous.model.name == previous.tokenizer.get("name") == cfg.tokenizer.get(
        "name"
    ):
        cfg.tokenizer.name = cfg.model.name
    return normalize_trainer(cfg)


def resolve(cfg: DictConfig, key: str) -> Any:
    """Returns the value of a key with its interpolations resolved."""
    try:
        value = OmegaConf.select(cfg, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{key} does not resolve: {first_line(error)}.") from error


def parse_override(word: str) -> Override:
    """Parses an override that gives one value.

    Raises:
        UserError: it can't be read, or gives several values.
    """
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException as error:
        raise UserError(explain(error, "train")) from error
    if override.is_sweep_override():
        raise UserError(f"{word}: a run goes on with one value. A list is KEY=[a,b].")
    return override


def compose_group(group: str, word: str, run_dir: Path, config_dir: Path | None) -> Any:
    """Composes the block of a group as a new run would have it with this override."""
    try:
        with create_hydra(folder=config_dir) as hydra:
            words = [word, f"run_dir={run_dir}"]
            cfg = hydra.config_loader.load_configuration("train", words, RunMode.RUN)
    except (HydraException, ValueError) as error:
        raise UserError(explain(error, "train")) from error
    OmegaConf.resolve(cfg[group])
    return cfg[group]


def with_run_dir(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """Copies a config for another run directory, which replaces the old one in every path."""
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


def location_overrides(cfg: DictConfig, previous: DictConfig, evaluation: bool = False) -> list[str]:
    """Returns the overrides that name the files of a run, as a person would type them.

    Args:
        cfg: the config now. A path in which it does not differ from `previous` is left to fill in, `PATH`.
        previous: the config in the run directory, that of the last attempt.
        evaluation: return only that of the text which an evaluation scores.
    """
    keys = []
    for block_key, block in [("data", previous.data), *source_blocks(previous.data)]:
        of_text = [name for name in ("train", "validation") if block.get(name)]
        for name in ["path"] if block.get("path") else of_text[-1:] if evaluation else of_text:
            domains = block[name] if isinstance(block[name], DictConfig) else ()
            keys += [f"{block_key}.{name}.{domain}" for domain in domains] or [f"{block_key}.{name}"]
    if not evaluation:
        brings_tokenizer = previous.model.get("name") == previous.tokenizer.get("name")
        keys += ["model.name"] if brings_tokenizer else ["model.name", "tokenizer.name"]
    words = []
    for key in keys:
        now, then = OmegaConf.select(cfg, key), OmegaConf.select(previous, key)
        if None not in (now, then):
            value = f"[{','.join(map(literal, now))}]" if isinstance(now, ListConfig) else literal(str(now))
            words.append(command(f"{key}={'PATH' if now == then else value}"))
    return words


@contextmanager
def hint_at_locations(again: str, overrides: list[str]) -> Iterator[None]:
    """Adds to an error about data or a tokenizer the command that names where they lie, if a `PATH` is to be filled in.

    Args:
        again: the command without those overrides.
        overrides: as of `location_overrides`.
    """
    try:
        yield
    except UserError as error:
        if "\n" in str(error) or not any(word.endswith("=PATH") for word in overrides):
            raise
        raise UserError(f"{error}\nIf they lie elsewhere now: {again} {' '.join(overrides)}", error.cause) from error


def check(cfg: DictConfig, previous: DictConfig | None, run: RunDirectory) -> None:
    """Refuses a config that can be seen to be wrong, or to be another experiment than the run that was begun.

    Args:
        previous: the config in the run directory, that of the last attempt; None for a new run.
    """
    fit_to_machine(cfg, previous)
    schema.check_run(cfg)
    if previous is not None:
        # What LOCATED names may move once a checkpoint is there: before it, the manifest may have no hashes yet.
        check_same(cfg, previous, (*CHANGEABLE, *LOCATED) if run.checkpoint_files() else CHANGEABLE)
        check_hours(cfg, previous, run)


def check_hours(cfg: DictConfig, previous: DictConfig, run: RunDirectory) -> None:
    """Refuses other hours of a run that has begun: its schedule goes by the steps that they came to then."""
    now, then = (OmegaConf.select(one, "budget.hours") for one in (cfg, previous))
    if now is not None and now != then:
        steps = run.read_manifest()["steps"]
        raise UserError(
            f"budget.hours={now:g}: {cfg.run_dir} was begun with {steps} steps, and goes on at the speed that it has.\n"
            "To train it longer: budget.hours=null trainer.max_steps=…"
        )


def check_same(cfg: DictConfig, previous: DictConfig, free: tuple[str, ...]) -> None:
    """Refuses a config that differs from the one of the last attempt in other keys and blocks than `free`."""
    differing = changed_values(cfg, previous)
    changed = [text for key, text in differing.items() if key == "data.text" or not is_in(key, free)]
    if changed:
        raise UserError(
            f"{cfg.run_dir} was begun with other choices, and can't go on with {', '.join(changed)}.\n"
            "For a new run give another directory: hydra.run.dir=DIR, or with lmlab.resume: --fresh --into DIR\n"
            "To begin it with the weights of this run, add model=pretrained model.name=RUN/model"
        )


def check_data(cfg: DictConfig, previous: DictConfig, run: RunDirectory, checkpoint: Path | None) -> None:
    """Refuses to go on with a run whose data or tokenizer has changed, or whose checkpoint does not fit the config."""
    from lmlab.training.checkpoint import numbers_parameters

    manifest = run.read_manifest()
    again = command("python", "-m", "lmlab.resume", from_here(run.path))
    with hint_at_locations(again, location_overrides(cfg, previous)):
        data = build.prepare_data(cfg)
    for key, name in (("data_fingerprint", "data"), ("tokenizer_hash", "tokenizer")):
        if manifest.get(key, getattr(data, key)) != getattr(data, key):
            changed = [text for key, text in changed_values(cfg, previous).items() if is_in(key, LOCATED)]
            where = " ".join(location_overrides(previous, previous))
            raise UserError(
                f"the {name} of {run.path} is not what the run was begun with: "
                f"{', '.join(changed) if changed else 'its files have changed'}.\n"
                f"Bring it back,{f' name where it is now ({where}),' if where else ''} or begin another run."
            )
    if checkpoint is None:
        return
    steps, *_ = build.training_length(cfg, data)
    if any(share.get("final_weight") is not None for _, share in sources(cfg.data).values()) and steps != manifest.get(
        "steps", steps
    ):
        raise UserError(
            f"{run.path} was begun with {manifest['steps']} steps, over which its sources change their weights, and "
            f"can't go on with {steps}.\nWithout final_weight a mixture can be trained longer."
        )
    if steps < run.step_of(checkpoint):
        raise UserError(f"{run.path} is at step {run.step_of(checkpoint)} already, and {steps} steps are fewer.")
    if schema.shards(cfg.trainer) > 1 and numbers_parameters(checkpoint):
        raise UserError(
            f"{checkpoint} was written by lmlab 0.1, which numbers parameters, and can't be sharded as it is.\n"
            "Go on without trainer=fsdp until the next checkpoint is there."
        )


def changed_values(cfg: DictConfig, previous: DictConfig) -> dict[str, str]:
    """Returns the keys in which a config differs from that of the last attempt, each with both values as text.

    A secret is not kept, and so is never a change.
    """
    now, then = (
        flatten(OmegaConf.to_container(without_secrets(one)))
        for one in (cfg, with_run_dir(previous, Path(cfg.run_dir)))
    )
    then |= {key: now[key] for key, value in then.items() if MARK in str(value) and now.get(key) is not None}
    return {
        key: f"{key}={as_typed(now.get(key, MISSING))} (it was {as_typed(then.get(key, MISSING))})"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    }


def fit_to_machine(cfg: DictConfig, previous: DictConfig | None = None) -> None:
    """Sets what a config leaves to the machine: devices to the ranks that torchrun or srun started, and precision.

    A run that goes on keeps its precision, and accumulates as its ranks need it: it never has a larger micro batch than
    before.

    Args:
        previous: the config in the run directory, that of the last attempt; None for a new run.

    Raises:
        UserError: the block trainer can't be read, the config asks for another number of ranks, or the batch does not
            divide over them.
    """
    trainer = cfg.trainer
    schema.check_trainer(trainer)
    if previous is not None:
        schema.check_trainer(previous.trainer)
    if trainer.precision is None:
        trainer.precision = previous.trainer.precision if previous is not None else schema.best_precision(trainer)
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
    if previous is None or world(trainer) == world(previous.trainer):
        return
    if trainer.accumulate_grad_batches != previous.trainer.accumulate_grad_batches:  # the command sets it
        return
    largest = cfg.batch_size // (world(previous.trainer) * previous.trainer.accumulate_grad_batches)
    unit = schema.batch_sizes(cfg).initial  # all batches are multiples of it
    for accumulate in range(1, unit + 1):
        micro_batches = world(trainer) * accumulate
        if unit % micro_batches == 0 and cfg.batch_size // micro_batches <= largest:
            trainer.accumulate_grad_batches = accumulate
            return
    divisors = [str(n) for n in range(1, unit + 1) if unit % n == 0]
    name = "batch_size" if unit == cfg.batch_size else "batch_warmup.initial"
    raise UserError(
        f"{name}={unit} does not divide over {world(trainer)} ranks.\n"
        f"This run can go on with {', '.join(divisors[:-1])} or {divisors[-1]} of them."
    )


def lengthens(cfg: DictConfig, previous: DictConfig, run: RunDirectory) -> bool:
    """Returns whether a config asks for more steps than a finished run has made."""
    if length(cfg) == length(previous):
        return False
    return not 0 < (cfg.trainer.max_steps or 0) <= run.read_summary()["steps"]


def length(cfg: DictConfig) -> tuple[float | None, ...]:
    """Returns the epochs, the steps and the budgets that a config asks for."""
    return tuple(OmegaConf.select(cfg, key) for key in LENGTH)
