"""The software and the machine that made a run, as its manifest records them."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import lmlab

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


def environment() -> dict[str, Any]:
    """Returns the versions, the git commit and the machine that this process runs with."""
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


def version_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the versions and the commit in which two environments differ, such as `torch 2.12.0 → 2.13.0`."""
    pairs = {name: (then[name], now[name]) for name in ("lmlab", "python")}
    pairs["commit"] = tuple((one["git"] or {}).get("commit", "none")[:12] for one in (then, now))
    for name in sorted(then["packages"].keys() | now["packages"].keys()):
        pairs[name] = then["packages"].get(name, "none"), now["packages"].get(name, "none")
    return [f"{name} {before} → {after}" for name, (before, after) in pairs.items() if before != after]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout in which a package lies, and whether it has changes; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie in somebody's environment inside a checkout of something else.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
