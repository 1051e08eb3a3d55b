"""From a checked config to the objects that it names."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lmlab.config.compose import without_secrets
from lmlab.config.schema import preprocessing, uses_gpu, world
from lmlab.config.targets import arguments, blocks, build, takes
from lmlab.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np

LONGEST = 1024  # positions of a window, where neither the command nor a run says how many


def prepare_data(cfg: DictConfig) -> Any:
    """The `Prepared` data of a run: from the cache where it is there."""
    from lmlab.data.preprocess import prepare

    learned = "texts" in takes(cfg.tokenizer, "tokenizer")
    return prepare(
        build(cfg.data, "data"),
        preprocessing(cfg),
        lambda texts: build(cfg.tokenizer, "tokenizer", texts=texts),
        OmegaConf.to_container(cfg.tokenizer) if learned else None,
        Path(cfg.cache_dir).expanduser(),
    )


def prepare_held_out(cfg: DictConfig, tokenizer: Any) -> Any:
    """The `Prepared` data of an evaluation."""
    from lmlab.data.preprocess import prepare_validation

    return prepare_validation(build(cfg.data, "data"), preprocessing(cfg), tokenizer, Path(cfg.cache_dir).expanduser())


def build_model(cfg: DictConfig, tokenizer: Any) -> tuple[Any, Any]:
    """The objective and the model of a config, checked against the tokenizer.

    A block size that the config leaves open becomes the longest that the model takes.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from lmlab.models import efficiency
    from lmlab.models.loading import check, positions

    # What a run has to say, it says itself.
    disable_progress_bar()
    set_verbosity_error()
    objective = build(cfg.objective, "objective", tokenizer=tokenizer)
    torch.manual_seed(cfg.seed)
    model = build(cfg.model, "model", tokenizer=tokenizer, causal=objective.causal)
    if cfg.preprocess.block_size is None:
        cfg.preprocess.block_size = min(positions(model) or LONGEST, LONGEST)
    check(model, tokenizer, cfg.preprocess.block_size, objective.causal)
    efficiency.fuse_activations(model)
    if cfg.attention is not None:
        efficiency.choose_attention(model, cfg.attention)
    if cfg.get("activation_checkpointing"):
        efficiency.checkpoint_activations(model)
    if cfg.get("compile"):
        efficiency.compile_layers(model)
    return objective, model


def build_held_out(cfg: DictConfig, data: Any, objective: Any) -> Any:
    """What is evaluated: by `context`, `score` and their like of evaluate.yaml; in training, blocks."""
    from lmlab.data.documents import CONTINUES, FLAGS
    from lmlab.evaluation.scoring import HeldOut, Labelled, Pseudo, check_targets
    from lmlab.evaluation.windows import Context, windows

    scoring = held_out_objective(cfg)
    if scoring != cfg.objective:
        objective = build(scoring, "objective", tokenizer=data.tokenizer)
    context = Context(cfg.get("context") or "blocks", cfg.preprocess.block_size, cfg.get("stride"))
    # Masks do not follow a run's seed: runs of several seeds are scored on the same positions.
    seed = cfg.seed if "score" in cfg else 0
    tokenizer, documents = data.tokenizer, data.validation
    check_targets(objective, objective.causal, documents.tokens[: context.block_size])
    names = ("bos", "eos") if objective.causal else ("cls", "bos", "eos")
    opening, closing = special_ids(tokenizer, *names), special_ids(tokenizer, "sep", "eos")
    shown = windows(context, documents, data.bounds, objective.causal, opening, closing)
    pseudo = None
    if cfg.get("score") == "pseudo":
        pseudo = {"within_word": cfg.within_word, "sample": cfg.sample, "seed": cfg.seed if cfg.sample else None}
        if cfg.within_word and not (documents.spans[:, FLAGS] & CONTINUES).any():
            raise UserError(
                "within_word=true would change nothing: to this tokenizer no token goes on with the word before it.\n"
                "Leave it out."
            )
        # An unknown word is a word.
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        rows: Any = Pseudo(documents, shown, tokenizer.mask_token_id, sorted(special), **pseudo)
    else:
        rows = Labelled(documents, shown, objective, objective.causal, seed)
    if not any(len(rows.row(i).tokens) for i in range(len(rows))):
        raise UserError("there is nothing to score: the text has no token that this context lets the model predict.")
    return HeldOut(
        rows,
        next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        {
            "figure": "pseudo_perplexity" if pseudo else objective.figure,
            "policy": {
                "context": context.name,
                "block_size": context.block_size,
                "stride": context.step if objective.causal and context.name != "blocks" else None,
                "drop_remainder_every": cfg.preprocess.drop_remainder_every if context.name == "blocks" else None,
                **{key: cfg.preprocess[key] for key in ("end_of_text", "special_tokens", "truncation")},
                "objective": None if pseudo else OmegaConf.to_container(scoring),
                "masks_seed": None if pseudo or objective.causal else seed,
                "pseudo": pseudo,
            },
            "units": cfg.get("units", "text"),
            "data_hash": documents.hash,
            "tokenizer_hash": data.tokenizer_hash,
        },
    )


