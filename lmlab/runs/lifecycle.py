"""The life of a run: new, resumed, lengthened, finished; and what stays of an attempt that fails.

A run directory is in one of three phases, which its files tell:

    new        it holds no manifest
    begun      it holds a manifest, and no summary: the run goes on, was stopped, or failed (see status.py)
    finished   it holds a summary; a config that asks for more steps lengthens it
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmlab.console import command
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Stopped, UserError, cause_of
from lmlab.io import from_here, replaced, take_back, write_beside, write_json, write_text
from lmlab.runs.directory import RunDirectory
from lmlab.runs.ledger import show_ledger
from lmlab.runs.manifest import environment, version_changes
from lmlab.runs.status import write_failure

if TYPE_CHECKING:
    from lmlab.data.prepared import Prepared
    from lmlab.training.module import LMModule

LOG = logging.getLogger(__name__)


@contextmanager
def failure_recorded(run: RunDirectory, in_sweep: bool = False) -> Iterator[None]:
    """Holds the lock of a run directory, and records there how an attempt at the run failed.

    An attempt that is refused before the run has begun leaves the directory as it was, unless the run is one of a
    sweep, which reports why each of its runs failed.

    Raises:
        UserError: another process holds the lock.
    """
    with run.lock() as before, SIGNALS.heeded():
        had_begun = run.begun()
        try:
            yield
        except (Exception, Stopped) as error:
            refused = isinstance(error, UserError) and error.cause in ("error", "bad config")
            crashed = cause_of(error) in ("crashed", "killed")  # its ranks have left logs
            if not (in_sweep or crashed or run.begun()):
                take_back(run.path, before)
            elif not (had_begun and refused):  # otherwise the run is what it was
                write_failure(run, error)
            raise


@contextmanager
def new(run: RunDirectory, config: str, overrides: str, seeds: dict[str, int], **facts: Any) -> Iterator[None]:
    """Begins a new run, by writing its config and its manifest. A run that is refused frees the directory again.

    Args:
        config: the composed config as YAML.
        overrides: those of the command as YAML.
        seeds: by what they decide.
        facts: more of the manifest.

    Raises:
        UserError: the directory holds a run or an evaluation already.
    """
    run.check_unused()
    try:
        write_text(run.config, config)
        write_text(run.overrides, overrides)
        run.start(seeds, **facts)
        run.failure.unlink(missing_ok=True)
        yield
    except BaseException as error:
        if cause_of(error) == "bad config":  # found by a callback or the objective, before the first step
            run.ledger.unlink(missing_ok=True)
        if not run.ledger.exists() and not run.certificate.exists():  # it did not begin to train, or has no metrics
            for file in (run.manifest, run.config, run.overrides):
                file.unlink(missing_ok=True)
        raise


@contextmanager
def resumed(run: RunDirectory, config: str, checkpoint: Path | None, **attempt: Any) -> Iterator[None]:
    """Goes on with a run that has begun. A config that is refused leaves all files as they were.

    Args:
        config: the composed config as YAML, which replaces the one before.
        checkpoint: what the run goes on from; None where it has none yet, and starts again.
        attempt: what the manifest keeps of this attempt, beside time, step, host and versions.
    """
    manifest, now = run.read_manifest(), environment()
    for line in version_changes(manifest, now):
        LOG.warning("Changed since the run began: %s", line)
    step = run.step_of(checkpoint) if checkpoint else 0
    LOG.info("Resuming run %s from step %d.", manifest["run_id"], step)
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "host": now["machine"]["host"]}
    about |= {"packages": now["packages"], "git": now["git"], **attempt}
    changed = (run.summary, run.failure, run.manifest, run.config)
    before = {path: path.read_bytes() for path in changed if path.is_file()}
    try:
        # The summary goes first: without it the run is not finished, whatever becomes of this process.
        run.summary.unlink(missing_ok=True)
        run.failure.unlink(missing_ok=True)
        run.unsent.unlink(missing_ok=True)  # loggers begin by sending it
        run.update_manifest(went_on=[*manifest.get("went_on", ()), about])
        write_text(run.config, config)
        yield
    except UserError:
        if run.path.is_dir() and checkpoint == next(iter(run.checkpoint_files()[::-1]), None):
            for path, content in before.items():  # refused before a step was made
                write_beside(path, lambda beside, content=content: beside.write_bytes(content))  # type: ignore[misc]
        raise


@contextmanager
def stop_reported(run: RunDirectory) -> Iterator[None]:
    """Logs, when a signal stops a run, what of it is kept and how it goes on."""
    try:
        yield
    except Stopped as stop:
        if run.begun():
            stop.kept = describe_kept(run)
            LOG.warning("%s", stop)
            stop.kept = None
        raise


def describe_kept(run: RunDirectory) -> str:
    """Says what a stopped run has kept, and the command that goes on with it."""
    if run.finished():
        return describe_finished(run)
    checkpoints = run.checkpoint_files()
    newest = f"Kept: the checkpoint of step {run.step_of(checkpoints[-1])}." if checkpoints else "No checkpoint yet."
    return f"{newest} To go on: {command('python', '-m', 'lmlab.resume', from_here(run.path))}"


def describe_finished(run: RunDirectory) -> str:
    """Returns what a finished run came to, and the command that trains it longer."""
    path, summary, trained = from_here(run.path), run.read_summary(), run.trained_as()
    budget = trained["config"].get("budget", {}) if trained else {}
    longer = [f"budget.{key}=…" for key, value in budget.items() if value is not None] or ["trainer.max_steps=…"]
    if longer == ["budget.hours=…"]:  # its steps are those that the hours came to at the start
        longer = ["budget.hours=null", "trainer.max_steps=…"]
    return (
        f"{path} is finished: {summary['steps']} steps, val/loss {summary['val/loss']:.4f}.\n"
        f"To train it longer: {command('python', '-m', 'lmlab.resume', path, *longer)}"
    )


def write_data(
    run: RunDirectory, data: "Prepared", steps: int, samples: int, vocab_size: int | None, show: bool
) -> None:
    """Writes what a run trains on: the hashes into its manifest, its tokenizer, and its ledger.

    Args:
        steps: optimizer steps of the run.
        samples: those of all steps.
        vocab_size: tokens that the config asks of a tokenizer which learns them from the text.
        show: print the ledger, and warn of a smaller vocabulary.
    """
    run.update_manifest(**data.identity, steps=steps)
    if not run.tokenizer.is_dir():  # written once, so that the model can be used before the run has ended
        replaced(run.tokenizer, data.tokenizer.save_pretrained)
    from lmlab.data.mixture import with_draws

    ledger = with_draws(data.ledger, data.train, samples)
    write_json(run.ledger, {split: asdict(counts) for split, counts in ledger.items()})
    if show:
        show_ledger(ledger)
        if vocab_size and len(data.tokenizer) < vocab_size:
            LOG.warning(
                "the text gives %s tokens, fewer than tokenizer.vocab_size=%d.", f"{len(data.tokenizer):,}", vocab_size
            )


def keep_hash(run: RunDirectory, name: Literal["teacher", "base"], weights: str | None, writes: bool) -> None:
    """Keeps the hash of a teacher's weights, or of those of the base of an adapter, in the manifest of a run.

    Args:
        weights: the hash; None where the base has none, as it is an adapter itself.
        writes: write it; false where the run goes on, or another rank writes the file.

    Raises:
        UserError: the run was begun with other weights.
    """
    what, key = {"teacher": ("teacher", "distill.model"), "base": ("base of the adapter", "model.name")}[name]
    if run.read_manifest().get(f"{name}_hash", weights) != weights:
        raise UserError(
            f"the {what} of {run.path} is not what the run was begun with: its weights differ.\n"
            f"Bring it back, name where it is now ({key}=PATH), or begin another run."
        )
    if writes and weights is not None:
        run.update_manifest(**{f"{name}_hash": weights})


def rewind(run: RunDirectory, module: "LMModule", checkpoint: str | None, leads: bool) -> None:
    """Cuts the rows of metrics.jsonl that come after a checkpoint: the run makes those steps again.

    Args:
        leads: whether this is the rank that writes the file.

    Raises:
        UserError: the checkpoint is not one of this model.
    """
    from lmlab.training.checkpoint import check_fits
    from lmlab.training.checkpoint_io import load_checkpoint
    from lmlab.training.loggers.metrics_file import truncate

    size = 0
    if checkpoint is not None:
        content = load_checkpoint(Path(checkpoint))
        check_fits(content, module, Path(checkpoint))
        size = content["metrics"]
    if leads:
        truncate(run.metrics, size)
