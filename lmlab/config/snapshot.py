"""Makes of a run that has not ended a run directory that commands for finished runs can read."""

import shutil
from collections.abc import Collection
from pathlib import Path

from omegaconf import OmegaConf
from transformers import AutoTokenizer

from lmlab.config import models, schema, trust
from lmlab.config.compose import config_of
from lmlab.errors import UserError
from lmlab.io import from_here
from lmlab.models.adapter_files import take_out
from lmlab.runs.directory import RunDirectory
from lmlab.training import checkpoint
from lmlab.training.checkpoint_io import load_checkpoint, load_weights, model_state


def snapshot(run: RunDirectory, path: Path, trusted: Collection[str]) -> str:
    """Writes the run directory of a run that ends with the best weights that `run` has kept so far.

    It has what evaluation and prediction read of a run: manifest, config, and the exported model.

    Args:
        trusted: packages, modules or what is in them, that the config of the run may name.

    Returns:
        a description of these weights.

    Raises:
        UserError: the run has kept none yet, its config names what is neither lmlab's own nor trusted, or a library of
            its adapter is not installed.
    """
    cfg = config_of(run)
    named = [key for key in ("model", "objective", "adapter") if key in cfg]
    trust.check_trusted(OmegaConf.masked_copy(cfg, named), trusted)
    checkpoints = (cfg.get("callbacks") or {}).get("checkpoints") or {}
    weights = checkpoint.best_so_far(run, checkpoints.get("mode") or checkpoint.mode_of(checkpoints.get("monitor", "")))
    if weights is None or not run.tokenizer.is_dir():
        raise UserError(f"{run.path} has kept no weights yet: it has not come to its first checkpoint.")
    if "adapter" in cfg:
        schema.check_adapter(cfg)
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    _, model = models.build_model(cfg, tokenizer)
    copy = RunDirectory(path)
    path.mkdir(parents=True)
    state = model_state(load_weights(weights, load_checkpoint(weights)))
    if "adapter" in cfg:
        state = take_out(model, state, tokenizer, copy.adapter, run.read_manifest().get("base_hash"))
    model.load_state_dict(state)
    for file in (run.manifest, run.config):
        shutil.copy(file, path)
    which = "best" if weights in run.best_files() else "last"
    said = f"{from_here(run.path)} at step {run.step_of(weights)}, its {which} weights so far"
    copy.update_manifest(snapshot=said)
    checkpoint.export(model, tokenizer, copy.model)
    return said
