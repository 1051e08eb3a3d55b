"""Checkpoint files: how they are written, whole or not at all (promise 6), and how they are read and checked."""

import errno
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lmlab.errors import UserError, disk_full, first_line
from lmlab.io import write_beside

LOG = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints to a temporary file beside their path, flushes it, and renames it.

    A file that a full disk has no room for is warned of; training goes on, and earlier checkpoints stay.

    Lightning's `AsyncCheckpointIO` copies on the device, lets copies pile up where the disk is slower than training,
    and can't run a job, such as the removal of older files, once a checkpoint is written.
    """

    def __init__(self) -> None:
        self.checked = False
        """True once the states of the callbacks are known to load again."""
        self.thread: ThreadPoolExecutor | None = None
        """The thread that writes files while training goes on; that waits only for a copy to main memory and for
        earlier saves but the last one. If None, training waits until they are written."""
        self.pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not self.checked and "callbacks" in checkpoint:
            check_loadable(checkpoint["callbacks"])
            self.checked = True
        if self.thread:
            self.wait(left=1)
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self.run_after_saves(partial(write_checkpoint, checkpoint, Path(path)))

    def run_after_saves(self, job: Callable[[], None]) -> None:
        """Runs a job once all that was saved before is written."""
        if self.thread:
            self.pending.append(self.thread.submit(job))
        else:
            job()

    def wait(self, left: int = 0) -> None:
        """Waits until at most `left` jobs are unfinished, and raises the error of one that failed."""
        while self.pending and (len(self.pending) > left or self.pending[0].done()):
            self.pending.pop(0).result()

    def teardown(self) -> None:
        self.wait()


def check_loadable(states: Mapping[str, Any]) -> None:
    """Refuses a callback whose state could be saved, but not loaded again.

    Raises:
        UserError: names the callback.
    """
    for name, state in states.items():
        stream = BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        try:
            torch.load(stream, weights_only=True)
        except UnpicklingError as error:
            raise UserError(
                f"the state of the callback {name} holds more than tensors and plain values, and is not loaded again.\n"
                "Its state_dict() has to return such values alone."
            ) from error


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint, or logs a warning if the disk is full."""

    def write(beside: Path) -> None:
        with beside.open("wb") as stream:  # given a path, torch would not say why it can't write
            torch.save(checkpoint, stream)

    try:
        path.parent.mkdir(exist_ok=True)  # and no parents: the run directory may be gone
        write_beside(path, write)
    except (OSError, RuntimeError) as error:
        if not disk_full(error):
            raise
        LOG.warning(
            "%s could not be kept, as the disk is full: training goes on, and what was kept before stays.\n"
            "Free some space in %s.",
            path.name,
            path.parent,
        )


def damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, whose parts are held against their checksums; None if it is whole.

    Raises:
        UserError: it can't be read now, which says nothing about its content.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
        if bad is None:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # whose reader is stricter
    except OSError as error:
        if error.errno == errno.EINVAL:  # the file says that a part lies where none can
            return first_line(error)
        raise UserError(
            f"{path} can't be read: {error.strerror or error}.\nNothing was changed. Try again when it can be."
        ) from error
    except UnpicklingError:  # it is whole, and `load_checkpoint` refuses it
        return None
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error, zlib.error) as error:
        return first_line(error)
    return f"the checksum of {bad} is another" if bad else None


def load_checkpoint(path: Path) -> Any:
    """Loads a checkpoint, as a dict whose tensors are mapped from the file; nothing in it is run (promise 10).

    Raises:
        UserError: it holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds
        raise UserError(
            f"{path} is refused: it is no checkpoint, or holds code, which lmlab does not run.\n"
            f"Remove it to go on from the checkpoint before it. ({first_line(error)})"
        ) from error
