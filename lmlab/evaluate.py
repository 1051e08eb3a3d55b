"""`python -m lmlab.evaluate MODEL [overrides]`: measure a model, and certify its metrics.

Takes Hydra overrides; `--help` lists them.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lmlab.config import build, changes, compose, evaluated, measures, models, schema, targets, trust
from lmlab.config.rank import on_all_ranks, on_rank_zero
from lmlab.console import command, show_result, show_rows
from lmlab.distributed import ranks
from lmlab.errors import UserError, cause_of, stopped_with
from lmlab.io import from_here, take_back, write_json
from lmlab.runs import lifecycle
from lmlab.runs.directory import RunDirectory

if TYPE_CHECKING:
    from lmlab.data.prepared import Prepared

COLUMNS = 8
"""The most metrics of a series that are shown side by side; the certificates have all."""


def measure(cfg: DictConfig) -> None:
    """Scores held-out text with the model of a config, and writes records and certificate. Every rank calls this.

    Each model of a series gets a folder for them, and the text is prepared for the first one.
    """
    from lmlab.data.sources import fingerprint
    from lmlab.models.checks import check_tokenizer
    from lmlab.models.hashing import weights_hash
    from lmlab.runs.ledger import log_doubts

    run, trained = RunDirectory(cfg.run_dir), trained_run(cfg)
    tokenizer = targets.build(cfg.tokenizer, "tokenizer")
    measure_one = None
    for one, path, facts in models_of(cfg, run, trained):
        objective, model = models.build_model_of_rank(one, tokenizer)
        check_tokenizer(model, tokenizer)

        def hashed(model: Any = model) -> str:  # before a precision changes the weights
            return weights_hash(model.state_dict())

        name = f"weights of {path.name}" if cfg.series else "weights"
        weights = ranks.from_rank_zero(name, hashed) if schema.shards(cfg.trainer) > 1 else hashed()
        hashes = {name: weights}
        if measure_one is None:
            data = held_out_data(one, tokenizer, trained) if cfg.get("data") else None
            hashes |= {"config": fingerprint(OmegaConf.to_yaml(cfg, sort_keys=True))}
            if data is not None:
                hashes |= {"data": data.data_fingerprint, "tokenizer": data.tokenizer_hash}
                if not ranks.rank():
                    log_doubts(data.ledger)
            measure_one = measures.build_measure(one, data, objective, tokenizer)
        ranks.check_ranks_agree(**hashes)
        facts = {"weights_hash": weights, **facts, "run": trained and trained.trained_as(), **run.provenance()}
        measure_one(model, path, trainer=build.build_evaluation_trainer(cfg), facts=facts)


def models_of(
    cfg: DictConfig, run: RunDirectory, trained: RunDirectory | None
) -> Iterator[tuple[DictConfig, Path, dict[str, Any]]]:
    """Yields the config, the directory and the facts of the one model of an evaluation, or of each of its series."""
    if not cfg.series:
        snapshot = trained and trained.read_manifest().get("snapshot")
        yield cfg, run.path, {"model": snapshot or cfg.model.name}
        return
    assert trained is not None
    for entry in trained.read_series():
        if entry["step"] in cfg.series:
            one = evaluated.of_step(cfg, entry["step"])
            yield one, run.path / f"step-{entry['step']}", {"model": one.model.name, "series": entry}


def trained_run(cfg: DictConfig) -> RunDirectory | None:
    """Returns the run whose exported model is evaluated, or models of its series; None for any other model."""
    if cfg.series:
        return RunDirectory(Path(cfg.model.name).resolve().parents[1])
    run = RunDirectory(Path(cfg.model.name).resolve().parent)
    return run if run.model == Path(cfg.model.name).resolve() and run.has_config() else None


def held_out_data(cfg: DictConfig, tokenizer: Any, trained: RunDirectory | None) -> "Prepared":
    """Prepares the text of an evaluation.

    Raises:
        UserError: it is the text that the model was trained with, and has changed since.
    """
    if trained is None:
        return build.prepare_held_out(cfg, tokenizer)
    manifest, kept = trained.read_manifest(), compose.read_config(trained.path)
    path = "RUN_DIRECTORY" if "snapshot" in manifest else from_here(trained.path)
    overrides = changes.location_overrides(cfg, kept, evaluation=True)
    with changes.hint_at_locations(command("python", "-m", "lmlab.evaluate", path), overrides):
        data = build.prepare_held_out(cfg, tokenizer)
    same = compose.without_secrets(cfg.data) == compose.without_secrets(kept.data)
    if same and manifest["data_fingerprint"] != data.data_fingerprint:
        raise UserError(
            f"the data of {trained.path} is not what it was trained with: its files have changed.\n"
            "Bring them back, or name other text: data=… on the command line."
        )
    return data


def check_invariance(cfg: DictConfig) -> None:
    """Measures again at another batch size and number of devices, and refuses totals that differ beyond rounding."""
    from lmlab.evaluation.records import check_agreement
    from lmlab.evaluation.suites.certificates import read

    again = cfg.copy()
    again.merge_with(evaluated.other_width(cfg), {"run_dir": f"{cfg.run_dir}/check"})
    run, other = RunDirectory(cfg.run_dir), RunDirectory(again.run_dir)
    try:
        other.start({"masks": cfg.seed})
        compose.write_config(again, other.path)
        on_all_ranks("evaluate", measure, again)
        first = read(run.path)
        difference = check_agreement(first, read(other.path))
    finally:
        shutil.rmtree(other.path, ignore_errors=True)
    widths = {"batch_size": [cfg.batch_size, again.batch_size], "devices": [cfg.trainer.devices, again.trainer.devices]}
    write_json(run.certificate, first.certificate | {"check": widths | difference})


@on_rank_zero(others=measure)
def evaluate_job(cfg: DictConfig) -> float:
    """Evaluates as Hydra composed it, one model or one of a multirun; returns perplexity, or what stands for it.

    What the config leaves open, the evaluated run says.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    folders = (Path(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line")
    if cfg.check and ranks.rank() is not None:
        raise UserError("check=true starts processes of its own: run the command without torchrun or srun.")
    given = compose.freeze(cfg.copy(), whole=False)
    OmegaConf.set_struct(given, False)
    if "_target_" not in (given.get("data") or {}):
        given.pop("data", None)  # keys of the run's own data
    schema.check_choices(given)  # before the model is looked at, which takes longer
    trusted = [*trust.packages(cfg.trust), *trust.named_by_command(overrides, next(folders, None))]
    run = RunDirectory(cfg.run_dir)
    with run.lock() as before:
        try:
            with snapshot_of_unfinished(cfg, trusted):
                cfg = compose.freeze(evaluated.completed(cfg, overrides, trusted))
                changes.fit_to_machine(cfg)
                schema.check_evaluation(cfg)
                return evaluate_on_all_ranks(cfg, run, overrides)
        except BaseException as error:
            if cause_of(error) not in ("crashed", "killed"):  # if they did, the logs of the ranks stay
                take_back(run.path, before)
            raise


@contextmanager
def snapshot_of_unfinished(cfg: DictConfig, trusted: Sequence[str]) -> Iterator[None]:
    """Lets a config that names an unfinished run name a snapshot of its best weights so far, for the time inside."""
    named = not OmegaConf.is_missing(cfg.model, "name") and cfg.model.get("name")
    if not named or cfg.series or not RunDirectory(cfg.model.name).unfinished():
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


def evaluate_on_all_ranks(cfg: DictConfig, run: RunDirectory, overrides: list[str]) -> float:
    """Measures on all ranks, checks and shows the result. Metrics whose check failed are not kept."""
    from lmlab.evaluation.suites.certificates import describe, read

    config, given = compose.config_yaml(cfg), compose.overrides_yaml(overrides)
    directories = [RunDirectory(run.path / f"step-{step}") for step in cfg.series] if cfg.series else [run]
    with lifecycle.new(run, config, given, {"masks": cfg.seed}), stopped_with("Nothing of the evaluation is kept."):
        try:
            began = time.perf_counter()
            on_all_ranks("evaluate", measure, cfg)
            seconds = time.perf_counter() - began
            if cfg.check:
                check_invariance(cfg)
        except BaseException:
            for directory in directories:
                for file in (directory.certificate, directory.records):
                    file.unlink(missing_ok=True)
            raise
    certificates = [read(directory.path).certificate for directory in directories]
    last = certificates[-1]
    unit = "tokens" if "tokens" in last["totals"] else "examples"
    count = sum(certificate["totals"][unit] for certificate in certificates)
    scored = "scored " if unit == "tokens" and last.get("suite") != "generation" else ""
    speed = f"{count / seconds:,.0f}" if count >= 10 * seconds else f"{count / seconds:.2g}"
    about = {"speed": f"{speed} {scored}{unit}/s in {seconds:.1f} s, loading included"}
    if cfg.series:
        about["certificates"] = str(from_here(run.path / "step-…" / run.certificate.name))
        show_series(certificates, about)
    else:
        show_result(describe(last) | about | {"certificate": str(from_here(run.certificate))})
    return last["figures"][last["figure"]]


def show_series(certificates: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Prints the metrics of each model of a series in a table, as many as fit, and below it what is alike for all."""
    from lmlab.evaluation.suites.certificates import describe

    texts = [describe(certificate) for certificate in certificates]
    alike = {title: text for title, text in texts[0].items() if all(each[title] == text for each in texts)}
    figures = certificates[0]["figures"]
    metrics = [title for title in texts[0] if title not in alike or title.replace(" ", "_") in figures][:COLUMNS]
    rows = [
        [f"{certificate['series'][key]:,}" for key in ("step", "tokens")] + [text[title] for title in metrics]
        for certificate, text in zip(certificates, texts, strict=True)
    ]
    show_rows("Series", ["step", "tokens seen", *metrics], rows, words=0)
    alike = {title: text for title, text in alike.items() if title not in metrics}
    show_result({**alike, **about}, "Evaluation")


def with_model(words: list[str]) -> list[str]:
    """Turns the model of a command into overrides: Hydra would take `model=NAME` for a file of conf/model.

    The model is the value of `model=`, or a first word that is no override.
    """
    first = next(iter(get_args_parser().parse_known_args(words)[0].overrides), "=")
    if "=" in first or first.startswith(("+", "~")):
        first = None
    overrides = []
    for word in words:
        if word == first or word.startswith("model="):
            name = word.removeprefix("model=")
            # A path that exists is taken literally, even if it holds a comma; otherwise commas separate several models.
            names = [name] if Path(name).exists() else name.split(",")
            quoted = [QuotedString(name, Quote.double).with_quotes() if Path(name).exists() else name for name in names]
            overrides += ["model=pretrained", f"model.name={','.join(quoted)}"]
        else:
            overrides.append(word)
    return overrides


@on_rank_zero(others=measure)
def main() -> None:
    if not any(word.lstrip("+").startswith("data=") for word in sys.argv):
        # These are keys of the run's own data, which the composed config does not have.
        sys.argv[1:] = [f"++{word}" if word.startswith("data.") else word for word in sys.argv[1:]]
    sys.argv[1:] = with_model(sys.argv[1:])
    if "COMP_LINE" in os.environ:  # a shell completes this line, of which all but the last word is as typed
        line, space, last = os.environ["COMP_LINE"].rpartition(" ")
        os.environ["COMP_LINE"] = " ".join(["lmlab", *with_model(line.split()[1:])]) + space + last
    compose.run_command(evaluate_job, "evaluate")


if __name__ == "__main__":
    main()
