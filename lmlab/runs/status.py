"""The status of a run, and how its last attempt ended, as the files of its directory tell."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from lmlab import secrets
from lmlab.distributed.signals import BEFORE_THE_LIMIT
from lmlab.errors import Stopped, UserError, cause_of, first_line, plainly
from lmlab.io import read_json, write_json
from lmlab.runs.directory import RunDirectory

ENDED = ("done", "pruned")
"""The names of the statuses of a finished run."""


@dataclass(frozen=True)
class Status:
    """The status of a run, which does not depend on what became of its process."""

    name: str
    """One of waiting, running, done, pruned, stopped (by a signal, with a checkpoint) and failed."""
    cause: str | None = None
    """The cause of a failure: out of memory, non-finite loss, killed, crashed, bad config, disk full, gone (the
    directory), damaged or error; or that of a stop: timed out, or the signal."""
    message: str | None = None
    """The message that was shown when the run failed or stopped."""
    step: int = 0
    """The number of optimizer steps that were made, as far as the directory knows."""
    steps: int | None = None
    """The number of optimizer steps of the whole run."""


def read_status(run: RunDirectory) -> Status:
    """Returns the status of a run, whether it has begun or not. Damaged files are a failure."""
    try:
        if run.finished():
            summary = run.read_summary()
            return Status("pruned" if "pruned" in summary else "done", step=summary["steps"], steps=summary["steps"])
        failure = read_json(run.failure) if run.failure.is_file() else None
        step, steps = last_step(run), run.read_manifest().get("steps") if run.begun() else None
        if run.held():
            return Status("running", None, None, step, steps)
        if failure:
            return Status(failure["state"], failure["cause"], failure["message"], step, steps)
        if run.begun():
            return Status("failed", "killed", "Its process ended without a message: it was killed.", step, steps)
        return Status("waiting")
    except (UserError, ValueError, KeyError, TypeError) as error:
        message = str(error) if isinstance(error, UserError) else f"{run.path} is damaged: {error!r}"
        return Status("failed", "damaged", message)


def last_step(run: RunDirectory) -> int:
    """Returns the step of the last whole row of a run's metrics, or of its last checkpoint where that is later."""
    lines = run.metrics.read_bytes().splitlines(keepends=True) if run.metrics.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    checkpoints = run.checkpoint_files()
    return max(json.loads(whole[-1])["step"] if whole else 0, run.step_of(checkpoints[-1]) if checkpoints else 0)


def write_failure(run: RunDirectory, error: BaseException) -> None:
    """Writes how an attempt at a run ended into its directory, unless the directory is gone."""
    if not run.path.is_dir():
        return
    if isinstance(error, Stopped):
        name, cause = "stopped", "timed out" if error.signal in BEFORE_THE_LIMIT else error.signal.name
        message = f"Stopped by {error.signal.name}."
    else:
        name, cause = "failed", cause_of(error)
        if cause == "error" and isinstance(error, UserError) and not run.begun():
            cause = "bad config"  # the run was refused
        message = secrets.redacted_text(plainly(error) or f"{type(error).__name__}: {first_line(error)}")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.failure, {"state": name, "cause": cause, "message": message, "time": time})
