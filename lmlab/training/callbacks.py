"""What is watched while a run trains: figures at an interval, and where it stands."""

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmlab.evaluation import records
from lmlab.evaluation.metrics import perplexity
from lmlab.evaluation.scoring import ScoringBatch
from lmlab.io import write_beside
from lmlab.models.flops import Flops
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint import best_weights, outdated
from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)


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
        self.total = dict.fromkeys(("seconds", "waited", "tokens", "flops", "flops_of_all"), 0.0)
        # At the last report; then seconds since it.
        self.step, self.tokens_then, self.interval = 0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        names = ("latest", "total", "step", "tokens_then", "interval")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.total.setdefault("flops_of_all", math.nan)  # a checkpoint of an older version counted one rank's alone

    def on_fit_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.parameters = {
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "trainable_parameters": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
        }
        self.flops = Flops.from_model(module.model)
        self.peak_flops = peak_flops(trainer.strategy.root_device, trainer.precision) if self.flops else None

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.waited_then = trainer.datamodule.waited
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
        self.clock = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.clock is None:
            # The batch was waited for before this, and that counts.
            self.clock = time.perf_counter() - (trainer.datamodule.waited - self.waited_when_stopped)

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

    def report(self, trainer: L.Trainer, module: LMModule) -> None:
        """Log what has gathered since the last report."""
        module.stop_on_nonfinite()
        reading = time.perf_counter()
        loss = float(module.train_nll.compute())
        targets = int(module.train_nll.targets)
        module.train_nll.reset()
        auxiliary = float(module.train_auxiliary.compute()) if module.train_auxiliary.targets else None
        module.train_auxiliary.reset()
        tokens = int(module.tokens)
        # Reading those figures waited for the device to finish its steps.
        self.interval += time.perf_counter() - reading
        waited = trainer.datamodule.waited
        # Of the rank that waited longest, and of the one that needed most.
        worst = torch.tensor([waited - self.waited_then, peak_memory(module.device)], device=module.device)
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            scored = torch.tensor(targets, device=module.device)
            dist.all_reduce(scored)
            targets = int(scored)
        wait, memory = worst.tolist()
        done = tokens - self.tokens_then
        flops_of_all = self.flops.step(done, targets, module.block_size) if self.flops else 0
        flops = flops_of_all / trainer.world_size  # of a device, which has a peak of its own
        steps = trainer.global_step - self.step
        passed = {"seconds": self.interval, "waited": wait, "tokens": done}
        for name, value in (passed | {"flops": flops, "flops_of_all": flops_of_all}).items():
            self.total[name] += value
        self.latest = {
            "train/loss": loss,
            f"train/{module.figure}": perplexity(loss),
            "optim/lr": module.lr,
            "optim/grad_norm": float(module.grad_norm) if module.grad_norm is not None else 0.0,
            "perf/tokens_per_s": done / self.interval,
            "perf/step_ms": 1000 * self.interval / steps,
            "perf/data_wait": wait / self.interval,
            "perf/peak_memory_gib": memory,
            "data/tokens_seen": tokens,
        }
        if auxiliary is not None:
            self.latest["train/aux_loss"] = auxiliary
        if self.peak_flops:
            self.latest["perf/mfu"] = flops / self.interval / self.peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, trainer.global_step)
        self.step, self.tokens_then, self.interval, self.waited_then = trainer.global_step, tokens, 0.0, waited
        self.clock = time.perf_counter()

    def stop(self, trainer: L.Trainer, module: LMModule) -> None:
        """Stop the clock until the next batch, when the device has finished the steps that it was given."""
        if self.clock is not None:
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            self.interval += time.perf_counter() - self.clock
            self.clock, self.waited_when_stopped = None, trainer.datamodule.waited

    def on_validation_start(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.stop(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.should_stop and trainer.global_step > self.step:
            self.report(trainer, module)  # so that the last state has it: early stopping may just have ended the run
            self.stop(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:
        self.stop(trainer, module)

    def result(self) -> dict[str, float]:
        """Of the whole run, for its summary."""
        seconds = self.total["seconds"]
        result = {
            **self.parameters,
            "tokens": int(self.total["tokens"]),
            "seconds": round(seconds, 3),
            "tokens_per_s": round(self.total["tokens"] / seconds, 1),
            "data_wait": round(self.total["waited"] / seconds, 4),
            "peak_memory_gib": round(self.latest["perf/peak_memory_gib"], 3),
        }
        if self.total["flops_of_all"] > 0:  # neither unknown nor NaN
            result["flops"] = int(self.total["flops_of_all"])
        if self.peak_flops:
            result["mfu"] = round(self.total["flops"] / seconds / self.peak_flops, 4)
        return result


def peak_memory(device: torch.device) -> float:
    """GiB that this process has had at most: of the GPU it uses, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not ru_maxrss, which a process begins with its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,  # SXM
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "AMD Instinct MI300X": 1307.4,
}
"""Dense products in bf16 and float16 with float32 sums, in 10^12 operations a second, by the name that torch gives a
device. From the makers' data sheets and white papers; where these state a rate with sparsity, half of it."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating-point operations a second that the device's maker promises; None where that is not known."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * 1e12


class WriteCertificate(Callback):
    """At the end of a run, writes the records and the certificate of its best weights into the run directory."""

    def __init__(self, run_dir: str):
        self.run = RunDirectory(run_dir)

    def on_fit_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.datamodule.whole is None and not outdated(trainer):
            self.write(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # of all held-out documents, after training
            self.write(trainer, module)

    def write(self, trainer: L.Trainer, module: LMModule) -> None:
        weights, best = best_weights(trainer)
        if trainer.is_global_zero:
            nll, units = module.result
            if best is not None and trainer.state.fn == TrainerFn.FITTING:
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


class Profile(Callback):
    """Writes a torch profiler trace of a few batches, for chrome://tracing or ui.perfetto.dev; each rank its own."""

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
            self.profiler.stop()  # which writes what there is
        if self.profiler and self.rank == 0:
            LOG.info("profile=true: no trace, as the run has not more than %d batches.", self.WAIT)

    def write(self, profiler: torch.profiler.profile) -> None:
        if profiler.step_num <= self.WAIT:
            return  # stopped before the first of them was done
        self.profiler = None
        self.folder.mkdir(exist_ok=True)
        write_beside(self.folder / f"rank{self.rank}.json", lambda place: profiler.export_chrome_trace(str(place)))


class ShowProgress(Callback):
    """A bar on a terminal, one plain line every few seconds elsewhere."""

    def __init__(self, every_seconds: float = 5.0):
        self.every_seconds = every_seconds
        self.bar: Progress | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.measure = next(c for c in trainer.callbacks if isinstance(c, Measure))
        self.first = trainer.global_step
        self.began = self.shown_at = time.perf_counter()
        self.validations: list[float] = []  # seconds of each
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
        elif trainer.global_step > self.first and time.perf_counter() - self.shown_at > self.every_seconds:
            self.shown_at = time.perf_counter()
            LOG.info("step %d/%d  %sETA %.0f s", trainer.global_step, module.steps, figures, self.left(trainer, module))

    def left(self, trainer: L.Trainer, module: LMModule) -> float:
        """Seconds until the end: of steps as they were so far, and of validations as those were."""
        step, steps, interval = trainer.global_step, module.steps, module.interval
        training = time.perf_counter() - self.began - sum(self.validations)
        each = sum(self.validations) / len(self.validations) if self.validations else 0.0
        to_come = math.ceil(steps / interval) - step // interval
        return training / (step - self.first) * (steps - step) + each * to_come

    @rank_zero_only
    def on_validation_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.validating = self.shown_at = time.perf_counter()

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: L.Trainer, module: LMModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Says where a validation is, on a terminal in the bar."""
        now, done, batches = time.perf_counter(), batch_idx + 1, trainer.num_val_batches[0]
        if self.bar:
            self.bar.update(self.task, figures=f"validation {done}/{batches}  ")
        elif now - self.shown_at > self.every_seconds:
            self.shown_at = now
            left = (now - self.validating) / done * (batches - done)
            LOG.info("step %d/%d  validation %d/%d  ETA %.0f s", trainer.global_step, module.steps, done, batches, left)

    def figures(self, name: str) -> str:
        latest = self.measure.latest
        if not latest:
            return ""
        return (
            f"loss {latest['train/loss']:.3f}  {name} {latest[f'train/{name}']:.2f}  "
            f"{latest['perf/tokens_per_s']:,.0f} tokens/s  "
        )

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        self.shown_at = time.perf_counter()
        self.validations.append(self.shown_at - self.validating)
        if trainer.state.fn == TrainerFn.VALIDATING:
            return  # the table at the end has it
        figures = module.validations[trainer.global_step]
        line = (
            f"step {trainer.global_step}/{module.steps}  val/loss {figures['val/loss']:.4f}  "
            f"val/{module.figure} {figures[f'val/{module.figure}']:.2f}"
        )
        LOG.info(line)

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
            left = (now - self.began) / done * (batches - done)
            print(f"batch {done}/{batches}  {speed:,.0f} scored tokens/s  ETA {left:.0f} s", flush=True)
