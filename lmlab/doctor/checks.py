"""The checks of a machine, each a function that returns what it found.

A check raises `Skip` for what a machine can do without, and a `UserError` of two lines, the fault and its fix, for
what is broken. A part that may hang, or that only another process can show, is a function that is called in one.
"""

import fcntl
import filecmp
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lmlab.errors import UserError, first_line
from lmlab.hub import go_offline_if_cut_off
from lmlab.io import empty_folders_removed, write_text
from lmlab.processes import last_line, printed_error, processes, python_call, run
from lmlab.runs.directory import RunDirectory

FREE = 4.0  # GiB: two checkpoints of the guide's model, a third while it is written, its weights and their export
REINSTALL = "install the tested versions again: pip install -c constraints.txt -e ."
STEPS = 100  # of the runs of `check_resume`: a second from the first checkpoint to the end
TINY = f"""
trainer=cpu trainer.max_steps={STEPS} callbacks.checkpoints.every_steps=10 logger=file
model.config.n_embd=32 model.config.n_head=2 model.config.n_layer=1
tokenizer.vocab_size=300 preprocess.block_size=32 preprocess.max_records=100
""".split()
"""Overrides of the runs of `check_resume`."""


class Skip(Exception):  # noqa: N818
    """The reason why a check does not apply to this machine, which is no fault."""


def check_folder(folder: Path, another: str) -> str:
    """Checks that a file can be written, flushed, renamed and locked in a folder, and that there is room.

    Args:
        another: the options that choose another folder.
    """
    folder, fix = folder.expanduser(), f"choose another: {another}"
    try:
        with empty_folders_removed(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".lmlab-doctor-", dir=folder) as own:
                write_text(Path(own, "file"), "lmlab")
                directory = RunDirectory(own)
                with directory.lock():
                    held = "BlockingIOError" in run(python_call(lock, str(directory.lock_file)), 10)[1]
                free = shutil.disk_usage(own).free / 2**30
    except OSError as error:
        raise UserError(f"{error.filename or folder} is not writable: {error.strerror or error}\n{fix}") from error
    if not held:
        raise UserError(f"{folder}: a lock there keeps no other process out (a network disk without locks?)\n{fix}")
    if free < FREE:
        raise UserError(f"{folder}: {free:.1f} GiB free, and the guide's runs take {FREE:.0f}\nfree some, or {fix}")
    return f"{folder}: {free:,.0f} GiB free; writing, renaming and locking work"


def lock(path: str) -> None:
    """Locks a file in a process of its own, as a process is never kept out by its own lock."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_compiler() -> str:
    """Checks that there is what torch.compile needs: a C++ compiler, and the headers of Python."""
    name, install = os.environ.get("CXX") or "g++", "apt install g++ python3-dev, or set CXX to a compiler"
    compiler = shutil.which(name) or shutil.which("clang++")
    if compiler is None:
        raise Skip(f"no {name}, which compile=true needs: {install}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise UserError(f"compile=true needs {header}, which is missing\n{install}; compile=false needs none")
    return f"{compiler} and Python.h are there, so compile=true can be used"


def check_slurm() -> str:
    """Checks that the controller of a SLURM cluster answers; returns its partitions and how it ends jobs."""
    if not shutil.which("sinfo"):
        raise Skip("not a SLURM machine")
    # Nodes are counted as allocated/idle/other/total.
    facts = ask_slurm("sinfo", "--noheader", "--format=%P nodes %F (A/I/O/T), time limit %l, %a").splitlines()
    config = dict(re.findall(r"^(\w+) *= *(\S+)", ask_slurm("scontrol", "show", "config"), re.MULTILINE))
    facts.append("jobs are re-queued" + ("" if config.get("JobRequeue") == "1" else " with sbatch --requeue"))
    facts.append(f"preemption {config.get('PreemptMode', 'unknown')}")
    try:
        facts.append(f"hydra-submitit-launcher {metadata.version('hydra-submitit-launcher')}")
    except metadata.PackageNotFoundError:
        facts.append("for -m hydra/launcher=slurm: pip install 'lmlab[slurm]'")
    return "; ".join(facts)


def ask_slurm(*command: str) -> str:
    """Returns what a command of SLURM prints."""
    code, output = run([*command], 10)
    if "configuration source" in output:
        raise Skip("its commands are installed, and no cluster is configured: SLURM_CONF names one")
    if code:
        raise UserError(
            f"{command[0]}: {last_line(output).removeprefix(f'{command[0]}: ')}\n"
            "ask the cluster's admins; `scontrol ping` names the controller, SLURM_CONF the configuration"
        )
    return output


def check_hub() -> str:
    """Checks that the Hugging Face hub answers as a run would ask it.

    It is asked in a process that can be ended, as looking up a host's name has no time limit.
    """
    code, output = run(python_call(ask_hub), 15)
    if code not in (0, -signal.SIGKILL):
        raise UserError(f"huggingface_hub: {last_line(output)}\n{REINSTALL}")
    endpoint, answer = last_line(output).split() if code == 0 else ("the hub", "silent")
    if answer == "unasked":
        raise Skip("HF_HUB_OFFLINE=1: only what is cached is used")
    if answer == "silent":
        raise Skip(f"{endpoint} does not answer: use local directories, or HF_HUB_OFFLINE=1 for what is cached")
    return f"{endpoint} answers"


def ask_hub() -> None:
    """Prints the hub's address and one of `answers`, `silent` and `unasked`."""
    from huggingface_hub import constants

    told = constants.is_offline_mode()
    go_offline_if_cut_off()
    print(constants.ENDPOINT, "unasked" if told else "silent" if constants.is_offline_mode() else "answers")


