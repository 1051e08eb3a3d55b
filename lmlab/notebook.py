"""Runs for scripts and notebooks: `train` makes one, and `TrainedRun` reads its directory.

Training runs in a process of its own, by the command that a shell would start: it leaves nothing in the memory of a
notebook, and the run is like any other.
"""

import os
import signal
import subprocess
import sys
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.errors import UserError
from lmlab.processes import last_line, printed_error
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import ENDED

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmlab.evaluation.records import Records
    from lmlab.reporting.load import Run

FOLDER = "hydra.run.dir="


class Image:
    """A PNG image, which a notebook shows."""

    def __init__(self, png: bytes):
        self.png = png

    def _repr_png_(self) -> bytes:
        return self.png


class TrainedRun:
    """A run, finished or not. What its directory holds is read when an attribute is first used."""

    def __init__(self, path: str | Path):
        """Takes the run directory.

        Raises:
            UserError: it is none.
        """
        self.path = Path(path)
        if not RunDirectory(path).begun():
            raise UserError(f"{path} is no run directory: it has no manifest.json.")

    @cached_property
    def run(self) -> "Run":
        """The run as a report reads it, with its config, manifest, samples and summary."""
        from lmlab.reporting.load import load_runs

        (run,), *_ = load_runs([self.path])
        return run

    @property
    def metrics(self) -> "pd.DataFrame":
        """The logged metrics, a row each time that some were logged, with its `step` and `seconds` of training."""
        return self.run.metrics

    @property
    def evaluation(self) -> "Records | None":
        """The records and the certificate of its best weights; None before its end."""
        return self.run.records

    @property
    def chart(self) -> Image | None:
        """The losses over training, as a report draws them; None if none were logged."""
        from lmlab.reporting.charts import losses_png

        png = losses_png(self.run)
        return None if png is None else Image(png)

    @cached_property
    def model_and_tokenizer(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The exported model, in evaluation mode, and its tokenizer.

        Raises:
            UserError: the run has not ended.
        """
        from lmlab.models import generation

        if self.run.status.name not in ENDED:
            raise UserError(f"{self.path} is {self.run.status.name}: the model is exported at the end of a run.")
        return generation.load(str(RunDirectory(self.path).model))

    @property
    def model(self) -> "PreTrainedModel":
        """The exported model, in evaluation mode."""
        return self.model_and_tokenizer[0]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model."""
        return self.model_and_tokenizer[1]

    def __repr__(self) -> str:
        final = ", ".join(f"{name} {value:.4f}" for name, value in self.run.final.items() if value is not None)
        return f"{self.path}: {self.run.status.name}, {final}"

    def _repr_mimebundle_(self, **unused: Any) -> dict[str, Any]:
        chart = self.chart
        image = {} if chart is None else {"image/png": chart.png}
        return {"text/plain": repr(self), **image}


def train(*overrides: str) -> TrainedRun:
    """Trains a model as `python -m lmlab.train` does, prints what that prints, and returns the run.

    Interrupting it (Ctrl-C, or a notebook's stop button) stops the run with a checkpoint. With the same `hydra.run.dir`
    it then goes on.

    Args:
        overrides: as on the command line, such as "objective=mlm" and "trainer.max_steps=100".

    Raises:
        UserError: what the command refuses, with its own words.
    """
    named = [override for override in overrides if override.startswith(FOLDER)]
    folder = named[-1].removeprefix(FOLDER) if named else f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S}"
    if {"-m", "--multirun"} & {*overrides}:
        raise UserError("-m: a sweep is several runs. Start it from a shell, and read each of them by TrainedRun.")
    command = [sys.executable, "-m", "lmlab.train", *overrides, *([] if named else [f"{FOLDER}{folder}"])]
    printed = list[str]()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a notebook's interruption comes to it once, from here
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="")
                printed.append(line)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            print(process.stdout.read(), end="")
            raise
    if process.returncode:
        output = "".join(printed)
        raise UserError(printed_error(output) or last_line(output))
    return TrainedRun(folder)
