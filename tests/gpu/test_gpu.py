"""Real runs on a GPU, held against the CPU. `LMLAB_GPU_TESTS=cpu make test-gpu` tries the tests themselves without one.

Each run is a process of its own, as the suite hides GPUs from this one. They share the GPU, some at a time.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ..conftest import GPUS, losses, metrics, stop_after
from ..training.test_width import DROPOUT_OFF

DEVICE = os.environ.get("LMLAB_GPU_TESTS", "gpu")
AT_A_TIME = min(4, os.cpu_count() or 1)
COMMON = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
# Of every kind of model, positions that fill flash attention's tiles, and a head whose logits are several chunks.
LARGER = ["model.config.n_embd=128", "model.config.n_head=2", "preprocess.block_size=64"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "gpu" and not GPUS, reason="there is no GPU here (nvidia-smi finds none)"),
]


def python(*words: object, **variables: str) -> str:
    """Runs Python with GPUs in sight; returns what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // AT_A_TIME))
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, env=env | variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Runs:
    """Starts commands, some at a time; the same one only once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(AT_A_TIME)
        self.started: dict[tuple[object, ...], Future[Path]] = {}

    def start(
        self, *overrides: str, command: str = "train", device: str = DEVICE, into: Path | None = None, **variables: str
    ) -> Future[Path]:
        """Returns what will be the directory of a run, or raise why it failed."""
        key = (overrides, command, device, into, *variables.items())
        if key not in self.started:
            directory = into or self.folder / str(len(self.started))
            chosen = [] if any(word.startswith("trainer=") for word in overrides) else [f"trainer={device}"]
            words = ["-m", f"lmlab.{command}", *chosen, *overrides, f"hydra.run.dir={directory}"]

            def run() -> Path:
                python(*words, **variables)
                return directory

            self.started[key] = self.pool.submit(run)
        return self.started[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The runs of this module, in directories of their own."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


def logged(run: Path, names: Iterable[str] = ("train/loss", "optim/grad_norm", "val/loss")) -> list[float]:
    """Returns the values of some metrics in the order in which they were logged."""
    return [row[name] for row in metrics(run) for name in names if name in row]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_run_and_its_evaluation_are_those_of_the_cpu(objective: str, runs: Runs) -> None:
    """A masked model's pseudo-log-likelihood included."""
    common = [f"objective={objective}", *DROPOUT_OFF[objective], *COMMON, "trainer.precision=32-true"]
    here, there = (run.result() for run in [runs.start(*common, device=device) for device in (DEVICE, "cpu")])
    assert logged(here) == pytest.approx(logged(there), rel=1e-3)
    scores = {"clm": [["context=sliding"]], "mlm": [["score=labels"], ["score=pseudo", "sample=0.1"]]}[objective]
    pairs = [
        [
            runs.start(f"model={here}", "trainer.precision=32-true", *score, command="evaluate", device=device)
            for device in (DEVICE, "cpu")
        ]
        for score in scores
    ]
    for pair in pairs:
        totals = [json.loads((run.result() / "certificate.json").read_text())["totals"] for run in pair]
        assert totals[0]["tokens"] > 100
        assert totals[0].pop("nll") == pytest.approx(totals[1].pop("nll"), rel=1e-5)
        assert totals[0].pop("nll_squared") == pytest.approx(totals[1].pop("nll_squared"), rel=1e-4)
        assert totals[0] == totals[1]


EXACT = ["trainer.precision=32-true"]
OTHERS = [
    ["trainer.precision=bf16-mixed"],
    ["trainer.precision=16-mixed"],
    ["trainer.precision=bf16-true"],
    ["trainer.precision=bf16-mixed", "compile=true"],
    ["trainer.precision=bf16-mixed", "activation_checkpointing=true"],
    ["trainer.precision=bf16-mixed", "logits_chunk_size=32"],
    ["trainer.precision=32-true", "float32_matmul_precision=high"],
    ["trainer.precision=bf16-mixed", "trainer=fsdp", "trainer.devices=1"],
]


