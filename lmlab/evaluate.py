"""`python -m lmlab.evaluate MODEL [overrides]`: measure a model, and certify the figures.

Takes Hydra overrides; `--help` lists them.
"""

import os
import shutil
import sys
import time
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, check, compose, resuming
from lmlab.errors import UserError, cause_of, stopped_with
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import from_here, take_back, write_json, write_text
from lmlab.training import launch

UNKEPT = "Nothing of the evaluation is kept."


def main() -> None:
    sys.argv[1:] = with_model(sys.argv[1:])
    if "COMP_LINE" in os.environ:  # a shell asks how to complete a line: all of it but the last word is as typed
        line, space, last = os.environ["COMP_LINE"].rpartition(" ")
        os.environ["COMP_LINE"] = " ".join(["lmlab", *with_model(line.split()[1:])]) + space + last
    if launch.rank():
        from lmlab.worker import follow

        follow("evaluate")
    else:
        compose.run_verb(start, "evaluate")


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
            named = ",".join(quoted(place) if Path(place).exists() else place for place in places)
            found += ["model=pretrained", f"model.name={named}"]
        else:
            found.append(word)
    return found


def quoted(text: str) -> str:
    """A text in the grammar of overrides."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def start(cfg: DictConfig) -> float | None:
    """Evaluate here, on all the devices asked for; returns the perplexity, by whatever name."""
    if launch.rank():
        from lmlab.worker import follow

        follow("evaluate")
        return None  # rank 0's counts
    with launch.leading():
        return evaluate(cfg, list(HydraConfig.get().overrides.task))


def evaluate(cfg: DictConfig, overrides: list[str]) -> float:
    """An evaluation of this config, in its directory."""
    if cfg.check and launch.rank() is not None:
        raise UserError("check=true starts processes of its own: run the command without torchrun or srun.")
    check.check_choices(compose.freeze(cfg.copy(), whole=False))  # before the model is looked at, which takes longer
    cfg = compose.freeze(compose.completed(cfg, overrides))
    resuming.settle_width(cfg)
    check.check_evaluation(cfg)
    run = RunDirectory(cfg.run_dir)
    with run.lock() as before:
        try:
            return evaluate_here(cfg, run, overrides)
        except BaseException as error:
            if cause_of(error) not in ("crashed", "killed"):  # then its ranks have left logs
                take_back(run.path, before)
            raise


def evaluate_here(cfg: DictConfig, run: RunDirectory, overrides: list[str]) -> float:
    """Measure, and certify; a figure whose check failed is none."""
    run.start({"masks": cfg.seed})
    try:
        write_text(run.config, OmegaConf.to_yaml(cfg))
        write_text(run.overrides, OmegaConf.to_yaml(overrides))
        began = time.perf_counter()
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
    if check.world(cfg.trainer) == 1:
        measure(cfg)
    elif launch.rank() is None:
        with stopped_with(UNKEPT):
            launch.launch("evaluate", run, cfg.trainer.devices, [str(run.path)])
    else:
        launch.tell([str(run.path)])
        measure(cfg)


def measure(cfg: DictConfig) -> None:
    """One rank's share of an evaluation; each rank calls this with the same composed config."""
    import numpy as np

    from lmlab.data.datamodule import HeldOutData
    from lmlab.evaluation import records
    from lmlab.evaluation.scoring import Scorer
    from lmlab.models.loading import check_belongs
    from lmlab.models.scored import rows_at_once

    run, evaluated = RunDirectory(cfg.run_dir), RunDirectory(Path(cfg.model.name).resolve().parent)
    tokenizer = check.build(cfg.tokenizer, "tokenizer")
    objective, model = build.build_model(cfg, tokenizer)
    check_belongs(model, tokenizer)
    weights = records.weights_hash(model.state_dict())  # before a precision changes them
    data = build.prepare_held_out(cfg, tokenizer)
    # Another model may lie beside a run's own.
    trained = evaluated.trained_as() if evaluated.model == Path(cfg.model.name).resolve() else None
    if trained and trained["config"]["data"] == cfg.data and evaluated.fingerprint() != data.data_fingerprint:
        raise UserError(
            f"the data of {evaluated.path} is not what it was trained with: its files have changed.\n"
            "Bring them back, or name other text: data=… on the command line."
        )
    held_out = build.build_held_out(cfg, data, objective)
    scorer = Scorer(model, len(data.validation), rows_at_once(model, None, check.uses_gpu(cfg.trainer)))
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
            "model": cfg.model.name,
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
        write_text(other.config, OmegaConf.to_yaml(again))
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
