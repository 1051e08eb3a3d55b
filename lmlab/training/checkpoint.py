"""What a run keeps of itself: whole files or none (promise 6), and the way back to them."""

import errno
import logging
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from threading import Thread
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import transformers
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmlab.console import command
from lmlab.data.datamodule import BlocksDataModule, HeldOutData
from lmlab.data.documents import UNITS
from lmlab.distributed.signals import SIGNALS, requeue
from lmlab.errors import UserError, disk_full, first_line
from lmlab.evaluation.scoring import DocumentSums
from lmlab.io import replaced, write_beside
from lmlab.runs.directory import RunDirectory
from lmlab.training.loggers import close
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)
NOW = -1  # the step of what no state speaks of yet
PATIENCE = 60.0  # seconds that W&B gets to end before a job is re-queued


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their place, flushed, and renamed.

    A file that can't be written is warned of; the run goes on, and what was there stays.
    """

    def __init__(self, background: bool = False):
        """In the `background`, training waits for a copy to main memory, and for all saves but the last one."""
        self.plain = False  # whether what the callbacks keep was looked at
        self.thread = ThreadPoolExecutor(1) if background else None
        self.pending: list[Future] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not self.plain and "callbacks" in checkpoint:
            check_plain(checkpoint["callbacks"])
            self.plain = True
        if self.thread:
            self.wait(left=1)  # else copies would pile up where the disk is slower than training
            checkpoint = apply_to_collection(checkpoint, Tensor, copy_to_host)
        self.then(partial(keep, checkpoint, Path(path)))

    def then(self, job: Callable[[], None]) -> None:
        """Do a thing when all that was saved before is written."""
        if not self.thread:
            job()
            return
        self.pending.append(self.thread.submit(job))

    def wait(self, left: int = 0) -> None:
        """Wait until no more than so many jobs are left to do. Raises what went wrong in the others."""
        while self.pending and (len(self.pending) > left or self.pending[0].done()):
            self.pending.pop(0).result()

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing in the file is run (promise 10)."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def teardown(self) -> None:
        self.wait()


def copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def check_plain(states: dict[str, Any]) -> None:
    """Refuse what a callback keeps, if it could not be loaded again.

    Raises:
        UserError: names the callback.
    """
    for name, state in states.items():
        stream = BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        try:
            torch.load(stream, weights_only=True)
        except UnpicklingError as error:
            raise UserError(
                f"the state of the callback {name} holds more than tensors and plain values, and is not loaded again.\n"
                "Its state_dict() has to return such values alone."
            ) from error


def keep(checkpoint: dict[str, Any], place: Path) -> None:
    """Write a checkpoint, or warn that it can't be."""

    def write(beside: Path) -> None:
        with beside.open("wb") as stream:  # given a path, torch would not say why it can't write
            torch.save(checkpoint, stream)

    try:
        place.parent.mkdir(exist_ok=True)  # and no parents: the run directory may be gone
        write_beside(place, write)
    except (OSError, RuntimeError) as error:
        if not disk_full(error):
            raise
        LOG.warning(
            "%s could not be kept, as the disk is full: training goes on, and what was kept before stays.\n"
            "Free some space in %s.",
            place.name,
            place.parent,
        )


