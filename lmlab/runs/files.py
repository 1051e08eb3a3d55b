"""Files and folders that are whole or not there (promise 6)."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(place: Path, content: Any) -> None:
    write_text(place, json.dumps(content, indent=2) + "\n")


def write_text(place: Path, text: str) -> None:
    """Written beside its place, flushed, and renamed."""
    beside = place.with_name(f".{place.name}.partial")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, place)


def replaced(place: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder beside `place`, flush it, and put it in its place."""
    beside = place.with_name(f".{place.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
