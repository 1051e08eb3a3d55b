"""Where metrics go: a file in the run directory, and W&B."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lmlab.errors import UserError, first_line, nearest

MODES = ("auto", "online", "offline", "disabled")


class MetricsFile(Logger):
    """`metrics.jsonl`: one object per line, with `step`, `time` (Unix seconds) and the metrics.

    Lines are only added, so a run that goes on keeps what it wrote before.
    """

    def __init__(self, run_dir: str):
        super().__init__()
        self.path = Path(run_dir) / "metrics.jsonl"

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as lines:
            print(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}), file=lines)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run directory holds the config already."""


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
    for name, value in (("logger.wandb.mode", mode), ("WANDB_MODE", os.environ.get("WANDB_MODE", mode))):
        if value not in MODES:
            raise UserError(f'{name} is one of {", ".join(MODES)}, not "{value}".{nearest(value, MODES)}')
    mode = value
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
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
    try:
        run = wandb.init(**options | {"mode": mode})
    except wandb.errors.Error as error:
        print(f"W&B could not be reached ({first_line(error)}); this run is logged offline.")
        run = wandb.init(mode="offline", **options)
    if run.offline and not run.disabled:
        print(f"W&B: offline. To upload: wandb sync {Path(run.dir).parent}")
    elif run.url:
        print(f"W&B: {run.url}")
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    run.define_metric("val/*", summary="min", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def close(loggers: Iterable[Logger], exit_code: int = 0) -> None:
    """End W&B runs, so that the next run of this process begins one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=exit_code)
