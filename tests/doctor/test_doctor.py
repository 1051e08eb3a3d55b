"""The self-check: this machine passes it, and each thing that can be broken is found, with its fix.

A fault is in what a check looks at: a file in the way, a port where nobody listens, a command of
the same name that fails. Only the runs of the check of resuming are played, as real ones take a
minute; one test lets the whole command make real ones.
"""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmlab.doctor import __main__ as doctor_command
from lmlab.doctor import checks
from lmlab.runs.directory import RunDirectory
from tests.conftest import run_verb
from tests.processes import heeding

CHECKS = ("folder", "compiler", "slurm", "hub", "wandb", "devices", "bf16", "collectives", "resume")
"""The functions of the checks, without their `check_`."""
NAMES = (
    *("runs", "data cache", "hub cache", "compiler", "SLURM", "hub", "W&B"),
    *("devices", "bf16", "collectives", "resume"),
)
KEY = "0123456789" * 4

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run `python -m lmlab.doctor` with one real check; returns its exit code, and the lines that don't pass."""

    def run(check: str, *arguments: object) -> tuple[int, str]:
        for other in CHECKS:
            if other != check:
                monkeypatch.setattr(checks, f"check_{other}", lambda *_: "not tried")
        with pytest.raises(SystemExit) as ended:
            run_verb("doctor", "--into", tmp_path / "runs", *arguments)
        said = capsys.readouterr().out.splitlines()
        # What can be copied stays whole.
        assert all(len(line) <= 100 or max(map(len, line.split())) > 60 for line in said), said
        text = "\n".join(line for line in said[1:-1] if "not tried" not in line)
        assert bool(ended.value.code) == ("fail  " in text)
        assert text.count("fail  ") == text.count("fix: "), text
        return int(bool(ended.value.code)), re.sub(r"\n {19}(?!fix:)", " ", text)

    return run


@pytest.fixture
def closed() -> str:
    """The address of a port of this machine where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make shell scripts the only commands that there are."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            place = folder / name.replace("_", "-")
            place.write_text(f"#!/bin/sh\n{script}\n")
            place.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


@contextmanager
def answering(status: int, body: bytes = b"") -> Iterator[str]:
    """A server that answers everything in the same way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def left_behind(folder: Path) -> list[str]:
    """What lies in a folder, and the processes that speak of it."""
    speak = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            speak += [process.parent.name] if str(folder) in process.read_text() else []
        except OSError:  # it has ended meanwhile
            continue
    return [str(place) for place in folder.iterdir()] + speak


