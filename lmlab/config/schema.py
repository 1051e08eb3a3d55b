"""What can be seen to be wrong in a config before anything is done."""

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from hydra._internal.utils import _locate  # hydra.utils.get_object also logs what it raises
from omegaconf import DictConfig, OmegaConf

from lmlab.config import signatures
from lmlab.config.explain import LIMITS
from lmlab.config.files import CONF, SWEEPS
from lmlab.console import command
from lmlab.distributed import ranks
from lmlab.errors import UserError, first_line, nearest
from lmlab.io import from_here

# What lmlab itself hands to the targets of a group, beside the keys of the block.
SUPPLIED = {
    "tokenizer": ("texts",),
    "model": ("tokenizer", "auto_class"),
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
SCORES = ("labels", "pseudo")
UNITS = ("text", "words")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
STRATEGIES = ("auto", "ddp", "fsdp")
SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"  # how configs of older versions say fsdp
OPTIMIZES = "called with (model, steps), returns an optimizer and a schedule, as lmlab.optim.AdamW does"


def target(block: DictConfig, key: str, get: Callable[[str], Any] = _locate) -> Any:
    """The object that a block's `_target_` names; `get` finds it by its dotted name, by default by importing it."""
    name = block.get("_target_") if isinstance(block, DictConfig) else None
    if name is None:
        raise UserError(f"{key} has no _target_: it is a new block, or its name is misspelt.")
    try:
        return get(name)
    except (ImportError, AttributeError, ValueError) as error:
        cause = error.__cause__
        why = f"{type(cause).__name__}: {first_line(cause)}" if cause else first_line(error)
        raise UserError(f"{key}._target_={name} can't be imported: {why}.") from error


def takes(block: DictConfig, key: str) -> Mapping[str, inspect.Parameter]:
    """What a block's target takes; where it can be, without importing it."""
    return target(block, key, signatures.parameters)


def arguments(parameters: Mapping[str, inspect.Parameter], block: DictConfig, key: str, **given: Any) -> dict[str, Any]:
    """A block's values as arguments of what has these parameters, unknown keys refused.

    `given` are those that lmlab supplies: passed on where there is a parameter for them.
    """
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values: dict[str, Any] = OmegaConf.to_container(block)  # type: ignore[assignment]
    values.pop("_target_", None)
    theirs = [name for name in parameters if name not in given]
    for name in values:
        if name in given or not (anything or name in parameters):
            close = nearest(f"{key}.{name}", [f"{key}.{known}" for known in theirs])
            raise UserError(f'there is no key "{key}.{name}".{close} Keys: {", ".join(theirs)}.')
        if name in parameters and not fits(values[name], parameters[name].annotation):
            wanted = inspect.formatannotation(parameters[name].annotation).replace("collections.abc.", "")
            mapping = f"\nA mapping is, in a shell, '{key}.{name}={{KEY: VALUE}}'." if "dict" in wanted else ""
            found = kind_of(values[name])
            raise UserError(f"{key}.{name}={values[name]}: it has to be {wanted}, not {found}.{mapping}")
    values |= {name: value for name, value in given.items() if anything or name in parameters}
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in values:
            raise UserError(f"{key}.{name} has to be given: add {key}.{name}=… to the command.")
    return values


def kind_of(value: Any) -> str:
    """The type of a value, and of those in it if it is a list."""
    name = type(value).__name__
    return f"{name}[{' | '.join(sorted({kind_of(item) for item in value}))}]" if type(value) is list and value else name


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated plain type; True where the annotation says more than that."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (list, Sequence):
        return type(value) is list and all(fits(item, one) for one in inner for item in value)
    if kind in (bool, int, str, NoneType, dict):
        return type(value) is kind
    return type(value) in (int, float) if kind is float else True


def build(block: DictConfig, key: str, **given: Any) -> Any:
    """Call a block's target with its values."""
    function = target(block, key)
    return function(**arguments(takes(block, key), block, key, **given))


def blocks(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The blocks that name a target, with their dotted keys."""
    for name in ("data", "tokenizer", "model", "objective", "optim", "trainer"):
        if name in cfg:
            yield name, cfg[name]
    for group in ("callbacks", "logger"):
        for name, block in (cfg.get(group) or {}).items():
            if block:
                yield f"{group}.{name}", block


def check_run(cfg: DictConfig, here: bool = True) -> None:
    """Refuse what can be seen to be wrong in the config of a run; of devices only if it is to run `here`."""
    limits = [key for key in map(str, cfg.trainer) if key.startswith("limit_")]
    if limits:
        raise UserError(f"trainer.{limits[0]}: {LIMITS}")
    check_keys(cfg, "train")
    check_numbers(cfg)
    check_validation(cfg)
    for key in ("accumulate_grad_batches", "log_every_n_steps"):
        value = cfg.trainer.get(key, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"trainer.{key} is a whole number, 1 or more, not {value}.")
    steps = cfg.trainer.get("max_steps")
    if steps is not None and steps < 1 and steps != -1:
        raise UserError(f"trainer.max_steps is a number of steps, or -1 to go by trainer.max_epochs, not {steps}.")
    for key in ("compile", "activation_checkpointing", "profile"):
        if type(cfg[key]) is not bool:
            raise UserError(f"{key} is true or false, not {cfg[key]}.")
    compiler = os.environ.get("CXX") or "g++"
    if cfg.compile and not (shutil.which(compiler) or shutil.which("clang++")):
        raise UserError(f"compile=true needs a C++ compiler, and there is no {compiler}: install one, or set CXX.")
    clip = cfg.trainer.get("gradient_clip_val")
    if clip is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val is 0 or more, or null for no clipping, not {clip}.")
    check_names(cfg.trainer)
    if here:
        check_devices(cfg.trainer)

    from lmlab.data.sampler import micro_batch_size

    micro_batch_size(cfg.batch_size, world(cfg.trainer), cfg.trainer.accumulate_grad_batches)


def check_validation(cfg: DictConfig) -> None:
    """Refuse what can be seen to be wrong in `validation`, which older configs do not have."""
    block = cfg.get("validation", {"max_documents": None})
    if not isinstance(block, Mapping | DictConfig):
        raise UserError(f"validation={block}: it is a block of keys. Those of validations: validation.max_documents=N.")
    wrong = [key for key in block if key != "max_documents"]
    if wrong:
        raise UserError(f'there is no key "validation.{wrong[0]}". Keys: max_documents.')
    most = block["max_documents"]
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"validation.max_documents is a whole number, 1 or more, or null for all, not {most}.")


def check_choices(cfg: DictConfig) -> None:
    """Refuse what can be seen to be wrong in the config of an evaluation, whatever is evaluated."""
    from lmlab.evaluation.windows import Context

    check_keys(cfg, "evaluate")
    check_numbers(cfg)
    if cfg.score not in SCORES:
        raise UserError(f'score is one of {", ".join(SCORES)}, not "{cfg.score}".{nearest(str(cfg.score), SCORES)}')
    if cfg.units not in UNITS:
        raise UserError(f'units is one of {", ".join(UNITS)}, not "{cfg.units}".{nearest(str(cfg.units), UNITS)}')
    for key in ("within_word", "check"):
        if type(cfg[key]) is not bool:
            raise UserError(f"{key} is true or false, not {cfg[key]}.")
    if cfg.sample is not None and not (type(cfg.sample) is float and 0 < cfg.sample < 1):
        raise UserError(f"sample is a share of the tokens between 0 and 1, or null for all, not {cfg.sample}.")
    if cfg.score != "pseudo" and (cfg.within_word or cfg.sample is not None):
        raise UserError("within_word and sample are for score=pseudo.")
    if cfg.stride is not None and (type(cfg.stride) is not int or cfg.stride < 1):
        raise UserError(f"stride is a number of tokens, 1 or more, or null for half a block, not {cfg.stride}.")
    if "texts" in takes(cfg.tokenizer, "tokenizer"):
        raise UserError(
            "a trained model has a tokenizer, and this one would have to learn it from text:\n"
            "leave tokenizer=… out, or name another by tokenizer.name=ID_OR_DIRECTORY."
        )
    check_names(cfg.trainer)
    if cfg.context is not None:
        # A block size that is left open is for the model to say; any stride may fit it.
        Context(cfg.context, cfg.preprocess.block_size or max(2, cfg.stride or 2), cfg.stride)


def check_evaluation(cfg: DictConfig) -> None:
    """Refuse what can be seen to be wrong in the whole config of an evaluation."""
    check_choices(cfg)
    check_devices(cfg.trainer)
    if cfg.score == "pseudo" and not target(cfg.objective, "objective").bidirectional:
        raise UserError("score=pseudo hides tokens, which is for masked models. For a causal one leave it out.")


def check_numbers(cfg: DictConfig) -> None:
    """Refuse numbers of a root config that are none."""
    for key in ("seed", "num_workers", "batch_size"):
        least = 1 if key == "batch_size" else 0
        if type(cfg[key]) is not int or not least <= cfg[key] < 2**63:
            raise UserError(f"{key} is a whole number, {least} or more, not {cfg[key]}.")
    if cfg.attention is not None and not isinstance(cfg.attention, str):
        raise UserError(f"attention is a name, such as sdpa, or null for the model's own choice, not {cfg.attention}.")
    if cfg.logits_chunk_size is not None and (type(cfg.logits_chunk_size) is not int or cfg.logits_chunk_size < 1):
        raise UserError(
            f"logits_chunk_size is a number of scored positions, 1 or more, or null, not {cfg.logits_chunk_size}."
        )
    if not isinstance(cfg.cache_dir, str):
        raise UserError(f"cache_dir is a directory, not {cfg.cache_dir}.")


def check_keys(cfg: DictConfig, name: str) -> None:
    """Refuse keys that an experiment file made up: at the top, or in a block."""
    known = set(OmegaConf.load(CONF / f"{name}.yaml")) - {"defaults", "hydra"}
    known |= {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "experiment"}
    for key in map(str, cfg):
        if key not in known:
            raise UserError(f'there is no key "{key}".{nearest(key, known)} Keys: {", ".join(sorted(known))}.')
    for key, block in blocks(cfg):
        parameters = takes(block, key)
        if key == "optim":
            check_optimizer(block)
        arguments(parameters, block, key, **dict.fromkeys(SUPPLIED.get(key.split(".")[0], ())))
    preprocessing(cfg)


def check_optimizer(block: DictConfig) -> None:
    """Refuse a class whose objects can't be called for an optimizer, such as those of torch.optim."""
    if block._target_.startswith("lmlab.optim."):  # known without importing it
        return
    made = target(block, "optim")
    called = not inspect.isclass(made) or any("__call__" in vars(base) for base in made.__mro__)
    if not called or {"model", "steps"} <= inspect.signature(made).parameters.keys():
        raise UserError(
            f"optim._target_={block._target_}: it has to make something that, {OPTIMIZES}.\nSee lmlab/optim.py."
        )


def check_names(trainer: DictConfig) -> None:
    """Refuse names that are none."""
    for key, known in (("precision", PRECISIONS), ("accelerator", ACCELERATORS)):
        name = str(trainer[key])
        if name not in known:
            raise UserError(f'trainer.{key} is one of {", ".join(known)}, not "{name}".{nearest(name, known)}')
    strategy(trainer)


def check_devices(trainer: DictConfig) -> None:
    """Refuse devices that are not there and precisions they do not have."""
    devices = trainer.devices
    nodes = world(trainer) // devices
    if nodes > 1 and ranks.rank() is None:
        submit = command("sbatch", from_here(SWEEPS / "train.sbatch"))
        raise UserError(
            f"trainer.num_nodes={nodes}: on several nodes the ranks are started by SLURM or torchrun.\n"
            f"Use -m hydra/launcher=slurm, or {submit}, or torchrun on each node."
        )
    if uses_gpu(trainer):
        import torch

        gpus = torch.cuda.device_count()
        if gpus == 0:
            hidden = " that CUDA_VISIBLE_DEVICES lets it see" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
            raise UserError(
                f"trainer.accelerator={trainer.accelerator}: there is no GPU here{hidden}.\nUse trainer=cpu."
            )
        if devices > gpus:
            raise UserError(
                f"trainer.devices={devices}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}.\n"
                f"Use trainer.devices={gpus}{' or less' if gpus > 1 else ''}."
            )
    elif trainer.precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU. On a CPU use bf16-mixed or 32-true.")


def strategy(trainer: DictConfig) -> str:
    """How several ranks share the work: `auto` and `ddp` replicate the model, `fsdp` shards it (FSDP2).

    Raises:
        UserError: another one, which would train otherwise than tests hold, or in silence something else.
    """
    given = trainer.strategy
    if isinstance(given, DictConfig) and given.get("_target_") == SHARDED:
        if given.get("tensor_parallel_size", 1) != 1:
            raise UserError(
                "trainer.strategy: lmlab has no tensor parallelism. Use trainer=fsdp, which shards the model."
            )
        if given.get("save_distributed_checkpoint", False):
            raise UserError("trainer.strategy: lmlab keeps each checkpoint in one file. Use trainer=fsdp as it is.")
        return "fsdp"
    if given not in STRATEGIES:
        raise UserError(
            f'trainer.strategy is one of {", ".join(STRATEGIES)}, not "{given}".{nearest(str(given), STRATEGIES)}'
        )
    return given


def world(trainer: DictConfig) -> int:
    """Ranks of a run: devices of all nodes."""
    for key in ("devices", "num_nodes"):
        value = trainer.get(key, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"trainer.{key} is a number of {key.removeprefix('num_')}, 1 or more, not {value}.")
    return trainer.devices * trainer.get("num_nodes", 1)


def uses_gpu(trainer: DictConfig) -> bool:
    """Whether a trainer runs on GPUs of this machine."""
    if trainer.accelerator != "auto":
        return trainer.accelerator in ("gpu", "cuda")
    import torch

    return torch.cuda.device_count() > 0


def other_width(cfg: DictConfig) -> dict[str, Any]:
    """Another batch size for an evaluation and, where more than one process can run, another number of them."""
    import torch

    alone = world(cfg.trainer) > 1 or (uses_gpu(cfg.trainer) and torch.cuda.device_count() < 2)
    return {
        # Odd where it was even: halves of a batch may be computed alike to the last bit.
        "batch_size": cfg.batch_size - 1 if cfg.batch_size > 1 else 2,
        "trainer": {"devices": 1 if alone else 2, "strategy": "ddp"},
    }


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
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval > 0:
        interval = max(1, round(interval * blocks / batch_size))
    if not isinstance(interval, int) or interval < 1:
        raise UserError(f"trainer.val_check_interval counts epochs (1.0) or steps (100), not {interval}.")
    return steps, min(interval, steps)


def preprocessing(cfg: DictConfig) -> Any:
    """The choices of a config that turn records into blocks."""
    from lmlab.data.options import Preprocessing

    block = cfg.preprocess
    if block.block_size is None:  # in an evaluation; build_model then asks the model
        block = OmegaConf.merge(block, {"block_size": Preprocessing.block_size})
    return Preprocessing(**arguments(inspect.signature(Preprocessing).parameters, block, "preprocess"))
