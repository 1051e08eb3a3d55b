"""The run directory: where every file of a run lies, and what the run is (promise 4)."""

import json
import os
import platform
import socket
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import lmlab
from lmlab.errors import UserError
from lmlab.runs.files import write_json

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
        self.certificate = self.path / "certificate.json"
        self.records = self.path / "records.parquet"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.profile = self.path / "profile"

    def start(self, seeds: dict[str, int]) -> None:
        """Claim the directory for a new run, by writing its manifest.

        Raises:
            UserError: the directory holds a run or an evaluation already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            # Exclusive: of two runs started here at once, one gets it.
            self.manifest.touch(exist_ok=False)
        except FileExistsError:
            raise UserError(
                f"{self.path} holds a run or an evaluation already.\nChoose another directory: hydra.run.dir=DIR"
            ) from None
        manifest = {
            "run_id": uuid.uuid4().hex[:8],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
            "lmlab": lmlab.__version__,
            "git": git_state(Path(lmlab.__file__).parent),
            "seeds": seeds,
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "machine": {
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cpus": os.cpu_count(),
            },
        }
        try:
            write_json(self.manifest, manifest)
        except BaseException:  # a full disk: an empty manifest would hold the directory for ever
            self.manifest.unlink()
            raise

    def give_up(self) -> None:
        """Free the directory of a run that was refused before it began."""
        if not self.ledger.exists() and not self.certificate.exists():
            for file in (self.manifest, self.config, self.overrides):
                file.unlink(missing_ok=True)

    def identity(self) -> dict[str, Any]:
        """The manifest."""
        return json.loads(self.manifest.read_text())

    def trained_as(self) -> dict[str, Any] | None:
        """The run's id and composed config, as a certificate names them; None if this is no run."""
        if not (self.manifest.is_file() and self.config.is_file()):
            return None
        return {"run_id": self.identity()["run_id"], "config": yaml.safe_load(self.config.read_text())}

    def fingerprint(self) -> str:
        """Of the data that it was trained with."""
        return self.identity()["data_fingerprint"]

    def provenance(self) -> dict[str, Any]:
        """By what, and where, the directory was made."""
        manifest = self.identity()
        return {key: manifest[key] for key in ("command", "lmlab", "git", "python", "packages", "machine")}

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.summary.read_text())

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        write_json(self.manifest, self.identity() | facts)


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
