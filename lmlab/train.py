"""`python -m lmlab.train [overrides]`: train one model, measure it, export it, hear it.

Takes Hydra overrides; `--help` lists them.
"""

import logging
import os
import shutil
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lmlab import secrets
from lmlab.config import build, changes, compose, schema
from lmlab.console import command
from lmlab.distributed import launch, ranks
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Stopped, UserError, cause_of, first_line
from lmlab.io import from_here, replaced, take_back, write_beside, write_json, write_text
from lmlab.runs import status
from lmlab.runs.choices import under
from lmlab.runs.directory import RunDirectory, differences, surroundings
from lmlab.runs.log import kept_log
from lmlab.sweeps import parameters
from lmlab.sweeps.points import read_points

LOG = logging.getLogger("lmlab.train")


def main() -> None:
    if ranks.rank():
        from lmlab.config.rank import follow

        follow(train_rank)
    else:
        compose.run_command(start, "train")


def start(cfg: DictConfig) -> float | None:
    """Begin a run here, or go on with the one that is; returns its best val/loss."""
    if ranks.rank():  # a SLURM launcher of Hydra's composes in every rank
        from lmlab.config.rank import follow

        follow(train_rank)
        return None  # rank 0's counts
    hydra = HydraConfig.get()
    with ranks.leading():
        swept = hydra.mode is RunMode.MULTIRUN
        here = swept and not hydra.launcher._target_.startswith(parameters.SUBMITIT)
        if swept:
            name_in_sweep(cfg, RunDirectory(cfg.run_dir))
        made, cfg.run_dir = Path(cfg.run_dir), ranks.same_directory(cfg.run_dir)
        if made != Path(cfg.run_dir):
            made.rmdir()  # Hydra's, for this attempt
        return run_or_go_on(compose.freeze(cfg), list(hydra.overrides.task), swept, apart=here)


def name_in_sweep(cfg: DictConfig, run: RunDirectory) -> None:
    """In W&B, the runs of a sweep share a group, and are named by what makes them, unless the config says otherwise."""
    block = (cfg.get("logger") or {}).get("wandb")
    if block and block.get("group") is None:
        block.group = str(from_here(run.path.parent))
    point = next((point for point in read_points(run.path.parent) if point.run.path == run.path), None)
    if block and point and block.get("name") is None:
        block.name = " ".join(point.overrides)


def run_or_go_on(
    cfg: DictConfig, overrides: list[str], swept: bool = False, apart: bool = False, **facts: Any
) -> float:
    """A run of this config in its directory: a new one, with `facts` in its manifest, or the one that is there.

    One that does not begin leaves nothing there, unless it is `swept`: then its sweep is told why. `apart` from this
    process, no other run of a sweep bears its memory, or its end.
    """
    run = RunDirectory(cfg.run_dir)
    with run.lock() as before, SIGNALS.heeded():
        kept = compose.config_of(run) if run.begun() else None
        try:
            check_all(cfg, kept, run)
            if kept is not None and run.finished() and not longer(cfg, kept, run):
                print(finished(run))
                ranks.tell([])
                return run.read_summary()["val/loss"]
            with kept_log(run.log):
                try:
                    if kept is None:
                        begin(cfg, run, overrides, facts, apart)
                    else:
                        go_on(cfg, run, kept, apart)
                except Stopped as stop:
                    if run.begun():
                        stop.kept = what_is_kept(run)
                        LOG.warning("%s", stop)
                        stop.kept = None
                    raise
        except (Exception, Stopped) as error:
            refused = isinstance(error, UserError) and error.cause in ("error", "bad config")
            crashed = cause_of(error) in ("crashed", "killed")  # its ranks have left logs
            if not (swept or crashed or run.begun()):
                take_back(run.path, before)
            elif not (kept is not None and refused):  # then the run is what it was
                status.write_failure(run, error)
            raise
    return run.read_summary()["val/loss"]


