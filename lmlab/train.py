"""`python -m lmlab.train [overrides]`: train one model, measure it, and export it.

Takes Hydra overrides; `--help` lists them.
"""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, compose, models
from lmlab.config.attempt import attempt
from lmlab.config.rank import on_rank_zero
from lmlab.distributed import ranks, slurm
from lmlab.runs import lifecycle
from lmlab.runs.directory import RunDirectory
from lmlab.runs.log import log_to
from lmlab.sweeps.points import name_run


def train(cfg: DictConfig, checkpoint: str | None = None) -> None:
    """Trains the model of a config in its run directory. Every rank calls this with the same arguments.

    Args:
        checkpoint: the path of the checkpoint to go on from; None for the start.
    """
    from lmlab.data.sources import fingerprint
    from lmlab.models.adapter_files import take_out
    from lmlab.models.efficiency import unsharded
    from lmlab.models.hashing import weights_hash
    from lmlab.models.memory import count_parameters
    from lmlab.training import checkpoint as checkpoints
    from lmlab.training.loggers.closing import closed_at_the_end
    from lmlab.training.summary import show_summary, summarize

    run = RunDirectory(cfg.run_dir)
    data = build.prepare_data(cfg)
    ranks.check_ranks_agree(
        config=fingerprint(OmegaConf.to_yaml(cfg, sort_keys=True)),
        data=data.data_fingerprint,
        tokenizer=data.tokenizer_hash,
    )
    objective, model = models.build_model_of_rank(cfg, data.tokenizer)
    module, datamodule = build.build_training(cfg, data, objective, model)
    writes = checkpoint is None and not ranks.rank()
    if module.teacher is not None:
        lifecycle.keep_hash(run, "teacher", weights_hash(module.teacher.model.state_dict()), writes)
    if "adapter" in cfg:
        lifecycle.keep_hash(run, "base", getattr(model, "base_hash", None), writes)
    lifecycle.rewind(run, module, checkpoint, leads=not ranks.rank())  # before loggers are made, which read the file
    trainer = build.build_trainer(cfg, module.val_interval, run.read_manifest()["run_id"])
    with closed_at_the_end(trainer.loggers, run):
        if trainer.is_global_zero:
            vocab_size, show = cfg.tokenizer.get("vocab_size"), checkpoint is None
            samples = datamodule.sizes.before(module.steps)
            lifecycle.write_data(run, data, module.steps, samples, vocab_size, show)
            count, trainable = count_parameters(model)
            groups = build.parameter_groups(cfg, model)
            facts = {"parameters": count, "trainable_parameters": trainable}
            run.update_manifest(**facts, **({"parameter_groups": groups} if groups else {}))
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        if checkpoints.rescoring_due(trainer):
            checkpoints.score_best_weights(trainer, module)
        weights, best = checkpoints.best_weights(trainer)
        if trainer.is_global_zero:
            if "adapter" in cfg:
                base_hash = run.read_manifest().get("base_hash")
                weights = take_out(module.model, weights, data.tokenizer, run.adapter, base_hash)
            if module.device_mesh is None:
                module.model.load_state_dict(weights)
            else:  # a shard can't take whole weights
                module.model = unsharded(module.model, models.build_model(cfg, data.tokenizer, empty=True)[1], weights)
            checkpoints.export(module.model, data.tokenizer, run.model)
            summary = summarize(run, trainer, module, best)
            show_summary(run, summary, module, datamodule, best is not None)


def train_rank(cfg: DictConfig, checkpoint: str | None = None) -> None:
    """Trains as one rank in a process of its own, which logs to a file."""
    run, rank = RunDirectory(cfg.run_dir), int(os.environ["RANK"])
    with log_to(run.rank_log(rank) if rank else run.log):
        train(cfg, checkpoint)


@on_rank_zero(others=train_rank)
def train_job(cfg: DictConfig) -> float:
    """Trains as Hydra composed it, one run or one of a sweep; returns its val/loss, for sweepers other than lmlab's."""
    hydra = HydraConfig.get()
    swept = hydra.mode is RunMode.MULTIRUN
    if swept:
        name_run(cfg)
    made, cfg.run_dir = Path(cfg.run_dir), ranks.same_directory(cfg.run_dir)
    if made != Path(cfg.run_dir):
        made.rmdir()  # Hydra's, for this attempt of torchrun
    apart = swept and not slurm.submits(hydra.launcher._target_)
    return attempt(train, compose.freeze(cfg), list(hydra.overrides.task), swept, apart)


@on_rank_zero(others=train_rank)
def main() -> None:
    compose.run_command(train_job, "train")


if __name__ == "__main__":
    main()
