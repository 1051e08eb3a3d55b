"""Builds the data, the module and the trainer that a checked config names."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config.budget import steps_of_budget
from lmlab.config.compose import without_secrets
from lmlab.config.held_out import build_validation
from lmlab.config.models import build_teacher, check_example
from lmlab.config.schema import (
    WITHOUT_ROWS,
    batch_sizes,
    block_lengths,
    preprocessing,
    shards,
    training_steps,
    uses_gpu,
    world,
)
from lmlab.config.targets import arguments, blocks, build, sources, takes
from lmlab.errors import UserError, first_line, naming_source
from lmlab.runs.choices import without_added
from lmlab.runs.directory import RunDirectory

if TYPE_CHECKING:
    import lightning as L
    import numpy as np
    from lightning.pytorch.loggers import Logger
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmlab.data.datamodule import BlocksDataModule
    from lmlab.data.options import Preprocessing
    from lmlab.data.preparation import Preparation
    from lmlab.data.prepared import Prepared
    from lmlab.objectives import Objective
    from lmlab.training.module import LMModule

METRICS_FILE = "lmlab.training.loggers.MetricsFile"
ROW_LOGGERS = [f"lmlab.training.loggers.{name}.{name}" for name in ("csv", "tensorboard", "mlflow", "trackio")]


def prepare_data(cfg: DictConfig) -> "Prepared":
    """Returns the data of a run, tokenized and cut into blocks: from the cache where it is there."""
    from lmlab.data.prepared import prepare

    data, choices, make_tokenizer, tokenizer_key, words = prepared_from(cfg)
    return prepare(data, choices, make_tokenizer, tokenizer_key, Path(cfg.cache_dir).expanduser(), words)


def prepared_from(cfg: DictConfig) -> "tuple[Any, Preprocessing, Callable[..., PreTrainedTokenizerBase], Any, bool]":
    """Returns what the data of a run is prepared from, as the first arguments of `Preparation` say."""
    learned = "texts" in takes(cfg.tokenizer, "tokenizer")
    return (
        build_corpus(cfg),
        preprocessing(cfg),
        lambda texts: build(cfg.tokenizer, "tokenizer", texts=texts),
        without_added(OmegaConf.to_container(cfg.tokenizer)) if learned else None,  # type: ignore[arg-type]
        cfg.objective.get("whole_word") is True,
    )


def preparation(values: dict[str, Any], go_on: str) -> "Preparation":
    """Returns the preparation of the data of a config in a directory.

    Args:
        values: the config in plain values, as it is handed to other processes.
        go_on: the command that goes on with it.
    """
    from lmlab.data.preparation import Preparation

    cfg = OmegaConf.create(values)
    if sources(cfg.data):
        raise UserError(
            "the sources of a mixture are prepared one by one, each in a directory of its own.\n"
            "Then mix these: 'data.sources={web: {_target_: lmlab.data.shards.load_prepared, path: DIR, weight: 3}, …}'"
        )
    return Preparation(Path(cfg.output).expanduser(), *prepared_from(cfg), shards=cfg.shards, command=go_on)


def prepare_held_out(cfg: DictConfig, tokenizer: "PreTrainedTokenizerBase") -> "Prepared":
    """Returns the held-out data of an evaluation, tokenized and cut into blocks: from the cache where it is there."""
    from lmlab.data.prepared import prepare_validation

    return prepare_validation(build_corpus(cfg), preprocessing(cfg), tokenizer, Path(cfg.cache_dir).expanduser())


def build_corpus(cfg: DictConfig) -> "Any":
    """Returns the corpus of a config, or the mixture of several."""
    corpora = {}
    for name, (block, _) in sources(cfg.data).items():
        with naming_source(name):
            corpora[name] = build(block, f"data.sources.{name}")
    return build(cfg.data, "data", corpora=corpora)


def training_length(
    cfg: DictConfig, data: "Prepared", model: "PreTrainedModel | None" = None, steps: int | None = None
) -> tuple[int, int, str | None]:
    """Returns the optimizer steps of a run, those from one of its validations to the next, and a text on its budget.

    The text is None for a run without a budget.

    Args:
        model: the model of the run, if it has been made.
        steps: those that its budget pays for, if they are known.
    """
    from lmlab.data.mixture import MixedBlocks

    assert data.train is not None
    epoch = data.train.epoch if isinstance(data.train, MixedBlocks) else len(data.train)
    of_budget, text = (steps, None) if steps else steps_of_budget(cfg, data, model) or (None, None)
    return *training_steps(cfg.trainer, epoch, batch_sizes(cfg), of_budget), text


def check_padding(model: "PreTrainedModel", lengths: "np.ndarray", rows: int) -> None:
    """Refuses a model whose metrics padding would move.

    Args:
        lengths: [N] positions of the rows that are trained on or scored, those of each length once or more often.
        rows: how many of them are in a batch.

    Raises:
        UserError: rows of several lengths would share a batch, and the model does not keep padding apart from text.
    """
    from lmlab.models.probe import probe

    least, most = int(lengths.min()), int(lengths.max())
    if rows > 1 and least < most and probe(model).padding_matters:
        raise UserError(
            f"padding changes what {model.config.model_type} makes of a row's own tokens, and rows of {least} to "
            f"{most} would be padded.\nTake one row at a time (batch_size=1, or more of "
            "trainer.accumulate_grad_batches), or drop what fills no block (preprocess.packing=concatenated "
            "preprocess.drop_remainder_every=…)."
        )


def build_training(
    cfg: DictConfig, data: "Prepared", objective: "Objective", model: "PreTrainedModel"
) -> "tuple[LMModule, BlocksDataModule]":
    """Returns the module and the data that a trainer fits, checked against memory and padding."""
    import numpy as np
    import torch

    from lmlab.data.datamodule import BlocksDataModule
    from lmlab.data.sampler import micro_batch_size
    from lmlab.models.chunked_loss import logits_chunk_size
    from lmlab.models.efficiency import check_flex_attention, check_sharding
    from lmlab.models.memory import check_training
    from lmlab.optim import Muon, Scheduled, ScheduleFree
    from lmlab.optim.width import scale_initial_weights
    from lmlab.training.module import LMModule

    assert data.train is not None
    trainer, gpu = cfg.trainer, uses_gpu(cfg.trainer)
    if shards(trainer) > 1:
        check_sharding(model)
    if cfg.attention == "flex_attention":
        check_flex_attention(model, gpu)
    optimizer = build(cfg.optim, "optim")
    if isinstance(optimizer, Scheduled):
        optimizer.freeze(model)
        if factors := optimizer.factors(model):
            if "name" in cfg.model:
                raise UserError("optim.base_width is for models from scratch, whose initial weights it scales.")
            scale_initial_weights(model, factors)
    steps, interval, _ = training_length(cfg, data, model)
    check_example(cfg, data, objective)
    held_out, whole = build_validation(cfg, data, objective)
    if isinstance(optimizer, Muon | ScheduleFree) and shards(trainer) > 1:
        name = "muon" if isinstance(optimizer, Muon) else "schedule_free"
        raise UserError(
            f"optim={name} works on whole weights, which a sharded model has not.\n"
            "Use trainer.strategy=ddp, or optim=adamw."
        )
    # AdamW keeps two moments, and Muon no more; what another optimizer keeps is not known.
    tensors = 3 if isinstance(optimizer, Scheduled) else 1
    half = str(trainer.precision) in ("bf16-true", "16-true")
    device = torch.device("cuda" if gpu else "cpu")
    has_room = check_training(model, tensors, half, device, trainer.devices, shards(trainer))
    teacher, z_loss = build_teacher(cfg, data.tokenizer, objective), getattr(objective, "z_loss", 0.0)
    if z_loss and teacher is not None:
        raise UserError("objective.z_loss is for training without a teacher: leave one of them out.")
    module = LMModule(
        model,
        optimizer,
        steps=steps,
        batch_size=cfg.batch_size,
        block_size=cfg.preprocess.block_size,
        seed=cfg.seed,
        sums=held_out.sums(),
        metric=objective.metric,
        logits_chunk_size=logits_chunk_size(model, cfg.logits_chunk_size, gpu),
        val_interval=interval,
        reduces_once=has_room,
        teacher=teacher,
        losses=getattr(objective, "losses", None),
        held_out_losses=held_out.losses,
        domains=tuple(held_out.documents.domains),
        z_loss=z_loss,
    )
    lengths = np.concatenate([data.train.lengths, (whole or held_out).rows.lengths])
    for one in [model] if teacher is None else [model, teacher.model]:
        check_padding(one, lengths, micro_batch_size(cfg.batch_size, world(trainer), trainer.accumulate_grad_batches))
    datamodule = BlocksDataModule(
        data.train,
        held_out,
        objective,
        pad_id=held_out.pad_id,
        batch_size=cfg.batch_size,
        steps=steps,
        seed=cfg.seed,
        accumulate=trainer.accumulate_grad_batches,
        num_workers=cfg.num_workers,
        tokenizer=data.tokenizer,
        whole=whole,
        sizes=batch_sizes(cfg),
        lengths=block_lengths(cfg),
    )
    return module, datamodule


def parameter_groups(cfg: DictConfig, model: "PreTrainedModel") -> list[dict[str, Any]]:
    """Returns what holds for the parameters of each pattern of `optim.groups`, and for all others; none without it."""
    from lmlab.optim import Scheduled

    optimizer = build(cfg.optim, "optim")
    return optimizer.describe_groups(model) if isinstance(optimizer, Scheduled) else []


def build_trainer(cfg: DictConfig, interval: int, run_id: str) -> "L.Trainer":
    """Returns the Lightning trainer of a run, with its callbacks and loggers.

    Args:
        interval: optimizer steps from one validation to the next.
        run_id: the identity of the run, in W&B too.
    """
    from lightning.pytorch.callbacks import Callback, Checkpoint

    from lmlab.training.callbacks import Profile
    from lmlab.training.checkpoint_io import AtomicCheckpointIO
    from lmlab.training.measure import Measure

    callbacks: list[Callback] = [Profile(cfg.run_dir)] if cfg.profile else []
    callbacks += [build(block, key) for key, block in blocks(cfg) if key.startswith("callbacks.")]
    callbacks.append(Measure())  # behind those that may end the run; what keeps its state Lightning puts last
    return lightning_trainer(
        cfg,
        callbacks=callbacks,
        logger=build_loggers(cfg, run_id),  # last, since W&B begins a run
        plugins=[AtomicCheckpointIO()],
        max_epochs=1,  # one long row of batches; see data/sampler.py
        max_steps=-1,  # the module says when it ends, after a last validation
        val_check_interval=interval * cfg.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        # Without one Lightning would add its own, elsewhere.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )


def build_loggers(cfg: DictConfig, run_id: str) -> "list[Logger]":
    """Returns the loggers of a run, first that of metrics.jsonl, which every run has.

    Args:
        run_id: the identity of the run.
    """
    from lmlab.training.loggers import MetricsFile

    given = {"run_dir": cfg.run_dir, "run_id": run_id, "config": OmegaConf.to_container(without_secrets(cfg))}
    others = [
        (key, block) for key, block in blocks(cfg) if key.startswith("logger.") and block._target_ != METRICS_FILE
    ]
    return [MetricsFile(cfg.run_dir), *(build(block, key, **given) for key, block in others)]


def send_rest(cfg: DictConfig) -> None:
    """Gives the loggers of a finished run the metrics that they lack because a service was away at its end.

    W&B is left out, as it has a command of its own for that.
    """
    from lmlab.training.loggers.closing import close

    run, cfg = RunDirectory(cfg.run_dir), cfg.copy()
    cfg.logger = {key.removeprefix("logger."): block for key, block in blocks(cfg) if block._target_ in ROW_LOGGERS}
    run.unsent.unlink()
    close(build_loggers(cfg, run.read_manifest()["run_id"]), result=run.read_summary())


def build_evaluation_trainer(cfg: DictConfig) -> "L.Trainer":
    """Returns the Lightning trainer of an evaluation: for its devices and its precision."""
    from lmlab.training.callbacks import ShowScoring

    callbacks = [] if cfg.get("suite") in WITHOUT_ROWS else [ShowScoring()]
    return lightning_trainer(cfg, callbacks=callbacks, logger=False, enable_checkpointing=False, val_check_interval=1.0)


def lightning_trainer(cfg: DictConfig, **options: Any) -> "L.Trainer":
    """Returns the trainer of the block `trainer`, with `options` over it, which prints nothing of its own."""
    import lightning as L
    import torch
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lmlab.evaluation.certify import silence_lightning
    from lmlab.training.sharded import ShardedStrategy

    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    silence_lightning()  # what a run has to say, it says itself
    options = arguments(cfg.trainer, "trainer") | options
    # Who started the ranks is known, and not to be guessed from a SLURM job's variables.
    alone = world(cfg.trainer) == 1
    environment = LightningEnvironment() if alone else TorchElasticEnvironment()
    options["plugins"] = [environment, *options.get("plugins", ())]
    # Lightning would start a process group for one rank, and leave its variables behind.
    if alone:
        options["strategy"] = "auto"
    elif shards(cfg.trainer) > 1:
        options["strategy"] = ShardedStrategy(shards(cfg.trainer))
    else:
        # Otherwise DDP orders its buckets anew after the first step of each process, and with them the sums
        # over ranks: a run that goes on would have other last bits. No buffer differs between ranks.
        options["strategy"] = DDPStrategy(
            find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    try:
        return L.Trainer(
            **options,
            default_root_dir=cfg.run_dir,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
