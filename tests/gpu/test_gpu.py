"""Real runs on a GPU, held against the CPU. `LMLAB_GPU_TESTS=cpu make test-gpu` tries the tests themselves without one.

Each run is a process of its own, as the suite hides GPUs from this one.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ..conftest import GPUS, losses, metrics, stop_after
from ..training.test_width import DROPOUT_OFF

DEVICE = os.environ.get("LMLAB_GPU_TESTS", "gpu")
STEPS = 6
COMMON = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
# Of every kind of model, positions that fill flash attention's tiles, and a head whose logits are several chunks.
LARGER = ["model.config.n_embd=128", "model.config.n_head=2", "preprocess.block_size=64"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "gpu" and not GPUS, reason="there is no GPU here (nvidia-smi finds none)"),
]
Run = Callable[..., Path]


def python(*words: object, **variables: str) -> str:
    """Runs Python with GPUs in sight; returns what it printed."""
    env = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, env=env | variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command by its name, with overrides, in a directory of that name; returns the directory."""

    def start(name: str, *overrides: str, command: str = "train", device: str = DEVICE, **variables: str) -> Path:
        words = ["-m", f"lmlab.{command}", *overrides, f"trainer={device}", f"hydra.run.dir={tmp_path / name}"]
        python(*words, **variables)
        return tmp_path / name

    return start


def logged(run: Path, names: Iterable[str] = ("train/loss", "optim/grad_norm", "val/loss")) -> list[float]:
    """Returns the values of some metrics in the order in which they were logged."""
    return [row[name] for row in metrics(run) for name in names if name in row]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_run_and_its_evaluation_are_those_of_the_cpu(objective: str, run: Run) -> None:
    common = [f"objective={objective}", *DROPOUT_OFF[objective], *COMMON, "trainer.precision=32-true"]
    devices = {"here": DEVICE, "there": "cpu"}
    here, there = (run(name, *common, device=device) for name, device in devices.items())
    assert logged(here) == pytest.approx(logged(there), rel=1e-3)
    words = [f"model={here}", "trainer.precision=32-true"]
    certificates = [
        json.loads((run(f"on_{name}", *words, command="evaluate", device=device) / "certificate.json").read_text())
        for name, device in devices.items()
    ]
    totals = [certificate["totals"] for certificate in certificates]
    assert totals[0].pop("nll") == pytest.approx(totals[1].pop("nll"), rel=1e-5)
    assert totals[0].pop("nll_squared") == pytest.approx(totals[1].pop("nll_squared"), rel=1e-4)
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=16-mixed"],
        ["trainer.precision=bf16-true"],
        ["trainer.precision=bf16-mixed", "compile=true"],
        ["trainer.precision=bf16-mixed", "activation_checkpointing=true"],
        ["trainer.precision=bf16-mixed", "logits_chunk_size=32"],
        ["trainer.precision=32-true", "float32_matmul_precision=high"],
    ],
    ids=" ".join,
)
def test_every_precision_trains_alike(overrides: list[str], run: Run) -> None:
    if DEVICE == "cpu" and "trainer.precision=16-mixed" in overrides:
        pytest.skip("16-mixed needs a GPU")
    common = [*DROPOUT_OFF["clm"], *LARGER, *COMMON]
    exact, found = run("exact", *common, "trainer.precision=32-true"), run("found", *common, *overrides)
    for name, tolerance in (("train/loss", 2e-2), ("val/loss", 2e-2), ("optim/grad_norm", 5e-2)):
        assert logged(found, [name]) == pytest.approx(logged(exact, [name]), rel=tolerance)


def test_a_run_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    """Under deterministic algorithms, dropout included."""
    common = [*DROPOUT_OFF["clm"][:8], *COMMON, "+trainer.deterministic=true"]
    whole = run("whole", *common, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    stop_after(whole, 3, tmp_path / "stopped")
    assert losses(run("stopped", *common, CUBLAS_WORKSPACE_CONFIG=":4096:8")) == losses(whole)


def test_no_step_waits_and_attention_is_flash(run: Run) -> None:
    """Read from the trace of torch's profiler: three steps between two reports."""
    words = [*DROPOUT_OFF["clm"], *LARGER, "trainer.max_steps=9", "trainer.log_every_n_steps=9", "profile=true"]
    trace = json.loads((run("traced", *words, "trainer.precision=bf16-mixed") / "profile" / "rank0.json").read_text())
    names: Counter[str] = Counter(event.get("name", "") for event in trace["traceEvents"])
    if DEVICE == "cpu":
        assert any("flash" in name for name in names)
        return
    assert any("flash" in name and "kernel" in name for name in names), names
    waits = {name: count for name, count in names.items() if name.endswith("Synchronize") or "DtoH" in name}
    assert sum(waits.values()) <= 2, waits  # the profiler's own, when it starts and stops


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from lmlab.models.efficiency import shard
from lmlab.models.loss import score
from tests.models.test_scored import small

device, backend = ("cpu", "gloo") if sys.argv[1] == "cpu" else ("cuda", "nccl")
dist.init_process_group(backend, init_method="tcp://localhost:0", rank=0, world_size=1)
ids = torch.arange(5, 37, device=device)[None]
positions = torch.arange(31, device=device)
found = []
for sharded in (False, True):
    model = small("llama", True).train(False).to(device)
    if sharded:
        shard(model, init_device_mesh(device, (1,)), bf16=sys.argv[2] == "bf16")
    with torch.autocast(device, torch.bfloat16, enabled=sys.argv[2] == "bf16"):
        nll = score(model, ids, None, positions, ids[0, 1:], 8).nll
    nll.sum().backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
    found.append((nll.detach(), torch.stack([grad.norm() for grad in grads])))
tolerance = 3e-2 if sys.argv[2] == "bf16" else 1e-4
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
print("same")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sharded_over_one_rank_is_the_same(precision: str) -> None:
    assert python("-c", FSDP, DEVICE, precision).splitlines()[-1] == "same"
