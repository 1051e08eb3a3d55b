"""What only real processes show: ranks that add up, and a run that is killed and goes on."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lmlab.distributed.launch import meeting_point
from lmlab.doctor.environment import REINSTALL
from lmlab.errors import UserError
from lmlab.processes import calling, last_line, processes
from lmlab.runs.directory import RunDirectory

STEPS = 100  # of the runs of `resuming`: a second from the first state to the end
TINY = f"""
trainer=cpu trainer.max_steps={STEPS} callbacks.checkpoints.every_steps=10 logger=file
model.config.n_embd=32 model.config.n_head=2 model.config.n_layer=1
tokenizer.vocab_size=300 preprocess.block_size=32 preprocess.max_records=100
""".split()


def collectives() -> str:
    """Ranks in processes of their own agree on a sum: over gloo, and over NCCL where there are GPUs for it."""
    import torch

    sums("gloo", 2, "let it use the loopback: export GLOO_SOCKET_IFNAME=lo")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        return "gloo: 2 ranks agree on a sum"
    sums("nccl", gpus, "export NCCL_DEBUG=INFO says why; in a container --ipc=host; else NCCL_P2P_DISABLE=1")
    return f"gloo: 2 ranks agree on a sum; NCCL: {gpus} GPUs do"


def sums(backend: str, world: int, fix: str) -> None:
    """Let ranks, started as a run starts them, add up."""
    _held, place = meeting_point()
    with processes() as (_, start):
        until = time.monotonic() + 30
        for process in [
            start(calling(add_up, backend), **place, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            for rank in range(world)
        ]:
            code, said = process.end(until - time.monotonic())
            if code:
                why = "no sum in 30 s" if code == -signal.SIGKILL else last_line(said)
                raise UserError(f"{backend}: {why}\n{fix}")


def add_up(backend: str) -> None:
    """One rank's share of `sums`."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    numbers = torch.full((1000,), rank + 1.0, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(numbers)
    if not (numbers == world * (world + 1) / 2).all():
        sys.exit(f"{world} ranks get a wrong sum")
    dist.destroy_process_group()


def resuming(seconds: float) -> str:
    """A run that is killed and goes on ends with the weights of one that nobody disturbed."""
    until = time.monotonic() + seconds
    with processes() as (folder, start):
        whole, killed = (RunDirectory(folder / name) for name in ("whole", "killed"))
        options = [*TINY, f"cache_dir={folder}/cache"]
        undisturbed, victim = (start(verb("train", *options, f"hydra.run.dir={run.path}")) for run in (whole, killed))
        while not (kept := killed.checkpoint_files()) and victim.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        code, said = victim.end(0)
        if code != -signal.SIGKILL:
            raise failed("a run ended before it could be killed", said)
        resumed = start(verb("resume", str(killed.path))) if kept else victim
        for process, what in ((undisturbed, "a run failed"), (resumed, "a killed run can't go on")):
            code, said = process.end(until - time.monotonic())
            if code == -signal.SIGKILL:
                raise UserError(f"not through in {seconds:.0f} s\ntry again when less runs on this machine")
            if code:
                raise failed(what, said)
        step = killed.read_manifest().get("went_on", [{"step": 0}])[-1]["step"]
        if not 0 < step < STEPS:
            raise failed(f"a killed run went on from step {step} of {STEPS}", said)
        tensors = same_tensors(whole.checkpoint_at(STEPS), killed.checkpoint_at(STEPS))
    went_on = f"went on from step {step} of {STEPS} and ended like one that was not"
    return f"killed by SIGKILL, a run {went_on}: {tensors} tensors, bit for bit"


def verb(name: str, *arguments: str) -> list[str]:
    """The command of a verb."""
    return [sys.executable, "-m", f"lmlab.{name}", *arguments]


def failed(what: str, said: str) -> UserError:
    """An error with a run's last words."""
    plain = said.rpartition("error: ")[2] if "error: " in said else last_line(said)
    why, _, fix = plain.strip().partition("\n")
    return UserError(f"{what}: {why}\n{fix or REINSTALL}")


def same_tensors(one: Path, other: Path) -> int:
    """How many tensors two states of a run have, weights and the optimizer's: all of them the same."""
    import torch

    def tensors(node: object, name: str = "") -> Iterator[tuple[str, bytes]]:
        if isinstance(node, torch.Tensor):
            yield name, node.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in inner:
            yield from tensors(value, f"{name}.{key}")

    first, second = (
        dict(tensors({key: state[key] for key in ("state_dict", "optimizer_states")}))
        for state in (torch.load(place, map_location="cpu", weights_only=True) for place in (one, other))
    )
    wrong = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    if wrong or not first:
        raise UserError(
            f"a run that was killed and went on ended with other numbers: {len(wrong)} of {len(first)} tensors\n"
            f"try again with OMP_NUM_THREADS=1, then {REINSTALL}"
        )
    return len(first)