@pytest.mark.parametrize("overrides", OTHERS, ids=" ".join)
def test_every_precision_trains_alike(overrides: list[str], runs: Runs) -> None:
    """TF32, compiled layers, recomputed activations, logits in chunks and FSDP2 on one rank too."""
    if DEVICE == "cpu" and "trainer.precision=16-mixed" in overrides:
        pytest.skip("16-mixed needs a GPU")

    def start(*overrides: str) -> Future[Path]:
        accelerator = [f"trainer.accelerator={DEVICE}"] if "trainer=fsdp" in overrides else []
        return runs.start(*DROPOUT_OFF["clm"], *LARGER, *COMMON, *overrides, *accelerator)

    # All of them at the first of these tests, so that each waits only for its own.
    exact, *_ = [start(*each) for each in (EXACT, *OTHERS)]
    for name, tolerance in (("train/loss", 2e-2), ("val/loss", 2e-2), ("optim/grad_norm", 5e-2)):
        found = logged(start(*overrides).result(), [name])
        assert found
        assert found == pytest.approx(logged(exact.result(), [name]), rel=tolerance)


APART = ["preprocess.document_attention=true", *COMMON]
GPT2 = [*DROPOUT_OFF["clm"], *LARGER]
LLAMA = ["model=scratch", "model.architecture=llama", "tokenizer.vocab_size=300", "preprocess.block_size=64"]
LLAMA += ["model.config={hidden_size: 128, num_hidden_layers: 1, num_attention_heads: 2}", "logger=file"]
WAYS = [
    [*GPT2, "trainer.precision=bf16-mixed"],
    [*GPT2, "trainer.precision=bf16-mixed", "compile=true"],
    [*LLAMA, "trainer.precision=bf16-mixed"],
    [*LLAMA, "trainer.precision=bf16-mixed", "attention=flex_attention"],
]


@pytest.mark.parametrize("overrides", WAYS, ids=" ".join)
def test_documents_are_kept_apart(overrides: list[str], runs: Runs) -> None:
    """By sdpa's kernel for masks, and by flex attention, which skips what the mask hides."""
    if DEVICE == "cpu" and "attention=flex_attention" in overrides:
        pytest.skip("flex attention has no backward pass on a CPU")
    model = GPT2 if overrides[: len(GPT2)] == GPT2 else LLAMA
    exact, *_ = [runs.start(*APART, *each) for each in ([*model, *EXACT], *WAYS)]
    for name, tolerance in (("train/loss", 2e-2), ("val/loss", 2e-2), ("optim/grad_norm", 5e-2)):
        found = logged(runs.start(*APART, *overrides).result(), [name])
        assert found
        assert found == pytest.approx(logged(exact.result(), [name]), rel=tolerance)


DETERMINISTIC = [*DROPOUT_OFF["clm"][:8], *COMMON, "+trainer.deterministic=true"]  # with dropout


def start_deterministic(runs: Runs, *overrides: str, into: Path | None = None) -> Future[Path]:
    return runs.start(*DETERMINISTIC, *overrides, into=into, CUBLAS_WORKSPACE_CONFIG=":4096:8")


def test_a_run_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """Under deterministic algorithms, dropout included."""
    whole = start_deterministic(runs, "callbacks.checkpoints.background=true").result()
    stop_after(whole, 3, tmp_path / "stopped")
    again = start_deterministic(runs, "callbacks.checkpoints.background=true", into=tmp_path / "stopped").result()
    assert losses(again) == losses(whole)
    assert weights_at(again, 6) == weights_at(whole, 6)


def test_the_same_seed_gives_the_same_bits_however_checkpoints_are_saved(runs: Runs) -> None:
    """In the background, a checkpoint has the weights of its step, not of those that training has made since."""
    options = [f"callbacks.checkpoints.background={background}" for background in ("true", "false")]
    one, other = (run.result() for run in [start_deterministic(runs, option) for option in options])
    assert losses(one) == losses(other)
    for step in (3, 6):
        assert weights_at(one, step) == weights_at(other, step)
    assert weights_at(one, 3) != weights_at(one, 6)


def weights_at(run: Path, step: int) -> dict[str, bytes]:
    """Returns the bytes of each of a checkpoint's tensors."""
    checkpoint = torch.load(run / "checkpoints" / f"step-{step}.ckpt", map_location="cpu", weights_only=True)
    return {name: tensor.numpy().tobytes() for name, tensor in checkpoint["state_dict"].items()}


