"""A callback that lets a tiny run take as long as a large one."""

import os
import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class Slow(Callback):
    """Waits in each step of a SLURM job that was not re-queued `fast_after` times yet."""

    def __init__(self, seconds: float = 1.0, fast_after: int = 2):
        in_time = int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= fast_after
        self.seconds = 0 if in_time or "SLURM_JOB_ID" not in os.environ else seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)