def build_validation(cfg: DictConfig, data: Any, objective: Any) -> tuple[Any, Any]:
    """What validations in training look at and, where that is a part of the held-out documents, all of them."""
    from lmlab.data.preprocess import group_texts
    from lmlab.data.sampler import some

    whole = build_held_out(cfg, data, objective)
    most = (cfg.get("validation") or {}).get("max_documents")
    if most is None or most >= len(data.validation):
        return whole, None
    seed = cfg.preprocess.split_seed
    documents = data.validation.chosen(some(seed, most, len(data.validation)))
    bounds = group_texts(documents.lengths, cfg.preprocess.block_size, cfg.preprocess.drop_remainder_every)
    if len(bounds) == 0:
        raise UserError(f"validation.max_documents={most}: those documents give no block. Raise it.")
    part = build_held_out(cfg, replace(data, validation=documents, bounds=bounds), objective)
    return part, whole


def check_padding(model: Any, lengths: "np.ndarray", rows: int) -> None:
    """Refuse a model whose metrics padding would move.

    Args:
        lengths: of all rows that are trained on or scored.
        rows: of them in a batch.

    Raises:
        UserError: rows of several lengths would share a batch, and the model does not keep padding apart from text.
    """
    from lmlab.models.probe import probe

    least, most = int(lengths.min()), int(lengths.max())
    if rows > 1 and least < most and probe(model).padding_matters:
        raise UserError(
            f"padding changes what {model.config.model_type} makes of a row's own tokens, and rows of {least} to "
            f"{most} would be padded.\nTake one row at a time (batch_size=1, or more of "
            "trainer.accumulate_grad_batches), or drop what fills no block (preprocess.drop_remainder_every=…)."
        )


def held_out_objective(cfg: DictConfig) -> DictConfig:
    """The block of the objective as held-out text is scored: what is said of validation stands in for what it names."""
    block: Any = OmegaConf.to_container(cfg.objective)
    named = {key: value for key, value in block.items() if key.startswith("validation_")}
    meant = {key.removeprefix("validation_"): value for key, value in named.items() if value is not None}
    return OmegaConf.create({key: value for key, value in block.items() if key not in named} | meant)