def test_no_step_waits_and_attention_is_flash(runs: Runs) -> None:
    """Read from the trace of torch's profiler: three steps between two reports."""
    words = [*DROPOUT_OFF["clm"], *LARGER, "trainer.max_steps=9", "trainer.log_every_n_steps=9", "profile=true"]
    run = runs.start(*words, "trainer.precision=bf16-mixed").result()
    trace = json.loads((run / "profile" / "rank0.json").read_text())
    names: Counter[str] = Counter(event.get("name", "") for event in trace["traceEvents"])
    if DEVICE == "cpu":
        assert any("flash" in name for name in names)
        return
    assert any("flash" in name and "kernel" in name for name in names), names
    waits = {name: count for name, count in names.items() if name.endswith("Synchronize") or "DtoH" in name}
    assert sum(waits.values()) <= 2, waits  # the profiler's own, when it starts and stops


ATTENTION = """
import sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from lmlab.models.loss import score
from tests.models.test_scored import small

device = sys.argv[1]
backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
ids = torch.arange(5, 69, device=device).view(2, 32)
for architecture, causal in (("gpt2", True), ("roberta", False)):
    found = []
    for backend in backends[: 2 if device == "cpu" else 3]:  # on a CPU there are no more
        model = small(architecture, causal).to(device)
        positions = torch.arange(0, 60, 3, device=device)
        with sdpa_kernel(backend), torch.autocast(device, torch.bfloat16):  # refuses what another one would have to do
            nll = score(model, ids, None, positions, ids.flatten()[positions + 1]).nll
            nll.sum().backward()
        found.append((nll.detach(), torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])))
    for other in found[1:]:
        for one, same in zip(found[0], other):
            torch.testing.assert_close(one, same, rtol=3e-2, atol=3e-2)
print("same")
"""


def test_every_kind_of_attention_gives_the_same_loss() -> None:
    """Plain, flash and memory-efficient attention, causal and from both sides."""
    assert python("-c", ATTENTION, "cpu" if DEVICE == "cpu" else "cuda").splitlines()[-1] == "same"


MEMORY = """
import sys, torch
from lmlab.models.loss import score
from lmlab.training.measure import peak_memory
from tests.models.test_scored import small

device = torch.device(sys.argv[1])
model = small("gpt2", True, vocab_size=20000).to(device)
ids = torch.randint(20000, (32, 64), device=device)
positions = torch.arange(32 * 64 - 1, device=device)
for chunk_size in (128, None):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    score(model, ids, None, positions, ids.flatten()[1:], chunk_size).nll.sum().backward()
    model.zero_grad()
    print(peak_memory(device))
"""


def test_logits_in_chunks_take_less_memory() -> None:
    """By all the logits at least, which are a sixteenth of themselves at a time."""
    in_chunks, at_once = map(float, python("-c", MEMORY, "cpu" if DEVICE == "cpu" else "cuda").split()[-2:])
    assert (at_once - in_chunks) * 2**30 > 2047 * 20000 * 4


QUANTIZED = """
import sys, torch
from lmlab.models import adapters
from lmlab.models.loss import score
from tests.models.test_scored import small

found = []
for device in ("cpu", sys.argv[1]):
    model = small("gpt2", True)
    given = {"base": None, "revision": None, "auto_class": "AutoModelForCausalLM", "seed": 0}
    adapters.lora(model=model, targets="all-linear", quantization="nf4", **given).to(device)
    ids, positions = torch.arange(5, 37, device=device)[None], torch.arange(31, device=device)
    nll = score(model, ids, None, positions, ids[0, 1:], 8).nll
    nll.sum().backward()
    with torch.no_grad(), adapters.merged_in_evaluation(model):
        merged = score(model, ids, None, positions, ids[0, 1:], 8).nll
    gradients = [p.grad for name, p in model.named_parameters() if ".lora_B." in name]
    found.append([tensor.cpu() for tensor in (nll.detach(), merged, *gradients)])
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("same")
"""


@pytest.mark.skipif(find_spec("bitsandbytes") is None or find_spec("peft") is None, reason="takes lmlab[qlora]")
def test_a_model_in_4_bits_computes_what_it_does_on_the_cpu() -> None:
    assert python("-c", QUANTIZED, "cpu" if DEVICE == "cpu" else "cuda").splitlines()[-1] == "same"


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
