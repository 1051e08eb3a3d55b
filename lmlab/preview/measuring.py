"""What some steps of a run take, in a process of their own that leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import nn

from lmlab.config import build, changes, compose, schema
from lmlab.data.datamodule import Batch
from lmlab.distributed import launch
from lmlab.errors import UserError, out_of_memory, plainly
from lmlab.io import read_json, write_json
from lmlab.models.efficiency import Flops, layers
from lmlab.processes import calling, last_line
from lmlab.secrets import redacted_text
from lmlab.training.callbacks import Measure, peak_memory

VALIDATION = 4  # batches
SECONDS, FEWEST, MOST = 4.0, 3, 30  # of steps behind the first


def measure(cfg: DictConfig, steps: int, interval: int) -> dict[str, Any]:
    """Make some steps of a run of `steps`, which validates every `interval` of them, as one rank of it would.

    Returns:
        `parts`: parameters and trainable ones; `start`: seconds until training; `steps`: seconds of each; `flops`
        of one, 0 where they can't be counted; `validation`: seconds of each batch but the first; `state`: seconds to
        write one; `bytes` of weights, gradients and optimizer; `peak` and `host`: GiB at most, of the device and of
        main memory; `out_of_memory`: what to say, if it did not fit. What was not come to is not there.

    Raises:
        UserError: as the run would.
    """
    with tempfile.TemporaryDirectory(prefix="lmlab-preview-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        alone = of_one_rank(changes.moved(cfg, folder))
        compose.write_config(alone, folder)
        write_json(folder / "report.json", {})
        env = os.environ | compose.handed_over(alone) | {"LMLAB_PARENT": str(os.getpid()), "TMPDIR": name}
        world = schema.world(cfg.trainer)
        if world > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cfg.trainer.devices)))
        task = [name, str(steps), str(interval), str(time.time())]
        with (folder / "said").open("wb") as said:
            # Its own session: a Ctrl-C reaches it from here alone.
            child = subprocess.Popen(
                calling(measure_here, *task),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                code = child.wait()
            finally:
                child.kill()
                child.wait()
        report = read_json(folder / "report.json")
        words = (folder / "said").read_text(errors="replace")
    if "error" in report:
        raise UserError(report["error"])
    if code == -9:
        report["out_of_memory"] = plainly(MemoryError("the system killed the process (SIGKILL)"))
    elif code:
        print(redacted_text(words), file=sys.stderr)
        raise UserError(f"the measured steps failed: {last_line(words)}")
    return report


def of_one_rank(cfg: DictConfig) -> DictConfig:
    """A run's config for one of its ranks alone, without what watches and keeps it."""
    world = schema.world(cfg.trainer)
    cfg.batch_size //= world
    cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy = 1, 1, "auto"
    cfg.trainer.log_every_n_steps = 1
    cfg.callbacks, cfg.logger, cfg.profile = {}, {}, False
    return cfg


def measure_here(place: str, steps: str, interval: str, began: str) -> None:
    """The process of `measure`."""
    launch.end_with_parent()
    folder = Path(place)
    report = Report(folder / "report.json")
    try:
        fit(compose.read_config(folder), int(steps), int(interval), float(began), report)
    except UserError as error:
        report.add(error=str(error))
        sys.exit(1)
    except Exception as error:
        if not out_of_memory(error):
            raise
        report.add(out_of_memory=plainly(error))


class Report:
    """Facts in a file, each as soon as it is known."""

    def __init__(self, place: Path):
        self.place = place
        self.facts: dict[str, Any] = {}

    def add(self, **facts: Any) -> None:
        self.facts |= facts
        write_json(self.place, self.facts)


def fit(cfg: DictConfig, steps: int, interval: int, began: float, report: Report) -> None:
    """A real fit, of a few steps and a few batches of validation."""
    data = build.prepare_data(cfg)
    objective, model = build.build_model(cfg, data.tokenizer)
    report.add(parts=parts(model))
    module, datamodule = build.build_training(cfg, data, objective, model, steps, interval)
    trainer = build.build_trainer(cfg, interval, "preview")
    trainer.limit_val_batches = VALIDATION
    trainer.callbacks.append(Watch(report, began, Path(cfg.run_dir)))  # type: ignore[attr-defined]
    trainer.fit(module, datamodule)


class Watch(L.Callback):
    """Takes down what `Measure`, which comes before it, finds at each step, and ends the fit when that is enough."""

    def __init__(self, report: Report, began: float, folder: Path):
        self.report, self.began, self.folder = report, began, folder
        self.steps: list[float] = []
        self.validation: list[float] = []
        self.flops = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.report.add(start=time.time() - self.began)
        self.measure = next(c for c in trainer.callbacks if isinstance(c, Measure))  # type: ignore[attr-defined]
        self.of = Flops.of(module.model)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.clock = time.perf_counter()
        self.first = not self.validation

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        now = time.perf_counter()
        alone = trainer.num_val_batches[0] == 1
        if not self.first or alone:  # the first one allocates
            self.validation.append(now - self.clock)
        self.clock, self.first = now, False

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.report.add(validation=self.validation)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if len(self.steps) == 0:
            self.flops += self.of.step(batch.tokens, len(batch.targets), module.block_size) if self.of else 0
        if self.measure.step == len(self.steps):  # accumulating
            return
        self.steps.append(self.measure.latest["perf/step_ms"] / 1000)
        self.report.add(
            steps=self.steps,
            flops=self.flops,
            bytes=sizes(module.model, trainer.optimizers[0]),
            peak=self.measure.latest["perf/peak_memory_gib"],
            host=peak_memory(torch.device("cpu")),
        )
        later = self.steps[1:]
        if len(later) >= MOST or (len(later) >= FEWEST and sum(later) > SECONDS):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if shutil.disk_usage(self.folder).free > 2 * sum(self.report.facts["bytes"].values()):
            began = time.perf_counter()
            trainer.save_checkpoint(self.folder / "state.ckpt")
            self.report.add(state=time.perf_counter() - began)


def parts(model: Any) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable ones); what parts share is counted in the first of them."""
    head = model.get_output_embeddings()
    inside = {id(p) for layer in layers(model) for p in layer.parameters()}
    embedding = {
        id(p) for module in model.base_model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    } - inside
    base = {id(p) for p in model.base_model.parameters()}
    tied = head is not None and any(id(p) in embedding for p in head.parameters())
    rows: dict[str, list[int]] = {"embeddings": [0, 0], f"layers ({len(layers(model))})": [0, 0]}
    for p in model.parameters():  # each once, however many names it has
        place = id(p)
        part = (
            "embeddings"
            if place in embedding
            else f"layers ({len(layers(model))})"
            if place in inside
            else "rest of the body"
            if place in base
            else "head"
        )
        row = rows.setdefault(part, [0, 0])
        row[0] += p.numel()
        row[1] += p.numel() if p.requires_grad else 0
    if tied:
        count, trained = rows.pop("head", [0, 0])
        rows["head, tied to the embeddings"] = [count, trained]
    return [(name, count, trained) for name, (count, trained) in rows.items()]


def sizes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, as they lie on the device after a step."""
    params = list(model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "weights": sum(p.numel() * p.element_size() for p in params),
        "gradients": sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None),
        "optimizer state": sum(t.numel() * t.element_size() for t in states),
    }