class Checkpoints(Checkpoint):
    """Keeps the best weights, and the whole state of a run: the last one and the one before it.

    The state is written after each validation, every so many steps or minutes, and when the
    run is told to stop. Steps, minutes and stops are those of optimizer steps: a state never
    lies in the middle of accumulated batches. A best file stays as long as a kept state
    speaks of it, so that the run can go on from either state after any stop.
    """

    def __init__(
        self,
        run_dir: str,
        monitor: str = "val/loss",
        mode: str = "min",
        keep_best: int = 1,
        every_steps: int | None = None,
        every_minutes: float | None = 30.0,
        background: bool | None = None,
        max_requeues: int = 100,
    ):
        """`background` writing is for GPUs, if null."""
        if mode not in ("min", "max"):
            raise UserError(f"callbacks.checkpoints.mode is min or max, not {mode}.")
        if keep_best < 0 or max_requeues < 0:
            raise UserError("callbacks.checkpoints.keep_best and max_requeues are whole numbers, 0 or more.")
        for key, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"callbacks.checkpoints.{key} is more than 0, or null for never, not {value}.")
        self.run = RunDirectory(run_dir)
        self.monitor, self.sign, self.keep_best = monitor, 1 if mode == "min" else -1, keep_best
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.background, self.max_requeues = background, max_requeues
        # By the step of a kept state: the steps of the best weights then, and their values.
        self.kept: dict[int, dict[int, float]] = {}
        self.best: dict[int, float] = {}
        self.early: int | None = None  # the length of the run that was stopped early, if it was

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "best": self.best, "early": self.early}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.best, self.early = state["kept"], state["best"], state["early"]

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, AtomicCheckpoints)
        self.io = io
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if self.io.thread is None and (on_gpu if self.background is None else self.background):
            self.io.thread = ThreadPoolExecutor(1)

    def on_save_checkpoint(self, trainer: L.Trainer, module: LMModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        # So that figures of steps which are made again are not there twice.
        checkpoint["metrics"] = 0
        if self.run.metrics.is_file() and trainer.is_global_zero:
            with self.run.metrics.open("rb") as file:
                os.fsync(file.fileno())  # a state is not to outlive the figures of its steps
                checkpoint["metrics"] = os.fstat(file.fileno()).st_size

    def on_load_checkpoint(self, trainer: L.Trainer, module: LMModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        step = checkpoint["global_step"]
        if trainer.is_global_zero:
            # Of steps that are still to come, since it is an earlier state that the run goes on from.
            for place in [*self.run.checkpoint_files(), *self.run.best_files()]:
                if self.run.step_of(place) > step:
                    place.unlink()
        if checkpoint["callbacks"][self.state_key]["early"] == module.steps:
            trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        self.step, self.began, self.intervals = trainer.global_step, time.monotonic(), 0
        # Apart from the device's own, so that asking the other ranks makes no step wait for it.
        self.group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        self.asked: tuple[Any, Tensor] | None = None
        # Lightning asks too, and makes the device wait each time.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        SIGNALS.heed()  # Lightning's handler, put there since, talks to other ranks from within
        SIGNALS.patient = True

    def agreed(self) -> tuple[int, int]:
        """The signal to stop for and the intervals of minutes gone by, as all ranks see them.

        Several ranks learn the answer one call later, when it has long been there.
        """
        minutes = (time.monotonic() - self.began) / 60
        mine = torch.tensor([SIGNALS.received, int(minutes / self.every_minutes) if self.every_minutes else 0])
        if self.group is None:
            signal, intervals = mine.tolist()
            return signal, intervals
        before, self.asked = self.asked, (dist.all_reduce(mine, dist.ReduceOp.MAX, self.group, async_op=True), mine)
        if before is None:
            return 0, 0
        before[0].wait()
        signal, intervals = before[1].tolist()
        return signal, intervals

    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.step:  # accumulating
            return
        self.step = trainer.global_step
        signal, intervals = self.agreed()
        if signal:
            self.stop(trainer, module, signal)
        due = intervals > self.intervals or (self.every_steps and self.step % self.every_steps == 0)
        self.intervals = max(intervals, self.intervals)
        if due and not module.validation_due():  # which keeps the state when it is through
            self.keep_state(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.state.fn == TrainerFn.FITTING:
            signal, _ = self.agreed()
            if signal:
                self.stop(trainer, module, signal)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:  # type: ignore[override]
        step = trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING or step == 0:  # a run is not judged by the weights it began with
            return
        ranked = {**self.best, step: module.validations[step][self.monitor]}
        best = sorted(ranked, key=lambda at: (self.sign * ranked[at], at))[: self.keep_best]
        if step in best:
            trainer.save_checkpoint(self.run.best_at(step), weights_only=True)
            # What is not there is not the best: there may be no room for it.
            if trainer.strategy.broadcast(self.io.thread is not None or self.run.best_at(step).is_file()):
                self.best = {at: ranked[at] for at in sorted(best)}
        if trainer.should_stop and step < module.steps:
            self.early = module.steps
        self.keep_state(trainer, module)

    def keep_state(self, trainer: L.Trainer, module: LMModule) -> None:
        """Keep the whole state, and then no more of the older ones than are needed."""
        step = trainer.global_step
        if step == 0:  # nothing to lose; and to save an optimizer that has not stepped, FSDP would step it
            return
        module.stop_on_nonfinite()
        self.kept[step] = self.best
        last = sorted(self.kept)[-3:]
        self.kept = {at: self.kept[at] for at in self.kept if at in last or self.run.checkpoint_at(at).is_file()}
        trainer.save_checkpoint(self.run.checkpoint_at(step), weights_only=False)
        if trainer.is_global_zero:
            self.io.then(partial(self.clear, {**self.kept, NOW: self.best}))

    def clear(self, kept: dict[int, dict[int, float]]) -> None:
        """Remove all but the last two states, and the best weights that neither they nor the run as it is now speak of.

        They are those on the disk: there may have been no room for the newest.
        """
        for place in self.run.checkpoint_files()[:-2]:
            place.unlink()
        there = {NOW, *map(self.run.step_of, self.run.checkpoint_files())}
        needed = {at for step in there for at in kept.get(step, {})}
        for place in self.run.best_files():
            if self.run.step_of(place) not in needed:
                place.unlink()

    def stop(self, trainer: L.Trainer, module: LMModule, signal: int) -> None:
        """Keep the state, put a SLURM job back in the queue where the signal asks for it, and end."""
        self.keep_state(trainer, module)
        self.io.wait()
        if trainer.is_global_zero and SIGNALS.ahead_of_a_limit(signal):
            # W&B's own process does not outlive the re-queueing; nor is the job to be lost to a slow upload.
            ending = Thread(target=close, args=(trainer.loggers, 1, True), daemon=True)
            ending.start()
            ending.join(PATIENCE)
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
        if SIGNALS.received and not SIGNALS.ahead_of_a_limit(SIGNALS.received):  # the last step lies in the last state
            SIGNALS.end(SIGNALS.received)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        SIGNALS.patient = False


def last_checkpoint(run: RunDirectory) -> Path | None:
    """The newest state of a run that is whole; None if it has kept none yet.

    Raises:
        UserError: there are states, and all are damaged.
    """
    places = run.checkpoint_files()[::-1]
    for place in places:
        why = damage(place)
        if why is None:
            return place
        # Not removed: somebody may still mend it, or want to know what became of it.
        aside = place.with_name(f"{place.name}.damaged")
        place.rename(aside)
        LOG.warning("%s is damaged (%s), and the state before it is used. It is now %s.", place, why, aside.name)
    if places:
        raise UserError(
            f"no state in {run.checkpoints} is whole, so the run can't go on.\n"
            f"To train it again from the start: {command('python', '-m', 'lmlab.resume', run.path, '--fresh')}"
        )
    return None


def best_so_far(run: RunDirectory, mode: str) -> tuple[Path, str, int] | None:
    """The checkpoint with the best weights that a run has kept so far, perhaps of one that is going on.

    Args:
        mode: whether the least of what is monitored is best, `min`, or the most, `max`.

    Returns:
        its path, whether it has the `best` or the `last` weights, and their step; None if there is none.
    """
    for path in run.checkpoint_files()[::-1]:
        try:
            kept = load_checkpoint(path)
        except UserError:  # it is damaged, or the run has just removed it
            continue
        states = [state for state in kept["callbacks"].values() if isinstance(state, dict) and "kept" in state]
        best = {at: value for state in states for at, value in state["best"].items() if run.best_at(at).is_file()}
        if best:
            step = (min if mode == "min" else max)(best, key=lambda at: best[at])
            return run.best_at(step), "best", step
        return path, "last", run.step_of(path)
    return None


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint: its parts are read and held against their checksums. None if it is whole.

    Raises:
        UserError: it can't be read now, which says nothing of what is in it.
    """
    try:
        with zipfile.ZipFile(place) as parts:
            bad = parts.testzip()
        if bad is None:
            torch.load(place, map_location="cpu", weights_only=True, mmap=True)  # whose reader is stricter
    except OSError as error:
        if error.errno == errno.EINVAL:  # the file says that a part lies where none can
            return first_line(error)
        raise UserError(
            f"{place} can't be read: {error.strerror or error}.\nNothing was changed. Try again when it can be."
        ) from error
    except UnpicklingError:  # it is whole, and `read_state` refuses it
        return None
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error, zlib.error) as error:
        return first_line(error)
    return f"the checksum of {bad} is another" if bad else None


def load_checkpoint(place: Path) -> dict[str, Any]:
    """A kept state, mapped and not read. Nothing in the file is run (promise 10).

    Raises:
        UserError: it holds more than tensors and plain values.
    """
    try:
        return torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch says it in several ways
        raise UserError(
            f"{place} is refused: it is no state of a run, or holds code, which lmlab does not run.\n"
            f"Remove it to go on from the state before it. ({first_line(error)})"
        ) from error


def numbered(place: Path) -> bool:
    """Whether a checkpoint, of an older lmlab, has an optimizer's parameters by number rather than by name."""
    optimizers = load_checkpoint(place)["optimizer_states"]
    return any(type(key) is int for optimizer in optimizers for key in optimizer["state"])


def check_fits(state: dict[str, Any], module: LMModule, place: Path) -> None:
    """Refuse the state of another model.

    Raises:
        UserError: a weight is missing, or has another shape.
    """
    there, wanted = ({n: tuple(t.shape) for n, t in s.items()} for s in (state["state_dict"], module.state_dict()))
    wrong = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{place} is of another model: {name} is {there.get(name, 'not there')} in it, "
            f"and {wanted.get(name, 'not there')} in the model of the config ({len(wrong)} such)."
        )


def measure_whole(trainer: L.Trainer, module: LMModule, whole: Any, rows_at_once: int, num_workers: int) -> None:
    """Score all held-out documents by the best weights, once training is over.

    Args:
        whole: what to score.
        rows_at_once: of it, on each rank.
    """
    callback, step = best_step(trainer)
    module.sums = DocumentSums(len(whole.documents.names))
    trainer.strategy.optimizers = []  # which a sharded checkpoint would be asked for
    trainer.validate(
        module,
        datamodule=HeldOutData(whole, rows_at_once, num_workers),
        ckpt_path=None if callback is None or step is None else str(callback.run.best_at(step)),
        verbose=False,
        weights_only=True,
    )


def score_all(trainer: L.Trainer, module: LMModule, data: BlocksDataModule) -> None:
    """Score all held-out documents by the best weights, where validations have looked at a part of them only."""
    if data.whole is not None or outdated(trainer):
        whole: Any = data.whole or data.held_out
        LOG.info("Scoring all %d held-out documents by the best weights.", len(whole.documents))
        measure_whole(trainer, module, whole, data.rows_at_once, data.num_workers)


def outdated(trainer: L.Trainer) -> bool:
    """Whether the best weights lie with sums of an older lmlab, which counted less than a certificate says now."""
    callback, step = best_step(trainer)
    if callback is None or step is None:
        return False
    sums = load_checkpoint(callback.run.best_at(step)).get("validation")
    return sums is not None and sums["units"].shape[1] != len(UNITS)


def best_step(trainer: L.Trainer) -> tuple[Checkpoints | None, int | None]:
    """The callback that keeps checkpoints, if there is one, and the step of the best weights that it has kept."""
    callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
    there = [at for at in callback.best if callback.run.best_at(at).is_file()] if callback else []
    if callback is None or not there:
        return callback, None
    return callback, min(there, key=lambda at: (callback.sign * callback.best[at], at))


def best_weights(trainer: L.Trainer) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The model's state dict that a run was found best at, and the checkpoint it is of.

    The last weights, and None, where none was kept. All ranks have to call it: weights that
    are sharded come together, on rank 0.
    """
    callback, step = best_step(trainer)
    best = None
    if callback is not None and step is not None:
        best = torch.load(callback.run.best_at(step), map_location="cpu", weights_only=True, mmap=True)
    state = trainer.strategy.lightning_module_state_dict() if best is None else best["state_dict"]
    return {n.removeprefix("model."): tensor for n, tensor in state.items() if n.startswith("model.")}, best


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Model and tokenizer in Hugging Face form, as `transformers.pipeline` loads them."""

    transformers.utils.logging.disable_progress_bar()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replaced(place, write)
