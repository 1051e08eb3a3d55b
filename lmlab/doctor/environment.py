"""What is here: room on the disks, a compiler, cores and GPUs."""

import fcntl
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

from lmlab.errors import UserError, first_line
from lmlab.io import empty_folders_removed, write_text
from lmlab.processes import calling, ended, last_line
from lmlab.runs.directory import RunDirectory

FREE = 4.0  # GiB: two states of the guide's model, a third while it is written, its weights and their export
UNITS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # what /proc/cpuinfo calls those for bf16, of x86 and of ARM
REINSTALL = "install the tested versions again: pip install -c constraints.txt -e ."


class NotThere(Exception):  # noqa: N818
    """What a machine can do without. A fault is a `UserError`: a line of what is broken, then how to mend it."""


def writing(folder: Path, another: str) -> str:
    """A file can be written, flushed, renamed and locked in a folder, and there is room."""
    try:
        with empty_folders_removed(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".lmlab-doctor-", dir=folder) as own:
                write_text(Path(own, "file"), "lmlab")
                run = RunDirectory(own)
                with run.lock():
                    held = "BlockingIOError" in ended(calling(lock, str(run.locked)), 10)[1]
                free = shutil.disk_usage(own).free / 2**30
    except OSError as error:
        raise UserError(f"{error.filename or folder} is not writable: {error.strerror or error}\n{another}") from error
    if not held:
        raise UserError(f"{folder}: a lock there keeps no other process out (a network disk without locks?)\n{another}")
    if free < FREE:
        raise UserError(f"{folder}: {free:.1f} GiB free, and the guide's runs take {FREE:.0f}\nfree some, or {another}")
    return f"{folder}: {free:,.0f} GiB free; writing, renaming and locking work"


def lock(file: str) -> None:
    """Of another process: one's own lock is never in one's way."""
    with open(file, "a") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
        options = ["-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
        code, said = ended([compiler, *options, str(source), "-o", f"{source}.so"], 30)
    if code:
        why = next((line for line in said.splitlines() if "error" in line), last_line(said))
        raise UserError(f"{compiler} can't compile for Python: {why}\n{install}; compile=false needs none")
    return f"{compiler} compiles, so compile=true can be used"


def devices() -> str:
    """Cores, memory and GPUs; a small product on each GPU is right."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    here = f"{len(os.sched_getaffinity(0))} cores, {memory:,.0f} GiB of memory"
    if not torch.cuda.is_available():
        return f"{here}, no GPU{unseen_gpus(torch.version.cuda)}"
    # Whole numbers: right to the last bit, at any precision of a GPU.
    numbers = torch.arange(64 * 64).remainder(7).reshape(64, 64).float()
    found: Counter[str] = Counter()
    for gpu in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(gpu)
            there = numbers.to(f"cuda:{gpu}")
            right = torch.equal((there @ there).cpu(), numbers @ numbers)
            wrong = "" if right else f"({properties.name}) computes wrong"
        except RuntimeError as error:
            wrong = f"can't be used: {first_line(error)}"
        if wrong:
            fix = "nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES=… of the others leaves it out"
            raise UserError(f"GPU {gpu} {wrong}\n{fix}")
        found[f"{properties.name}, {properties.total_memory / 2**30:,.0f} GiB"] += 1
    return "; ".join([here, *(f"{count} × {name}" for name, count in found.items())])


def unseen_gpus(cuda: str | None) -> str:
    """What there is to say of GPUs that the driver sees and torch, built for `cuda`, does not."""
    code, said = ended(["nvidia-smi", "-L"], 20) if shutil.which("nvidia-smi") else (0, "")
    seen = len(re.findall("^GPU ", said, re.MULTILINE))
    if code or not seen:
        return ""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f" ({seen} hidden by CUDA_VISIBLE_DEVICES)"
    fix = f"renew the driver: torch is built for CUDA {cuda}" if cuda else "install a torch that is built for CUDA"
    raise UserError(f"nvidia-smi sees {seen} GPUs, and torch none\n{fix}, https://pytorch.org/get-started/locally")


def bf16() -> str:
    """Products in bfloat16 are right; whether there are units for them."""
    import torch

    gpu = torch.cuda.is_available()
    for device in ("cpu", "cuda")[: 1 + gpu]:
        error = error_of_bf16(device)
        if not error < 2**-7:
            raise UserError(f"a product on {device} is wrong by {error:.1%}\nuse trainer.precision=32-true")
    if gpu:
        where, units = "the GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        where = f"this CPU ({platform.machine()})"
        units = cpuinfo.is_file() and not UNITS.isdisjoint(cpuinfo.read_text().split())
    return f"right; {where} has {'units for it' if units else 'no units for it: precision=32-true is faster'}"


def error_of_bf16(device: str) -> float:
    """Of a product of bfloat16 numbers, against the largest of the true ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 1024, generator=generator).bfloat16() for rows in (64, 1024))
    true = a.float() @ b.float()
    product = (a.to(device) @ b.to(device)).float().cpu()
    return ((product - true).abs().max() / true.abs().max()).item()
