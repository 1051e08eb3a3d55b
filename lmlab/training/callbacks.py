"""Callbacks that a config or an option switches on: progress, the certificate of a run, and a profile of its steps."""

import logging
import math
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmlab.console import duration
from lmlab.evaluation import records
from lmlab.evaluation.certify import precision_of
from lmlab.evaluation.scoring import ScoringBatch
from lmlab.io import write_beside
from lmlab.models.adapters import merged_state
from lmlab.models.hashing import weights_hash
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint import best_weights, rescoring_due
from lmlab.training.measure import Measure
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)


class WriteCertificate(Callback):
    """Writes the records and the certificate of the best weights into the run directory at the end of a run."""

    def __init__(self, run_dir: str):
        self.run = RunDirectory(run_dir)

    def on_fit_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if not rescoring_due(trainer):
            self.write(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # all held-out documents were scored again, after training
            self.write(trainer, module)

    def write(self, trainer: L.Trainer, module: LMModule) -> None:
        """Writes records and certificate; all ranks have to call it, as sharded weights are gathered for their hash."""
        weights, best = best_weights(trainer)
        if not trainer.is_global_zero:
            return
        nll, units = module.result
        if best is not None and trainer.state.fn == TrainerFn.FITTING:
            nll, units = best["validation"]["nll"].numpy(), best["validation"]["units"].numpy()
        held_out = trainer.datamodule.held_out
        facts = {
            **held_out.facts,
            "precision": precision_of(trainer),
            "weights_hash": weights_hash(merged_state(module.model, weights)),
            "model": str(self.run.model),
            "run": self.run.trained_as(),
            **self.run.provenance(),
        }
        if best is not None and best.get("average"):
            facts["average"] = best["average"]
        records.write(self.run.path, held_out.documents, nll, units, facts)


class Profile(Callback):
    """Writes a torch profiler trace of a few batches per rank, for chrome://tracing or ui.perfetto.dev."""

    WAIT, STEPS = 3, 3  # batches: the first ones allocate, and compile

    def __init__(self, run_dir: str):
        self.folder = RunDirectory(run_dir).profile

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.rank = trainer.global_rank
        self.profiler: torch.profiler.profile | None = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=self.WAIT - 1, warmup=1, active=self.STEPS, repeat=1),
            on_trace_ready=self.write,
        )
        self.profiler.start()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.profiler:
            self.profiler.step()

    def on_train_end(self, *args: Any) -> None:
        if self.profiler:
            self.profiler.stop()  # which writes the batches so far
        if self.profiler and self.rank == 0:
            LOG.info("profile=true: no trace, as the run has not more than %d batches.", self.WAIT)

    def write(self, profiler: torch.profiler.profile) -> None:
        """Writes the trace, unless the run ended before the first batch that was to be traced."""
        if profiler.step_num <= self.WAIT:
            return
        self.profiler = None
        self.folder.mkdir(exist_ok=True)
        write_beside(self.folder / f"rank{self.rank}.json", lambda path: profiler.export_chrome_trace(str(path)))


class ShowProgress(Callback):
    """Shows the progress of a run: a bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, every_seconds: float = 5.0):
        self.every_seconds = every_seconds
        self.bar: Progress | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.measure = next(c for c in trainer.callbacks if isinstance(c, Measure))
        self.first_step = trainer.global_step
        self.began = self.shown_at = time.perf_counter()
        self.validation_seconds: list[float] = []
        if sys.stderr.isatty():
            columns = ("[bold]train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"))
            self.bar = Progress(*columns, "ETA", TimeRemainingColumn())
            self.task = self.bar.add_task("", total=module.steps, completed=self.first_step, metrics="")
            self.bar.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:
        step, latest, name = trainer.global_step, self.measure.latest, module.metric
        metrics = ""
        if latest:
            metrics = (
                f"loss {latest['train/loss']:.3f}  {name} {latest[f'train/{name}']:.2f}  "
                f"{latest['perf/tokens_per_s']:,.0f} tokens/s  "
            )
        if self.bar:
            self.bar.update(self.task, completed=step, metrics=metrics)
        elif step > self.first_step and time.perf_counter() - self.shown_at > self.every_seconds:
            self.shown_at = time.perf_counter()
            left = duration(self.seconds_left(trainer, module))
            LOG.info("step %d/%d  %sETA %s", step, module.steps, metrics, left)

    def seconds_left(self, trainer: L.Trainer, module: LMModule) -> float:
        """Returns the seconds until the end of the run, with steps and validations as fast as they were so far."""
        step, steps, interval = trainer.global_step, module.steps, module.val_interval
        in_validation = sum(self.validation_seconds)
        per_step = (time.perf_counter() - self.began - in_validation) / (step - self.first_step)
        per_validation = in_validation / max(1, len(self.validation_seconds))
        return per_step * (steps - step) + per_validation * (math.ceil(steps / interval) - step // interval)

    @rank_zero_only
    def on_validation_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.validation_began = self.shown_at = time.perf_counter()

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, module: LMModule, outputs: Any, batch: ScoringBatch, batch_idx: int, *args: Any
    ) -> None:
        now, done, batches = time.perf_counter(), batch_idx + 1, trainer.num_val_batches[0]
        if self.bar:
            self.bar.update(self.task, metrics=f"validation {done}/{batches}  ")
        elif now - self.shown_at > self.every_seconds:
            self.shown_at = now
            left = duration((now - self.validation_began) / done * (batches - done))
            LOG.info("step %d/%d  validation %d/%d  ETA %s", trainer.global_step, module.steps, done, batches, left)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        self.shown_at = time.perf_counter()
        self.validation_seconds.append(self.shown_at - self.validation_began)
        if trainer.state.fn == TrainerFn.FITTING:  # the table at the end of a run has those of a later validation
            step, name = trainer.global_step, f"val/{module.metric}"
            metrics = module.validations[step]
            LOG.info("step %d/%d  val/loss %.4f  %s %.2f", step, module.steps, metrics["val/loss"], name, metrics[name])

    def on_exception(self, trainer: L.Trainer, module: LMModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # else the terminal's cursor stays hidden

    @rank_zero_only
    def teardown(self, trainer: L.Trainer, module: LMModule, stage: str) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class ShowScoring(Callback):
    """Prints the progress of an evaluation every few seconds."""

    def __init__(self, every_seconds: float = 5.0):
        self.every_seconds = every_seconds

    @rank_zero_only
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = self.shown_at = time.perf_counter()
        self.targets = 0

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: ScoringBatch,
        batch_idx: int,
        *args: Any,
    ) -> None:
        self.targets += batch.targets.numel()
        now = time.perf_counter()
        if now - self.shown_at > self.every_seconds:
            self.shown_at = now
            done, batches = batch_idx + 1, trainer.num_val_batches[0]
            speed = self.targets * trainer.world_size / (now - self.began)
            left = duration((now - self.began) / done * (batches - done))
            print(f"batch {done}/{batches}  {speed:,.0f} scored tokens/s  ETA {left}", flush=True)
