"""Completes the config of an evaluation: what its command leaves open, the evaluated run says."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lmlab import secrets
from lmlab.config import trust
from lmlab.config.compose import read_config, refuse_redacted
from lmlab.config.files import CONF
from lmlab.config.schema import uses_gpu, world
from lmlab.config.targets import FILES, source_blocks, target
from lmlab.errors import UserError
from lmlab.hub import check_directory, from_hub, split_revision
from lmlab.runs.choices import is_in
from lmlab.runs.directory import RunDirectory

AS_IN_TRAINING = ("block_size", "document_attention")
"""The keys of the block preprocess that say what a model sees at once, and not how text is prepared."""


def completed(cfg: DictConfig, overrides: list[str], trusted: Collection[str] = ()) -> DictConfig:
    """Returns the config of an evaluation, with what the evaluated run says where the command does not.

    Args:
        overrides: of the command line, to tell a choice from a default.
        trusted: packages, modules or what is in them, that the config of the run may name.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    run = take_model(cfg)
    taken = list[str]()  # blocks of the run
    module = trust.exported_module(Path(cfg.model.name))
    if module is not None and "module" not in cfg.model:
        cfg.model.module = module
        taken += ["model"]
    if "objective" not in cfg:
        cfg.objective = run.objective if run is not None else objective_of(cfg)
        taken += ["objective"] if run is not None else []
    if cfg.get("suite") == "minimal_pairs":
        take_pairs(cfg)
    elif cfg.get("suite") == "lm_eval":
        take_tasks(cfg)
    elif "_target_" not in (cfg.get("data") or {}):
        take_data(cfg, run, overrides)
        taken += ["data", "preprocess"]
    source = (cfg.get("data") or {}).get("_target_")
    if source == "lmlab.data.shards.load_prepared" and "tokenizer=prepared" not in overrides:
        cfg.tokenizer = OmegaConf.load(CONF / "tokenizer" / "pretrained.yaml")  # the model's, whatever the text has
    for key in AS_IN_TRAINING:
        if cfg.preprocess.get(key) is None and run is not None and cfg.get("suite") != "minimal_pairs":
            cfg.preprocess[key] = run.preprocess.get(key)
    if cfg.preprocess.document_attention is None:
        cfg.preprocess.document_attention = False
    if cfg.get("data") and OmegaConf.is_missing(cfg.data, "train"):
        cfg.data.train = None
    cfg.pop("trust")
    trust.check_trusted(OmegaConf.masked_copy(cfg, taken), trusted)
    refuse_redacted(secrets.redacted_keys(OmegaConf.to_container(OmegaConf.masked_copy(cfg, taken))), "+")
    objective = target(cfg.objective, "objective")
    own = getattr(objective, "score", "labels")
    if "suite" in cfg and cfg.suite != "generation" and objective.auto_class == "AutoModelForMaskedLM":
        own = "pseudo"
    cfg.score = cfg.score or own
    blocks = cfg.score == own or cfg.get("suite") == "lm_eval"
    cfg.context = cfg.context or ("blocks" if blocks else "document")
    return cfg


def take_model(cfg: DictConfig) -> DictConfig | None:
    """Sets the model's name to its exported directory where it names a run; returns the config of that run, else None.

    Raises:
        UserError: no model is named, or what is named holds none.
    """
    if OmegaConf.is_missing(cfg.model, "name") or not cfg.model.get("name"):
        raise UserError("model has to be given: add model=RUN_DIRECTORY, or an exported directory, or a hub id.")
    run = RunDirectory(cfg.model.name)
    if cfg.series:
        return take_series(cfg, run)
    if run.has_config():
        trained = read_config(run.path)
        if not run.model.is_dir():
            raise UserError(f"{run.path} holds no model: it is an evaluation. Name a run: model=RUN_DIRECTORY")
        cfg.model.name = str(run.model)
        return trained
    if cfg.model.name.endswith(".ckpt"):
        raise UserError(f"{cfg.model.name} is a checkpoint of a run: name the run's directory, model=RUN_DIRECTORY")
    check_directory("model", cfg.model.name, "model")
    return None


def take_series(cfg: DictConfig, run: RunDirectory) -> DictConfig:
    """Sets the steps whose models are evaluated, and the model's name to the last of them; returns the run's config.

    Raises:
        UserError: the directory is no run, or has no series, or none of these steps.
    """
    steps = [model["step"] for model in run.read_series()]
    if not run.has_config() or not steps:
        raise UserError(
            f"{run.path} holds no series of models, as a run with callbacks.series=log has it.\n"
            "To evaluate the model that is there, leave series=… out."
        )
    cfg.series = steps if cfg.series is True else sorted({*cfg.series})
    missing = [step for step in cfg.series if step not in steps]
    if missing:
        raise UserError(
            f"series={cfg.series}: the series of {run.path} has no model of step {missing[0]}.\n"
            f"It has those of the steps {', '.join(map(str, steps))}."
        )
    cfg.model.name = str(run.series_at(cfg.series[-1]))
    return read_config(run.path)


