"""Training on a GPU that is not there: no wait for it, no copy it has to be waited for, and flash attention."""

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
        ["objective=clm", "chunk=16", "checkpointing=selective"],
        pytest.param(
            ["objective=mlm", "accumulate=2", "precision=16-mixed", "checkpointing=true"], marks=pytest.mark.long
        ),
        pytest.param(["objective=clm", "documents=5"], marks=pytest.mark.longest),
        pytest.param(["objective=mlm", "documents=5", "chunk=16"], marks=pytest.mark.longest),
        pytest.param(["objective=clm"], marks=pytest.mark.longest),
        pytest.param(["objective=clm", "adapter=qlora"], marks=pytest.mark.long),
        pytest.param(["objective=mlm", "chunk=16", "checkpointing=selective"], marks=pytest.mark.longest),
        pytest.param(["objective=clm", "accumulate=2", "precision=16-mixed", "chunk=16"], marks=pytest.mark.longest),
    ],
    ids=" ".join,
)
def test_nothing_makes_the_host_wait(words: list[str]) -> None:
    """The command fails where a step or a validation's batch does, see benchmarks/trace.py."""
    command = [sys.executable, "-m", "benchmarks.trace", "size=tiny", "batch_size=8", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a step" in done.stdout
    assert "a batch of a validation" in done.stdout


CHANGED = """
from benchmarks import trace
from lmlab.training.measure import Measure
from lmlab.training.module import LMModule

step, validation_step = LMModule.training_step, LMModule.validation_step
LMModule.training_step = lambda self, *args: (loss := step(self, *args), loss.item())[0]
LMModule.validation_step = lambda self, *args: (validation_step(self, *args), self.sums.nll.cpu())[0]
Measure.on_train_batch_end = lambda self, trainer, module, *args: trace.torch.cuda.synchronize()
watch, _ = trace.trace(trace.Settings(size="tiny", batch_size=8))
print(*(dict(+work.waits) for work in (watch.steps, watch.validations)))
trace.show(watch, 1.0, documents=False)
"""


@pytest.mark.long
def test_a_wait_is_found() -> None:
    """Three steps are watched, and three validations of two batches."""
    done = subprocess.run([sys.executable, "-c", CHANGED], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("{'_local_scalar_dense': 3, 'synchronize': 3} {'_to_copy': 6}")
    assert "in a step the host waits for the device: {'_local_scalar_dense': 3, 'synchronize': 3}" in done.stderr
