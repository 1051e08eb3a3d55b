"""The checkpoints of a run: when they are saved, which ones stay, and which one is used.

`checkpoints/step-N.ckpt` holds weights, optimizer and counters after N optimizer steps, and is what a run goes on from.
`checkpoints/best-N.ckpt` holds weights alone.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import lightning as L
import torch
import torch.distributed as dist
import transformers
from annotated_types import Ge, Gt
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.console import command
from lmlab.data.datamodule import HeldOutData
from lmlab.data.documents import COUNTS
from lmlab.distributed.signals import SIGNALS
from lmlab.distributed.slurm import requeue
from lmlab.errors import UserError
from lmlab.io import replaced
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint_io import (
    AtomicCheckpointIO,
    best_values,
    damage,
    load_checkpoint,
    load_weights,
    model_state,
    remove,
)
from lmlab.training.loggers.closing import close
from lmlab.training.loggers.metrics_file import flushed_size
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)
Key = TypeVar("Key", int, str)
PATIENCE = 60.0  # seconds that W&B gets to end before a job is re-queued


class Checkpoints(Checkpoint):
    """Saves the best weights, and the last two checkpoints that the run can go on from.

    A checkpoint is saved after each validation, every so many steps or minutes, and when the run is told to stop;
    always between two optimizer steps, never in the middle of accumulated batches.

    Lightning's `ModelCheckpoint` can't take its place. It removes an old file before the new one is known to be on the
    disk, and it knows the best weights as of its newest checkpoint only. Here each checkpoint names the best weights
    of its time, and they stay as long as it does, so that a run can go on from either after any kill. Nor does it
    let ranks agree on a signal without waiting for each other in every step, or re-queue a SLURM job.
    """

    def __init__(
        self,
        run_dir: str,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] | None = None,
        keep_best: Annotated[int, Ge(0)] = 1,
        every_steps: Annotated[int, Ge(1)] | None = None,
        every_minutes: Annotated[float, Gt(0)] | None = 30.0,
        keep_every: Annotated[int, Ge(1)] | None = None,
        background: bool | None = None,
        max_requeues: Annotated[int, Ge(0)] = 100,
    ):
        """Takes the options.

        Args:
            monitor: the metric of a validation that the best weights are chosen by.
            mode: `min` if the least of it is best, `max` if the most is; None for what `mode_of` says.
            keep_best: how many of the best weights are kept. With 0, and where the objective says so
                (`Objective.last_weights`), a run ends with its last weights.
            every_steps: after how many steps a checkpoint is saved also between validations; None for never.
            every_minutes: the same in minutes.
            keep_every: a checkpoint is also saved every so many steps, and stays; None keeps the last two alone.
            background: whether training goes on while files are written; None for on GPUs only.
            max_requeues: how often a SLURM job that reaches its time limit is put back in the queue.
        """
        self.run = RunDirectory(run_dir)
        self.monitor, self.mode, self.keep_best = monitor, mode or mode_of(monitor), keep_best
        self.spacings = [every for every in (every_steps, keep_every) if every is not None]
        """The numbers of steps whose multiples a checkpoint is saved at, also between validations."""
        self.every_minutes, self.keep_every = every_minutes, keep_every
        self.background, self.max_requeues = background, max_requeues
        self.best: dict[int, float] = {}
        """The metric of the best weights, by their steps."""
        self.best_at_save: dict[int, dict[int, float]] = {}
        """The value of `best` at each checkpoint, by the step of that."""
        self.early: int | None = None
        """The length of the run, in steps, that was stopped early; None if it was not."""

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.best_at_save, "best": self.best, "early": self.early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_at_save, self.best, self.early = state["kept"], state["best"], state["early"]

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
        self.io = trainer.strategy.checkpoint_io
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if self.io.thread is None and (on_gpu if self.background is None else self.background):
            self.io.thread = ThreadPoolExecutor(1)

    def on_save_checkpoint(self, trainer: L.Trainer, module: LMModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        # So that a run that goes on from here can take back the metrics of steps that it makes again.
        checkpoint["metrics"] = flushed_size(self.run.metrics) if trainer.is_global_zero else 0

    def on_load_checkpoint(self, trainer: L.Trainer, module: LMModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        step = checkpoint["global_step"]
        if trainer.is_global_zero:
            # The run may go on from an earlier checkpoint than its last one.
            for path in [*self.run.checkpoint_files(), *self.run.best_files()]:
                if self.run.step_of(path) > step:
                    remove(path)
        if checkpoint["callbacks"][self.state_key]["early"] == module.steps:
            trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        self.step, self.began, self.intervals = trainer.global_step, time.monotonic(), 0
        # Apart from the device's own, so that asking the other ranks makes no step wait for it.
        self.group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        self.asked: tuple[Any, Tensor] | None = None
        # Lightning asks too, and makes the device wait each time.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        SIGNALS.heed()  # Lightning has installed a handler since, which talks to other ranks from within
        SIGNALS.patient = True

    def poll(self) -> tuple[int, int]:
        """Returns the signal to stop for, or 0, and the intervals of minutes that have passed, as all ranks see them.

        Several ranks get the answer to the previous call, which has long arrived.
        """
        minutes = (time.monotonic() - self.began) / 60
        intervals = int(minutes / self.every_minutes) if self.every_minutes else 0
        if self.group is None:
            return SIGNALS.received, intervals
        mine = torch.tensor([SIGNALS.received, intervals])
        asked, self.asked = self.asked, (dist.all_reduce(mine, dist.ReduceOp.MAX, self.group, async_op=True), mine)
        if asked is None:
            return 0, 0
        asked[0].wait()
        signal, intervals = asked[1].tolist()
        return signal, intervals

    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.step:  # accumulating
            return
        self.step = trainer.global_step
        signal, intervals = self.poll()
        if signal:
            self.stop(trainer, module, signal)
        due = intervals > self.intervals or any(self.step % every == 0 for every in self.spacings)
        self.intervals = max(intervals, self.intervals)
        if due and not module.validation_due():  # which saves a checkpoint at its end
            self.save(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.state.fn == TrainerFn.FITTING:
            signal, _ = self.poll()
            if signal:
                self.stop(trainer, module, signal)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        step = trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING or step == 0:  # the weights that a run began with are no result of it
            return
        candidates = module.candidates(self.monitor)
        kind = rank(candidates, self.mode)[0]
        values = {**self.best, step: candidates[kind]}
        objective = trainer.datamodule.batches.objective  # type: ignore[attr-defined]
        keep = 0 if getattr(objective, "last_weights", False) else self.keep_best
        best = rank(values, self.mode)[:keep]
        if step in best:
            with module.with_average(kind):
                trainer.save_checkpoint(self.run.best_at(step), weights_only=True)
            # Without room for its file, it is not one of the best.
            if trainer.strategy.broadcast(self.io.thread is not None or self.run.best_at(step).exists()):
                self.best = {at: values[at] for at in sorted(best)}
        if trainer.should_stop and step < module.steps:
            self.early = module.steps
        self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: LMModule) -> None:
        """Saves a checkpoint, and then removes older files that are not needed any more."""
        step = trainer.global_step
        if step == 0:  # nothing to lose; and to save an optimizer that has not stepped, FSDP would step it
            return
        module.check_finite()
        module.use_trained_weights()
        best_at_save = {**self.best_at_save, step: self.best}
        last = sorted(best_at_save)[-3:]
        self.best_at_save = {
            at: best for at, best in best_at_save.items() if at in last or self.run.checkpoint_at(at).exists()
        }
        trainer.save_checkpoint(self.run.checkpoint_at(step), weights_only=False)
        if trainer.is_global_zero:
            self.io.run_after_saves(partial(self.remove_old, self.best_at_save, self.best))

    def remove_old(self, best_at_save: dict[int, dict[int, float]], best: dict[int, float]) -> None:
        """Removes all but the last two checkpoints, and all weights that are not among the best, now or at theirs.

        The last two are those on the disk: there may have been no room for the newest one. Others stay where
        `keep_every` says so.
        """
        for path in self.run.checkpoint_files()[:-2]:
            if self.keep_every is None or self.run.step_of(path) % self.keep_every:
                remove(path)
        left = map(self.run.step_of, self.run.checkpoint_files())
        needed = {*best, *(at for step in left for at in best_at_save.get(step, {}))}
        for path in self.run.best_files():
            if self.run.step_of(path) not in needed:
                remove(path)

    def stop(self, trainer: L.Trainer, module: LMModule, signal: int) -> None:
        """Saves a checkpoint, re-queues a SLURM job if the signal comes ahead of its time limit, and ends the process.

        Raises:
            Stopped: always.
        """
        self.save(trainer, module)
        self.io.wait()
        if trainer.is_global_zero and SIGNALS.ahead_of_a_limit(signal):
            # W&B's own process does not outlive the re-queueing; nor is the job to be lost to a slow upload.
            close(trainer.loggers, exit_code=1, will_go_on=True, timeout=PATIENCE)
            LOG.info(requeue(self.max_requeues))
        trainer.strategy.barrier()  # a rank that ended first would have SLURM kill the others
        SIGNALS.end(signal)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.asked:
            self.asked[0].wait()
            self.asked = None
        self.io.wait()
        trainer.strategy.barrier()  # all ranks may read what was written
        SIGNALS.patient = False
        if SIGNALS.received and not SIGNALS.ahead_of_a_limit(SIGNALS.received):  # the last checkpoint has the last step
            SIGNALS.end(SIGNALS.received)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        SIGNALS.patient = False


def mode_of(monitor: str) -> Literal["min", "max"]:
    """Returns `max` for an accuracy, of which the most is best, and `min` for any other metric."""
    return "max" if monitor.endswith("accuracy") else "min"


def rank(values: Mapping[Key, float], mode: str) -> list[Key]:
    """Returns the steps of validations from the best to the worst; of equal ones the earlier first.

    Args:
        values: the metric of each, by its step; or by names, of which the earlier in the alphabet come first.
        mode: `min` if the least is best, `max` if the most is.
    """
    sign = 1 if mode == "min" else -1
    return sorted(values, key=lambda key: (sign * values[key], key))


def best_on_disk(run: RunDirectory, values: Mapping[int, float], mode: str) -> Path | None:
    """Returns the path of the best weights that are on the disk, or None; the arguments are those of `rank`."""
    return next((path for path in map(run.best_at, rank(values, mode)) if path.exists()), None)


def last_checkpoint(run: RunDirectory) -> Path | None:
    """Returns the path of a run's newest checkpoint that is whole, or None if it has none.

    Renames damaged ones, and removes what a save or a removal that was killed has left.

    Raises:
        UserError: all of them are damaged.
    """
    for left in run.checkpoints.glob(".*.ckpt.*"):  # by a save or a removal that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    paths = run.checkpoint_files()[::-1]
    for path in paths:
        why = damage(path)
        if why is None:
            return path
        # Not removed: somebody may want to mend it, or to know what became of it.
        aside = path.with_name(f"{path.name}.damaged")
        path.rename(aside)
        LOG.warning("%s is damaged (%s), and the checkpoint before it is used. It is now %s.", path, why, aside.name)
    if paths:
        raise UserError(
            f"no checkpoint in {run.checkpoints} is whole, so the run can't go on.\n"
            f"To train it again from the start: {command('python', '-m', 'lmlab.resume', run.path, '--fresh')}"
        )
    return None


def best_so_far(run: RunDirectory, mode: str) -> Path | None:
    """Returns the path of the best weights of a run that may still be going on.

    Without a file of them it is that of the last checkpoint, and None without any; `mode` is that of `rank`.
    """
    for path in run.checkpoint_files()[::-1]:
        try:
            values = best_values(load_checkpoint(path))
        except UserError:  # it is damaged, or the run has just removed it
            continue
        return best_on_disk(run, values, mode) or path
    return None


def numbers_parameters(path: Path) -> bool:
    """Returns whether a checkpoint is one of lmlab 0.1, which numbered the optimizer's parameters, not named them."""
    optimizers = load_checkpoint(path)["optimizer_states"]
    return any(type(key) is int for optimizer in optimizers for key in optimizer["state"])