def check_all(cfg: DictConfig, kept: DictConfig | None, run: RunDirectory) -> None:
    """Refuse what can be seen to be wrong in the config of a run; `kept` is that of the one that goes on."""
    changes.settle_width(cfg, kept)
    schema.check_run(cfg)
    if kept is not None:
        # Of a run without a checkpoint, nothing could tell what was in the place that a path names.
        changes.check_same(cfg, kept, located=bool(run.checkpoint_files()))


def begin(cfg: DictConfig, run: RunDirectory, overrides: list[str], facts: dict[str, Any], apart: bool) -> None:
    """A new run. One that is refused leaves its directory to others."""
    try:
        compose.write_config(cfg, run.path)
        write_text(run.overrides, OmegaConf.to_yaml(secrets.redacted_command(overrides)))
        run.start({"run": cfg.seed, "split": cfg.preprocess.split_seed}, **facts)
        run.failure.unlink(missing_ok=True)
        on_all_ranks(cfg, run, None, apart)
    except BaseException as error:
        if cause_of(error) == "bad config":  # seen by what trains, before it does
            run.ledger.unlink(missing_ok=True)
        run.give_up()
        raise


def go_on(cfg: DictConfig, run: RunDirectory, kept: DictConfig, apart: bool) -> None:
    """Go on from the last state, or from the start where none was kept. What has changed is noted."""
    from lmlab.training.checkpoint import last_checkpoint, numbered

    state = last_checkpoint(run)
    step = run.step_of(state) if state else 0
    then, now = run.read_manifest(), surroundings()
    again = command("python", "-m", "lmlab.resume", from_here(run.path))
    with changes.where_they_lie(again, changes.places(cfg, kept)):
        data = build.prepare_data(cfg)
    for key, name in (("data_fingerprint", "data"), ("tokenizer_hash", "tokenizer")):
        if then.get(key, getattr(data, key)) != getattr(data, key):
            words = [w for k, w in changes.differing(cfg, kept).items() if under(k, changes.LOCATED)]
            named = " ".join(changes.places(kept, kept))
            raise UserError(
                f"the {name} of {run.path} is not what the run was begun with: "
                f"{', '.join(words) if words else 'its files have changed'}.\n"
                f"Bring it back,{f' name where it is now ({named}),' if named else ''} or begin another run."
            )
    assert data.train is not None
    steps, _ = schema.training_steps(cfg.trainer, len(data.train), cfg.batch_size)
    if state and sharded(cfg) and not sharded(kept) and numbered(state):
        raise UserError(
            f"{state} was written by an older lmlab, and can't be sharded as it is.\n"
            "Go on without trainer=fsdp until the next checkpoint is there."
        )
    if steps < step:
        raise UserError(f"{run.path} is at step {step} already, and {steps} steps are fewer.")
    for line in differences(then, now):
        LOG.warning("Changed since the run began: %s", line)
    attempt = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "host": now["machine"]["host"]}
    attempt |= {"packages": now["packages"], "git": now["git"], "devices": schema.world(cfg.trainer)}
    if changes.length(cfg) != changes.length(kept):
        attempt["length_before"] = changes.length(kept)
    LOG.info("Going on with run %s from step %d.", then["run_id"], step)
    # The summary goes first: without it the run is not finished, whatever becomes of this process.
    changed = (run.summary, run.failure, run.manifest, run.config)
    before = {place: place.read_bytes() for place in changed if place.is_file()}
    try:
        run.summary.unlink(missing_ok=True)
        run.failure.unlink(missing_ok=True)
        run.update_manifest(went_on=[*then.get("went_on", ()), attempt])
        compose.write_config(cfg, run.path)
        on_all_ranks(cfg, run, state, apart)
    except UserError:
        newest = run.checkpoint_files()[-1] if run.checkpoint_files() else None
        if state == newest and run.path.is_dir():  # refused before it went on: as if never asked
            for place, content in before.items():
                write_beside(place, lambda beside, content=content: beside.write_bytes(content))  # type: ignore[misc]
        raise


def sharded(cfg: DictConfig) -> bool:
    """Whether a run's model is sharded over several ranks."""
    return cfg.trainer.strategy == "fsdp" and schema.world(cfg.trainer) > 1