def of_step(cfg: DictConfig, step: int) -> DictConfig:
    """Returns the config of an evaluation of a series with the model of one step in it."""
    one = cfg.copy()
    one.model.name = str(RunDirectory(Path(cfg.model.name).parents[1]).series_at(step))
    return one


def take_pairs(cfg: DictConfig) -> None:
    """Sets the block data to the sentences of the minimal pairs that a command names.

    Raises:
        UserError: it names none, or other data besides.
    """
    if OmegaConf.is_missing(cfg, "pairs") or cfg.pairs is None:
        raise UserError(f"suite={cfg.suite} needs pairs: add pairs=FILE to the command, or a glob in quotes.")
    if cfg.get("data"):
        raise UserError(f"suite={cfg.suite} scores the sentences of pairs=…: leave data=… out.")
    cfg.data = {"_target_": "lmlab.data.pairs.load_pairs", "pairs": cfg.pairs, "phenomenon": cfg.phenomenon}


def take_tasks(cfg: DictConfig) -> None:
    """Refuses an evaluation by tasks that names none, or names text.

    Raises:
        UserError: it does.
    """
    if OmegaConf.is_missing(cfg, "tasks") or not cfg.tasks:
        raise UserError(f"suite={cfg.suite} needs tasks: add tasks=NAME to the command, or 'tasks=[NAME,NAME]'.")
    if cfg.get("data"):
        raise UserError(f"suite={cfg.suite} has the examples of its tasks: leave data=… out.")
    cfg.pop("data", None)


def take_data(cfg: DictConfig, run: DictConfig | None, overrides: list[str]) -> None:
    """Sets the blocks data and preprocess to those of a run, but for what the command says of them.

    Raises:
        UserError: there is no run, or its text would be prepared in another way.
    """
    if run is None:
        raise UserError(
            "data has to be given, as the model is not a run of lmlab: add data=wikitext2 (or another group),\n"
            "data=hub data.path=ID, or data=files data.validation=FILE to the command."
        )
    for word in overrides:
        own = word.partition("=")[0].removeprefix("preprocess.") in AS_IN_TRAINING
        if word.lstrip("+~").startswith("preprocess") and not own:
            raise UserError(f"{word} is for text that is named by data=…; the run's own is prepared as it was.")
    cfg.data = OmegaConf.merge(run.data, cfg.get("data") or {})  # it may lie elsewhere, or have a secret
    cfg.preprocess = OmegaConf.merge(run.preprocess, {key: cfg.preprocess.get(key) for key in AS_IN_TRAINING})
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    for key, block in [("data", cfg.data), *source_blocks(cfg.data)]:
        files = "path" not in block and block.get("_target_", FILES) == FILES
        moved = any(is_in(word, (f"{key}.validation",)) for word in given) and f"{key}.train" not in given
        if files and block.get("train") is not None and moved:
            from lmlab.data.sources import find_files

            try:
                find_files(block.train, f"{key}.train")
            except UserError:  # of what is scored it could only tell what was trained on
                block.train = None


def objective_of(cfg: DictConfig) -> DictConfig:
    """Returns the block of the objective that a model, by its own config, was trained with."""
    from lmlab.models.formats import load_config
    from lmlab.models.loading import auto_class_of
    from lmlab.objectives import OBJECTIVE_OF

    repository, revision = split_revision(cfg.model.name, cfg.model.revision)
    with from_hub("model", repository, "model"):
        config = load_config(repository, revision)
        name = OBJECTIVE_OF[auto_class_of(config, cfg.model.name)]
    block = OmegaConf.load(CONF / "objective" / f"{name}.yaml")
    assert isinstance(block, DictConfig)
    block.pop("defaults", None)
    return block


def other_width(cfg: DictConfig) -> dict[str, Any]:
    """Returns another batch size for an evaluation and, where more than one process can run, another number of them."""
    import torch

    alone = world(cfg.trainer) > 1 or (uses_gpu(cfg.trainer) and torch.cuda.device_count() < 2)
    return {
        # Odd where it was even: halves of a batch may be computed alike to the last bit.
        "batch_size": cfg.batch_size - 1 if cfg.batch_size > 1 else 2,
        "trainer": {"devices": 1 if alone else 2, "strategy": "ddp"},
    }