def check_fits(checkpoint: Mapping[str, Any], module: LMModule, path: Path) -> None:
    """Refuses the checkpoint of another model.

    Raises:
        UserError: a weight is missing in it or in the module, or has another shape.
    """
    saved, own = ({n: tuple(t.shape) for n, t in s.items()} for s in (checkpoint["state_dict"], module.state_dict()))
    wrong = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path} is of another model: {name} is {saved.get(name, 'not there')} in it, "
            f"and {own.get(name, 'not there')} in the model of the config ({len(wrong)} such)."
        )


def best_checkpoint(trainer: L.Trainer) -> Path | None:
    """Returns the path of the best weights that a trainer's `Checkpoints` has saved, or None."""
    callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
    return best_on_disk(callback.run, callback.best, callback.mode) if callback else None


def best_weights(trainer: L.Trainer) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns the model's state dict at the best step of a run, and the checkpoint that it is from.

    Without such a checkpoint these are the last weights, and None. All ranks have to call it, as sharded weights are
    gathered; rank 0 alone gets any.
    """
    path = best_checkpoint(trainer)
    if path is None:
        best, state = None, trainer.strategy.lightning_module_state_dict()
        state = {name: gathered(tensor) for name, tensor in state.items()}
    else:
        best = load_checkpoint(path)
        state = load_weights(path, best) if trainer.is_global_zero else {}
    return model_state(state), best


def gathered(tensor: Tensor) -> Tensor:
    """Returns a tensor of a state dict, a sharded one as a whole on rank 0 and empty elsewhere; all ranks call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)


def rescoring_due(trainer: L.Trainer) -> bool:
    """Returns whether all held-out documents have yet to be scored by the best weights of a run.

    That is so where validations look at a part of them, and where lmlab 0.1 saved the best weights: the sums that lie
    with them lack counts that a certificate has now.
    """
    if trainer.datamodule.whole is not None:  # type: ignore[attr-defined]
        return True
    path = best_checkpoint(trainer)
    sums = load_checkpoint(path).get("validation") if path else None
    return sums is not None and sums["units"].shape[1] != len(COUNTS)


def score_best_weights(trainer: L.Trainer, module: LMModule) -> None:
    """Scores all held-out documents by the best weights of a run, once its training is over."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    whole = data.whole or data.held_out
    LOG.info("Scoring all %d held-out documents by the best weights.", len(whole.documents))
    module.sums = whole.sums()
    trainer.strategy.optimizers = []  # which a sharded checkpoint would be asked for
    trainer.validate(
        module,
        datamodule=HeldOutData(whole, data.rows_at_once, data.num_workers),
        ckpt_path=best_checkpoint(trainer),
        verbose=False,
        weights_only=True,
    )


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes model and tokenizer in Hugging Face form, as `transformers.pipeline` loads them."""
    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replaced(path, write)
