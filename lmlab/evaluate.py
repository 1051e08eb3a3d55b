"""`python -m lmlab.evaluate MODEL [overrides]`: measure a model, and certify the figures.

Takes Hydra overrides; `--help` lists them.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lmlab import secrets
from lmlab.config import build, changes, compose, evaluated, schema, targets, trust
from lmlab.console import command
from lmlab.distributed import launch, ranks
from lmlab.errors import UserError, cause_of, stopped_with
from lmlab.io import from_here, take_back, write_json, write_text
from lmlab.runs.directory import RunDirectory

UNKEPT = "Nothing of the evaluation is kept."


def main() -> None:
    if not any(word.lstrip("+").startswith("data=") for word in sys.argv):
        # Of the run's own data then, which the composed config does not have.
        sys.argv[1:] = [f"++{word}" if word.startswith("data.") else word for word in sys.argv[1:]]
    sys.argv[1:] = with_model(sys.argv[1:])
    if "COMP_LINE" in os.environ:  # a shell asks how to complete a line: all of it but the last word is as typed
        line, space, last = os.environ["COMP_LINE"].rpartition(" ")
        os.environ["COMP_LINE"] = " ".join(["lmlab", *with_model(line.split()[1:])]) + space + last
    if ranks.rank():
        from lmlab.config.rank import follow

        follow(measure)
    else:
        compose.run_command(start, "evaluate")


def with_model(words: list[str]) -> list[str]:
    """A command's words as Hydra takes them: to it `model` is a group of conf/, and its value the name of a file there.

    The model is the value of `model=`, or a first word that is no override.
    """
    first = next(iter(get_args_parser().parse_known_args(words)[0].overrides), "=")
    if "=" in first or first.startswith(("+", "~")):
        first = None
    found = []
    for word in words:
        if word == first or word.startswith("model="):
            place = word.removeprefix("model=")
            # What is there is taken as typed, whatever signs of Hydra's own are in it; of several, each.
            places = [place] if Path(place).exists() else place.split(",")
            quoted = [QuotedString(place, Quote.double).with_quotes() for place in places]
            named = ",".join(q if Path(place).exists() else place for q, place in zip(quoted, places, strict=True))
            found += ["model=pretrained", f"model.name={named}"]
        else:
            found.append(word)
    return found


def start(cfg: DictConfig) -> float | None:
    """Evaluate here, on all the devices asked for; returns the perplexity, by whatever name."""
    if ranks.rank():
        from lmlab.config.rank import follow

        follow(measure)
        return None  # rank 0's counts
    with ranks.leading():
        hydra = HydraConfig.get()
        folders = (source.path for source in hydra.runtime.config_sources if source.provider == "command-line")
        return evaluate(cfg, list(hydra.overrides.task), next(map(Path, folders), None))


def evaluate(cfg: DictConfig, overrides: list[str], folder: Path | None = None) -> float:
    """An evaluation of this config, composed with `folder` as --config-dir, in its directory."""
    if cfg.check and ranks.rank() is not None:
        raise UserError("check=true starts processes of its own: run the command without torchrun or srun.")
    chosen = compose.freeze(cfg.copy(), whole=False)
    OmegaConf.set_struct(chosen, False)
    if "_target_" not in (chosen.get("data") or {}):
        chosen.pop("data", None)  # keys of the run's own data
    schema.check_choices(chosen)  # before the model is looked at, which takes longer
    # What the command names to be imported, it trusts.
    trusted = [*trust.packages(cfg.trust), *trust.named_by_command(overrides, folder)]
    run = RunDirectory(cfg.run_dir)
    with run.lock() as before:
        try:
            with of_finished_run(cfg, trusted):
                cfg = compose.freeze(evaluated.completed(cfg, overrides, trusted))
                changes.settle_width(cfg)
                schema.check_evaluation(cfg)
                return evaluate_here(cfg, run, overrides)
        except BaseException as error:
            if cause_of(error) not in ("crashed", "killed"):  # then its ranks have left logs
                take_back(run.path, before)
            raise


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
    """Measure, and certify; a figure whose check failed is none."""
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
        for file in (run.certificate, run.records):
            file.unlink(missing_ok=True)
        run.give_up()
        raise
    return show(run, seconds)


def measure_on_all(cfg: DictConfig) -> None:
    """Measure, on as many processes as the config has devices."""
    run = RunDirectory(cfg.run_dir)
    if schema.world(cfg.trainer) == 1:
        measure(cfg)
    elif ranks.rank() is None:
        with stopped_with(UNKEPT):
            launch.launch(["evaluate", str(run.path)], cfg.trainer.devices, run.rank_log, compose.handed_over(cfg))
    else:
        ranks.tell([str(run.path)], compose.handed_over(cfg))
        measure(cfg)


def measure(cfg: DictConfig) -> None:
    """One rank's share of an evaluation; each rank calls this with the same composed config."""
    import numpy as np

    from lmlab.data.datamodule import HeldOutData
    from lmlab.data.sources import fingerprint
    from lmlab.evaluation import records
    from lmlab.evaluation.scoring import Scorer
    from lmlab.models.loading import check_belongs
    from lmlab.models.loss import rows_at_once
    from lmlab.runs.ledger import warn_of

    run, evaluated = RunDirectory(cfg.run_dir), RunDirectory(Path(cfg.model.name).resolve().parent)
    tokenizer = targets.build(cfg.tokenizer, "tokenizer")
    objective, model = build.build_model(cfg, tokenizer)
    check_belongs(model, tokenizer)
    weights = records.weights_hash(model.state_dict())  # before a precision changes them
    # Another model may lie beside a run's own.
    trained = evaluated.trained_as() if evaluated.model == Path(cfg.model.name).resolve() else None
    words = changes.places(cfg, OmegaConf.create(trained["config"]), scored=True) if trained else []
    place = "RUN_DIRECTORY" if trained and "snapshot" in evaluated.read_manifest() else from_here(evaluated.path)
    with changes.where_they_lie(command("python", "-m", "lmlab.evaluate", place), words):
        data = build.prepare_held_out(cfg, tokenizer)
    hashes = {"data": data.data_fingerprint, "tokenizer": data.tokenizer_hash, "weights": weights}
    ranks.agree(config=fingerprint(OmegaConf.to_yaml(cfg)), **hashes)
    if not ranks.rank():
        warn_of(data.ledger)
    same = trained and compose.without_secrets(cfg.data) == trained["config"]["data"]
    if same and evaluated.fingerprint() != data.data_fingerprint:
        raise UserError(
            f"the data of {evaluated.path} is not what it was trained with: its files have changed.\n"
            "Bring them back, or name other text: data=… on the command line."
        )
    held_out = build.build_held_out(cfg, data, objective)
    build.check_padding(model, held_out.rows.lengths, cfg.batch_size)
    scorer = Scorer(
        model, len(data.validation.names), rows_at_once(model, cfg.logits_chunk_size, schema.uses_gpu(cfg.trainer))
    )
    trainer = build.build_evaluation_trainer(cfg)
    with stopped_with(UNKEPT):
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
            "model": evaluated.read_manifest().get("snapshot", cfg.model.name) if trained else cfg.model.name,
            "run": trained,
            **run.provenance(),
        }
        records.write(run.path, data.validation, *scorer.result, facts)


def prove(cfg: DictConfig) -> None:
    """Measure again at another batch size and number of devices; refuse totals that moved."""
    from lmlab.evaluation import records

    again = evaluated.elsewhere(cfg, evaluated.other_width(cfg))
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
    from lmlab.console import show_result
    from lmlab.evaluation import records

    certificate = records.read(run.path).certificate
    speed = f"{certificate['totals']['tokens'] / seconds:,.0f} scored tokens/s in {seconds:.1f} s, loading included"
    show_result(records.described(certificate) | {"speed": speed, "certificate": str(from_here(run.certificate))})
    return certificate["figures"][certificate["figure"]]


if __name__ == "__main__":
    main()
