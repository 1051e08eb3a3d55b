"""The logger of Weights & Biases (W&B)."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

import lmlab
from lmlab.console import command
from lmlab.errors import UserError, first_line, nearest
from lmlab.io import read_json, rows
from lmlab.runs.directory import RunDirectory
from lmlab.runs.manifest import git_state
from lmlab.secrets import redacted_command

LOG = logging.getLogger(__name__)
MODES = ("auto", "online", "offline", "disabled")
AXES = {"steps": "trainer/global_step", "tokens": "data/tokens_seen"}
SUMMARIES = {"val": "min", "train": "min", "perf": "mean", "perf/peak_memory_gib": "max"}
"""The statistic that W&B's summary keeps of a metric, by its name or the part before the slash; of others, the last
value."""
ANSWER = 5  # seconds that W&B waits for its service when it is handed a table or an artifact, which it asks about first
COLUMNS = ("step", "text", "said")  # of samples.jsonl


class WandB(WandbLogger):
    """Logs the rows of metrics.jsonl to a W&B run, each once, however often the run was killed and resumed.

    A row's W&B step is its number in that file; the optimizer step is in the row. The row of a validation has a table
    of its samples, and the summary at the end one of all. W&B's own incremental tables can't hold them: a sample that
    is sent again after a kill would be there twice, and no more than a hundred validations are shown.

    W&B may fail at any time, as its own process may have ended: that is warned of once, and no run fails for it.
    """

    def __init__(self, experiment: Any, run: RunDirectory, received: int, axis: str, log_model: bool, patience: float):
        """Sends the rows and samples of earlier attempts that W&B does not have yet.

        Args:
            experiment: the W&B run.
            received: how many rows W&B has already.
            axis: the metric that curves are drawn against.
            patience: seconds that W&B has at the end to send the rest.
        """
        super().__init__(experiment=experiment)
        self.run, self.received, self.axis, self.patience = run, received, axis, patience
        self.sends_model = log_model
        self.row, self.defined = 0, set[str]()
        self.closed = self.warned = False
        self.accepted = {"metrics", "samples"}
        samples: dict[int, list[dict[str, Any]]] = {}
        for sample in rows(run.samples):
            samples.setdefault(sample["step"], []).append(sample)
        for row in rows(run.metrics):
            self.log_metrics({name: row[name] for name in row if name not in ("step", "time")}, row["step"])
            if "val/loss" in row:
                self.log_samples(samples.get(row["step"], []))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.row >= self.received and "metrics" in self.accepted:
            try:
                self.define_metrics(metrics)
                self.experiment.log({**metrics, "trainer/global_step": step}, step=self.row)
            except Exception as error:
                self.give_up("metrics", first_line(error))
        self.row += 1

    def define_metrics(self, metrics: Iterable[str]) -> None:
        """Tells W&B what to draw each metric against, and what its summary keeps of it."""
        for name in {*metrics, "trainer/global_step"} - self.defined:
            # By its whole name: of several globs that fit, W&B takes any.
            summary = SUMMARIES.get(name, SUMMARIES.get(name.partition("/")[0]))
            axis = {} if name == self.axis else {"step_metric": self.axis, "step_sync": True}
            self.experiment.define_metric(name, summary=summary, **axis)
            self.defined.add(name)

    @rank_zero_only
    def log_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds a table of the samples of a validation to the row that was logged last."""
        if self.row > self.received:
            self.send_samples(samples, partial(self.experiment.log, step=self.row - 1))

    def send_samples(self, samples: Sequence[Mapping[str, Any]], send: Callable[[dict[str, Any]], Any]) -> None:
        """Calls `send` with a table of samples, as long as W&B takes them."""
        import wandb

        if not samples or self.accepted != {"metrics", "samples"}:
            return
        began = time.monotonic()
        try:
            data = [[sample[name] for name in COLUMNS] for sample in samples]
            send({"samples": wandb.Table(columns=list(COLUMNS), data=data)})
        except Exception as error:  # there may also be no room for the file that a table becomes
            self.give_up("samples", first_line(error))
        else:
            if time.monotonic() - began > ANSWER - 1:
                self.give_up("samples", "its service does not answer.")

    def give_up(self, content: str, why: str) -> None:
        """Sends no more metrics, or no more samples."""
        self.accepted.discard(content)
        LOG.warning("W&B takes no more %s: %s\nTraining goes on; %s.jsonl has all.", content, why, content)

    def end(self, exit_code: int, will_go_on: bool, result: Mapping[str, Any] | None) -> None:
        """Sends what comes at the end, the result if there is one, and ends the W&B run."""
        import wandb

        run = self.experiment
        with self.unsent_reported():
            if will_go_on:
                run.mark_preempting()
            if not run.disabled:
                run.log({}, commit=True)  # the last row goes first: it would have the last word in the summary
                self.send_samples(list(rows(self.run.samples)), run.summary.update)
                if result is not None:
                    run.summary.update(dict(result))
                    self.send_artifacts(result)
        with self.unsent_reported():
            run.finish(exit_code=exit_code)
        with self.unsent_reported():
            if will_go_on:  # W&B's own process is ended too: SLURM would kill it first, and this one then complain
                wandb.teardown()

    def send_artifacts(self, result: Mapping[str, Any]) -> None:
        """Sends the certificate, the model if it is wanted, and what data they are of."""
        import wandb

        manifest = self.run.read_manifest()
        hashes = {name: manifest[name] for name in ("data_fingerprint", "tokenizer_hash")}
        metadata = {"run_id": manifest["run_id"], **hashes}
        ledger = {**hashes, "ledger": read_json(self.run.ledger)}
        data = wandb.Artifact(f"data-{manifest['data_fingerprint'][:12]}", "dataset", metadata=ledger)
        with data.new_file("data.json") as stream:  # W&B tells versions apart by their content
            json.dump(ledger, stream, indent=2)
        # What `use_artifact` does, which waits for the service, and refuses offline.
        self.experiment._log_artifact(data, is_user_created=True, use_after_commit=True)
        if self.run.certificate.is_file():
            certificate = wandb.Artifact(f"certificate-{manifest['run_id']}", "certificate", metadata=metadata)
            for file in (self.run.certificate, self.run.records):
                certificate.add_file(str(file), policy="immutable")  # else W&B makes a copy in the home directory
            self.experiment.log_artifact(certificate)
        if self.sends_model:
            model = wandb.Artifact(f"model-{manifest['run_id']}", "model", metadata={**metadata, **result})
            model.add_dir(str(self.run.model), policy="immutable")
            self.experiment.log_artifact(model)

    @contextmanager
    def unsent_reported(self) -> Iterator[None]:
        """Logs an error inside as the reason why W&B may not have all of the run."""
        try:
            yield
        except Exception as error:
            self.warn_unsent(first_line(error))

    def warn_unsent(self, why: str) -> None:
        """Warns, once, that W&B may not have all of the run, with the command that sends it."""
        if not self.warned:
            self.warned = True
            online = [] if self.experiment.offline else ["--no-skip-online"]
            send = command("wandb", "sync", *online, Path(self.experiment.dir).parent)
            LOG.warning("W&B may not have all of the run: %s\nTo send it: %s", why, send)