def check_wandb() -> str:
    """Checks that Weights & Biases accepts a key that is configured, which is never shown."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        raise Skip(f"WANDB_MODE={mode}: nothing is sent")
    if find_spec("wandb") is None:
        raise UserError("wandb is not installed\npip install wandb, or logger=file for each run")
    code, output = run(python_call(ask_wandb), 25, WANDB_SILENT="true")
    answer = "no answer in 25 s" if code == -signal.SIGKILL else last_line(output)
    if code:
        raise UserError(f"{answer}\nset WANDB_MODE=offline, or WANDB_BASE_URL; for another key: python -m wandb login")
    if answer == "no key":
        raise Skip("no key, so runs are logged offline; to send them: python -m wandb login")
    return f"{answer} accepts the key"


def ask_wandb() -> None:
    """Prints the address that accepts the key, or what is wrong."""
    from urllib.error import HTTPError
    from urllib.request import urlopen

    import wandb

    code, answer = 0, "its server"
    try:
        answer = wandb.setup().settings.base_url
        if not wandb.login(prompt=False, verify=False):
            answer = "no key"
        else:
            with suppress(HTTPError):  # first of all: its own client takes long to say that nobody answers
                urlopen(answer, timeout=5).close()
            wandb.Api(timeout=10)
    except wandb.errors.Error as error:
        code, answer = 1, str(error)
    except OSError as error:
        code, answer = 1, f"{answer} does not answer: {getattr(error, 'reason', error)}"
    print(answer, flush=True)
    os._exit(code)  # its service may take minutes to end by itself


def check_devices() -> str:
    """Checks that each GPU multiplies a small matrix right; returns cores, memory and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{len(os.sched_getaffinity(0))} cores, {memory:,.0f} GiB of memory"
    if not torch.cuda.is_available():
        return f"{machine}, no GPU{hidden_gpus(torch.version.cuda)}"
    # Whole numbers: right to the last bit, at any precision of a GPU.
    numbers = torch.arange(64 * 64).remainder(7).reshape(64, 64).float()
    kinds: Counter[str] = Counter()
    for gpu in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(gpu)
            on_gpu = numbers.to(f"cuda:{gpu}")
            right = torch.equal((on_gpu @ on_gpu).cpu(), numbers @ numbers)
            fault = "" if right else f"({properties.name}) computes wrong"
        except RuntimeError as error:
            fault = f"can't be used: {first_line(error)}"
        if fault:
            fix = "nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES=… of the others leaves it out"
            raise UserError(f"GPU {gpu} {fault}\n{fix}")
        kinds[f"{properties.name}, {properties.total_memory / 2**30:,.0f} GiB"] += 1
    return "; ".join([machine, *(f"{count} × {name}" for name, count in kinds.items())])


def hidden_gpus(cuda: str | None) -> str:
    """Returns how many GPUs CUDA_VISIBLE_DEVICES hides; GPUs that a torch built for `cuda` can't see are a fault."""
    code, output = run(["nvidia-smi", "-L"], 20) if shutil.which("nvidia-smi") else (0, "")
    count = len(re.findall("^GPU ", output, re.MULTILINE))
    if code or not count:
        return ""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f" ({count} hidden by CUDA_VISIBLE_DEVICES)"
    fix = f"renew the driver: torch is built for CUDA {cuda}" if cuda else "install a torch that is built for CUDA"
    raise UserError(f"nvidia-smi sees {count} GPUs, and torch none\n{fix}, https://pytorch.org/get-started/locally")


