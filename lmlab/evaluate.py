"""`python -m lmlab.evaluate model=PLACE [overrides]`: measure a model, and certify the figures.

Takes Hydra overrides; `--help` lists them.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, check, compose, resuming, trust
from lmlab.errors import UserError
from lmlab.runs import secrets
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import from_here, write_json, write_text
from lmlab.training import launch


def main() -> None:
    if not any(word.lstrip("+").startswith("data=") for word in sys.argv):
        # Of the run's own data then, which the composed config does not have.
        sys.argv[1:] = [f"++{word}" if word.startswith("data.") else word for word in sys.argv[1:]]
    # To Hydra `model` is a group of conf/, so that its value could only be the name of a file there.
    for place, word in reversed(list(enumerate(sys.argv))):
        if word.startswith("model="):
            name = word.removeprefix("model=")
            if Path(name).exists():  # as typed, whatever signs of Hydra's own are in it
                name = f'"{name.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"'
            sys.argv[place : place + 1] = ["model=pretrained", f"model.name={name}"]
    if launch.rank():
        from lmlab.worker import follow

        follow("evaluate")
    else:
        compose.run_verb(start, "evaluate")


def start(cfg: DictConfig) -> float | None:
    """Evaluate here, on all the devices asked for; returns the perplexity, by whatever name."""
    if launch.rank():
        from lmlab.worker import follow

        follow("evaluate")
        return None  # rank 0's counts
    with launch.leading():
        hydra = HydraConfig.get()
        folders = (source.path for source in hydra.runtime.config_sources if source.provider == "command-line")
        return evaluate(cfg, list(hydra.overrides.task), next(map(Path, folders), None))


def evaluate(cfg: DictConfig, overrides: list[str], folder: Path | None = None) -> float:
    """An evaluation of this config, composed with `folder` as --config-dir, in its directory."""
    if cfg.check and launch.rank() is not None:
        raise UserError("check=true starts processes of its own: run the command without torchrun or srun.")
    # What the command names to be imported, it trusts.
    trusted = [*trust.packages(cfg.trust), *trust.named_by_command(overrides, folder)]
    with of_finished_run(cfg, trusted):
        cfg = compose.freeze(compose.completed(cfg, overrides, trusted))
        resuming.settle_width(cfg)
        check.check_evaluation(cfg)
        run = RunDirectory(cfg.run_dir)
        with run.lock():
            return evaluate_here(cfg, run, overrides)


@contextmanager
def of_finished_run(cfg: DictConfig, trusted: Sequence[str]) -> Iterator[None]:
    """Where the config names a run that has not ended, let it name a snapshot of it instead."""
    named = not OmegaConf.is_missing(cfg.model, "name") and cfg.model.get("name")
    if not named or not RunDirectory(cfg.model.name).unfinished():
        yield
        return
    from lmlab.config.snapshot import snapshot

    path = Path(cfg.run_dir) / "snapshot"
    try:
        print(f"Evaluating {snapshot(RunDirectory(cfg.model.name), path, trusted)}.")
        cfg.model.name = str(path)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def evaluate_here(cfg: DictConfig, run: RunDirectory, overrides: list[str]) -> float:
    """Measure, and certify; nothing stays of an evaluation that failed."""
    run.start({"masks": cfg.seed})
    try:
        compose.write_config(cfg, run.path)
        write_text(run.overrides, OmegaConf.to_yaml(secrets.redacted_command(overrides)))
        began = time.perf_counter()
        with run.staying():
            measure_on_all(cfg)
            seconds = time.perf_counter() - began
            if cfg.check:
                prove(cfg)
    except BaseException:
        for file in (run.certificate, run.records):  # a figure whose check failed is none
            file.unlink(missing_ok=True)
        run.give_up()
        raise
    return show(run, seconds)


def measure_on_all(cfg: DictConfig) -> None:
    """Measure, on as many processes as the config has devices."""
    run = RunDirectory(cfg.run_dir)
    if check.world(cfg.trainer) == 1:
        measure(cfg)
    elif launch.rank() is None:
        launch.launch("evaluate", run, cfg.trainer.devices, [str(run.path)], compose.handed_over(cfg))
    else:
        launch.tell([str(run.path)], compose.handed_over(cfg))
        measure(cfg)


def measure(cfg: DictConfig) -> None:
    """One rank's share of an evaluation; each rank calls this with the same composed config."""
    import numpy as np

    from lmlab.data.datamodule import HeldOutData
    from lmlab.data.sources import fingerprint
    from lmlab.evaluation import records
    from lmlab.evaluation.scoring import Scorer
    from lmlab.models.loading import check_belongs
    from lmlab.models.scored import rows_at_once
    from lmlab.runs.summary import warn_of

    run, evaluated = RunDirectory(cfg.run_dir), RunDirectory(Path(cfg.model.name).resolve().parent)
    tokenizer = check.build(cfg.tokenizer, "tokenizer")
    objective, model = build.build_model(cfg, tokenizer)
    check_belongs(model, tokenizer)
    weights = records.weights_hash(model.state_dict())  # before a precision changes them
    data = build.prepare_held_out(cfg, tokenizer)
    hashes = {"data": data.data_fingerprint, "tokenizer": data.tokenizer_hash, "weights": weights}
    launch.agree(config=fingerprint(OmegaConf.to_yaml(cfg)), **hashes)
    if not launch.rank():
        warn_of(data.ledger)
    # Another model may lie beside a run's own.
    trained = evaluated.trained_as() if evaluated.model == Path(cfg.model.name).resolve() else None
    same = trained and compose.without_secrets(cfg.data) == trained["config"]["data"]
    if same and evaluated.fingerprint() != data.data_fingerprint:
        raise UserError(
            f"the data of {evaluated.path} is not what it was trained with: its files have changed.\n"
            "Bring them back, or name other text: data=… on the command line."
        )
    held_out = build.build_held_out(cfg, data, objective)
    build.check_padding(model, held_out.rows.lengths, cfg.batch_size)
    scorer = Scorer(model, len(data.validation.names), rows_at_once(model, None, check.uses_gpu(cfg.trainer)))
    trainer = build.build_evaluation_trainer(cfg)
    trainer.validate(scorer, HeldOutData(held_out, cfg.batch_size, cfg.num_workers), verbose=False)
    if not np.isfinite(scorer.result[0]).all():
        raise UserError(
            "the model gives targets no finite nll: its weights have diverged, "
            f"or trainer.precision={cfg.trainer.precision} is too narrow for them."
        )
    if trainer.is_global_zero:
        facts = held_out.facts | {
            "precision": trainer.precision,
            "weights_hash": weights,
            "model": evaluated.identity().get("snapshot", cfg.model.name) if trained else cfg.model.name,
            "run": trained,
            **run.provenance(),
        }
        records.write(run.path, data.validation, *scorer.result, facts)