@pytest.mark.longest
def test_this_machine_passes(tmp_path: Path) -> None:
    """The whole command as it is typed, in the time that it promises."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = os.environ | {"TMPDIR": str(temporary), "HF_HOME": str(tmp_path / "huggingface")}
    env |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # a rank's shell
    command = [sys.executable, "-m", "lmlab.doctor", "--into", f"{tmp_path}/runs", "--cache-dir", f"{tmp_path}/cache"]
    began = time.monotonic()
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    took = time.monotonic() - began
    assert result.returncode == 0, result.stdout + result.stderr
    verdicts = {line[6:17].strip(): line[:4] for line in result.stdout.splitlines()[1:-1] if line[0] != " "}
    assert tuple(verdicts) == NAMES
    may_be_missing = {"compiler", "SLURM", "hub", "W&B"}
    assert all(verdict == "pass" for name, verdict in verdicts.items() if name not in may_be_missing), result.stdout
    assert set(verdicts.values()) <= {"pass", "skip"}
    assert re.search(r"killed by SIGKILL, a run went on from step [1-9]\d* of 100", result.stdout)
    assert took < 120, f"{took:.0f} s"
    assert left_behind(temporary) == []
    assert [place.name for place in tmp_path.iterdir()] == ["temporary"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, doctor: Doctor) -> None:
    (tmp_path / "file").touch()
    failed, said = doctor("folder", "--cache-dir", tmp_path / "file" / "cache")
    assert failed
    unwrapped = " ".join(said.split())
    assert f"fail data cache {tmp_path}/file/cache is not writable: Not a directory" in unwrapped
    assert "fix: choose another: cache_dir=DIR, or LMLAB_CACHE=DIR" in unwrapped
    assert said.count("fail") == 1
    assert "pass  runs" in said
    assert "GiB free; writing, renaming and locking work" in said


def test_too_little_disk(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FREE", 1e9)
    failed, said = doctor("folder")
    assert failed
    assert "GiB free, and the guide's runs take 1000000000" in said
    assert "fix: free some, or choose another: hydra.run.dir=DIR" in said


def test_locks_that_keep_nobody_out(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lock(run: RunDirectory) -> Iterator[None]:
        run.lock_file.touch()
        yield

    monkeypatch.setattr(RunDirectory, "lock", lock)
    failed, said = doctor("folder")
    assert failed
    assert "a lock there keeps no other process out" in said


def test_compiler(doctor: Doctor, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    commands()
    failed, said = doctor("compiler")
    assert not failed
    assert "skip  compiler     no g++, which compile=true needs: apt install" in said
    commands(**{"g++": "exit 1"})
    monkeypatch.setattr("sysconfig.get_path", lambda *_, **__: "/nowhere")
    failed, said = doctor("compiler")
    assert failed
    assert "compile=true needs /nowhere/Python.h, which is missing" in said
    assert "fix: apt install g++ python3-dev" in said


def test_slurm(doctor: Doctor, commands: Callable[..., None]) -> None:
    commands()
    assert doctor("slurm") == (0, "skip  SLURM        not a SLURM machine")
    commands(
        sinfo="echo 'gpu* nodes 1/6/1/8 (A/I/O/T), time limit 1-00:00:00, up'; echo 'old nodes 0/2/0/2 …, down'",
        scontrol="echo 'PreemptMode = REQUEUE'; echo 'JobRequeue              = 0'",
    )
    failed, said = doctor("slurm")
    assert not failed
    assert "gpu* nodes 1/6/1/8 (A/I/O/T), time limit 1-00:00:00, up; old nodes 0/2/0/2" in said
    assert "re-queued with sbatch --requeue; preemption REQUEUE" in said
    commands(sinfo="echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    failed, said = doctor("slurm")
    assert failed
    assert "fail  SLURM        sinfo: slurm_load_partitions: Unable to contact slurm controller" in said
    assert "fix: ask the cluster's admins; `scontrol ping`" in said


def test_hub(doctor: Doctor, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, said = doctor("hub")
    assert not failed
    assert "skip  hub          HF_HUB_OFFLINE=1" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", closed)
    failed, said = doctor("hub")
    assert not failed
    assert f"skip  hub          {closed} does not answer: use local directories, or HF_HUB_OFFLINE=1" in said
    with answering(200) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert doctor("hub") == (0, f"pass  hub          {endpoint} answers")


@pytest.mark.long
def test_weights_and_biases(doctor: Doctor, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, said = doctor("wandb")
    assert not failed
    assert "skip  W&B          WANDB_MODE=offline" in said
    monkeypatch.delenv("WANDB_MODE")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", closed)
    failed, said = doctor("wandb")
    assert not failed
    assert "skip  W&B          no key, so runs are logged offline" in said
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    failed, said = doctor("wandb")
    assert failed
    assert f"fail  W&B          {closed} does not answer: [Errno 111] Connection refused" in said
    assert "fix: set WANDB_MODE=offline" in said
    assert KEY not in said
    with answering(401, b'{"errors": [{"message": "no such key"}]}') as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        failed, said = doctor("wandb")
    assert failed
    assert "no such key" in said
    assert "for another key: python -m wandb login" in said
    assert KEY not in said
    with answering(200, b'{"data": {"viewer": {"id": "1", "username": "me", "teams": {"edges": []}}}}') as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert doctor("wandb") == (0, f"pass  W&B          {url} accepts the key")


def test_gpus_that_torch_does_not_see(
    doctor: Doctor, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands(nvidia_smi="echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-1)'")
    failed, said = doctor("devices")  # tests hide them
    assert not failed
    assert "no GPU (2 hidden by CUDA_VISIBLE_DEVICES)" in said
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    failed, said = doctor("devices")
    assert failed
    assert "fail  devices      nvidia-smi sees 2 GPUs, and torch none" in said
    assert "https://pytorch.org/get-started/locally" in said
    commands(nvidia_smi="echo 'NVIDIA-SMI has failed'; exit 9")
    failed, said = doctor("devices")
    assert not failed
    assert said.endswith("no GPU")


def test_bf16_that_computes_wrong(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.bf16_error("cpu")
    assert 0 < right < 2**-7
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: product(a, b) * (1 if a.dtype == torch.float32 else 1.05)
    )
    failed, said = doctor("bf16")
    assert failed
    assert re.search(r"fail  bf16         a product on cpu is wrong by [45]\.\d%", said), said
    assert "fix: use trainer.precision=32-true" in said


def test_ranks_that_do_not_find_each_other(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    failed, said = doctor("collectives")
    assert failed
    assert "fail  collectives  gloo: " in said
    assert "none0" in said
    assert "fix: let it use the loopback: export GLOO_SOCKET_IFNAME=lo" in said


PLAYED = """
import json, shutil, sys, time
from pathlib import Path
weights, behaviour, verb, run = sys.argv[1:]
run = Path(run.removeprefix("hydra.run.dir="))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "model").mkdir(exist_ok=True)
def keep(step, name):
    (run / f"checkpoints/step-{step}.ckpt").touch()
    shutil.copy(f"{weights}/{name}", run / "model/model.safetensors")
    (run / "manifest.json").write_text(json.dumps({"went_on": [{"step": 0 if behaviour == "begins again" else 10}]}))
