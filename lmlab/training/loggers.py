"""Where metrics go: a file in the run directory, and W&B."""

import json
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

import lmlab
from lmlab.console import command
from lmlab.errors import Stopped, UserError, disk_full, first_line, nearest
from lmlab.io import read_json, rows
from lmlab.runs.directory import RunDirectory
from lmlab.runs.manifest import git_state
from lmlab.secrets import redacted_command

LOG = logging.getLogger(__name__)
MODES = ("auto", "online", "offline", "disabled")
AXES = {"steps": "trainer/global_step", "tokens": "data/tokens_seen"}
SUMMARIES = {"val": "min", "train": "min", "perf": "mean", "perf/peak_memory_gib": "max"}
"""What W&B's summary keeps of a metric, by its name or the part before the slash: the best, or else the last."""
ANSWER = 5  # seconds that W&B waits for its service when it is handed a table or an artifact, which it asks about first
COLUMNS = ("step", "text", "said")  # of samples.jsonl


class Lines:
    """A file that whole lines are added to. Those that a full disk has no room for wait until it has some again."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.waiting = ""

    def add(self, *objects: Mapping[str, Any]) -> None:
        """One line for each."""
        lines = (self.waiting + "".join(json.dumps(line) + "\n" for line in objects)).encode()
        done = False
        try:
            with self.path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    done = file.write(lines) == len(lines)
                finally:
                    if not done:
                        file.truncate(size)  # no half of a line
        except OSError as error:
            if not disk_full(error):
                raise
        if not done and not self.waiting:
            LOG.warning("no room for %s in %s: they wait until there is some.", self.what, self.path)
        self.waiting = "" if done else lines.decode()


class MetricsFile(Logger):
    """`metrics.jsonl`: one object per line, with `step`, `time` (Unix seconds) and the metrics.

    Lines are only added, so a run that goes on keeps what it wrote before.
    """

    def __init__(self, run_dir: str):
        super().__init__()
        self.lines = Lines(RunDirectory(run_dir).metrics, "figures")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.add({"step": step, "time": round(time.time(), 3), **metrics})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run directory holds the config already."""


def rewind(lines: Path, size: int) -> None:
    """Take back what a file of lines has after its first `size` bytes.

    It is of steps that the run, going on from a kept state, will make again, row for row.
    """
    if lines.is_file():
        os.truncate(lines, lines.read_bytes().rfind(b"\n", 0, size) + 1)


