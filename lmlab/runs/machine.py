"""What a machine has to be able to do, tried out: each check is a function that says what it found.

A check raises `UserError` where something is broken (its first line says what, the others how to
mend it), and `NotThere` for what a machine can do without. Nothing that it made or started is
left behind, however it ends.
"""

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmlab.errors import UserError, first_line
from lmlab.runs.directory import RunDirectory
from lmlab.runs.files import write_text

FREE = 4.0  # GiB: two states of the guide's model, a third while it is written, its weights and their export
UNITS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # what /proc/cpuinfo calls those for bf16, of x86 and of ARM
TINY = [
    "trainer=cpu",
    "model.config.n_embd=32",
    "model.config.n_head=2",
    "model.config.n_layer=1",
    "tokenizer.vocab_size=300",
    "preprocess.block_size=32",
    "preprocess.max_records=100",
    "logger=file",
]
STEPS, KEPT_EVERY = 100, 10  # of the runs of `resuming`: a second from the first state to the end
REINSTALL = "install the tested versions again: pip install -c constraints.txt -e ."


class NotThere(Exception):  # noqa: N818
    """Something that this machine does without, which is no fault."""


def writing(folder: Path, another: str) -> str:
    """A file can be written, flushed, renamed and locked in a folder, and there is room."""
    try:
        with scratch(folder) as own:
            write_text(own / "file", "lmlab")
            run = RunDirectory(own)
            with run.lock():
                # From another process: one's own lock is never in one's way.
                code = f"import fcntl; fcntl.lockf(open({str(run.locked)!r}, 'a'), {fcntl.LOCK_EX | fcntl.LOCK_NB})"
                held = "BlockingIOError" in ended(python(code), 10)[1]
            free = shutil.disk_usage(own).free / 2**30
    except OSError as error:
        raise UserError(f"{error.filename or folder} is not writable: {error.strerror or error}\n{another}") from error
    if not held:
        raise UserError(f"{folder}: a lock there keeps no other process out (a network disk without locks?)\n{another}")
    if free < FREE:
        raise UserError(f"{folder}: {free:.1f} GiB free, and the guide's runs take {FREE:.0f}\nfree some, or {another}")
    return f"{folder}: {free:,.0f} GiB free; writing, renaming and locking work"


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside of another; both are gone afterwards where they were not there before."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lmlab-doctor-", dir=folder) as own:
            yield Path(own)
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def compiling() -> str:
    """A C++ compiler that can make what torch.compile asks of it."""
    wanted = os.environ.get("CXX") or "g++"
    compiler = shutil.which(wanted) or shutil.which("clang++")
    install = "apt install g++ python3-dev, or set CXX to a compiler"
    if compiler is None:
        raise NotThere(f"no {wanted}, which compile=true needs: {install}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <Python.h>\n#include <cmath>\nextern double f(double x) { return std::exp(x); }\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [compiler, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", f"{source}.so"]
        code, said = ended(command, 30)
    if code:
        why = next((line for line in said.splitlines() if "error" in line), last_line(said))
        raise UserError(f"{compiler} can't compile for Python: {why}\n{install}; compile=false needs none")
    return f"{compiler} compiles, so compile=true can be used"


def slurm() -> str:
    """The controller of a SLURM cluster answers; its partitions, and what becomes of jobs that it stops."""
    if not shutil.which("sinfo"):
        raise NotThere("not a SLURM machine")
    answers = {}
    for command in (["sinfo", "--noheader", "--format=%P %F %l %a"], ["scontrol", "show", "config"]):
        code, said = ended(command, 10)
        if code:
            raise UserError(
                f"{command[0]}: {last_line(said).removeprefix(f'{command[0]}: ')}\n"
                "ask the cluster's admins; `scontrol ping` names the controller, SLURM_CONF the configuration"
            )
        answers[command[0]] = said
    partitions = []
    for name, nodes, limit, state in (line.split() for line in answers["sinfo"].splitlines()):
        _, idle, _, total = nodes.split("/")
        hours = "no time limit" if limit == "infinite" else f"at most {limit}"
        partitions.append(f"{name} {total} nodes ({idle} idle), {hours}{'' if state == 'up' else f', {state}'}")
    settings = dict(line.split("=", 1) for line in answers["scontrol"].splitlines() if "=" in line)
    config = {key.strip(): value.strip() for key, value in settings.items()}
    preempted = f"preemption {config.get('PreemptMode', 'unknown')}"
    requeued = "jobs are re-queued" if config.get("JobRequeue") == "1" else "jobs are re-queued with sbatch --requeue"
    try:
        launcher = f"hydra-submitit-launcher {metadata.version('hydra-submitit-launcher')}"
    except metadata.PackageNotFoundError:
        launcher = "for -m hydra/launcher=slurm: pip install 'lmlab[slurm]'"
    return "; ".join([*partitions, requeued, preempted, launcher])


