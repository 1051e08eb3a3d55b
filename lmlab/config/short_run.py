"""A short real run of a config, in a process of its own, for the memory and the time that a whole one takes."""

import math
import os
import shutil
import signal
import sys
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from torch import nn

from lmlab.config import build, changes, compose, models, schema
from lmlab.console import duration
from lmlab.data.sampler import EvaluationSampler, micro_batch_size
from lmlab.distributed import launch
from lmlab.errors import UserError, plainly, shown_plainly
from lmlab.io import read_json, rows, write_json
from lmlab.models.memory import count_parameters
from lmlab.processes import last_line, printed_error, processes, python_call
from lmlab.runs.directory import RunDirectory
from lmlab.secrets import redacted_text
from lmlab.training.measure import Measure, peak_memory

if TYPE_CHECKING:
    from lmlab.data.prepared import Prepared

SHORT = 31
"""The most steps of a short run."""
TRAINER = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "log_every_n_steps": 1,
    "limit_val_batches": 4,
    "min_steps": 4,
    "min_epochs": 0,  # which Lightning would make 1 for `min_steps`
    "max_time": {"seconds": 8},  # by Lightning's Timer
}
"""Keys of the trainer in a short run, which is one rank alone."""


@dataclass
class Measurement:
    """The findings of a short run, as far as it came. Times are in seconds, memory is in GiB."""

    parameters: int = 0
    """The number of parameters; 0 if the model was not made."""
    trainable: int = 0
    """The number of trainable parameters."""
    steps: list[float] = field(default_factory=list)
    """Time of each optimizer step; empty if none was made."""
    start: float = 0.0
    """Time until the first validation: imports, data, model."""
    validation_batch: float = 0.0
    """Time of a batch in a validation."""
    checkpoint: float | None = None
    """Time to write one; None if there was no room for it."""
    tokens: int = 0
    """Tokens of a step."""
    flops: int = 0
    """Floating-point operations of a step; 0 where they can't be counted."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Sizes of weights, gradients and optimizer state."""
    device_memory: float = 0.0
    """Peak memory of the device; on a CPU that of the process."""
    host_memory: float = 0.0
    """Peak memory of the process."""
    out_of_memory: str | None = None
    """The message, if it did not fit."""

    @property
    def step(self) -> float:
        """The median time of a step, without the first one, which also allocates."""
        return median(self.steps[1:] or self.steps)