class WandB(WandbLogger):
    """A W&B run that has the rows of metrics.jsonl, each once, whatever became of the processes that sent them.

    A row's W&B step is its number in that file; steps of the optimizer are in the row. That of
    a validation also has a table of its samples, and the run's summary at the end one of all.
    W&B's own incremental tables are none of these: a sample that is sent again after a kill would
    be in them twice, and no more than a hundred validations are shown.
    """

    def __init__(self, experiment: Any, run: RunDirectory, there: int, axis: str, log_model: bool, patience: float):
        """`there`: the rows that W&B has already; those of the file beyond them are sent again.

        Curves are drawn against the metric `axis`; W&B gets `patience` seconds at the end.
        """
        super().__init__(experiment=experiment)
        self.run, self.there, self.axis, self.keeps_model, self.patience = run, there, axis, log_model, patience
        self.number, self.seen = 0, set[str]()
        self.closed = self.unsent = False
        self.takes_rows = self.takes_tables = True
        samples: dict[int, list[dict[str, Any]]] = {}
        for sample in rows(run.samples):
            samples.setdefault(sample["step"], []).append(sample)
        for row in rows(run.metrics):
            self.log_metrics({name: row[name] for name in row if name not in ("step", "time")}, row["step"])
            if "val/loss" in row:
                self.log_samples(samples.get(row["step"], []))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.number >= self.there and self.takes_rows:
            try:
                self.send({**metrics, "trainer/global_step": step})
            except Exception as error:  # W&B's own process may have ended; no run fails for it
                self.takes_rows = False
                LOG.warning(
                    "W&B takes no more figures: %s\nTraining goes on; metrics.jsonl has all.", first_line(error)
                )
        self.number += 1

    def send(self, row: dict[str, Any]) -> None:
        for name in row.keys() - self.seen:
            # By its whole name: of several globs that fit, W&B takes any.
            summary = SUMMARIES.get(name, SUMMARIES.get(name.partition("/")[0]))
            axis = {} if name == self.axis else {"step_metric": self.axis, "step_sync": True}
            self.experiment.define_metric(name, summary=summary, **axis)
        self.seen |= row.keys()
        self.experiment.log(row, step=self.number)

    @rank_zero_only
    def log_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Send the samples of a validation, in the row that was logged last."""
        if self.number > self.there:
            self.send_table(samples, lambda table: self.experiment.log({"samples": table}, step=self.number - 1))

    def send_table(self, samples: Sequence[Mapping[str, Any]], send: Callable[[Any], Any]) -> None:
        import wandb

        if not (samples and self.takes_rows and self.takes_tables):
            return
        began = time.monotonic()
        try:
            send(wandb.Table(columns=list(COLUMNS), data=[[sample[name] for name in COLUMNS] for sample in samples]))
            why = "its service does not answer." if time.monotonic() - began > ANSWER - 1 else ""
        except Exception as error:  # as above; or there is no room for the file that a table becomes
            why = first_line(error)
        if why:
            self.takes_tables = False
            LOG.warning("W&B gets no more tables of samples: %s\nTraining goes on; samples.jsonl has all.", why)

    def end(self, exit_code: int, will_go_on: bool, result: Mapping[str, Any] | None) -> None:
        """Hand over the result, if there is one, and end."""
        import wandb

        steps: list[Callable[[], Any]] = [self.experiment.mark_preempting] if will_go_on else []
        if not self.experiment.disabled:
            # The last row goes first: it would have the last word in the summary.
            steps += [partial(self.experiment.log, {}, commit=True), self.hand_over_samples]
            if result is not None:
                steps += [partial(self.hand_over, result), partial(self.hand_over_files, result)]
        steps.append(partial(self.experiment.finish, exit_code=exit_code))
        if will_go_on:  # W&B's own process is ended too: SLURM would kill it first, and this one then complain
            steps.append(wandb.teardown)
        for step in steps:
            try:
                step()
            except Exception as error:  # a signal to all of a job has ended W&B's own process; no run fails for it
                self.say_unsent(first_line(error))

    def hand_over_samples(self) -> None:
        """All samples, where W&B looks for the last of them."""
        samples = list(rows(self.run.samples))
        self.send_table(samples, lambda table: self.experiment.summary.update({"samples": table}))

    def hand_over(self, result: Mapping[str, Any]) -> None:
        """The metrics that a run ended with."""
        self.experiment.summary.update(dict(result))

    def hand_over_files(self, result: Mapping[str, Any]) -> None:
        """The certificate and the model, and what data they are of."""
        import wandb

        manifest = self.run.read_manifest()
        of = {name: manifest[name] for name in ("data_fingerprint", "tokenizer_hash")}
        facts = {"run_id": manifest["run_id"], **of}
        of["ledger"] = read_json(self.run.ledger)
        data = wandb.Artifact(f"data-{manifest['data_fingerprint'][:12]}", "dataset", metadata=of)
        with data.new_file("data.json") as stream:  # W&B tells versions apart by what is in them
            json.dump(of, stream, indent=2)
        # What `use_artifact` does, which waits for the service, and refuses offline.
        self.experiment._log_artifact(data, is_user_created=True, use_after_commit=True)
        if self.run.certificate.is_file():
            certificate = wandb.Artifact(f"certificate-{manifest['run_id']}", "certificate", metadata=facts)
            for file in (self.run.certificate, self.run.records):
                certificate.add_file(str(file), policy="immutable")  # else W&B makes a copy in the home directory
            self.experiment.log_artifact(certificate)
        if self.keeps_model:
            model = wandb.Artifact(f"model-{manifest['run_id']}", "model", metadata={**facts, **result})
            model.add_dir(str(self.run.model), policy="immutable")
            self.experiment.log_artifact(model)

    def say_unsent(self, why: str) -> None:
        if self.unsent:
            return
        self.unsent = True
        online = [] if self.experiment.offline else ["--no-skip-online"]
        send = command("wandb", "sync", *online, Path(self.experiment.dir).parent)
        LOG.warning("W&B may not have all of the run: %s\nTo send it: %s", why, send)


def weights_and_biases(
    run_dir: str,
    run_id: str,
    config: dict[str, Any],
    project: str = "lmlab",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = "train",
    tags: list[str] | None = None,
    notes: str | None = None,
    mode: str = "auto",
    against: str = "tokens",
    log_model: bool = False,
    patience: float = 60.0,
) -> Logger:
    """A W&B run whose id is the run's own, so that it stays one however often it is started.

    Args:
        mode: `online`, `offline`, `disabled`, or `auto`: online where an API key is configured. The
            variable WANDB_MODE wins. A service that can't be reached leaves the run offline.
        against: what curves are drawn against, `steps` or `tokens`.
        log_model: whether W&B also gets the exported model.
        patience: seconds that W&B has at the end to send what it has not yet.
    """
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(ANSWER))
    import wandb  # a second of start-up that a run without W&B need not pay

    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(offline=True)
    for key, value in (("logger.wandb.mode", mode), ("WANDB_MODE", os.environ.get("WANDB_MODE", mode))):
        if value not in MODES:
            raise UserError(f'{key} is one of {", ".join(MODES)}, not "{value}".{nearest(value, MODES)}')
    mode = value
    if against not in AXES:
        raise UserError(f'logger.wandb.against is one of {", ".join(AXES)}, not "{against}".{nearest(against, AXES)}')
    if patience <= 0:
        raise UserError(f"logger.wandb.patience is more than 0 seconds, not {patience}.")
    lab = Path(lmlab.__file__).parent
    settings: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": 20.0,
        "finish_timeout": float(patience),
        "finish_timeout_raises": True,
        "save_code": True,  # else W&B keeps no git diff
        # The code that runs is lmlab's; without a checkout of it, W&B looks where the run directory lies.
        "git_root": str(lab) if git_state(lab) else None,
    }
    options: dict[str, Any] = {
        "dir": run_dir,
        "id": run_id,
        "project": project,
        "entity": entity,
        "name": name,
        "group": group,
        "job_type": job_type,
        "tags": tags,
        "notes": notes,
        "config": config,
        "resume": "allow",
        "settings": wandb.Settings(**settings),
    }
    earlier = list(Path(run_dir).glob("wandb/offline-run-*"))
    try:
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        with redacted_arguments():
            run = wandb.init(**options | {"mode": mode})
    except (wandb.errors.Error, ValueError) as error:  # a key that is none is a ValueError
        LOG.warning("W&B could not be reached (%s); this run is logged offline.", first_line(error))
        wandb.teardown()  # its own process would take the id for one in use
        with redacted_arguments():
            run = wandb.init(**options | {"mode": "offline"})
    there = 0
    if run.offline and not run.disabled:
        for folder in earlier:  # the new one has their rows, and what a kill has kept from them
            folder.rename(folder.with_name(f"earlier-{folder.name}"))
        LOG.info("W&B: offline. To upload: %s", command("wandb", "sync", Path(run.dir).parent))
    elif run.url:
        LOG.info("W&B: %s", run.url)
        there = run.starting_step
    return WandB(run, RunDirectory(run_dir), there, AXES[against], log_model, patience)


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Let W&B see the command without its secrets: it keeps the arguments as metadata, and no setting stops that."""
    arguments, sys.argv = sys.argv, redacted_command(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments


def close(
    loggers: Iterable[Logger], exit_code: int = 0, will_go_on: bool = False, result: Mapping[str, Any] | None = None
) -> None:
    """End W&B runs, so that the next run of this process begins one of its own.

    One that `will_go_on`, W&B shows as pre-empted. It gets the `result` of one that has come to its end.
    """
    for logger in loggers:
        if not isinstance(logger, WandB) or logger.closed:
            continue
        logger.closed = True
        # Apart, since W&B would ask a service that is not there again and again.
        ending = Thread(target=logger.end, args=(exit_code, will_go_on, result), daemon=True)
        ending.start()
        ending.join(logger.patience + 5 * ANSWER)
        if ending.is_alive():
            logger.say_unsent(f"not done in {logger.patience:g} seconds")


@contextmanager
def closed_at_the_end(loggers: Iterable[Logger], run: RunDirectory) -> Iterator[None]:
    """End W&B runs when the run is through, with its summary; as failed or pre-empted where an error ends it."""
    try:
        yield
    except BaseException as error:
        close(loggers, exit_code=1, will_go_on=isinstance(error, Stopped))
        raise
    close(loggers, result=run.read_summary() if run.finished() else None)
