"""How far a run has come, and what ended it, as its directory says."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from lmlab import secrets
from lmlab.distributed.signals import BEFORE_THE_LIMIT
from lmlab.errors import Stopped, UserError, cause_of, first_line, plainly
from lmlab.io import write_json
from lmlab.runs.directory import RunDirectory

ENDED = ("done", "pruned")
"""States of a run that has come to its end."""


@dataclass(frozen=True)
class Status:
    """Of a run, whatever became of the process."""

    name: str
    """waiting, running, done, pruned, stopped (by a signal, its state kept) or failed."""
    cause: str | None = None
    """Why it failed: out of memory, non-finite loss, killed, crashed, bad config, disk full, gone (its directory),
    damaged or error; or why it stopped: timed out, or the signal."""
    message: str | None = None
    """What was said then."""
    step: int = 0
    """Optimizer steps that were made, as far as the directory knows."""
    steps: int | None = None
    """Of how many."""


def read_status(run: RunDirectory) -> Status:
    """The state of a run, or of the place of one that has not begun. Where files are damaged, that is its failure."""
    try:
        return told_by(run)
    except (UserError, ValueError, KeyError, TypeError) as error:
        what = str(error) if isinstance(error, UserError) else f"{run.path} is damaged: {error!r}"
        return Status("failed", "damaged", what)


def told_by(run: RunDirectory) -> Status:
    """The state of a run, if its files are whole."""
    if run.finished():
        result = run.read_summary()
        return Status("pruned" if "pruned" in result else "done", step=result["steps"], steps=result["steps"])
    failure = run.failed()
    step, steps = last_step(run), run.read_manifest().get("steps") if run.begun() else None
    if run.held():
        return Status("running", None, None, step, steps)
    if failure:
        return Status(failure["state"], failure["cause"], failure["message"], step, steps)
    if run.begun():
        return Status("failed", "killed", "Its process ended without a word: it was killed.", step, steps)
    return Status("waiting")


def last_step(run: RunDirectory) -> int:
    """The step of the last whole row of a run's figures."""
    lines = run.metrics.read_bytes().splitlines(keepends=True) if run.metrics.is_file() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def write_failure(run: RunDirectory, error: BaseException) -> None:
    """Leave in a run's directory what ended it, unless the directory is gone."""
    if not run.path.is_dir():
        return
    if isinstance(error, Stopped):
        state, cause = "stopped", "timed out" if error.signal in BEFORE_THE_LIMIT else error.signal.name
        message = f"Stopped by {error.signal.name}."
    else:
        state, cause = "failed", cause_of(error)
        if cause == "error" and isinstance(error, UserError) and not run.begun():
            cause = "bad config"  # it was refused
        message = secrets.redacted_text(plainly(error) or f"{type(error).__name__}: {first_line(error)}")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.failure, {"state": state, "cause": cause, "message": message, "time": time})