def special_ids(tokenizer: Any, *names: str) -> list[int]:
    """The ids of special tokens, of those that the tokenizer has."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in names)
    return [token for token in ids if token is not None]


def build_training(
    cfg: DictConfig, data: Any, objective: Any, model: Any, steps: int, interval: int
) -> tuple[Any, Any]:
    """The module and the data that a trainer fits, for a run of `steps` that validates every `interval` of them."""
    import numpy as np
    import torch

    from lmlab.data.datamodule import BlocksDataModule
    from lmlab.data.sampler import share_of
    from lmlab.models.loss import rows_at_once
    from lmlab.models.memory import check_training
    from lmlab.optim import AdamW
    from lmlab.training.module import LMModule

    held_out, whole = build_validation(cfg, data, objective)
    optimizer = build(cfg.optim, "optim")
    # AdamW keeps two moments; what another optimizer keeps is not known.
    tensors = 3 if isinstance(optimizer, AdamW) else 1
    half = str(cfg.trainer.precision) in ("bf16-true", "16-true")
    device = torch.device("cuda" if uses_gpu(cfg.trainer) else "cpu")
    shards = world(cfg.trainer) if cfg.trainer.strategy == "fsdp" else 1
    check_training(model, tensors, half, device, cfg.trainer.devices, shards)
    module = LMModule(
        model,
        optimizer,
        steps,
        cfg.batch_size,
        cfg.preprocess.block_size,
        cfg.seed,
        len(held_out.documents.names),
        objective.figure,
        rows_at_once(model, cfg.logits_chunk_size, uses_gpu(cfg.trainer)),
        interval,
    )
    rows = share_of(cfg.batch_size, world(cfg.trainer), cfg.trainer.accumulate_grad_batches)
    lengths = data.train.bounds[:, 1] - data.train.bounds[:, 0]
    check_padding(model, np.concatenate([lengths, (whole or held_out).rows.lengths]), rows)
    datamodule = BlocksDataModule(
        data.train,
        held_out,
        objective,
        pad_id=held_out.pad_id,
        batch_size=cfg.batch_size,
        steps=steps,
        seed=cfg.seed,
        accumulate=cfg.trainer.accumulate_grad_batches,
        num_workers=cfg.num_workers,
        tokenizer=data.tokenizer,
        whole=whole,
    )
    return module, datamodule


def build_trainer(cfg: DictConfig, interval: int, run_id: str) -> Any:
    """The Lightning trainer of a run, with its callbacks and loggers.

    `interval` counts optimizer steps between validations.
    """
    from lightning.pytorch.callbacks import Checkpoint

    from lmlab.training.callbacks import Measure, Profile
    from lmlab.training.checkpoint import AtomicCheckpoints

    callbacks: list[Any] = [Profile(cfg.run_dir)] if cfg.profile else []
    callbacks += [build(block, key) for key, block in blocks(cfg) if key.startswith("callbacks.")]
    callbacks.append(Measure())  # behind those that may end the run; what keeps its state Lightning puts last
    # Last, since W&B begins a run.
    shown = OmegaConf.to_container(without_secrets(cfg))
    given = {"run_dir": cfg.run_dir, "run_id": run_id, "config": shown}
    loggers = [build(block, key, **given) for key, block in blocks(cfg) if key.startswith("logger.")]
    return lightning_trainer(
        cfg,
        callbacks=callbacks,
        # Null would make Lightning add a logger of its own.
        logger=loggers or False,
        plugins=[AtomicCheckpoints()],
        max_epochs=1,  # one long row of batches; see data/sampler.py
        max_steps=-1,  # the module says when it ends, after a last validation
        val_check_interval=interval * cfg.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        # Without one Lightning would add its own, elsewhere.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )


def build_evaluation_trainer(cfg: DictConfig) -> Any:
    """The Lightning trainer of an evaluation: for its devices and its precision."""
    from lmlab.training.callbacks import ShowScoring

    return lightning_trainer(
        cfg, callbacks=[ShowScoring()], logger=False, enable_checkpointing=False, val_check_interval=1.0
    )


def lightning_trainer(cfg: DictConfig, **options: Any) -> Any:
    """A `lightning.Trainer` of the block `trainer`, `options` over it, that says nothing of its own."""
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    # Lightning's greetings and hints; what a run has to say, it says itself.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    options = arguments(takes(cfg.trainer, "trainer"), cfg.trainer, "trainer") | options
    # Who started the ranks is known, and not to be guessed from a SLURM job's variables.
    alone = world(cfg.trainer) == 1
    environment = LightningEnvironment() if alone else TorchElasticEnvironment()
    options["plugins"] = [environment, *options.get("plugins", ())]
    # Lightning would start a process group for one rank, and leave its variables behind.
    if alone:
        options["strategy"] = "auto"
    elif cfg.trainer.strategy == "fsdp":
        options["strategy"] = ModelParallelStrategy(world(cfg.trainer), 1, save_distributed_checkpoint=False)
    else:
        # Otherwise DDP orders its buckets anew after the first step of each process, and with them the sums
        # over ranks: a run that goes on would have other last bits.
        options["strategy"] = DDPStrategy(find_unused_parameters=True)
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
