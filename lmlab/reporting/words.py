"""How a report says things."""

import re
from typing import Any

from lmlab.console import command
from lmlab.io import from_here
from lmlab.reporting.reading import Run
from lmlab.runs.choices import as_typed


def next_command(run: Run) -> str:
    """How to go on with a run that has not come to its end; empty where there is nothing to do."""
    if run.state.name in ("done", "pruned", "running"):
        return ""
    if run.begun:
        return command("python", "-m", "lmlab.resume", from_here(run.place))
    return command("python", "-m", "lmlab.sweep", "resume", from_here(run.sweep)) if run.sweep else ""


def letter(number: int) -> str:
    """The name of a kind of evaluation."""
    return chr(65 + number) if number < 26 else f"E{number + 1}"


def file_name(key: str) -> str:
    """A key as a part of one; not always unique."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)[:80]


def figure(value: float) -> str:
    """A perplexity for people."""
    return f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.3g}"


def parameters(run: Run) -> str:
    """How many parameters a run's model has, where its summary says it."""
    count, trainable = (run.result.get(name) for name in ("parameters", "trainable_parameters"))
    if count is None:
        return ""
    return f"{count:,}" if trainable == count else f"{count:,} ({trainable:,})"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def brief(value: Any, most: int = 40) -> str:
    """A value of a config for people: of numbers four digits that count, long text cut in its middle."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return shortened(" ".join(as_typed(value).split()), most)


def shortened(text: str, most: int) -> str:
    """Text without its middle, where both ends may be what tells it from others."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"