def hub() -> str:
    """The Hugging Face hub answers, as a run would ask it."""
    code, said = ended(
        # In a process, which can be ended: looking up a host's name knows no time limit.
        python(
            "from huggingface_hub import constants; from lmlab.errors import go_offline_if_cut_off\n"
            "before = constants.is_offline_mode(); go_offline_if_cut_off()\n"
            "print(before, constants.is_offline_mode(), constants.ENDPOINT)"
        ),
        15,
    )
    if code and code != -signal.SIGKILL:
        raise UserError(f"huggingface_hub: {last_line(said)}\n{REINSTALL}")
    told, offline, endpoint = last_line(said).split() if not code else ("False", "True", "the hub")
    if told == "True":
        raise NotThere("HF_HUB_OFFLINE=1: only what is cached is used")
    if offline == "True":
        raise NotThere(f"{endpoint} does not answer: use local directories, or HF_HUB_OFFLINE=1 for what is cached")
    return f"{endpoint} answers"


def wandb() -> str:
    """Weights & Biases: a key that is configured is let in. It is never shown."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        raise NotThere(f"WANDB_MODE={mode}: nothing is sent")
    if find_spec("wandb") is None:
        raise UserError("wandb is not installed\npip install wandb, or logger=file for each run")
    code, said = ended(
        python(
            "import os, urllib.error, urllib.request, wandb\n"
            "def end(code, text):\n"
            "    print(text, flush=True)\n"
            "    os._exit(code)\n"  # its service may take minutes to end by itself
            "try: key = wandb.login(prompt=False, verify=False)\n"
            "except wandb.errors.Error as error: end(1, error)\n"
            "if not key: end(0, 'no key')\n"
            "url = wandb.setup().settings.base_url\n"
            # First of all: its own client takes long to say that nobody answers.
            "try: urllib.request.urlopen(url, timeout=5).close()\n"
            "except urllib.error.HTTPError: pass\n"
            "except OSError as error: end(1, f'{url} does not answer: {getattr(error, \"reason\", error)}')\n"
            "try: wandb.Api(timeout=10)\n"
            "except wandb.errors.Error as error: end(1, error)\n"
            "end(0, url)"
        ),
        25,
        WANDB_SILENT="true",
    )
    answer = last_line(said)
    if code == 0 and answer == "no key":
        raise NotThere("no key, so runs are logged offline; to send them: python -m wandb login")
    if code:
        if code == -signal.SIGKILL:
            answer = "no answer in 25 s"
        raise UserError(f"{answer}\nset WANDB_MODE=offline, or WANDB_BASE_URL; for another key: python -m wandb login")
    return f"{answer} accepts the key"


def devices() -> str:
    """Cores, memory and GPUs; a small product on each GPU is right."""
    import torch

    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    here = f"{cores} cores, {memory:,.0f} GiB of memory"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return f"{here}, no GPU{unseen_gpus(torch.version.cuda)}"
    # Whole numbers: right to the last bit, at any precision of a GPU.
    numbers = torch.arange(64 * 64).remainder(7).reshape(64, 64).float()
    found: Counter[str] = Counter()
    for number in range(gpus):
        leave_out = "nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES=… of the others leaves it out"
        try:
            properties = torch.cuda.get_device_properties(number)
            there = numbers.to(f"cuda:{number}")
            right = torch.equal((there @ there).cpu(), numbers @ numbers)
        except RuntimeError as error:
            raise UserError(f"GPU {number} can't be used: {first_line(error)}\n{leave_out}") from error
        if not right:
            raise UserError(f"GPU {number} ({properties.name}) computes wrong\n{leave_out}")
        found[f"{properties.name}, {properties.total_memory / 2**30:,.0f} GiB"] += 1
    return "; ".join([here, *(f"{count} × {name}" for name, count in found.items())])


def unseen_gpus(cuda: str | None) -> str:
    """What there is to say of GPUs that the driver sees and torch, built for `cuda`, does not."""
    if not shutil.which("nvidia-smi"):
        return ""
    code, said = ended(["nvidia-smi", "-L"], 20)
    seen = [line for line in said.splitlines() if line.startswith("GPU ")]
    if code or not seen:
        return ""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f" ({len(seen)} hidden by CUDA_VISIBLE_DEVICES)"
    raise UserError(
        f"nvidia-smi sees {len(seen)} GPUs, and torch none\n"
        + (f"renew the driver: torch is built for CUDA {cuda}" if cuda else "install a torch that is built for CUDA")
        + ", https://pytorch.org/get-started/locally"
    )


def bf16() -> str:
    """Products in bfloat16 are right; whether there are units for them."""
    import torch

    gpu = torch.cuda.is_available()
    for device in ("cpu", *(["cuda"] if gpu else [])):
        error = error_of_bf16(device)
        if not error < 2**-7:
            raise UserError(f"a product on {device} is wrong by {error:.1%}\nuse trainer.precision=32-true")
    if gpu:
        with_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        with_units = bool(cpuinfo.is_file() and UNITS & set(cpuinfo.read_text().split()))
    where = "the GPU" if gpu else f"this CPU ({platform.machine()})"
    return f"right; {where} has {'units for it' if with_units else 'no units for it: precision=32-true is faster'}"


def error_of_bf16(device: str) -> float:
    """Of a product of bfloat16 numbers, against the largest of the true ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator).bfloat16() for _ in range(2))
    true = a[:64].float() @ b.float()
    product = a[:64].to(device) @ b.to(device)
    return ((product.float().cpu() - true).abs().max() / true.abs().max()).item()


