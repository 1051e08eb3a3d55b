"""Run directories as runs leave them, made from a real one without training."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lmlab.evaluation import records
from lmlab.runs.directory import RunDirectory


def made(
    source: Path,
    place: Path,
    changes: dict[str, Any] | None = None,
    factor: float = 1.0,
    end: str = "done",
    rows: int = 0,
    steps: int | None = None,
) -> Path:
    """A run like `source`, with other choices and losses `factor` times as high.

    Args:
        changes: of its config, by dotted keys.
        end: done; or as it lies after it was killed at its middle.
        rows: of metrics to have between the first and the last, where those of `source` are too few.
        steps: that it was to make.
    """
    run, like = RunDirectory(place), RunDirectory(source)
    place.mkdir(parents=True)
    config = yaml.safe_load(like.config.read_text())
    config["run_dir"] = str(place)
    for key, value in (changes or {}).items():
        *folders, name = key.split(".")
        inner = config
        for folder in folders:
            inner = inner[folder]
        inner[name] = value
    identity = place.name + str(abs(hash(str(place))))[:8]
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copy(like.overrides, run.overrides)
    shutil.copy(like.ledger, run.ledger)
    manifest = like.read_manifest() | {"run_id": identity, "seeds": {"run": config["seed"], "split": 0}}
    run.manifest.write_text(json.dumps(manifest | ({"steps": steps} if steps else {})))
    lines = [scaled(json.loads(line), factor) for line in like.metrics.read_text().splitlines()]
    if rows:
        lines = longer(lines, rows)
    if end != "done":
        half = lines[: len(lines) // 2]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in half) + '{"step": 99, "time": 17')
        return place
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = like.read_summary() | scaled(
        {key: v for key, v in like.read_summary().items() if key.startswith("val/")}, factor
    )
    run.summary.write_text(json.dumps(summary))
    certified(like, run, {"run_id": identity, "config": config}, factor)
    return place


def certified(like: RunDirectory, run: RunDirectory, trained: dict[str, Any], factor: float) -> None:
    """Records and certificate of losses `factor` times as high."""
    read = records.read(like.path)
    nll, units = read.sums
    nll = nll * [factor, factor**2]
    names = [read.table[name] for name in ("document", "stretch", "start", "domain")]
    columns = [*names, *nll.T, *units.T]
    table = pa.table(columns, records.SCHEMAS[records.FORMAT])
    certificate = read.certificate | records.metrics_and_totals(nll, units, table, read.certificate)
    policy = read.certificate["policy"] | {"block_size": trained["config"]["preprocess"]["block_size"]}
    certificate |= {"run": trained, "records_hash": records.rows_hash(table), "weights_hash": trained["run_id"]}
    pq.write_table(table, run.records)
    run.certificate.write_text(json.dumps(certificate | {"policy": policy}))


def scaled(row: dict[str, Any], factor: float) -> dict[str, Any]:
    """A row of metrics with its losses, and what is made of them, at `factor`."""
    found = dict(row)
    for key, value in row.items():
        if key.endswith("perplexity"):
            found[key] = math.exp(min(700, factor * math.log(value)))
        elif key.endswith(("/loss", "bits_per_byte", "bits_per_word")):
            found[key] = factor * value
    return found


def longer(lines: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """So many rows, between those that there are."""
    train = next(line for line in lines if "train/loss" in line)
    first, last = lines[0], lines[-1]
    between = []
    for i in range(1, rows + 1):
        share = i / (rows + 1)
        row = {key: round(value * (1 + 1e-3 * math.sin(i)), 6) for key, value in train.items()}
        row |= {"step": i * 10, "time": first["time"] + 3600 * share, "data/tokens_seen": i * 2560}
        row["train/loss"] = first["val/loss"] - (first["val/loss"] - last["val/loss"]) * share**0.3 + 0.01 * math.sin(i)
        between.append(row)
        if i % 20 == 0:
            at = {name: row[name] for name in ("step", "time", "data/tokens_seen")}
            between.append({**last, **at, "val/loss": row["train/loss"]})
    end = {"step": rows * 10 + 10, "time": first["time"] + 3600, "data/tokens_seen": rows * 2560 + 2560}
    return [first, *between, {**last, **end}]
