"""Steps on a GPU that is not there: no wait for it, no copy it has to be waited for, and flash attention."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None, reason="the trace needs a torch for CPUs alone"
)


@pytest.mark.parametrize(
    "words",
    [
        ["objective=clm"],
        ["objective=mlm", "accumulate=2", "precision=16-mixed"],
        pytest.param(["objective=clm", "chunk=16", "checkpointing=true"], marks=pytest.mark.long),
        pytest.param(["objective=mlm", "checkpointing=true"], marks=pytest.mark.long),
    ],
)
def test_no_step_makes_the_host_wait(words: list[str]) -> None:
    """The command fails where one does, see benchmarks/trace.py."""
    command = [sys.executable, "-m", "benchmarks.trace", "size=tiny", "batch_size=8", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a step" in done.stdout


def test_a_wait_is_found() -> None:
    code = (
        "from benchmarks import trace\n"
        "from lmlab.training.module import LMModule\n"
        "step = LMModule.training_step\n"
        "LMModule.training_step = lambda self, *args: (loss := step(self, *args), loss.item())[0]\n"
        "trace.show(*trace.trace(trace.Settings(size='tiny', batch_size=8)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "the host waits for the device: {'_local_scalar_dense': 3}" in done.stderr
