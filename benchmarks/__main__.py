"""All comparisons, one after the other, and one table of them.

  python -m benchmarks                every row at a size for two cores
  python -m benchmarks rows=mlm       the rows whose command has this in it, those included that take long
  python -m benchmarks --table        no measuring: results/*.json as the table of README.md

Each row writes results/*.json, and can be run alone by its own command.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.arguments import Arguments
from benchmarks.results import COLUMNS, RESULTS, cells, place, record, show
from lmlab.errors import UserError, shown_plainly


class Row(NamedTuple):
    title: str
    words: str
    """The rest of the command, after `python -m benchmarks.`"""
    target: str
    long: bool = False
    """True if the row is run only where it is asked for."""

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.words}"

    def parsed(self) -> tuple[Any, Arguments]:
        """Returns the module of the comparison, and its settings."""
        name, *words = self.words.split()
        module = importlib.import_module(f"benchmarks.{name}")
        return module, module.Settings.parse(words)


ROWS = [
    Row("masked step, DistilRoBERTa size, 8 × 128 / Trainer", "train objective=mlm", "≥ 1.9"),
    Row(
        "the same in bf16, 1 × 32",
        "train objective=mlm precision=bf16-mixed batch_size=1 block_size=32 agree=1",
        "≥ 1.9",
    ),
    Row("the same in bf16, 8 × 128", "train objective=mlm precision=bf16-mixed", "≥ 1.9", long=True),
    Row("causal step, DistilGPT2 size, 8 × 128 / Trainer", "train", "≥ 1.10"),
    Row("the same in bf16, 1 × 32", "train precision=bf16-mixed batch_size=1 block_size=32 agree=1", "≥ 1.10"),
    Row("the same in bf16, 8 × 128", "train precision=bf16-mixed", "≥ 1.10", long=True),
    Row("small causal model, 8 × 64 / plain PyTorch loop", "train size=small peer=loop", "≥ 0.95"),
    Row("the same, compiled / not", "train size=small peer=lmlab lmlab.compile=true", "≥ 1.15"),
    Row(
        "memory of a causal step, 4 layers × 128, 50k vocabulary, 8 × 1024 / Trainer",
        "train size=small block_size=1024 vocabulary=50257 measure=memory lmlab.activation_checkpointing=true",
        "≤ 0.6",
    ),
    Row(
        "memory of a causal step, DistilGPT2 size, 8 × 1024 / Trainer",
        "train block_size=1024 measure=memory lmlab.activation_checkpointing=true",
        "≤ 0.6",
        long=True,
    ),
    Row("group_texts, 8 M tokens / the guide's", "data task=group_texts", "≥ 100"),
    Row("load → blocks, 5,000 ELI5-like records / the guide's", "data", "≥ 1.8"),
    Row("memory of preparing, corpus 16 × larger / smaller", "data task=memory", "< 1.3"),
    Row("scoring in blocks / forward pass of training", "evaluate", "≥ 1"),
    Row("block/stride × cost of blocks / cost of sliding", "evaluate peer=blocks", "≥ 1"),
    Row("head and loss, 1,016 rows: all logits at once / in chunks", "head", ""),
    Row("head and loss of a masked batch, 154 rows", "head rows=154", ""),
    Row("`python -m lmlab.train --help`, seconds", "start what=help", "< 1.2"),
    Row("default run, seconds to its first step", "start", "< 10"),
]


@dataclass
class Settings(Arguments):
    rows: str = ""


def main() -> None:
    with shown_plainly():
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(__doc__)
        elif sys.argv[1:] == ["--table"]:
            print(table())
        else:
            run(Settings.parse(sys.argv[1:]).rows)


def run(wanted: str) -> None:
    """Measures the wanted rows; one that fails does not keep the others from being measured."""
    chosen = [row for row in ROWS if (wanted in row.words if wanted else not row.long)]
    if not chosen:
        raise UserError(f'no command of a row has "{wanted}" in it. Without rows=… all are run.')
    shown, failed = [], []
    for row in chosen:
        print(f"{row.title}: {row.command}", flush=True)
        module, settings = row.parsed()
        try:
            result = record(row.words.split()[0], settings, module.compare)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(row.command)
            result = None
        shown.append((row.title, result, row.target))
    show(shown)
    if failed:
        raise UserError("\n".join(["these rows failed; their errors are above:", *failed]))


def table() -> str:
    """Returns the results on record as Markdown: each row, then whatever else was measured."""
    files = {file: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    lines = [[*COLUMNS, "command"], ["---"] * (len(COLUMNS) + 1)]
    for row in ROWS:
        result = files.pop(place(row.words.split()[0], row.parsed()[1]), None)
        lines.append([*cells(row.title, result, row.target), f"`{result['command'] if result else row.command}`"])
    for result in files.values():
        title = "" if result.get("device", "cpu") == "cpu" else result["device"]
        lines.append([*cells(title, result, ""), f"`{result['command']}`"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