def check_bf16() -> str:
    """Checks that products in bfloat16 are right; returns whether the device has units for them."""
    import torch

    gpu = torch.cuda.is_available()
    for device in ("cpu", "cuda")[: 1 + gpu]:
        error = bf16_error(device)
        if not error < 2**-7:
            raise UserError(f"a product on {device} is wrong by {error:.1%}\nuse trainer.precision=32-true")
    if gpu:
        name, units = "the GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")  # avx512_bf16 and amx_bf16 of x86, bf16 and svebf16 of ARM
        name, units = f"this CPU ({platform.machine()})", cpuinfo.is_file() and "bf16" in cpuinfo.read_text()
    return f"right; {name} has {'bf16 units' if units else 'no bf16 units: precision=32-true is faster'}"


def bf16_error(device: str) -> float:
    """Returns the largest error of a product of bfloat16 matrices, as a share of its largest true entry."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 1024, generator=generator).bfloat16() for rows in (64, 1024))
    true = a.float() @ b.float()
    product = (a.to(device) @ b.to(device)).float().cpu()
    return ((product - true).abs().max() / true.abs().max()).item()


def check_collectives() -> str:
    """Checks that ranks in processes of their own agree on a sum, by gloo, and by NCCL where there are GPUs for it."""
    import torch

    sum_over_ranks("gloo", 2, "let it use the loopback: export GLOO_SOCKET_IFNAME=lo")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        return "gloo: 2 ranks agree on a sum"
    fix = "export NCCL_DEBUG=INFO says why; in a container --ipc=host; else NCCL_P2P_DISABLE=1"
    sum_over_ranks("nccl", gpus, fix)
    return f"gloo: 2 ranks agree on a sum; NCCL: {gpus} GPUs do"


def sum_over_ranks(backend: str, world: int, fix: str) -> None:
    """Starts ranks as a run does, lets them add up, and raises the error of the first that fails."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is in this process, and not for rank 0 to make
    with processes(threads=1) as (_, start):
        until = time.monotonic() + 30
        command = python_call(add_up, backend)
        for process in [start(command, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]:
            code, output = process.end(until - time.monotonic())
            if code:
                why = "no sum in 30 s" if code == -signal.SIGKILL else last_line(output)
                raise UserError(f"{backend}: {why}\n{fix}")


def add_up(backend: str) -> None:
    """Takes part in the sum of `sum_over_ranks` as one rank."""
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


def check_resume(seconds: float) -> str:
    """Checks that a run that is killed and resumed ends with the same bits as one that nobody disturbed."""
    until = time.monotonic() + seconds
    with processes(threads=1) as (folder, start):
        whole, killed = (RunDirectory(folder / name) for name in ("whole", "killed"))
        options = [*TINY, f"cache_dir={folder}/cache"]
        undisturbed, victim = (start(command("train", *options, f"hydra.run.dir={r.path}")) for r in (whole, killed))
        while not (checkpoints := killed.checkpoint_files()) and victim.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        code, output = victim.end(0)
        if code != -signal.SIGKILL:
            raise run_failed("a run ended before it could be killed", output)
        resumed = start(command("resume", str(killed.path))) if checkpoints else victim
        for process, fault in ((undisturbed, "a run failed"), (resumed, "a killed run can't go on")):
            code, output = process.end(until - time.monotonic())
            if code == -signal.SIGKILL:
                raise UserError(f"not through in {seconds:.0f} s\ntry again when less runs on this machine")
            if code:
                raise run_failed(fault, output)
        step = killed.read_manifest().get("went_on", [{"step": 0}])[-1]["step"]
        if not 0 < step < STEPS:
            raise run_failed(f"a killed run went on from step {step} of {STEPS}", output)
        one, other = (directory.model / "model.safetensors" for directory in (whole, killed))
        if not filecmp.cmp(one, other, shallow=False):
            fault = "a run that was killed and went on ended with other weights"
            raise UserError(f"{fault}\ntry again with OMP_NUM_THREADS=1, then {REINSTALL}")
    return f"killed by SIGKILL, a run went on from step {step} of {STEPS} and ended like one that was not, bit for bit"


def command(name: str, *arguments: str) -> list[str]:
    """Returns a command of lmlab."""
    return [sys.executable, "-m", f"lmlab.{name}", *arguments]


def run_failed(fault: str, output: str) -> UserError:
    """Returns the error for a run that failed with this output."""
    why, _, fix = (printed_error(output) or last_line(output)).partition("\n")
    return UserError(f"{fault}: {why}\n{fix or REINSTALL}")
