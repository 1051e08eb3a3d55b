"""`python -m lmlab.train [overrides]`: train one model, measure it, export it, hear it.

Takes Hydra overrides; `--help` lists them.
"""

import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, check, compose
from lmlab.errors import UserError, first_line
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import from_here, write_json, write_text


def main() -> None:
    compose.run_verb(start, "train")


def start(cfg: DictConfig) -> float:
    """Begin a run here, on all the devices it asks for; returns its best val/loss."""
    overrides = HydraConfig.get().overrides.task
    cfg = compose.freeze(cfg)
    check.check_run(cfg)
    run = RunDirectory(cfg.run_dir)
    run.start({"run": cfg.seed, "split": cfg.preprocess.split_seed})
    try:
        write_text(run.config, OmegaConf.to_yaml(cfg))
        write_text(run.overrides, OmegaConf.to_yaml(overrides))
        if cfg.trainer.devices == 1:
            train(cfg)
        else:
            from lmlab.training.launch import launch

            # One process prepares; the ranks find the cache.
            build.prepare_data(cfg)
            launch("train", run.path, cfg.trainer.devices)
    except BaseException:
        run.give_up()
        raise
    return run.result()["val/loss"]


def train(cfg: DictConfig) -> None:
    """One rank's share of a run; each rank calls this with the same composed config."""
    from lmlab.data.datamodule import BlocksDataModule
    from lmlab.models.scored import rows_at_once
    from lmlab.runs.summary import show_ledger
    from lmlab.training.checkpoint import best_weights
    from lmlab.training.loggers import close
    from lmlab.training.module import LMModule

    run = RunDirectory(cfg.run_dir)
    data = build.prepare_data(cfg)
    objective, model = build.build_model(cfg, data.tokenizer)
    steps, interval = check.training_steps(cfg.trainer, len(data.train), cfg.batch_size)
    module = LMModule(
        model,
        check.build(cfg.optim, "optim"),
        steps,
        cfg.batch_size,
        cfg.preprocess.block_size,
        cfg.seed,
        len(data.validation),
        objective.figure,
        rows_at_once(model, cfg.loss_rows, check.uses_gpu(cfg.trainer)),
    )
    held_out = build.build_held_out(cfg, data, objective)
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
    )
    trainer = build.build_trainer(cfg, steps, interval, run.identity()["run_id"])
    try:
        if trainer.is_global_zero:
            run.note(data_fingerprint=data.data_fingerprint, tokenizer_hash=data.tokenizer_hash)
            write_json(run.ledger, {split: asdict(counts) for split, counts in data.ledger.items()})
            show_ledger(data.ledger)
        trainer.validate(module, datamodule, verbose=False)
        trainer.fit(module, datamodule)
        weights, best = best_weights(trainer)
        if trainer.is_global_zero:
            if module.device_mesh is not None:  # a shard can't take whole weights
                module.model = build.build_model(cfg, data.tokenizer)[1]
            module.model.load_state_dict(weights)
            step = trainer.global_step if best is None else best["global_step"]
            finish(cfg, run, trainer, module, data, step)
    except BaseException:
        if trainer.interrupted and trainer.is_global_zero:
            print(f"Interrupted at step {trainer.global_step}. What was kept is in {run.checkpoints}.")
        close(trainer.loggers, exit_code=1)
        raise
    close(trainer.loggers)


def finish(cfg: DictConfig, run: RunDirectory, trainer: Any, module: Any, data: Any, step: int) -> None:
    """Export the module's weights, which are those of `step`, and say what came of the run and what the model says."""
    from lmlab.models.inference import speak
    from lmlab.runs.summary import show_result
    from lmlab.training.callbacks import Measure
    from lmlab.training.checkpoint import export

    export(module.model, data.tokenizer, run.model)
    before, after = module.validations[0], module.validations[step]
    measure = next(callback for callback in trainer.callbacks if isinstance(callback, Measure))
    figure = f"val/{module.figure}"
    result = {
        **after,
        f"{figure}_before": before[figure],
        "steps": trainer.global_step,
        **measure.result(),
    }
    write_json(run.summary, result)
    place = from_here(run.path)
    try:
        text, said = speak(module.model, data.tokenizer, data.validation.tokens[: cfg.preprocess.block_size].tolist())
    except (UserError, RuntimeError) as error:  # the run is done and kept; this is only its last word
        text, said = "…", f"(nothing: {first_line(error)})"
    show_result(
        {
            f"{title(module.figure)} before": f"{before[figure]:,.2f}",
            f"{title(module.figure)} after": f"{after[figure]:,.2f}   (best weights, held-out text)",
            **{title(name): f"{value:.4f}" for name, value in after.items() if name.endswith("bits_per_byte")},
            "tokens": f"{result['tokens']:,} trained on in {result['seconds']:.1f} s",
            "speed": f"{result['tokens_per_s']:,.0f} tokens/s, {result['data_wait']:.1%} of the time waiting for data",
            **({"mfu": f"{result['mfu']:.1%} of what the device could do"} if "mfu" in result else {}),
            "peak memory": f"{result['peak_memory_gib']:.2f} GiB",
            "run directory": str(place),
            "model": str(place / run.model.name),
            "it says": said,
        }
    )
    python = "python" if shutil.which("python") == sys.executable else from_here(Path(sys.executable))
    print("Next:", shlex.join([str(python), "-m", "lmlab.predict", str(place), text]))


def title(figure: str) -> str:
    """A figure's name for people."""
    return figure.removeprefix("val/").replace("_", " ")


if __name__ == "__main__":
    main()
