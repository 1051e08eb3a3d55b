"""Checkpoints on the disk: how they are written, whole or not at all (promise 6), and how they are read and checked.

A checkpoint is a file of torch's. That of a sharded model is a folder, which any number of ranks can load:

```
step-6.ckpt/
  checkpoint.pt                 all of it but the sharded tensors, of which it has the shapes
  shard-00001-….safetensors …   what each rank held of them, by torch.distributed.checkpoint
  checksums.json                the CRC-32 of each of these files
```
"""

import errno
import logging
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from lmlab.errors import UserError, disk_full, first_line
from lmlab.io import partial_of, read_json, replaced, write_beside, write_json

LOG = logging.getLogger(__name__)
REST, CHECKSUMS = "checkpoint.pt", "checksums.json"
FILE_BYTES = 2**29
"""The bytes of a rank's shards that go into one file, which is held in memory while it is written."""


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
        self.group: dist.ProcessGroup | None = None
        """The ranks as they write a sharded checkpoint, apart from those that train meanwhile."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; where its tensors are sharded, each rank calls this and writes its shards."""
        if not self.checked and "callbacks" in checkpoint:
            check_loadable(checkpoint["callbacks"])
            self.checked = True
        checkpoint, shards = take_out_shards(checkpoint)
        if shards and self.group is None:
            self.group = dist.new_group(backend="gloo")
        if self.thread:
            self.wait(left=0 if shards else 1)  # copies of shards are as many as there is memory for
            checkpoint, shards = apply_to_collection((checkpoint, shards), Tensor, copied)
        self.run_after_saves(partial(write_checkpoint, checkpoint, shards, Path(path), self.group))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Loads a checkpoint for a model that is not sharded."""
        if Path(path).is_file():
            return super().load_checkpoint(path, *args, **options)
        return load_shards(Path(path), load_checkpoint(Path(path)))

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


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor in main memory; one on the meta device as it is."""
    return tensor if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def take_out_shards(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """Returns a checkpoint with its sharded tensors replaced by ones on the meta device, and these tensors by names.

    One that is there several times, such as a tied weight, gets one name; so does what replaces it.
    """
    shards: dict[str, DTensor] = {}
    replacements: dict[int, Tensor] = {}

    def take_out(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in replacements:
            shards[name] = tensor
            replacements[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return replacements[id(tensor)]

    return map_tensors(checkpoint, take_out), shards


def map_tensors(node: Any, change: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Returns nested dicts and lists with what `change` returns for the name and the value of each of their tensors."""
    if isinstance(node, Tensor):
        return change(name, node)
    if isinstance(node, dict):
        return {key: map_tensors(value, change, f"{name}/{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [map_tensors(value, change, f"{name}/{number}") for number, value in enumerate(node)]
    return node


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


def write_checkpoint(
    checkpoint: dict[str, Any], shards: dict[str, DTensor], path: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Writes a checkpoint, or logs a warning if the disk is full.

    Args:
        checkpoint: all of it but sharded tensors.
        shards: the sharded tensors; with any, each rank calls this.
        group: the ranks, where there are sharded tensors.
    """
    leads = not shards or dist.get_rank(group) == 0
    try:
        path.parent.mkdir(exist_ok=True)  # and no parents: the run directory may be gone
        if leads and path.exists() and path.is_dir() is not bool(shards):
            remove(path)  # the same step, written while the model was sharded (a folder) or was not (a file)
        if not shards:
            write_beside(path, partial(write_file, checkpoint))
        elif leads:
            replaced(path, partial(write_folder, checkpoint, shards, group))
        else:
            write_folder(checkpoint, shards, group, partial_of(path))
    except (OSError, RuntimeError) as error:
        if not disk_full(error):
            raise
        if leads:
            LOG.warning(
                "%s could not be kept, as the disk is full: training goes on, and what was kept before stays.\n"
                "Free some space in %s.",
                path.name,
                path.parent,
            )


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint as one file."""
    with path.open("wb") as stream:  # given a path, torch would not say why it can't write
        torch.save(checkpoint, stream)


def write_folder(
    checkpoint: dict[str, Any], shards: dict[str, DTensor], group: dist.ProcessGroup | None, folder: Path
) -> None:
    """Writes this rank's shards of a checkpoint and, on rank 0, the rest of it and all checksums; each rank calls it.

    Args:
        folder: the same on all ranks, made here: where that fails on one of them, it fails on all.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in shards.values())
    files = {name: 1 + end // (FILE_BYTES * ranks) for name, end in zip(shards, ends, strict=True)}
    try:
        writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
        dcp.save(dict(shards), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # on all ranks, for what went wrong on one of them
        raise next(iter(error.failures.values()))[0] from error
    own = {file.name: checksum(file) for file in folder.glob(f"shard-{rank + 1:05d}-*")}
    of_ranks: list[Any] = [{}] * ranks
    dist.gather_object(own, of_ranks if rank == 0 else None, group=group)
    if rank == 0:
        write_file(checkpoint, folder / REST)
        sums = {REST: checksum(folder / REST)}
        for own in of_ranks:
            sums |= own
        write_json(folder / CHECKSUMS, sums)


def checksum(file: Path) -> int:
    """Returns the CRC-32 of a file."""
    total = 0
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            total = zlib.crc32(part, total)
    return total


def remove(path: Path) -> None:
    """Removes a checkpoint: whenever a kill comes, it is whole, or there is none of its name."""
    if path.is_dir():
        shutil.rmtree(partial_of(path), ignore_errors=True)
        shutil.rmtree(path.rename(partial_of(path)))
    else:
        path.unlink()


def damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, whose parts are held against their checksums; None if it is whole.

    Raises:
        UserError: it can't be read now, which says nothing about its content.
    """
    bad = None
    try:
        if path.is_dir():
            sums = read_json(path / CHECKSUMS)
            bad = next((name for name, expected in sums.items() if checksum(path / name) != expected), None)
        else:
            with zipfile.ZipFile(path) as parts:
                bad = parts.testzip()
            if bad is None:
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # whose reader is stricter
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except UserError as error:  # no JSON
        return first_line(error)
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

    Sharded tensors are on the meta device, until `load_shards` loads them.

    Raises:
        UserError: it holds more than tensors and plain values.
    """
    file = path / REST if path.is_dir() else path
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds
        raise UserError(
            f"{path} is refused: it is no checkpoint, or holds code, which lmlab does not run.\n"
            f"Remove it to go on from the checkpoint before it. ({first_line(error)})"
        ) from error


def best_values(checkpoint: Mapping[str, Any]) -> dict[int, float]:
    """Returns the metric of the best weights that a run had kept at a checkpoint, by their steps."""
    states = checkpoint["callbacks"].values()
    values: dict[int, float] = next((each["best"] for each in states if isinstance(each, dict) and "kept" in each), {})
    return values


def load_weights(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the whole state dict of a checkpoint; that of a sharded model is loaded into this process.

    Args:
        checkpoint: what `load_checkpoint` returned for the path.
    """
    part = {"state_dict": checkpoint["state_dict"]}
    state: dict[str, Tensor] = (load_shards(path, part) if path.is_dir() else part)["state_dict"]
    return state


def model_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of the model, under its own names, in that of the module that trains it."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def load_shards(path: Path, part: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the checkpoint of a sharded model, or a part of it, with its sharded tensors.

    Args:
        path: that of the checkpoint.
        part: some entries of what `load_checkpoint` returns for it.
        own: the same entries of a model that is sharded in any way: each rank loads its shards into their tensors.
            None loads whole tensors.

    Raises:
        UserError: the files of the checkpoint can't be read.
    """
    tensors: dict[str, Tensor] = {}
    instead: dict[int, Tensor] = {}
    own_tensors: dict[str, Tensor] = {}
    map_tensors(own, own_tensors.setdefault)

    def put_in(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in instead:
            instead[id(tensor)] = own_tensors[name] if own else torch.empty_like(tensor, device="cpu")
            tensors[name] = instead[id(tensor)]
        return instead[id(tensor)]

    filled: dict[str, Any] = map_tensors(part, put_in)
    try:
        with warnings.catch_warnings():  # of no_dist: each rank reads what it needs, and asks no other
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path} can't be read: {first_line(cause)}.\nNothing was changed.") from error
    return filled