def collectives() -> str:
    """Ranks in processes of their own agree on a sum: over gloo, and over NCCL where there are GPUs for it."""
    import torch

    said = ["gloo: 2 ranks agree on a sum"]
    sums("gloo", 2)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1:
        sums("nccl", gpus)
        said.append(f"NCCL: {gpus} GPUs do")
    return "; ".join(said)


def sums(backend: str, world: int) -> None:
    """Start ranks as a run does, and look at their sums."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = python(f"from lmlab.runs.machine import add_up; add_up({backend!r})")
    with processes() as (folder, start):
        logs = [folder / str(rank) for rank in range(world)]
        ranks = [
            start(command, log, **place, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            for rank, log in enumerate(logs)
        ]
        until = time.monotonic() + 30
        codes = [process_end(process, until) for process in ranks]
        said = [log.read_text(errors="replace") for log in logs]
    right = str(world * (world + 1) / 2)
    wrong = [(code, text) for code, text in zip(codes, said, strict=True) if code or right not in text.splitlines()]
    if wrong:
        code, text = wrong[0]
        why = "no sum in 30 s" if code == -signal.SIGKILL else last_line(text)
        fix = {
            "gloo": "let it use the loopback: export GLOO_SOCKET_IFNAME=lo",
            "nccl": "export NCCL_DEBUG=INFO says why; in a container --ipc=host; else NCCL_P2P_DISABLE=1",
        }
        raise UserError(f"{backend}: {why}\n{fix[backend]}")


def add_up(backend: str) -> None:
    """One rank's share of `sums`: print the sum that it gets."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    assert numbers.min() == numbers.max()
    print(numbers[0].item())
    dist.destroy_process_group()