def measure(cfg: DictConfig, steps: int) -> Measurement:
    """Trains a few of the `steps` of a run as one of its ranks would, and takes its time from its own metrics.

    Raises:
        UserError: as the run would.
    """
    several = schema.world(cfg.trainer) > 1
    threads = max(1, (os.cpu_count() or 1) // cfg.trainer.devices) if several else None
    with processes(threads) as (folder, start):
        short = short_run(cfg, steps, folder)
        compose.write_config(short, folder)
        variables = compose.handed_over(short) | {"LMLAB_PARENT": str(os.getpid())}
        code, output = start(python_call(train_briefly, str(folder), str(time.time())), **variables).end()
        result = folder / "measurement.json"
        measured = Measurement(**read_json(result)) if result.is_file() else Measurement()
    error = printed_error(output)
    if code == -signal.SIGKILL:
        measured.out_of_memory = plainly(MemoryError("the system killed the process (SIGKILL)"))
    elif error and error.startswith("out of memory: "):
        measured.out_of_memory = error
    elif error:
        raise UserError(error)
    elif code:
        print(redacted_text(output), file=sys.stderr)
        raise UserError(f"the measured steps failed: {last_line(output)}")
    return measured


def time_parts(
    cfg: DictConfig, measured: Measurement, steps: int, interval: int, held_out: int, whole: int
) -> list[tuple[str, int, float]]:
    """Returns the parts of the time of a run: the name of each, its count, and the seconds of one.

    Args:
        interval: steps between two validations.
        held_out: rows of a validation.
        whole: rows that are scored once after training.
    """
    world = schema.world(cfg.trainer)
    share = micro_batch_size(cfg.batch_size, world, cfg.trainer.accumulate_grad_batches)
    validations = math.ceil(steps / interval)  # after the one before training
    batches, batches_at_end = (len(EvaluationSampler(rows, share, 0, world)) for rows in (held_out, whole))
    parts = [
        ("start: imports, data, model", 1, measured.start),
        ("first step", 1, measured.steps[0]),
        ("steps", math.ceil(schema.batch_sizes(cfg).before(steps) / cfg.batch_size) - 1, measured.step),
        ("validation batches", (1 + validations) * batches + batches_at_end, measured.validation_batch),
    ]
    if measured.checkpoint is not None:
        parts.append(("checkpoints written", validations, measured.checkpoint))
    return parts


def steps_of_hours(
    cfg: DictConfig, data: "Prepared", measured: Measurement, hours: float, held_out: int, whole: int
) -> int:
    """Returns the optimizer steps for which a run takes no more than some hours, validations and checkpoints included.

    Args:
        held_out, whole: as of `time_parts`.

    Raises:
        UserError: one step takes longer, or there was not enough memory for the short run.
    """
    if measured.out_of_memory:
        raise UserError(measured.out_of_memory)

    def seconds(steps: int) -> float:
        _, interval, _ = build.training_length(cfg, data, steps=steps)
        parts = time_parts(cfg, measured, steps, interval, held_out, whole)
        return sum(count * each for _, count, each in parts)

    if not measured.steps or seconds(1) > 3600 * hours:
        raise UserError(
            f"budget.hours={hours:g} is too short for this run, whose start, first step and validations take "
            f"{duration(seconds(1)) if measured.steps else 'longer'}."
        )
    most = 1
    while seconds(2 * most) <= 3600 * hours:
        most *= 2
    # Between `most`, which fits, and twice as many, which do not.
    return most + bisect_right(range(most + 1, 2 * most), 3600 * hours, key=seconds)


def short_run(cfg: DictConfig, steps: int, folder: Path) -> DictConfig:
    """Returns the config of a short run in a folder, without what watches and keeps a run of `steps`."""
    short = changes.with_run_dir(cfg, folder)
    short.batch_size //= schema.world(cfg.trainer)
    length = min(steps, SHORT)
    short.budget = short.batch_warmup = short.block_warmup = None
    short.trainer.update(TRAINER | {"max_steps": length, "val_check_interval": length})
    short.callbacks, short.profile = {}, False
    short.logger = {"metrics_file": {"_target_": "lmlab.training.loggers.MetricsFile"}}
    return short


def train_briefly(folder: str, began: str) -> None:
    """Makes a short run in its process, and writes its `Measurement` into its folder.

    Args:
        began: when the process was started, in Unix seconds.
    """
    launch.end_with_parent()
    with shown_plainly():
        run = RunDirectory(folder)
        cfg = compose.read_config(run.path)
        data = build.prepare_data(cfg)
        objective, model = models.build_model(cfg, data.tokenizer)
        measured = Measurement(*count_parameters(model))
        write_json(run.path / "measurement.json", asdict(measured))
        module, datamodule = build.build_training(cfg, data, objective, model)
        trainer = build.build_trainer(cfg, module.val_interval, "preview")
        trainer.fit(module, datamodule)

        callbacks = {type(callback): callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
        first, *steps_made, _ = rows(run.metrics)  # validations before the first step and after the last
        validation = callbacks[Timer].time_elapsed("validate")  # of the last one: the first allocates
        measured.start = first["time"] - float(began) - validation
        measured.validation_batch = validation / trainer.num_val_batches[0]
        measured.steps = [row["perf/step_ms"] / 1000 for row in steps_made]
        measured.device_memory = steps_made[-1]["perf/peak_memory_gib"]
        measured.host_memory = peak_memory(torch.device("cpu"))
        summary = callbacks[Measure].result()
        measured.tokens, measured.flops = (int(summary.get(k, 0)) // len(steps_made) for k in ("tokens", "flops"))
        measured.bytes = count_bytes(model, trainer.optimizers[0])
        if shutil.disk_usage(run.path).free > 2 * sum(measured.bytes.values()):
            before = time.perf_counter()
            trainer.save_checkpoint(run.path / "checkpoint.ckpt")
            measured.checkpoint = time.perf_counter() - before
        write_json(run.path / "measurement.json", asdict(measured))


def count_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns the bytes of weights, gradients and optimizer state as they lie on the device after a step."""
    params = list(model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return {
        "weights": sum(p.nbytes for p in params),
        "gradients": sum(p.nbytes for p in params if p.requires_grad),
        "optimizer state": sum(t.nbytes for t in states),
    }
