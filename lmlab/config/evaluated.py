"""The config of an evaluation: what its command leaves open, the evaluated run says."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lmlab import secrets
from lmlab.config import trust
from lmlab.config.compose import read_config, refuse_redacted
from lmlab.config.files import CONF
from lmlab.errors import UserError
from lmlab.hub import check_directory, from_hub
from lmlab.runs.directory import RunDirectory


def completed(cfg: DictConfig, overrides: list[str], trusted: Collection[str] = ()) -> DictConfig:
    """The config of an evaluation, with what the run that it evaluates says where the command does not.

    Args:
        overrides: of the command line, to tell a choice from a default.
        trusted: packages, modules or what is in them, that the config of the run may name.
    """
    if OmegaConf.is_missing(cfg.model, "name") or not cfg.model.get("name"):
        raise UserError("model has to be given: add model=RUN_DIRECTORY, or an exported directory, or a hub id.")
    run = RunDirectory(cfg.model.name)
    trained = read_config(run.path) if run.manifest.is_file() and run.config.is_file() else None
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if trained is not None:
        if not run.model.is_dir():
            raise UserError(f"{run.path} holds no model: it is an evaluation. Name a run: model=RUN_DIRECTORY")
        cfg.model.name = str(run.model)
    elif cfg.model.name.endswith(".ckpt"):
        raise UserError(f"{cfg.model.name} is a checkpoint of a run: name the run's directory, model=RUN_DIRECTORY")
    else:
        check_directory("model", cfg.model.name, "model")
    taken = list[str]()  # from the run
    if "_target_" not in (cfg.get("data") or {}):
        if trained is None:
            name = cfg.model.name
            raise UserError(
                ("" if Path(name).exists() else f'there is no directory "{name}", which may be a hub id.\n')
                + "data has to be given, as the model is not a run of lmlab: add data=wikitext2 (or another group),\n"
                "data=hub data.path=ID, or data=files data.validation=FILE to the command."
            )
        for word in overrides:
            if word.lstrip("+~").startswith("preprocess") and not word.startswith("preprocess.block_size="):
                raise UserError(f"{word} is for text that is named by data=…; the run's own is prepared as it was.")
        cfg.data = OmegaConf.merge(trained.data, cfg.get("data") or {})  # it may lie elsewhere, or have a secret
        cfg.preprocess = OmegaConf.merge(trained.preprocess, {"block_size": cfg.preprocess.block_size})
        named = {word.lstrip("+").partition("=")[0] for word in overrides}
        files = cfg.data._target_ == "lmlab.data.sources.load_files"
        if files and cfg.data.train is not None and "data.validation" in named and "data.train" not in named:
            from lmlab.data.sources import find

            try:
                find(cfg.data.train, "train")
            except UserError:  # of what is scored it could only tell what was trained on
                cfg.data.train = None
        taken += ["data", "preprocess"]
    if cfg.preprocess.block_size is None and trained is not None:
        cfg.preprocess.block_size = trained.preprocess.block_size
    if OmegaConf.is_missing(cfg.data, "train"):
        cfg.data.train = None
    if "objective" not in cfg:
        cfg.objective = trained.objective if trained is not None else objective_of(cfg)
        taken += ["objective"] if trained is not None else []
    cfg.pop("trust")
    trust.check_trusted(OmegaConf.masked_copy(cfg, taken), trusted)
    refuse_redacted(secrets.redacted_keys(OmegaConf.to_container(OmegaConf.masked_copy(cfg, taken))), "+")
    if cfg.context is None:
        cfg.context = "document" if cfg.score == "pseudo" else "blocks"
    return cfg


def objective_of(cfg: DictConfig) -> DictConfig:
    """The objective that a model, by its own config, was trained with."""
    from lmlab.models.loading import is_causal

    with from_hub("model", cfg.model.name, "model"):
        name = "clm" if is_causal(cfg.model.name, cfg.model.revision) else "mlm"
    block = OmegaConf.load(CONF / "objective" / f"{name}.yaml")
    assert isinstance(block, DictConfig)
    block.pop("defaults", None)
    return block


def elsewhere(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """The same config with some values changed, for a directory in its own."""
    other = OmegaConf.merge(cfg, changes, {"run_dir": f"{cfg.run_dir}/check"})
    assert isinstance(other, DictConfig)
    return other