def longer(cfg: DictConfig, kept: DictConfig, run: RunDirectory) -> bool:
    """Whether a config asks for more steps than a finished run has made."""
    if changes.length(cfg) == changes.length(kept):
        return False
    return not 0 < (cfg.trainer.max_steps or 0) <= run.read_summary()["steps"]


def on_all_ranks(cfg: DictConfig, run: RunDirectory, state: Path | None, apart: bool) -> None:
    """Train, on as many processes as the config has devices; `apart` from this one also on one."""
    word = [str(run.path), *([str(state)] if state else [])]
    with run.staying():
        if schema.world(cfg.trainer) == 1 and not apart:
            train(cfg, state)
            return
        build.prepare_data(cfg)  # once: the ranks find the cache
        if ranks.rank() is None:
            again = command("python", "-m", "lmlab.resume", run.path)
            advice = f"\nThe run can go on from its last checkpoint: {again}"
            launch.launch(["train", *word], cfg.trainer.devices, run.rank_log, compose.handed_over(cfg), advice)
        else:
            ranks.tell(word, compose.handed_over(cfg))
            train(cfg, state)


def finished(run: RunDirectory) -> str:
    """What to say of a run that has come to its end."""
    place = from_here(run.path)
    return (
        f"{place} is finished: {run.read_summary()['steps']} steps, val/loss {run.read_summary()['val/loss']:.4f}.\n"
        f"To train it longer: {command('python', '-m', 'lmlab.resume', place, 'trainer.max_steps=…')}"
    )


def what_is_kept(run: RunDirectory) -> str:
    """What to say of a run that was stopped."""
    if run.finished():
        return finished(run)
    states = run.checkpoint_files()
    kept = f"Kept: the state of step {run.step_of(states[-1])}." if states else "It had kept no state yet."
    return f"{kept} To go on: {command('python', '-m', 'lmlab.resume', from_here(run.path))}"


def train_rank(cfg: DictConfig, state: str | None = None) -> None:
    """One rank of a run, in a process of its own; what it logs also goes to a file."""
    run, rank = RunDirectory(cfg.run_dir), int(os.environ["RANK"])
    with kept_log(run.rank_log(rank) if rank else run.log):
        train(cfg, Path(state) if state else None)


def train(cfg: DictConfig, state: Path | None = None) -> None:
    """One rank's share of a run, from a kept state on; each rank calls this with the same composed config."""
    from lmlab.data.sources import fingerprint
    from lmlab.runs.ledger import show_ledger
    from lmlab.training import checkpoint, loggers

    run = RunDirectory(cfg.run_dir)
    leads = not ranks.rank()
    data = build.prepare_data(cfg)
    ranks.agree(config=fingerprint(OmegaConf.to_yaml(cfg)), data=data.data_fingerprint, tokenizer=data.tokenizer_hash)
    objective, model = build.build_model(cfg, data.tokenizer)
    assert data.train is not None
    steps, interval = schema.training_steps(cfg.trainer, len(data.train), cfg.batch_size)
    module, datamodule = build.build_training(cfg, data, objective, model, steps, interval)
    kept = checkpoint.load_checkpoint(state) if state else {"global_step": 0, "metrics": 0}
    if state:
        checkpoint.check_fits(kept, module, state)
    if leads:
        loggers.rewind(run.metrics, kept["metrics"])
    del kept
    trainer = build.build_trainer(cfg, interval, run.read_manifest()["run_id"])
    try:
        if leads:
            run.update_manifest(**data.identity, steps=steps)
            if not run.tokenizer.is_dir():  # so that the model can be used before the run has ended
                replaced(run.tokenizer, data.tokenizer.save_pretrained)
            write_json(run.ledger, {split: asdict(counts) for split, counts in data.ledger.items()})
            if not state:
                show_ledger(data.ledger)
                wanted = cfg.tokenizer.get("vocab_size")
                if wanted and len(data.tokenizer) < wanted:
                    said = f"{len(data.tokenizer):,} tokens, fewer than tokenizer.vocab_size={wanted}"
                    LOG.warning("the text gives %s.", said)
        trainer.fit(module, datamodule, ckpt_path=state, weights_only=True)
        if datamodule.whole is not None or checkpoint.outdated(trainer):
            LOG.info("Scoring all %d held-out documents by the best weights.", len(data.validation))
            whole = datamodule.whole or datamodule.held_out
            checkpoint.measure_whole(trainer, module, whole, datamodule.rows_at_once, cfg.num_workers)
        weights, best = checkpoint.best_weights(trainer)
        if leads:
            if module.device_mesh is not None:  # a shard can't take whole weights
                module.model = build.build_model(cfg, data.tokenizer)[1]
            module.model.load_state_dict(weights)
            finish(cfg, run, trainer, module, data, None if best is None else best["global_step"])
    except BaseException as error:
        loggers.close(trainer.loggers, exit_code=1, will_go_on=isinstance(error, Stopped))
        raise
    loggers.close(trainer.loggers, result=run.read_summary() if leads else None)


