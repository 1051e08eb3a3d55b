"""What is watched while a run trains: figures at an interval, and where it stands."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmlab.evaluation import records
from lmlab.evaluation.perplexity import perplexity
from lmlab.evaluation.scoring import Targets
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint import best_checkpoint
from lmlab.training.module import LMModule


class Measure(Callback):
    """Logs loss, learning rate, gradient norm and speed every `trainer.log_every_n_steps` steps.

    Loss and perplexity are token-weighted over all batches and ranks since the last time.
    Speed leaves validation and checkpoints out.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        # None while it stands still: validation or a checkpoint is under way.
        self.clock: float | None = None
        # Over the whole run, for the table at its end.
        self.seconds = 0.0
        self.tokens = 0

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.step, self.tokens_then, self.interval = trainer.global_step, int(module.tokens), 0.0
        self.first_tokens = self.tokens_then
        self.clock = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.clock is None:
            self.clock = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: LMModule,
        *args: Any,
    ) -> None:
        now = time.perf_counter()
        self.interval += now - (self.clock or now)
        self.clock = now
        due = trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == module.steps
        if due and trainer.global_step > self.step:
            self.report(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.global_step > self.step:  # stopped early, between two reports
            self.report(trainer, module)

    def report(self, trainer: L.Trainer, module: LMModule) -> None:
        """Log what has gathered since the last report."""
        module.stop_on_nonfinite()
        reading = time.perf_counter()
        loss = float(module.train_nll.compute())
        module.train_nll.reset()
        tokens = int(module.tokens)
        # Reading those figures waited for the device to finish its steps.
        self.interval += time.perf_counter() - reading
        self.latest = {
            "train/loss": loss,
            f"train/{module.figure}": perplexity(loss),
            "optim/lr": module.lr,
            "optim/grad_norm": float(module.grad_norm) if module.grad_norm is not None else 0.0,
            "perf/tokens_per_s": (tokens - self.tokens_then) / self.interval,
            "perf/step_ms": 1000 * self.interval / (trainer.global_step - self.step),
            "data/tokens_seen": tokens,
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, trainer.global_step)
        self.seconds += self.interval
        self.tokens = tokens - self.first_tokens
        self.step, self.tokens_then, self.interval = trainer.global_step, tokens, 0.0
        self.clock = time.perf_counter()

    def on_validation_start(self, *args: Any) -> None:
        self.clock = None

    def on_save_checkpoint(self, *args: Any) -> None:
        self.clock = None


class WriteCertificate(Callback):
    """At the end of a run, writes the records and the certificate of its best validation into the run directory."""

    def __init__(self, run_dir: str):
        self.run = RunDirectory(run_dir)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: LMModule) -> None:
        best = best_checkpoint(trainer)
        if best is None:
            weights, nll, units = module.model.state_dict(), *module.result
        else:
            inside = {name: tensor for name, tensor in best["state_dict"].items() if name.startswith("model.")}
            weights = {name.removeprefix("model."): tensor for name, tensor in inside.items()}
            nll, units = best["validation"]["nll"].numpy(), best["validation"]["units"].numpy()
        held_out = trainer.datamodule.held_out
        facts = {
            **held_out.facts,
            "precision": trainer.precision,
            "weights_hash": records.weights_hash(weights),
            "model": str(self.run.model),
            "run": self.run.trained_as(),
            **self.run.provenance(),
        }
        records.write(self.run.path, held_out.documents, nll, units, facts)


class ShowProgress(Callback):
    """A bar on a terminal, one plain line every few seconds elsewhere."""

    def __init__(self, every_seconds: float = 5.0):
        self.every_seconds = every_seconds
        self.bar: Progress | None = None
        self.shown_at = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.measure = next(c for c in trainer.callbacks if isinstance(c, Measure))
        self.first, self.began = trainer.global_step, time.perf_counter()
        if sys.stderr.isatty():
            columns = ("[bold]train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            self.bar = Progress(*columns, "ETA", TimeRemainingColumn())
            self.task = self.bar.add_task("", total=module.steps, completed=self.first, figures="")
            self.bar.start()

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: LMModule,
        *args: Any,
    ) -> None:
        figures = self.figures(module.figure)
        if self.bar:
            self.bar.update(self.task, completed=trainer.global_step, figures=figures)
        elif figures and time.perf_counter() - self.shown_at > self.every_seconds:
            self.shown_at = time.perf_counter()
            done = trainer.global_step - self.first
            left = (self.shown_at - self.began) / done * (module.steps - trainer.global_step)
            print(f"step {trainer.global_step}/{module.steps}  {figures}  ETA {left:.0f} s", flush=True)

    def figures(self, name: str) -> str:
        latest = self.measure.latest
        if not latest:
            return ""
        return (
            f"loss {latest['train/loss']:.3f}  {name} {latest[f'train/{name}']:.2f}  "
            f"{latest['perf/tokens_per_s']:,.0f} tokens/s"
        )

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        figures = module.validations[trainer.global_step]
        line = (
            f"step {trainer.global_step}/{module.steps}  val/loss {figures['val/loss']:.4f}  "
            f"val/{module.figure} {figures[f'val/{module.figure}']:.2f}"
        )
        if self.bar:
            self.bar.console.print(line)
        else:
            print(line, flush=True)

    def on_exception(self, trainer: L.Trainer, module: LMModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # else the terminal's cursor stays hidden

    @rank_zero_only
    def teardown(self, trainer: L.Trainer, module: LMModule, stage: str) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class ShowScoring(Callback):
    """Where an evaluation stands, every few seconds."""

    def __init__(self, every_seconds: float = 5.0):
        self.every_seconds = every_seconds

    @rank_zero_only
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = self.shown_at = time.perf_counter()
        self.targets = 0

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Targets, batch_idx: int, *args: Any
    ) -> None:
        self.targets += batch.targets.numel()
        now = time.perf_counter()
        if now - self.shown_at > self.every_seconds:
            self.shown_at = now
            done, batches = batch_idx + 1, trainer.num_val_batches[0]
            speed = self.targets * trainer.world_size / (now - self.began)
            left = (now - self.began) / done * (batches - done)
            print(f"batch {done}/{batches}  {speed:,.0f} scored tokens/s  ETA {left:.0f} s", flush=True)