if verb == "train" and run.name == "killed":
    if behaviour == "no room":
        sys.exit("error: no room in x.\\nFree some.")
    if behaviour != "slow":
        keep(10, "one")
    time.sleep(60)
if verb == "resume" and behaviour == "broken":
    raise ImportError("half of a package")
keep(100, "other" if verb == "resume" and behaviour == "differs" else "one")
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script that behaves in some way in the place of `train` and `resume`."""
    weights = {"w": torch.tensor([0.1, float("nan"), -0.0], dtype=torch.bfloat16), "b": torch.tensor(1.0)}
    other = weights | {"w": torch.tensor([0.1, float("nan"), 0.0], dtype=torch.bfloat16)}  # another bit, and equal
    for name, tensors in (("one", weights), ("other", other)):
        save_file(tensors, tmp_path / name)
    (tmp_path / "played.py").write_text(PLAYED)

    def behave(behaviour: str) -> None:
        command = [sys.executable, str(tmp_path / "played.py"), str(tmp_path), behaviour]
        monkeypatch.setattr(checks, "command", lambda name, *arguments: [*command, name, arguments[-1]])

    return behave


def test_resuming_that_works(doctor: Doctor, play: Callable[[str], None]) -> None:
    play("works")
    failed, said = doctor("resume")
    assert not failed
    assert "went on from step 10 of 100 and ended like one that was not, bit for bit" in said


@pytest.mark.parametrize(
    ("behaviour", "found", "fix"),
    [
        ("differs", "ended with other weights", "try again with OMP_NUM_THREADS=1"),
        ("begins again", "a killed run went on from step 0 of 100", "install the tested versions again"),
        ("broken", "a killed run can't go on: ImportError: half of a package", "install the tested versions again"),
        ("no room", "a run ended before it could be killed: no room in x.", "Free some."),
        ("slow", "not through in 2 s", "try again when less runs on this machine"),
    ],
)
def test_resuming_that_is_broken(
    behaviour: str, found: str, fix: str, doctor: Doctor, play: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    play(behaviour)
    if behaviour == "slow":
        monkeypatch.setattr(doctor_command, "LIMIT", 2)
    failed, said = doctor("resume")
    assert failed
    assert found in said
    assert f"fix: {fix}" in said


def test_a_check_that_breaks_does_not_stop_the_others(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: str) -> float:
        raise ImportError("libcudart.so: cannot open\nmore")

    monkeypatch.setattr(checks, "bf16_error", breaks)
    failed, said = doctor("bf16")
    assert failed
    assert "fail  bf16         ImportError: libcudart.so: cannot open\n" in said
    assert "fix: install the tested versions again" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_nothing(number: signal.Signals, tmp_path: Path, play: Callable[[str], None]) -> None:
    """Stopped while its runs go on: they end, and their directories are gone."""
    play("slow")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = checks.command("train", "DIR")[:-2]
    code = (
        "import sys; from lmlab.doctor import __main__ as doctor, checks\n"
        f"for name in {CHECKS[:-1]}: setattr(checks, f'check_{{name}}', lambda *_: 'not tried')\n"
        f"checks.command = lambda name, *arguments: [*{command}, name, arguments[-1]]\n"
        "sys.argv = ['doctor']; doctor.main()"
    )
    env = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, preexec_fn=heeding)
    until = time.monotonic() + 30
    while not list(temporary.glob("*/killed/checkpoints")) and time.monotonic() < until:
        time.sleep(0.02)
    assert left_behind(temporary)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert left_behind(temporary) == []


def test_arguments_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_verb("doctor", "--in", "to", "nowhere")
    assert ended.value.code == 1
    assert "For all arguments: python -m lmlab.doctor --help" in capsys.readouterr().err
