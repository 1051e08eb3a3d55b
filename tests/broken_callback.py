"""Callbacks that go wrong on purpose."""

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from lmlab.training import checkpoint_io


class KeepsASet(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": {object}}


class TakesAway(Callback):
    """After a step, moves the run directory, or deletes it where there is nowhere to move it to."""

    def __init__(self, run_dir: str, to: str | None = None, step: int = 2):
        self.run_dir, self.to, self.step = Path(run_dir), to, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and self.to:
            self.run_dir.rename(self.to)
        elif trainer.global_step == self.step:
            shutil.rmtree(self.run_dir)


class HasNoRoomForFolders(Callback):
    """Lets rank 0 find the disk too full for the folder of a checkpoint: ext4 needs a block for it."""

    def on_fit_start(self, trainer: Any, *args: Any) -> None:
        mkdir = Path.mkdir

        def full(path: Path, *args: Any, **options: Any) -> None:
            if trainer.is_global_zero and path.name.endswith(".ckpt.partial"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            mkdir(path, *args, **options)

        Path.mkdir = full  # type: ignore[method-assign]


class SavesSlowly(Callback):
    """Lets each rank take longer for the checksums of a sharded checkpoint."""

    def on_fit_start(self, *args: Any) -> None:
        checksum = checkpoint_io.checksum
        checkpoint_io.checksum = lambda file: (time.sleep(0.15), checksum(file))[1]
