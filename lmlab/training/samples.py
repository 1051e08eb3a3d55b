"""Samples of what the model generates while it is trained, from the same few texts at each validation."""

import logging
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmlab.errors import UserError, first_line
from lmlab.runs.directory import RunDirectory
from lmlab.training.loggers.metrics_file import JSONLines, flushed_size, truncate
from lmlab.training.loggers.wandb import WandB
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)
SHORTEST = 4  # tokens of a document that a sample can begin with


class Samples(Callback):
    """Writes `samples.jsonl`: the `step`, a `text` from a held-out document, and what the model `said` to it.

    The objective makes the text, and chooses how the model goes on with it or fills it in. A run with samples is the
    same to the last bit as one without.
    """

    def __init__(self, run_dir: str, count: Annotated[int, Ge(0)] = 3):
        """Takes the first `count` documents that are long enough."""
        self.run, self.count = RunDirectory(run_dir), count
        self.lines = JSONLines(self.run.samples, "samples")
        self.size = 0
        """The size of the file, in bytes, at the checkpoint that the run goes on from."""

    def state_dict(self) -> dict[str, Any]:
        return {"size": flushed_size(self.run.samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]

    def on_fit_start(self, trainer: L.Trainer, module: LMModule) -> None:
        documents = trainer.datamodule.held_out.documents
        long = np.flatnonzero(documents.lengths >= SHORTEST)
        self.texts = [documents.tokens[slice(*documents.edges[i : i + 2])].tolist() for i in long[: self.count]]
        if trainer.is_global_zero:
            truncate(self.run.samples, self.size)
        if module.device_mesh is not None and self.texts:
            LOG.info("No samples while training: each rank has only a shard of the model.")
            self.texts = []

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or not self.texts:
            return
        try:
            pairs = self.generate(trainer, module)
        except (UserError, RuntimeError) as error:
            LOG.warning("the model can't speak, so there are no samples: %s", first_line(error))
            self.texts = []
            return
        samples = [{"step": trainer.global_step, "text": text, "said": said} for text, said in pairs]
        self.lines.append(*samples)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.log_samples(samples)

    def generate(self, trainer: L.Trainer, module: LMModule) -> list[tuple[str, str]]:
        """Returns a text of each document and what the model said to it; modes and generators stay as they are."""
        modes = {part: part.training for part in module.modules()}
        devices = [module.device] if module.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
                module.model.eval()
                data = trainer.datamodule
                return [data.batches.objective.sample(module.model, data.tokenizer, ids) for ids in self.texts]
        finally:
            for part, training in modes.items():
                part.training = training
