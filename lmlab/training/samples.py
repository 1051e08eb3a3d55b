"""What a model says while it is trained: the same few texts, at each validation."""

import logging
import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmlab.errors import UserError, first_line
from lmlab.runs.directory import RunDirectory
from lmlab.training.loggers import Lines, WandB, rewind
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)
SHORTEST = 4  # tokens of a document that has something to say


class Samples(Callback):
    """`samples.jsonl`: the `step`, a `text` from a held-out document, and what the model `said` to it.

    A causal model goes on with the text, a masked one fills its mask. The run is the same to the
    last bit as one without samples.
    """

    def __init__(self, run_dir: str, count: int = 3):
        """`count` documents, the first ones that are long enough."""
        if count < 0:
            raise UserError(f"callbacks.samples.count is a whole number, 0 or more, not {count}.")
        self.run, self.count = RunDirectory(run_dir), count
        self.lines = Lines(self.run.samples, "samples")
        self.size = 0  # of the file, when the state was kept that the run goes on from

    def state_dict(self) -> dict[str, Any]:
        if not self.run.samples.is_file():
            return {"size": 0}
        with self.run.samples.open("rb") as file:
            os.fsync(file.fileno())  # a state is not to outlive the samples of its steps
            return {"size": os.fstat(file.fileno()).st_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]

    def on_fit_start(self, trainer: L.Trainer, module: LMModule) -> None:
        documents = trainer.datamodule.held_out.documents
        long = [number for number, length in enumerate(documents.lengths) if length >= SHORTEST]
        self.texts = [documents.tokens[slice(*documents.edges[i : i + 2])].tolist() for i in long[: self.count]]
        if trainer.is_global_zero:
            rewind(self.run.samples, self.size)
        if module.device_mesh is not None and self.texts:
            LOG.info("No samples while training: one rank has but a shard of the model.")
            self.texts = []

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or not self.texts:
            return
        try:
            said = self.speak(trainer, module)
        except (UserError, RuntimeError) as error:
            LOG.warning("the model can't speak, so there are no samples: %s", first_line(error))
            self.texts = []
            return
        samples = [{"step": trainer.global_step, "text": text, "said": words} for text, words in said]
        self.lines.add(*samples)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.log_samples(samples)

    def speak(self, trainer: L.Trainer, module: LMModule) -> list[tuple[str, str]]:
        """A text and what the model makes of it, for each document. Neither modes nor generators are changed."""
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
