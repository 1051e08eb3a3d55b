"""The run directory: where each file of a run lies, and one identity for all of them (promise 4)."""

import errno
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lmlab import secrets
from lmlab.errors import UserError
from lmlab.io import content, empty_folders_removed, held, lock, read_json, write_json
from lmlab.runs.manifest import environment


class RunDirectory:
    """The files of a run or an evaluation. Making the object neither reads nor writes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.overrides = self.path / "overrides.yaml"
        self.manifest = self.path / "manifest.json"
        self.ledger = self.path / "ledger.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.certificate = self.path / "certificate.json"
        self.records = self.path / "records.parquet"
        self.words = self.path / "words.parquet"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.series = self.path / "series"
        self.series_index = self.series / "index.json"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.tokenizer = self.path / "tokenizer"
        self.profile = self.path / "profile"
        self.log = self.path / "train.log"
        self.logs = self.path / "logs"
        self.failure = self.path / "failure.json"
        self.unsent = self.path / "unsent"
        self.lock_file = self.path / ".lock"

    def checkpoint_at(self, step: int) -> Path:
        """Returns the path of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step}.ckpt"

    def best_at(self, step: int) -> Path:
        """Returns the path of the weights after `step` optimizer steps, kept because they are among the best."""
        return self.checkpoints / f"best-{step}.ckpt"

    def series_at(self, step: int) -> Path:
        """Returns the path of the exported model after `step` optimizer steps, in a run with a series of them."""
        return self.series / f"step-{step}"

    def read_series(self) -> list[dict[str, Any]]:
        """Returns the step, tokens, path (in `series`) and dtype of each model of the series, in order of steps.

        Raises:
            UserError: its index is damaged.
        """
        if not self.series_index.is_file():
            return []
        models = read_json(self.series_index).get("models")
        if not isinstance(models, list) or not all(is_model(model) for model in models):
            raise UserError(f"{self.series_index} is damaged: it does not list models as lmlab writes them.")
        return models

    def rank_log(self, rank: int) -> Path:
        """Returns the path of the output of a rank other than 0."""
        return self.logs / f"rank{rank}.log"

    def checkpoint_files(self) -> list[Path]:
        """Returns the checkpoints that are there, in the order of their steps."""
        return self.numbered("step")

    def best_files(self) -> list[Path]:
        """Returns the best weights that are there, in the order of their steps."""
        return self.numbered("best")

    def numbered(self, name: str) -> list[Path]:
        """Returns the files `name-STEP.ckpt` in the order of their steps. Others are somebody else's."""
        paths = (p for p in self.checkpoints.glob(f"{name}-*.ckpt") if p.stem.removeprefix(f"{name}-").isdecimal())
        return sorted(paths, key=self.step_of)

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """Returns the step in the name of a checkpoint."""
        return int(checkpoint.stem.rpartition("-")[2])

    @contextmanager
    def lock(self) -> Iterator[set[Path]]:
        """Keeps other processes from writing to this directory. The lock ends with this process, however that ends.

        Yields:
            The paths that lay in it before. All others may be removed inside, and a new directory is then removed too.

        Raises:
            UserError: another process holds the lock.
        """
        before = content(self.path)
        with empty_folders_removed(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock_file.open("a+") as file:
                try:
                    lock(file, wait=False)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    file.seek(0)
                    raise UserError(
                        f"{self.path} is being written by another process: {file.read().strip() or 'just started'}.\n"
                        "Wait until it has ended, or stop it by Ctrl-C or kill: it keeps a checkpoint and can go on."
                    ) from None
                file.truncate(0)
                with suppress(OSError):  # a full disk does not keep the lock from being held
                    os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
                yield before

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Explains an error inside that comes of the directory being moved or deleted.

        Raises:
            UserError: the directory holds no run any more.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self.begun():
                raise
            raise UserError(
                f"{self.path} was moved or deleted while it was being written to.\n"
                "A run that was moved can go on from its last checkpoint: python -m lmlab.resume DIR",
                "gone",
            ) from error

    def held(self) -> bool:
        """Returns whether another process holds the lock of this directory."""
        return held(self.lock_file)

    def begun(self) -> bool:
        """Returns whether the directory holds a run or an evaluation."""
        return self.manifest.is_file()

    def has_config(self) -> bool:
        """Returns whether the directory holds a run or an evaluation, with its composed config."""
        return self.begun() and self.config.is_file()

    def check_unused(self) -> None:
        """Refuses a directory that holds a run or an evaluation already."""
        if self.begun():
            raise UserError(
                f"{self.path} holds a run or an evaluation already.\nChoose another directory: hydra.run.dir=DIR"
            )

    def start(self, seeds: dict[str, int], **facts: Any) -> None:
        """Makes this the directory of a new run, by writing its manifest.

        Args:
            seeds: the seeds of the run, by what each decides.
            facts: more of the manifest.

        Raises:
            UserError: the directory holds a run or an evaluation already.
        """
        self.check_unused()
        self.path.mkdir(parents=True, exist_ok=True)
        by_wandb = "WANDB_SWEEP_ID" in os.environ  # W&B's own agent starts this run, and has named it
        manifest = {
            "run_id": (by_wandb and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": secrets.redacted_command([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "seeds": seeds,
            **environment(),
            **facts,
        }
        write_json(self.manifest, manifest)

    def finished(self) -> bool:
        """Returns whether the directory holds a run that has finished."""
        return self.summary.is_file()

    def unfinished(self) -> bool:
        """Returns whether the directory holds a run that has begun to train and has not finished."""
        return self.has_config() and self.ledger.is_file() and not self.model.is_dir()

    def read_manifest(self) -> dict[str, Any]:
        """Returns what the run is: its id, command, seeds, data, software and machine."""
        return read_json(self.manifest)

    def update_manifest(self, **facts: Any) -> None:
        """Adds facts to the manifest."""
        write_json(self.manifest, self.read_manifest() | facts)

    def read_summary(self) -> dict[str, Any]:
        """Returns the metrics and counts that a finished run ended with."""
        return read_json(self.summary)

    def trained_as(self) -> dict[str, Any] | None:
        """Returns the run's id and composed config, as a certificate names them; None if this is no run."""
        if not self.has_config():
            return None
        return {"run_id": self.read_manifest()["run_id"], "config": yaml.safe_load(self.config.read_text())}

    def provenance(self) -> dict[str, Any]:
        """Returns the command, versions and machine by which the directory was made, and where the run was resumed."""
        manifest = self.read_manifest()
        names = ("command", "lmlab", "git", "python", "packages", "machine", "went_on")
        return {name: manifest[name] for name in names if name in manifest}


def is_model(entry: Any) -> bool:
    """Returns whether an entry of the index of a series is one as lmlab writes it."""
    kinds = {"step": int, "tokens": int, "path": str, "dtype": str}
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds
