"""Checks a config against the keys that there are (keys.py), and refuses early what can be seen to be wrong.

A block that names a target has the keys that the target takes; see targets.py.
"""

import inspect
import math
import os
import shutil
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lmlab.config import signatures
from lmlab.config.explain import LIMITS
from lmlab.config.files import SWEEPS
from lmlab.config.targets import PUSH, SHARE, arguments, blocks, sources, takes, target
from lmlab.console import command, counted
from lmlab.distributed import ranks
from lmlab.errors import UserError, check_installed
from lmlab.io import from_here

if TYPE_CHECKING:
    from lmlab.data.options import Preprocessing
    from lmlab.data.warmup import BatchSizes, BlockLengths


DECLARED = {
    "train": "lmlab.config.keys.Train",
    "prepare": "lmlab.config.keys.Prepare",
    "evaluate": "lmlab.config.keys.Evaluate",
    "trainer": "lmlab.config.keys.Trainer",
    "validation": "lmlab.config.keys.Validation",
    "budget": "lmlab.config.keys.Budget",
    "warmup": "lmlab.config.keys.Warmup",
    "push": "lmlab.config.keys.Push",
    "preprocess": "lmlab.data.options.Preprocessing",
}
"""The classes that declare the keys of the root configs, by their names, and of blocks without a target."""
# What lmlab itself hands to the targets of a group, beside the keys of the block.
SUPPLIED = {
    "data": ("corpora",),
    "tokenizer": ("texts",),
    "model": ("tokenizer", "auto_class", "empty"),
    "objective": ("tokenizer",),
    "distill": ("tokenizer", "objective", "block_size"),
    "adapter": ("model", "base", "revision", "auto_class", "seed"),
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
EXTRAS = ("tensorboard", "mlflow", "trackio")
"""Libraries of loggers that are not installed with lmlab, by the names of its extras."""
DESTINATION = ("save_dir", "version", "tracking_uri", "experiment", "entity", "project")
"""The keys of a logger that say where it writes."""
WITHOUT_ROWS = ("generation", "lm_eval")
"""The suites that score no rows of held-out text."""
MOST_STEPS = 2**40
"""The most steps that a run can have: the index of a sample has to fit into 64 bits."""
OPTIMIZES = "called with (model, steps), returns an optimizer and a schedule, as lmlab.optim.AdamW does"


def check_run(cfg: DictConfig, here: bool = True) -> None:
    """Refuses what can be seen to be wrong in the config of a run.

    Args:
        here: check the devices too, as the run is to be on this machine.
    """
    check_keys(cfg, "train")
    compiler = os.environ.get("CXX") or "g++"
    if cfg.compile and not (shutil.which(compiler) or shutil.which("clang++")):
        raise UserError(f"compile=true needs a C++ compiler, and there is no {compiler}: install one, or set CXX.")
    check_loggers(cfg)
    if "adapter" in cfg:
        check_adapter(cfg)
    if here:
        check_devices(cfg.trainer)

    from lmlab.data.sampler import micro_batch_size

    sizes = batch_sizes(cfg)
    key = "batch_size" if sizes.initial == sizes.batch_size else "batch_warmup.initial"
    micro_batch_size(sizes.initial, world(cfg.trainer), cfg.trainer.accumulate_grad_batches, key)
    if cfg.preprocess.block_size is not None:
        block_lengths(cfg)


def check_choices(cfg: DictConfig) -> None:
    """Refuses what can be seen to be wrong in the config of an evaluation, whatever is evaluated."""
    from lmlab.evaluation.windows import Context

    check_keys(cfg, "evaluate")
    suite = cfg.get("suite")
    if cfg.score != "pseudo" and ((cfg.within_word and not suite) or cfg.sample is not None):
        raise UserError("within_word and sample are for score=pseudo.")
    contexts = (None, "blocks") if suite in WITHOUT_ROWS else ("document",)
    if suite and (cfg.context not in contexts or cfg.stride is not None or cfg.sample is not None):
        raise UserError(f"suite={suite} decides what the model sees: leave context, stride and sample out.")
    other = next((key for key in ("surprisal", "calibration") if cfg[key]), None)
    if suite and other:
        raise UserError(
            f"{other}=true is for the nll of held-out text, and suite={suite} measures another thing: leave one out."
        )
    if cfg.check and suite in WITHOUT_ROWS:
        raise UserError(f"check=true is for the nll of text, which suite={suite} does not add up. Leave it out.")
    if cfg.series and cfg.check:
        raise UserError("check=true is for one model, and series=… for several: leave one of them out.")
    if "texts" in takes(cfg.tokenizer, "tokenizer"):
        raise UserError(
            "a trained model has a tokenizer, and this one would have to learn it from text:\n"
            "leave tokenizer=… out, or name another by tokenizer.name=ID_OR_DIRECTORY."
        )
    if cfg.context is not None:
        # A block size that is left open is for the model to say; any stride may fit it.
        choices = cfg.preprocess
        block_size = choices.block_size or max(2, cfg.stride or 2)
        Context(cfg.context, block_size, cfg.stride, choices.get("document_attention") is True)


def check_evaluation(cfg: DictConfig) -> None:
    """Refuses what can be seen to be wrong in the whole config of an evaluation."""
    check_choices(cfg)
    check_devices(cfg.trainer)
    objective, suite = target(cfg.objective, "objective"), cfg.get("suite")
    if suite in WITHOUT_ROWS and shards(cfg.trainer) > 1:
        raise UserError(f"suite={suite} needs the whole model on each device: use trainer.strategy=ddp.")
    if suite == "lm_eval" and objective.auto_class not in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        raise UserError(f"suite={suite} is for causal and masked models, and {objective.__name__} makes neither.")
    if suite == "lm_eval" and cfg.score == "labels" and objective.bidirectional:
        raise UserError(f"suite={suite} scores whole answers: leave score=labels out, or add score=elbo.")
    if cfg.score != "labels" and objective.auto_class in ("AutoModelForSeq2SeqLM", "AutoModelForPreTraining"):
        raise UserError(f"score={cfg.score} hides tokens behind a mask, which is for masked models. Leave it out.")
    if cfg.score != "labels" and (not objective.bidirectional or objective.target_shift):
        raise UserError(
            f"score={cfg.score} hides tokens, which is for models that predict a token where it stands, from both "
            "sides.\nFor a causal one leave it out."
        )
    if cfg.score == "labels" and getattr(objective, "score", "labels") != "labels":
        raise UserError(f"score=labels: held-out text of {objective.__name__} is scored by score={objective.score}.")
    if cfg.score != "elbo" and cfg.draws is not None:
        raise UserError("draws is for score=elbo: leave it out, or add score=elbo.")
    own_losses = getattr(objective, "losses", None) is not None or objective.auto_class == "AutoModelForSeq2SeqLM"
    for key in ("surprisal", "calibration"):
        if cfg[key] and (cfg.score == "elbo" or own_losses):
            raise UserError(
                f"{key}=true needs one prediction for each token of the text, which "
                f"{'score=elbo' if cfg.score == 'elbo' else objective.__name__} does not make.\nLeave it out"
                f"{', or use score=pseudo.' if cfg.score == 'elbo' else '.'}"
            )


def check_keys(cfg: DictConfig, name: str) -> None:
    """Refuses keys that are none and values that a key can't have, at the top and in each block.

    Args:
        name: of the root config, train or evaluate.
    """
    arguments(cfg, "", DECLARED[name])
    limits = [key for key in map(str, cfg.trainer) if key.startswith("limit_")]
    if limits:
        raise UserError(f"trainer.{limits[0]}: {LIMITS}")
    check_trainer(cfg.trainer)
    arguments(cfg.get("validation") or OmegaConf.create(), "validation", DECLARED["validation"])
    arguments(cfg.get("budget") or OmegaConf.create(), "budget", DECLARED["budget"])
    for key in ("batch_warmup", "block_warmup"):
        arguments(cfg.get(key) or OmegaConf.create(), key, DECLARED["warmup"])
    pushes = OmegaConf.masked_copy(cfg.get("logger") or OmegaConf.create(), [*PUSH])
    arguments(pushes, "logger", DECLARED["push"])
    for key, block in blocks(cfg):
        if key == "optim":
            check_optimizer(block)
        arguments(block, key, **dict.fromkeys(SUPPLIED.get(key.split(".")[0], ())))
    for name, (_, share) in sources(cfg.get("data")).items():
        arguments(share, f"data.sources.{name}", SHARE)
    preprocessing(cfg)


def check_loggers(cfg: DictConfig) -> None:
    """Refuses a logger whose library is not installed, and two loggers that would write to the same destination."""
    seen: dict[str, str] = {}
    for key, block in blocks(cfg):
        if not key.startswith("logger."):
            continue
        package, _, library = str(block._target_).rpartition(".")
        if package.startswith("lmlab.") and library in EXTRAS:
            check_installed(key, library, library)
        # The name is a part of the path for loggers of Lightning, and for others only what is shown.
        names = ("name", *DESTINATION) if "save_dir" in block else DESTINATION
        destination = str([block._target_, *((name, block.get(name)) for name in names)])
        if destination in seen:
            raise UserError(
                f"{seen[destination]} and {key} would write to the same destination: leave one of them out."
            )
        seen[destination] = key


def check_adapter(cfg: DictConfig) -> None:
    """Refuses an adapter whose libraries are not installed, or that its model or trainer is not for.

    The model can't be random or sharded, and a quantized one can't be in bf16.
    """
    check_installed("adapter=…", "adapters", "peft")
    if (quantization := cfg.adapter.get("quantization")) is not None:
        check_installed(f"adapter.quantization={quantization}", "qlora", "bitsandbytes")
    if cfg.model.get("_target_") == "lmlab.models.loading.from_scratch":
        raise UserError(
            "adapter=… leaves the weights of the model as they are, and those of this one are random.\n"
            "Use model=pretrained model.name=ID_OR_DIRECTORY, or leave adapter out."
        )
    if shards(cfg.trainer) > 1:
        raise UserError(
            f"adapter=… is not for a sharded model, as trainer.strategy={cfg.trainer.strategy} makes it.\n"
            "Use trainer.strategy=ddp."
        )
    if quantization is not None and cfg.trainer.precision == "bf16-true":
        raise UserError(
            "adapter.quantization is not for trainer.precision=bf16-true, which would round its scales.\n"
            "Use trainer.precision=bf16-mixed, which computes in bf16 too."
        )


def check_trainer(trainer: DictConfig) -> None:
    """Refuses values of the block trainer that lmlab could not go by."""
    own = signatures.parameters(DECLARED["trainer"])
    arguments(OmegaConf.masked_copy(trainer, [*own]), "trainer", DECLARED["trainer"])


def check_optimizer(block: DictConfig) -> None:
    """Refuses a class whose objects can't be called for an optimizer, such as those of torch.optim."""
    if target(block, "optim", str).startswith("lmlab.optim."):  # known without importing it
        return
    made = target(block, "optim")
    called = not inspect.isclass(made) or any("__call__" in vars(base) for base in made.__mro__)
    if not called or {"model", "steps"} <= inspect.signature(made).parameters.keys():
        raise UserError(
            f"optim._target_={block._target_}: it has to make something that, {OPTIMIZES}.\nSee lmlab/optim/adamw.py."
        )


def check_devices(trainer: DictConfig) -> None:
    """Refuses devices that are not there, and precisions that they do not have."""
    nodes = world(trainer) // trainer.devices
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
        if trainer.devices > gpus:
            raise UserError(
                f"trainer.devices={trainer.devices}: this machine has {counted(gpus, 'GPU')}.\n"
                f"Use trainer.devices={gpus}{' or less' if gpus > 1 else ''}."
            )
    elif trainer.accelerator == "mps":
        import torch

        if not torch.backends.mps.is_available():
            raise UserError("trainer.accelerator=mps: there is no GPU of Apple here.\nUse trainer=cpu.")
    elif trainer.precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU. On a CPU use bf16-mixed or 32-true.")


def world(trainer: DictConfig) -> int:
    """Returns the number of ranks of a run: the devices of all its nodes."""
    return trainer.devices * trainer.get("num_nodes", 1)


def shards(trainer: DictConfig) -> int:
    """Returns the number of ranks over which a model is sharded; 1 if each rank has all of it."""
    return {"fsdp": world(trainer), "hsdp": trainer.devices}.get(trainer.strategy, 1)


def uses_gpu(trainer: DictConfig) -> bool:
    """Returns whether a trainer runs on GPUs of this machine."""
    if trainer.accelerator != "auto":
        return trainer.accelerator in ("gpu", "cuda")
    import torch

    return torch.cuda.device_count() > 0


def best_precision(trainer: DictConfig) -> str:
    """Returns bf16-mixed where a trainer's GPUs have units for it, else 32-true."""
    if not uses_gpu(trainer):
        return "32-true"
    import torch

    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"


def warmup(cfg: DictConfig, key: str) -> dict[str, int]:
    """Returns what a config says of the warm-up of its batches or blocks; nothing where they have none.

    Raises:
        UserError: one of its two keys is missing.
    """
    block = cfg.get(key) or {}
    given = {name: block[name] for name in ("initial", "steps") if block.get(name) is not None}
    if len(given) == 1:
        present, missing = ("initial", "steps") if "initial" in given else ("steps", "initial")
        raise UserError(f"{key}.{present}={given[present]}: a warm-up has both. Set {key}.{missing} too.")
    return given


def batch_sizes(cfg: DictConfig) -> "BatchSizes":
    """Returns the samples of each step of a run."""
    from lmlab.data.warmup import BatchSizes

    return BatchSizes(cfg.batch_size, **warmup(cfg, "batch_warmup"))


def block_lengths(cfg: DictConfig) -> "BlockLengths | None":
    """Returns the length of the rows of each step of a run; None where its blocks are never cut."""
    from lmlab.data.warmup import BlockLengths

    given = warmup(cfg, "block_warmup")
    return BlockLengths(cfg.preprocess.block_size, **given) if given else None


def training_steps(
    trainer: DictConfig, blocks: int, sizes: "BatchSizes", of_budget: int | None = None
) -> tuple[int, int]:
    """Returns the optimizer steps of a run, and those from one validation to the next.

    Epochs run on into one another: a batch may hold the end of one and the start of the next, so n epochs are
    ⌈n · blocks / batch_size⌉ full steps.

    Args:
        sizes: the samples of each step.
        of_budget: the steps that a budget pays for, if the run has one.
    """
    steps = trainer.max_steps if of_budget is None else of_budget
    if steps is None or steps == -1:
        if trainer.max_epochs is None or trainer.max_epochs <= 0:
            raise UserError("the run has no end: set trainer.max_epochs or trainer.max_steps.")
        steps = sizes.steps_for(math.ceil(trainer.max_epochs * blocks))
    if steps > MOST_STEPS:
        raise UserError(f"the run would have {steps:.3g} steps, and can have up to {MOST_STEPS:.3g}: ask for fewer.")
    interval = trainer.val_check_interval
    if isinstance(interval, float):
        interval = max(1, round(interval * blocks / sizes.batch_size))
    return steps, min(interval, steps)


def preprocessing(cfg: DictConfig) -> "Preprocessing":
    """Returns the choices of a config that turn records into blocks."""
    from lmlab.data.options import Preprocessing

    # In an evaluation the run says what is left open, or build_model asks the model.
    left_open = [key for key in ("block_size", "document_attention") if cfg.preprocess.get(key, 0) is None]
    block = cfg.preprocess.copy()
    block.update({key: getattr(Preprocessing, key) for key in left_open})
    return Preprocessing(**arguments(block, "preprocess", DECLARED["preprocess"]))