def prove(cfg: DictConfig) -> None:
    """Measure again at another batch size and number of devices; refuse totals that moved."""
    from lmlab.evaluation import records

    again = compose.elsewhere(cfg, check.other_width(cfg))
    run, other = RunDirectory(cfg.run_dir), RunDirectory(again.run_dir)
    try:
        other.start({"masks": cfg.seed})
        compose.write_config(again, other.path)
        measure_on_all(again)
        first = records.read(run.path)
        found = records.difference(first, records.read(other.path))
    finally:
        shutil.rmtree(other.path, ignore_errors=True)
    widths = {"batch_size": [cfg.batch_size, again.batch_size], "devices": [cfg.trainer.devices, again.trainer.devices]}
    write_json(run.certificate, first.certificate | {"check": widths | found})


def show(run: RunDirectory, seconds: float) -> float:
    """Say what came out, and return the perplexity."""
    from lmlab.evaluation import records
    from lmlab.runs.summary import show_result

    certificate = records.read(run.path).certificate
    speed = f"{certificate['totals']['tokens'] / seconds:,.0f} scored tokens/s in {seconds:.1f} s, loading included"
    show_result(records.described(certificate) | {"speed": speed, "certificate": str(from_here(run.certificate))})
    return certificate["figures"][certificate["figure"]]


if __name__ == "__main__":
    main()