def weights_and_biases(
    run_dir: str,
    run_id: str,
    config: dict[str, Any],
    *,
    project: str = "lmlab",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = "train",
    tags: list[str] | None = None,
    notes: str | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    against: Literal["steps", "tokens"] = "tokens",
    log_model: bool = False,
    patience: Annotated[float, Gt(0)] = 60.0,
) -> Logger:
    """Returns the logger of a W&B run whose id is the run's own, so that it stays one however often it is started.

    Those not listed are arguments of `wandb.init`.

    Args:
        mode: `online`, `offline`, `disabled`, or `auto`: online where an API key is configured. The
            variable WANDB_MODE wins. A service that can't be reached leaves the run offline.
        against: what curves are drawn against, `steps` or `tokens`.
        log_model: True to give W&B the exported model as well.
        patience: seconds that W&B has at the end to send what it has not yet.
    """
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(ANSWER))
    import wandb  # a second of start-up that a run without W&B need not pay

    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(offline=True)  # which logs on rank 0 only
    chosen: Any = os.environ.get("WANDB_MODE", mode)
    if chosen not in MODES:
        raise UserError(f'WANDB_MODE is one of {", ".join(MODES)}, not "{chosen}".{nearest(chosen, MODES)}')
    code = Path(lmlab.__file__).parent
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=20.0,
        finish_timeout=float(patience),
        finish_timeout_raises=True,
        save_code=True,  # else W&B keeps no git diff
        # The code that runs is lmlab's; without a checkout of it, W&B looks where the run directory lies.
        git_root=str(code) if git_state(code) else None,
    )

    init = partial(
        wandb.init,
        dir=run_dir,
        id=run_id,
        project=project,
        entity=entity,
        name=name,
        group=group,
        job_type=job_type,
        tags=tags,
        notes=notes,
        config=config,
        resume="allow",
        settings=settings,
    )
    earlier = list(Path(run_dir).glob("wandb/offline-run-*"))
    with redacted_arguments():
        try:
            if chosen == "auto":
                chosen = "online" if wandb.login(prompt=False) else "offline"
            run = init(mode=chosen)
        except (wandb.errors.Error, ValueError) as error:  # a key that is none is a ValueError
            LOG.warning("W&B could not be reached (%s); this run is logged offline.", first_line(error))
            wandb.teardown()  # its own process would take the id for one in use
            run = init(mode="offline")
    received = 0
    if run.offline and not run.disabled:
        for folder in earlier:  # the new one has their rows, and those that a kill has kept from them
            folder.rename(folder.with_name(f"earlier-{folder.name}"))
        LOG.info("W&B: offline. To upload: %s", command("wandb", "sync", Path(run.dir).parent))
    elif run.url:
        LOG.info("W&B: %s", run.url)
        received = run.starting_step
    return WandB(run, RunDirectory(run_dir), received, AXES[against], log_model, patience)


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Hides secrets in the command from W&B, which keeps the arguments as metadata, and has no setting against that."""
    arguments, sys.argv = sys.argv, redacted_command(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments
