"""The run directory: where every file of a run lies, and what the run is (promise 4)."""

import errno
import os
import platform
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

import lmlab
from lmlab import secrets
from lmlab.errors import UserError
from lmlab.io import content, empty_folders_removed, held, lock, read_json, write_json

PACKAGES = (
    "lightning",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "wandb",
    "torchmetrics",
    "numpy",
)


class RunDirectory:
    """Names the files of a run; nothing is read or written before it is asked for."""

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
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.tokenizer = self.path / "tokenizer"
        self.profile = self.path / "profile"
        self.log = self.path / "train.log"
        self.logs = self.path / "logs"
        self.failure = self.path / "failure.json"
        self.locked = self.path / ".lock"

    def checkpoint_at(self, step: int) -> Path:
        """The whole state of the run after `step` optimizer steps."""
        return self.checkpoints / f"step-{step}.ckpt"

    def best_at(self, step: int) -> Path:
        """The weights after `step` optimizer steps, kept as some of the best."""
        return self.checkpoints / f"best-{step}.ckpt"

    def rank_log(self, rank: int) -> Path:
        """What a rank other than 0 printed."""
        return self.logs / f"rank{rank}.log"

    def checkpoint_files(self) -> list[Path]:
        """The states that are kept, the newest last."""
        return self.numbered("step")

    def best(self) -> list[Path]:
        """The best weights that are kept, in the order of their steps."""
        return self.numbered("best")

    def numbered(self, name: str) -> list[Path]:
        # What else a person or a callback put there is theirs.
        places = (p for p in self.checkpoints.glob(f"{name}-*.ckpt") if p.stem.removeprefix(f"{name}-").isdecimal())
        return sorted(places, key=self.step_of)

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.stem.rpartition("-")[2])

    @contextmanager
    def lock(self) -> Iterator[set[Path]]:
        """Keep other processes from this directory. However this one ends, the lock goes with it.

        Yields:
            What lay in it before; all else may be taken back inside, and a new directory then goes too.

        Raises:
            UserError: another process has it.
        """
        before = content(self.path)
        with empty_folders_removed(self.path), opened(self.locked) as file:
            try:
                lock(file, wait=False)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                raise UserError(
                    f"{self.path} is being written by another process: {file.read().strip() or 'which just began'}.\n"
                    "Wait until it has ended, or stop it by Ctrl-C or kill: it keeps its state and can go on."
                ) from None
            file.truncate(0)
            with suppress(OSError):  # a full disk keeps no lock from being one
                os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
            yield before

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Name the cause of an error that comes of the directory's being gone.

        Raises:
            UserError: it was there when something was begun in it, and is no more.
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
        """Whether another process has this directory."""
        return held(self.locked)

    def begun(self) -> bool:
        """Whether the directory holds a run or an evaluation."""
        return self.manifest.is_file()

    def start(self, seeds: dict[str, int], **facts: Any) -> None:
        """Make this the directory of a new run, by writing its manifest. `facts` are added to it.

        Raises:
            UserError: the directory holds a run or an evaluation already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.begun():
            raise UserError(
                f"{self.path} holds a run or an evaluation already.\nChoose another directory: hydra.run.dir=DIR"
            )
        swept = "WANDB_SWEEP_ID" in os.environ  # W&B's own agent starts this run, and has named it
        manifest = {
            "run_id": (swept and os.environ.get("WANDB_RUN_ID")) or uuid.uuid4().hex[:8],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": secrets.redacted_command([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "seeds": seeds,
            **surroundings(),
            **facts,
        }
        write_json(self.manifest, manifest)

    def give_up(self) -> None:
        """Free the directory of a run that was refused before it began."""
        if not self.ledger.exists() and not self.certificate.exists():
            for file in (self.manifest, self.config, self.overrides):
                file.unlink(missing_ok=True)

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary.is_file()

    def unfinished(self) -> bool:
        """Whether the directory holds a run that began to train and has not ended: it goes on, or was stopped."""
        return self.begun() and self.config.is_file() and self.ledger.is_file() and not self.model.is_dir()

    def failed(self) -> dict[str, Any] | None:
        """What ended the last attempt at a run that has not come to its end: see status.py."""
        return read_json(self.failure) if self.failure.is_file() else None

    def read_manifest(self) -> dict[str, Any]:
        """The manifest."""
        return read_json(self.manifest)

    def trained_as(self) -> dict[str, Any] | None:
        """The run's id and composed config, as a certificate names them; None if this is no run."""
        if not (self.manifest.is_file() and self.config.is_file()):
            return None
        return {"run_id": self.read_manifest()["run_id"], "config": yaml.safe_load(self.config.read_text())}

    def fingerprint(self) -> str:
        """Of the data that it was trained with."""
        return self.read_manifest()["data_fingerprint"]

    def provenance(self) -> dict[str, Any]:
        """By what, and where, the directory was made."""
        manifest = self.read_manifest()
        return {key: manifest[key] for key in ("command", "lmlab", "git", "python", "packages", "machine")}

    def read_summary(self) -> dict[str, Any]:
        """What the run ended with."""
        return read_json(self.summary)

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        write_json(self.manifest, self.read_manifest() | facts)


def opened(place: Path) -> TextIO:
    """A file to read and add to, in a folder that may have to be made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.open("a+")


def surroundings() -> dict[str, Any]:
    """By what, and where, this process runs."""
    return {
        "lmlab": lmlab.__version__,
        "git": git_state(Path(lmlab.__file__).parent),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What code and versions differ between the surroundings of two runs."""
    pairs = {name: (then[name], now[name]) for name in ("lmlab", "python")}
    pairs["commit"] = tuple((side["git"] or {}).get("commit", "none")[:12] for side in (then, now))
    for name in sorted(then["packages"].keys() | now["packages"].keys()):
        pairs[name] = then["packages"].get(name, "none"), now["packages"].get(name, "none")
    return [f"{name} {before} → {after}" for name, (before, after) in pairs.items() if before != after]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout `folder` lies in, and whether it has changes; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie in somebody's environment inside a checkout of something else.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