def finish(cfg: DictConfig, run: RunDirectory, trainer: Any, module: Any, data: Any, best: int | None) -> None:
    """Export the module's weights, and say what came of the run and what the model says.

    They are those of step `best`, or the last ones if that is None.
    """
    from lmlab.console import show_result
    from lmlab.models.generation import speak
    from lmlab.training.callbacks import Measure
    from lmlab.training.checkpoint import export

    export(module.model, data.tokenizer, run.model)
    before = module.validations[0]
    after = module.final or module.validations[trainer.global_step if best is None else best]
    most = (cfg.get("validation") or {}).get("max_documents")
    part = f"   ({most:,} of {len(data.validation):,} held-out documents)" if most and module.final else ""
    measure = next(callback for callback in trainer.callbacks if isinstance(callback, Measure))
    stops = (getattr(callback, "pruned", None) for callback in trainer.callbacks)
    pruned = next(({"pruned": step} for step in stops if step is not None), {})
    figure, which = f"val/{module.figure}", "last" if best is None else "best"
    result = {
        **after,
        f"{figure}_before": before[figure],
        "steps": trainer.global_step,
        **measure.result(),
        **pruned,
    }
    write_json(run.summary, result)
    count, trainable = result["parameters"], result["trainable_parameters"]
    text_of = f"all {len(data.validation):,} held-out documents" if part else "held-out text"
    place = from_here(run.path)
    try:
        text, said = speak(module.model, data.tokenizer, data.validation.tokens[: cfg.preprocess.block_size].tolist())
    except (UserError, RuntimeError) as error:  # the run is done and kept; this is only its last word
        text, said = "…", f"(nothing: {first_line(error)})"
    show_result(
        {
            f"{title(module.figure)} before": f"{before[figure]:,.2f}{part}",
            f"{title(module.figure)} after": f"{after[figure]:,.2f}   ({which} weights, {text_of})",
            **{title(name): f"{value:.4f}" for name, value in after.items() if name.endswith("bits_per_byte")},
            "parameters": f"{count:,}" + (f", {trainable:,} of them trainable" if trainable < count else ""),
            "tokens": f"{result['tokens']:,} trained on in {result['seconds']:.1f} s",
            **({"FLOPs": f"{result['flops']:.3g} of forward and backward passes"} if "flops" in result else {}),
            "speed": f"{result['tokens_per_s']:,.0f} tokens/s, {result['data_wait']:.1%} of the time waiting for data",
            **({"mfu": f"{result['mfu']:.1%} of what the device could do"} if "mfu" in result else {}),
            "peak memory": f"{result['peak_memory_gib']:.2f} GiB",
            "run directory": str(place),
            "model": str(place / run.model.name),
            "it says": said,
        }
    )
    python = "python" if shutil.which("python") == sys.executable else from_here(Path(sys.executable))
    print("Next:", command(python, "-m", "lmlab.predict", place, text))


def title(figure: str) -> str:
    """A figure's name for people."""
    return figure.removeprefix("val/").replace("_", " ")


if __name__ == "__main__":
    main()