def resuming(seconds: float) -> str:
    """A run that is killed and goes on ends with the weights of one that nobody disturbed."""
    until = time.monotonic() + seconds
    with processes() as (folder, start):
        whole, killed = RunDirectory(folder / "whole"), RunDirectory(folder / "killed")
        options = [*TINY, f"trainer.max_steps={STEPS}", f"callbacks.checkpoints.every_steps={KEPT_EVERY}"]
        options.append(f"cache_dir={folder}/cache")

        def begin(run: RunDirectory, command: list[str]) -> subprocess.Popen[bytes]:
            return start(command, Path(f"{run.path}.txt"))

        undisturbed = begin(whole, verb("train", *options, f"hydra.run.dir={whole.path}"))
        victim = begin(killed, verb("train", *options, f"hydra.run.dir={killed.path}"))
        kept = 0
        while not kept and victim.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
            kept = max(map(killed.step_of, killed.states()), default=0)
        victim.kill()
        if victim.wait() != -signal.SIGKILL:
            raise failed("a run ended before it could be killed", killed)
        resumed = begin(killed, verb("resume", str(killed.path))) if kept else victim
        for process, run in ((resumed, killed), (undisturbed, whole)):
            if process_end(process, until) == -signal.SIGKILL:
                raise UserError(f"not through in {seconds:.0f} s\ntry again when less runs on this machine")
            if process.returncode:
                raise failed("a killed run can't go on" if run is killed else "a run failed", run)
        went_on = killed.identity().get("went_on", [{"step": 0}])[-1]["step"]
        if not 0 < went_on < STEPS:
            raise failed(f"a killed run went on from step {went_on} of {STEPS}", killed)
        tensors = same_tensors(whole.state_at(STEPS), killed.state_at(STEPS))
    return (
        f"killed by SIGKILL, a run went on from step {went_on} of {STEPS} and ended like one that was not: "
        f"{tensors} tensors, bit for bit"
    )


def failed(what: str, run: RunDirectory) -> UserError:
    """An error with a run's last words."""
    said = Path(f"{run.path}.txt").read_text(errors="replace")
    plain = said.rpartition("error: ")[2] if "error: " in said else last_line(said)
    why, _, fix = plain.strip().partition("\n")
    return UserError(f"{what}: {why}\n{fix or REINSTALL}")


def same_tensors(one: Path, other: Path) -> int:
    """How many tensors two states of a run have, weights and the optimizer's; all of them are the same.

    Raises:
        UserError: some are not.
    """
    import torch

    def tensors(node: object, name: str = "") -> Iterator[tuple[str, bytes]]:
        if isinstance(node, torch.Tensor):
            yield name, node.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(node, dict):
            for key, value in node.items():
                yield from tensors(value, f"{name}.{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                yield from tensors(value, f"{name}.{number}")

    first, second = (
        dict(tensors({key: state[key] for key in ("state_dict", "optimizer_states")}))
        for state in (torch.load(place, map_location="cpu", weights_only=True) for place in (one, other))
    )
    wrong = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if wrong or not first:
        raise UserError(
            f"a run that was killed and went on ended with other numbers: {len(wrong)} of {len(first)} tensors\n"
            f"try again with OMP_NUM_THREADS=1, then {REINSTALL}"
        )
    return len(first)


def verb(name: str, *arguments: str) -> list[str]:
    """The command of a verb."""
    return [sys.executable, "-m", f"lmlab.{name}", *arguments]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@contextmanager
def processes() -> Iterator[tuple[Path, Callable[..., subprocess.Popen[bytes]]]]:
    """Yields a folder, and a function that starts a command with its output in a file.

    Afterwards all of them have ended, with what they started themselves, and the folder is gone.
    """
    begun: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="lmlab-doctor-", ignore_cleanup_errors=True) as folder:
        # What a job or torchrun says of its ranks is not for these.
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC_", "SLURM_PROC", "SLURM_STEP")
        common = {key: value for key, value in os.environ.items() if not key.startswith(ranks)}
        common = {"OMP_NUM_THREADS": "1"} | common | {"TMPDIR": folder}

        def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
            with log.open("wb") as out:
                settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                settings |= {"env": common | variables, "start_new_session": True}
                begun.append(subprocess.Popen(command, **settings))
            return begun[-1]

        try:
            yield Path(folder), start
        finally:
            for process in begun:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def process_end(process: subprocess.Popen[bytes], until: float) -> int:
    """A process's exit code; that of SIGKILL, which it is sent then, where it takes too long."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def ended(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command, of which nothing runs any more."""
    with processes() as (folder, start):
        log = folder / "output"
        code = process_end(start(command, log, **variables), time.monotonic() + seconds)
        return code, log.read_text(errors="replace")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "(it said nothing)"
