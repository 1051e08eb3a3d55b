"""The metrics of training: loss, learning rate, gradient norm, speed, memory and utilization."""

# Hooks take the one module that there is, and only the arguments that they use.
# mypy: disable-error-code="override, attr-defined"

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmlab.data.warmup import BlockLengths
from lmlab.evaluation.metrics import perplexity
from lmlab.models.flops import Flops
from lmlab.models.memory import count_parameters
from lmlab.training.module import LMModule


class Stopwatch:
    """Counts seconds while it runs."""

    def __init__(self) -> None:
        self.counted = 0.0
        self.started: float | None = None
        """The time of the last start, by `time.perf_counter`; None while it stands still."""

    def start(self, seconds_ago: float = 0.0) -> None:
        """Starts counting, from some seconds ago."""
        self.started = time.perf_counter() - seconds_ago

    def stop(self) -> None:
        """Stops counting; the seconds so far are kept."""
        self.counted, self.started = self.seconds, None

    @property
    def seconds(self) -> float:
        """The seconds counted so far."""
        return self.counted + (time.perf_counter() - self.started if self.started is not None else 0.0)


class Measure(Callback):
    """Logs loss, learning rate, gradient norm and speed every `trainer.log_every_n_steps` steps.

    Loss and perplexity are means over all targets of all ranks since the last report. Validations, checkpoints and
    logging are no part of the speed.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """The metrics of the last report."""
        self.total = dict.fromkeys(("seconds", "waited", "tokens", "flops", "flops_of_all"), 0.0)
        """Sums over the whole run. The `flops` of one device, for its utilization, don't follow from those of all at
        the end, as a resumed run may have had another world size before."""
        self.step, self.tokens_then = 0, 0
        """Optimizer steps and tokens at the last report."""
        self.watch = Stopwatch()
        """Counts the seconds of training since the last report."""

    def state_dict(self) -> dict[str, Any]:
        names = ("latest", "total", "step", "tokens_then")
        return {**{name: getattr(self, name) for name in names}, "interval": self.watch.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.counted = state["interval"]
        vars(self).update({name: value for name, value in state.items() if name != "interval"})
        # lmlab 0.1 counted the operations of one device only; NaN leaves those of all out of the summary.
        self.total.setdefault("flops_of_all", float("nan"))

    def on_fit_start(self, trainer: L.Trainer, module: LMModule) -> None:
        count, trainable = count_parameters(module.model)
        self.parameters = {"parameters": count, "trainable_parameters": trainable}
        self.flops = Flops.from_model(module.model)
        self.peak_flops = peak_flops(trainer.strategy.root_device, trainer.precision) if self.flops else None

    def on_train_start(self, trainer: L.Trainer, module: LMModule) -> None:
        self.waited_then = self.waited_at_stop = trainer.datamodule.waited
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
        self.watch.start()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.watch.started is None:
            # The batch was waited for before this hook, and that counts.
            self.watch.start(trainer.datamodule.waited - self.waited_at_stop)

    def on_train_batch_end(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:
        due = trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == module.steps
        if due and trainer.global_step > self.step:
            self.report(trainer, module)

    def report(self, trainer: L.Trainer, module: LMModule) -> None:
        """Logs the metrics of the steps since the last report."""
        waited = trainer.datamodule.waited
        on_host = torch.tensor([waited - self.waited_then, peak_memory(module.device)], dtype=torch.float64)
        norm = torch.zeros((), device=module.device) if module.grad_norm is None else module.grad_norm
        on_device = torch.stack([module.tokens.double(), norm.double(), module.first_bad_batch.double()])
        sums = module.sums_since_report()
        # A list over the ranks for each value. They come in one copy, as each copy has the host wait for the device to
        # finish its steps.
        by_rank = module.by_rank(torch.cat([on_host.to(module.device), on_device, sums])).T.tolist()
        seconds = self.watch.seconds
        waits, memories, tokens_seen, norms, bad_batches, *others = by_rank
        nll, targets, auxiliary, auxiliary_targets, kl, kl_targets, z_loss, z_targets = map(math.fsum, others)
        module.refuse_bad_batch(int(min(bad_batches)))
        for metric in module.train_metrics:
            metric.reset()
        loss = nll / targets if targets else math.nan  # as a masked block may have none
        losses = {"train/loss": loss}
        if module.teacher is not None and kl_targets:
            mean = kl / kl_targets
            losses = {"train/loss": module.teacher.loss(loss, mean), "train/nll": loss, "train/kl": mean}
        tokens, wait = int(tokens_seen[0]), max(waits)
        new_tokens = tokens - self.tokens_then
        flops_of_all = 0
        if self.flops:  # each step has as many tokens, in rows of its own length
            lengths = trainer.datamodule.batches.lengths or BlockLengths(module.block_size)
            steps = range(self.step, trainer.global_step)
            of_steps = [self.flops.step(new_tokens, int(targets), lengths.of(step)) for step in steps]
            flops_of_all = sum(of_steps) // len(of_steps)
        flops = flops_of_all / trainer.world_size
        new = {"seconds": seconds, "waited": wait, "tokens": new_tokens, "flops": flops, "flops_of_all": flops_of_all}
        self.total = {name: total + new[name] for name, total in self.total.items()}
        self.latest = {
            **losses,
            f"train/{module.metric}": perplexity(loss),
            "optim/lr": module.lr,
            "optim/grad_norm": norms[0],
            "perf/tokens_per_s": new_tokens / seconds,
            "perf/step_ms": 1000 * seconds / (trainer.global_step - self.step),
            "perf/data_wait": wait / seconds,
            "perf/peak_memory_gib": max(memories),
            "data/tokens_seen": tokens,
        }
        if auxiliary_targets:
            self.latest["train/aux_loss"] = auxiliary / auxiliary_targets
        if z_targets:
            self.latest["train/z_loss"] = z_loss / z_targets
        if self.flops:
            self.latest["perf/flops_total"] = self.total["flops_of_all"]
        if self.peak_flops:
            self.latest["perf/mfu"] = flops / seconds / self.peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, trainer.global_step)
        self.step, self.tokens_then, self.waited_then = trainer.global_step, tokens, waited
        self.watch = Stopwatch()
        self.watch.start()

    def stop(self, trainer: L.Trainer, module: LMModule) -> None:
        """Stops the watch until the next batch, once the device has finished the steps that it was given."""
        if self.watch.started is not None:
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            self.watch.stop()
            self.waited_at_stop = trainer.datamodule.waited

    def on_validation_start(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.stop(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LMModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.should_stop and trainer.global_step > self.step:
            self.report(trainer, module)  # so that the last checkpoint has it: early stopping may have ended the run
            self.stop(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: LMModule, *args: Any) -> None:
        self.stop(trainer, module)

    def result(self) -> dict[str, float]:
        """Returns the sizes, counts and speeds of the whole run, for `summary.json`."""
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
    """Returns the most memory that this process has used so far, in GiB: of its GPU, or the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not `ru_maxrss`, which begins with that of the parent process.
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
"""Dense matrix products in bf16 and float16 with float32 sums, in 10^12 operations per second, by the name that torch
gives a device. From the makers' data sheets and white papers; half of rates that are stated with sparsity."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the floating-point operations per second that the maker of a device states, or None if not known."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * 1e12
