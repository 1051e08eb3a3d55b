"""A series of exported models: the weights of a run after chosen steps, each as transformers loads a model.

```
series/
  index.json    the step, the tokens seen, the path below the run's `series/` and the dtype of each model
  step-0/       a model and its tokenizer; the last step of a run is always there
  step-1/ …
```
"""

import logging
import shutil
from functools import partial
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lmlab.errors import disk_full
from lmlab.io import read_json, replaced, write_json
from lmlab.models.adapters import merged_state
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint import gathered
from lmlab.training.checkpoint_io import AtomicCheckpointIO, model_state
from lmlab.training.measure import Measure
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Spacing = Literal["log"] | int
"""The way from one step of a series to the next: `log` doubles it, a number is added to it."""


class Series(Callback):
    """Writes an exported model after each of chosen steps, and after the last step.

    None of them is removed later, except those of steps that a resumed run repeats. The thread that writes checkpoints,
    where there is one, writes the models too, in order: all models before a checkpoint are on the disk when that is.
    """

    def __init__(
        self,
        run_dir: str,
        steps: Literal["log"] | Annotated[int, Ge(1)] | list[Literal["log"] | Annotated[int, Ge(1)]] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """Takes the options.

        Args:
            steps: `log` for the steps 0, 1, 2, 4, 8 and so on; a number for its multiples, from 0; a list for all steps
                of its elements; None for no series.
            dtype: the number format of the weights.
        """
        self.run = RunDirectory(run_dir)
        self.spacings: list[Spacing] = steps if isinstance(steps, list) else [] if steps is None else [steps]
        self.dtype = dtype
        self.last: int | None = None
        """The step of the last model of the series; None before the first."""

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        last = self.rewind(trainer.global_step) if trainer.is_global_zero else None
        self.last = trainer.strategy.broadcast(last)
        if is_due(trainer.global_step, self.spacings):
            self.write(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if is_due(trainer.global_step, self.spacings):
            self.write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        if self.spacings:
            self.write(trainer, module)

    def rewind(self, step: int) -> int | None:
        """Removes the models of steps after the one that a run goes on from; returns the last step that is left."""
        if not self.run.series.is_dir():
            return None
        kept = [model for model in self.run.read_series() if model["step"] <= step]
        write_json(self.run.series_index, {"models": kept})
        paths = {model["path"] for model in kept}
        for folder in [*self.run.series.glob("step-*"), *self.run.series.glob(".step-*")]:
            if folder.name not in paths:  # as is one that a kill kept from being whole, or from the index
                shutil.rmtree(folder)
        return max((model["step"] for model in kept), default=None)

    def write(self, trainer: L.Trainer, module: LMModule) -> None:
        """Writes the model of the present step, unless it is written; all ranks call this."""
        step = trainer.global_step
        if step == self.last:
            return
        module.check_finite()
        next(callback for callback in trainer.callbacks if isinstance(callback, Measure)).stop(trainer, module)  # type: ignore[attr-defined]
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        if io.thread:
            io.wait(left=1)  # two copies of the weights at most
        module.use_evaluated_weights()
        weights = copy_weights(trainer, module, DTYPES[self.dtype])
        module.use_trained_weights()
        self.last = step
        if trainer.is_global_zero:
            model = {"step": step, "tokens": int(module.tokens), "path": f"step-{step}", "dtype": self.dtype}
            io.run_after_saves(partial(write_model, self.run, module.model, weights, model))


def is_due(step: int, spacings: list[Spacing]) -> bool:
    """Returns whether a series of these spacings has a model of a step, be it the last one or not."""
    return any(step & (step - 1) == 0 if spacing == "log" else step % spacing == 0 for spacing in spacings)


def copy_weights(trainer: L.Trainer, module: LMModule, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a copy in main memory of the model's state dict, on rank 0 alone; tied weights stay tied.

    All ranks have to call it, as sharded weights are gathered.

    Args:
        dtype: of the floating-point numbers in the copy.
    """
    if module.device_mesh is None and not trainer.is_global_zero:
        return {}
    state = merged_state(module.model, model_state(trainer.strategy.lightning_module_state_dict()))
    copies: dict[Any, Tensor] = {}
    for tensor in state.values():
        if identity(tensor) not in copies:
            whole = gathered(tensor)
            kind = dtype if whole.is_floating_point() else whole.dtype
            copies[identity(tensor)] = whole.detach().to("cpu", kind, copy=whole is tensor)
    return {name: copies[identity(tensor)] for name, tensor in state.items()} if trainer.is_global_zero else {}


def identity(tensor: Tensor) -> Any:
    """Returns a key that tensors of a state dict share if they are one weight under two names."""
    return id(tensor) if isinstance(tensor, DTensor) else (tensor.data_ptr(), tensor.shape)


def write_model(run: RunDirectory, model: PreTrainedModel, weights: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Writes a model of a series, and then its entry into the index; logs a warning if the disk is full.

    Args:
        model: the model that is trained, of which no weight is read.
        weights: its state dict at the step of the entry.
    """

    def write(folder: Any) -> None:
        model.save_pretrained(folder, state_dict=weights)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | {"dtype": entry["dtype"]})
        shutil.copytree(run.tokenizer, folder, dirs_exist_ok=True)

    try:
        run.series.mkdir(exist_ok=True)  # and no parents: the run directory may be gone
        replaced(run.series / entry["path"], write)
        write_json(run.series_index, {"models": [*run.read_series(), entry]})
    except (OSError, RuntimeError) as error:
        if not disk_full(error):
            raise
        LOG.warning(
            "%s of the series could not be kept, as the disk is full: training goes on.\nFree some space in %s.",
            entry["path"],
            run.series,
        )
