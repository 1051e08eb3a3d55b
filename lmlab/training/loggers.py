"""Where metrics go: a file in the run directory, and W&B."""

import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lmlab.errors import UserError, disk_full, first_line, nearest
from lmlab.runs.directory import RunDirectory

LOG = logging.getLogger(__name__)
MODES = ("auto", "online", "offline", "disabled")


class MetricsFile(Logger):
    """`metrics.jsonl`: one object per line, with `step`, `time` (Unix seconds) and the metrics.

    Lines are only added, so a run that goes on keeps what it wrote before. Those that a full
    disk has no room for are written when it has some again.
    """

    def __init__(self, run_dir: str):
        super().__init__()
        self.path = RunDirectory(run_dir).metrics
        self.waiting = ""

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n"
        lines = (self.waiting + line).encode()
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                done = file.write(lines) == len(lines)
            except OSError as error:
                if not disk_full(error):
                    raise
                done = False
            if not done:
                file.truncate(size)  # no half of a line
                if not self.waiting:
                    LOG.warning("no room for figures in %s: they wait until there is some.", self.path)
        self.waiting = "" if done else lines.decode()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run directory holds the config already."""


def rewind(metrics: Path, size: int) -> None:
    """Take back what a metrics file has after its first `size` bytes.

    It is of steps that the run, going on from a kept state, will make again, row for row.
    """
    if metrics.is_file():
        os.truncate(metrics, metrics.read_bytes().rfind(b"\n", 0, size) + 1)


def rows(metrics: Path) -> list[dict[str, Any]]:
    """What a metrics file holds; a line that a kill left unfinished is none."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class WandB(WandbLogger):
    """A W&B run that has the rows of metrics.jsonl, each once, whatever became of the processes that sent them.

    A row's W&B step is its number in that file; steps of the optimizer are in the row.
    """

    def __init__(self, experiment: Any, run_dir: str, there: int):
        """`there`: the rows that W&B has already; those of the file beyond them are sent again."""
        super().__init__(experiment=experiment)
        self.there, self.number, self.closed = there, 0, False
        for row in rows(RunDirectory(run_dir).metrics):
            self.log_metrics({name: row[name] for name in row if name not in ("step", "time")}, row["step"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.number >= self.there:
            self.experiment.log({**metrics, "trainer/global_step": step}, step=self.number)
        self.number += 1


def weights_and_biases(
    run_dir: str,
    run_id: str,
    config: dict[str, Any],
    project: str = "lmlab",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    mode: str = "auto",
) -> Logger:
    """A W&B run whose id is the run's own, so that it stays one however often it is started.

    Args:
        mode: `online`, `offline`, `disabled`, or `auto`: online where an API key is configured. The
            variable WANDB_MODE wins. A service that can't be reached leaves the run offline.
    """
    import wandb  # a second of start-up that a run without W&B need not pay

    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(offline=True)
    for key, value in (("logger.wandb.mode", mode), ("WANDB_MODE", os.environ.get("WANDB_MODE", mode))):
        if value not in MODES:
            raise UserError(f'{key} is one of {", ".join(MODES)}, not "{value}".{nearest(value, MODES)}')
    mode = value
    options: dict[str, Any] = {
        "dir": run_dir,
        "id": run_id,
        "project": project,
        "entity": entity,
        "name": name,
        "group": group,
        "job_type": job_type,
        "tags": tags,
        "notes": notes,
        "config": config,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off"),
    }
    earlier = list(Path(run_dir).glob("wandb/offline-run-*"))
    try:
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        run = wandb.init(**options | {"mode": mode})
    except (wandb.errors.Error, ValueError) as error:  # a key that is none is a ValueError
        LOG.warning("W&B could not be reached (%s); this run is logged offline.", first_line(error))
        run = wandb.init(**options | {"mode": "offline"})
    there = 0
    if run.offline and not run.disabled:
        for folder in earlier:  # the new one has their rows, and what a kill has kept from them
            folder.rename(folder.with_name(f"earlier-{folder.name}"))
        LOG.info("W&B: offline. To upload: wandb sync %s", Path(run.dir).parent)
    elif run.url:
        LOG.info("W&B: %s", run.url)
        there = run.starting_step
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.define_metric("val/*", summary="min", step_metric="trainer/global_step", step_sync=True)
    return WandB(run, run_dir, there)


def close(loggers: Iterable[Logger], exit_code: int = 0, will_go_on: bool = False) -> None:
    """End W&B runs, so that the next run of this process begins one of its own.

    One that `will_go_on`, W&B shows as pre-empted.
    """
    for logger in loggers:
        if not isinstance(logger, WandB) or logger.closed:
            continue
        logger.closed = True
        try:
            if will_go_on:
                logger.experiment.mark_preempting()
            logger.experiment.finish(exit_code=exit_code)
        except Exception as error:  # a signal to all of a job has ended W&B's own process; no run fails for it
            LOG.warning("W&B could not be told that the run ended: %s", first_line(error))
