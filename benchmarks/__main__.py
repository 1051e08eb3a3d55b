"""All comparisons, one after the other, and one table of them.

  python -m benchmarks                every row at a size for two cores
  python -m benchmarks gpu            the rows for a GPU instead: about five minutes on an H100 or H200
  python -m benchmarks rows=mlm       the rows whose command has this in it, those included that take long
  python -m benchmarks --table        no measuring: results/*.json as the table of README.md

Each row writes results/*.json, and can be run alone by its own command.
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.arguments import Arguments
from benchmarks.results import COLUMNS, GPU_COLUMNS, RESULTS, cells, gpu_cells, place, record, show
from lmlab.errors import UserError, shown_plainly


class Row(NamedTuple):
    title: str
    words: str
    """The rest of the command, after `python -m benchmarks.`"""
    target: str = ""
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
    Row("tiny causal model, 8 × 16 / Lightning's own loop", "train size=tiny peer=lightning"),
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
    Row(
        "causal step with LoRA, DistilGPT2 size, 8 × 128 / of all weights",
        "train peer=lmlab agree=1 lmlab.adapter=lora",
        "≥ 1.33",
    ),
    Row("memory of the same", "train peer=lmlab measure=memory lmlab.adapter=lora", "≤ 0.6"),
    Row(
        "causal step with Muon, 4 layers × 256, 96 × 128 / with AdamW",
        "train size=medium peer=lmlab batch_size=96 agree=1 lmlab.optim=muon",
        "≥ 0.91",
    ),
    Row("small causal step / masked diffusion step of that size", "objectives", "≥ 0.91"),
    Row(
        "small generator's step and discriminator's / ELECTRA's step",
        "objectives objective=electra rounds=24",
        "≥ 0.95",
    ),
    Row(
        "DistilGPT2-size step across documents of 40 tokens / with document attention",
        "objectives objective=clm size=distil batch_size=2 steps=4 documents=40",
        "≥ 0.91",
    ),
    Row(
        "the same, masked, DistilRoBERTa size",
        "objectives objective=mlm size=distil batch_size=2 steps=4 documents=40",
        "≥ 0.91",
    ),
    Row("group_texts, 8 M tokens / the guide's", "data task=group_texts", "≥ 100"),
    Row("load → blocks, 5,000 ELI5-like records / the guide's", "data", "≥ 1.8"),
    Row("the same, 20,000 records, 50 MB", "data records=20000", "≥ 2.5"),
    Row("the same, 320,000 records, 800 MB", "data records=320000 pairs=1", "≥ 2.0", long=True),
    Row("memory of preparing, corpus 16 × larger / smaller", "data task=memory", "< 1.2"),
    Row("time of preparing, corpus 16 × larger / smaller", "data task=time", "< 17"),
    Row("preparing by one process / by two, a core each", "scale", "≥ 1.8", long=True),
    Row("second start at 800 MB of text, seconds", "scale task=start", "< 0.5", long=True),
    Row("first batch of 10⁹ blocks, seconds", "scale task=index", "< 1"),
    Row("memory of the same, MiB", "scale task=index of=memory", "< 200"),
    Row("scoring in blocks / forward pass of training", "evaluate", "≥ 1"),
    Row("block/stride × cost of blocks / cost of sliding", "evaluate peer=blocks", "≥ 1"),
    Row("500 minimal pairs, small causal model / minicons", "minimal_pairs", "", long=True),
    Row("200 minimal pairs, small masked model", "minimal_pairs objective=mlm count=200", "", long=True),
    Row("head and loss, 1,016 rows: all logits at once / in chunks", "head", ""),
    Row("head and loss of a masked batch, 154 rows", "head rows=154", ""),
    Row("`python -m lmlab.train --help`, seconds", "start what=help", "< 1.2"),
    Row("default run, seconds to its first step", "start", "< 10"),
]


GPU_ROWS = [
    Row(
        "GPT-2 124M, causal, 32 × 1024: lmlab / Trainer",
        "train size=gpt2 precision=bf16-mixed batch_size=32 dropout=off",
    ),
    Row(
        "the same: lmlab compiled / plain loop compiled as a whole",
        "train size=gpt2 peer=compiled precision=bf16-mixed batch_size=32 dropout=off lmlab.compile=true",
    ),
    Row(
        "DistilRoBERTa size, masked, 64 × 512: lmlab / Trainer",
        "train objective=mlm precision=bf16-mixed batch_size=64 block_size=512 dropout=off",
    ),
    Row(
        "the same: lmlab compiled / plain loop compiled as a whole",
        "train objective=mlm peer=compiled precision=bf16-mixed batch_size=64 block_size=512 dropout=off "
        "lmlab.compile=true",
    ),
    Row(
        "GPT-2 124M, causal, 32 × 1024: lmlab compiled / not",
        "train size=gpt2 peer=lmlab precision=bf16-mixed batch_size=32 dropout=off lmlab.compile=true",
    ),
    Row(
        "DistilRoBERTa size, masked, 64 × 512: lmlab compiled / not",
        "train objective=mlm peer=lmlab precision=bf16-mixed batch_size=64 block_size=512 dropout=off "
        "lmlab.compile=true",
    ),
]
"""What is measured on a GPU, the most important first."""


@dataclass
class Settings(Arguments):
    rows: str = ""


def main() -> None:
    with shown_plainly():
        words = sys.argv[1:]
        if {"--help", "-h"} & set(words):
            print(__doc__)
        elif words == ["--table"]:
            print(table())
        elif words[:1] == ["gpu"]:
            run(Settings.parse(words[1:]).rows, gpu=True)
        else:
            run(Settings.parse(words).rows)


def run(wanted: str, gpu: bool = False) -> None:
    """Measures the wanted rows; one that fails does not keep the others from being measured."""
    rows = GPU_ROWS if gpu else ROWS
    chosen = [row for row in rows if (wanted in row.words if wanted else not row.long)]
    if not chosen:
        raise UserError(f'no command of a row has "{wanted}" in it. Without rows=… all are run.')
    if gpu:
        refuse_without_gpu()
    shown, failed = [], []
    for row in chosen:
        print(f"{row.title}: {row.command}", flush=True)
        module, settings = row.parsed()
        began = time.perf_counter()
        try:
            result = record(row.words.split()[0], settings, module.compare)
        except (UserError, RuntimeError) as error:  # torch's own of a GPU are RuntimeErrors
            print(f"error: {error}", file=sys.stderr)
            failed.append(row.command)
            result = None
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        shown.append((row.title, result, row.target))
    show(shown, gpu)
    if failed:
        raise UserError("\n".join(["these rows failed; their errors are above:", *failed]))


def refuse_without_gpu() -> None:
    import torch  # two seconds, which --help need not wait for

    if not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here: torch finds none.\nFor the rows of a CPU, leave gpu out: python -m benchmarks"
        )


def table() -> str:
    """Returns the results on record as Markdown: each row, then whatever else was measured; then those of a GPU."""
    files = {file: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}

    def found(row: Row, device: str) -> tuple[dict[str, Any] | None, str]:
        """Returns a row's result, and its command as it was run."""
        result = files.pop(place(row.words.split()[0], row.parsed()[1], device), None)
        return result, f"`{result['command'] if result else row.command}`"

    lines, gpu_lines = [], []
    for row in ROWS:
        result, command = found(row, "cpu")
        lines.append([*cells(row.title, result, row.target), command])
    for row in GPU_ROWS:
        result, command = found(row, "gpu")
        day = f"{result['device']}, {result['date'][:10]}" if result else ""
        gpu_lines.append([*gpu_cells(row.title, result), day, command])
    for result in files.values():
        title = "" if result.get("device", "cpu") == "cpu" else result["device"]
        lines.append([*cells(title, result, ""), f"`{result['command']}`"])
    tables = [((*COLUMNS, "command"), lines), ((*GPU_COLUMNS, "measured", "command"), gpu_lines)]
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])
        for columns, rows in tables
    )


if __name__ == "__main__":
    main()
