"""Writes and shows the result of a comparison."""

import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lmlab
from benchmarks.arguments import Arguments
from lmlab.console import show_rows
from lmlab.errors import shown_plainly
from lmlab.io import write_json
from lmlab.runs.manifest import PACKAGES, git_state

RESULTS = Path(__file__).parent / "results"
EFFORT = ("pairs", "turn", "agree", "warmup", "runs", "rounds")  # how well is measured, not what
COLUMNS = ("", "lmlab", "peer", "median", "spread", "target")
GPU_COLUMNS = ("", "tokens/s", "ms a step", "MFU", "of a measured peak", "peak memory, GiB", "median", "spread")


def verb(
    name: str, text: str, settings: type[Arguments], compare: Callable[[Any], dict[str, Any]], **options: Any
) -> None:
    """Runs one comparison as the command line says, writes its result and shows it; `text` is for `--help`."""
    with shown_plainly():
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(text)
        else:
            result = record(name, settings.parse(sys.argv[1:], **options), compare)
            title = result["command"].removeprefix("python -m benchmarks.")
            show([(title, result, "")], gpu="speed" in result and result["device"] != "cpu")


def record(name: str, settings: Arguments, compare: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Runs a comparison, and writes the result with all that it depends on."""
    command = " ".join(["python", "-m", f"benchmarks.{name}", *settings.words()])
    result = {"command": command, **compare(settings), "settings": asdict(settings), **provenance()}
    RESULTS.mkdir(exist_ok=True)
    write_json(place(name, settings, result.get("device", "cpu")), result)
    return result


def place(name: str, settings: Arguments, device: str = "cpu") -> Path:
    """Returns the path of a result: one for each comparison and kind of device, however long it was measured."""
    what = [word for word in settings.words() if word.partition("=")[0] not in EFFORT]
    words = [*([] if device == "cpu" else ["gpu"]), name, *what]
    return RESULTS / f"{re.sub('[^a-zA-Z0-9_.=-]', '-', '-'.join(words))}.json"


def provenance() -> dict[str, Any]:
    """Returns machine, versions and commit; neither the machine's name nor a path on it."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "machine": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in (*PACKAGES, "accelerate")},
        },
        "git": git_state(Path(lmlab.__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cells(title: str, result: dict[str, Any] | None, target: str) -> list[str]:
    """Returns the cells of a row of the table."""
    if result is None:
        return [title, "", "", "", "", target]
    sides = [f"{value:,.{0 if value >= 100 else 2}f} {result['unit']}" for value in result["sides"].values()]
    return [title, *sides, *[""] * (2 - len(sides)), *judged(result), target]


def gpu_cells(title: str, result: dict[str, Any] | None) -> list[str]:
    """Returns the cells of a row of the table for GPUs: lmlab's figure and the peer's, or a question mark."""
    if result is None:
        return [title, *[""] * (len(GPU_COLUMNS) - 1)]
    formats = {
        "tokens_per_s": "{:,.0f}",
        "step_ms": "{:.1f}",
        "mfu": "{:.1%}",
        "mfu_of_measured": "{:.1%}",
        "peak_memory_gib": "{:.1f}",
    }
    both = [
        " / ".join("?" if side[name] is None else shape.format(side[name]) for side in result["speed"].values())
        for name, shape in formats.items()
    ]
    return [title, *both, *judged(result)]


def judged(result: dict[str, Any]) -> list[str]:
    """Returns a result's median and spread."""
    found = result["result"]
    return [f"{found['median']:.3g}", f"{found['min']:.3g} – {found['max']:.3g}"] if found else ["void", ""]


def show(rows: list[tuple[str, dict[str, Any] | None, str]], gpu: bool = False) -> None:
    """Prints the table of some results, and why some are void."""
    if gpu:
        show_rows("Benchmarks", GPU_COLUMNS, [gpu_cells(title, result) for title, result, _ in rows])
    else:
        show_rows("Benchmarks", COLUMNS, [cells(*row) for row in rows])
    for title, result, _ in rows:
        if result and result["void"]:
            print(f"void: {title}\n  {result['void']}")
