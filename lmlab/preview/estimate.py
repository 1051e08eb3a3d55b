"""The tables of a preview: parameters, memory and speed of a short run, and the time of a whole one."""

import math
from datetime import datetime, timedelta

from omegaconf import DictConfig

from lmlab.config import schema
from lmlab.config.short_run import Measurement, time_parts
from lmlab.config.targets import build
from lmlab.console import counted, duration, show_result, show_rows
from lmlab.preview.plan import Plan
from lmlab.training.series import DTYPES, Series, is_due
from lmlab.training.summary import parameters_text


def show_measured(cfg: DictConfig, measured: Measurement) -> None:
    """Prints the parameters of a model, and the memory and the time of the steps of a short run, if it made some."""
    rows = {"parameters": parameters_text(measured.parameters, measured.trainable)}
    if measured.steps:
        world, later = schema.world(cfg.trainer), measured.steps[1:] or measured.steps
        whose = "the GPU" if schema.uses_gpu(cfg.trainer) else "the process"
        least, most = duration(min(later)), duration(max(later))
        flops = f", {measured.flops / measured.step / 1e9:,.1f} GFLOP/s per device" if measured.flops else ""
        rows |= {name: f"{size / 2**20:,.1f} MiB" for name, size in measured.bytes.items()} | {
            "peak memory": f"{measured.device_memory:.2f} GiB of {whose}",
            "first step": duration(measured.steps[0]),
            "a step": f"{duration(measured.step)} (median of {len(later)}, {least} to {most})",
            "speed": f"{measured.tokens * world / measured.step:,.0f} tokens/s{flops}",
            "validation batch": duration(measured.validation_batch),
            "checkpoint": "no room here to write one",
        }
        if measured.checkpoint is not None:
            rows["checkpoint"] = f"{duration(measured.checkpoint)} to write"
        if world > 1:
            rows["devices"] = f"one of {world} measured, with its share of the batch; communication is left out"
            if schema.shards(cfg.trainer) > 1:
                rows["sharding"] = "not measured: sharded, a device holds less than this one did"
    show_result(rows, "Measured")


def show_series(cfg: DictConfig, measured: Measurement, steps: int) -> None:
    """Prints how many exported models a run of so many steps would write, and their size, if it is to write any."""
    block = (cfg.callbacks or {}).get("series")
    series = build(block, "callbacks.series") if block else None
    if isinstance(series, Series) and series.spacings:
        models = sum(is_due(step, series.spacings) for step in range(steps)) + 1  # and the last one
        size = models * measured.parameters * DTYPES[series.dtype].itemsize / 2**20
        print(f"Series: {counted(models, 'exported model')}, {size:,.1f} MiB in all.")


def show_estimate(plan: Plan, measured: Measurement, steps: int, interval: int, held_out: int, whole: int) -> float:
    """Prints the time of a run, of a sweep, and when it would end.

    Args:
        interval: steps between two validations.
        held_out: rows of a validation.
        whole: rows that are scored once more when training has ended.

    Returns:
        the seconds of a run.
    """
    parts = time_parts(plan.cfg, measured, steps, interval, held_out, whole)
    total = sum(count * each for _, count, each in parts)
    rows = [(name, f"{count:,}", duration(each), duration(count * each)) for name, count, each in parts]
    show_rows("Time", ("", "count", "each", "in all"), [*rows, ("a run", "", "", duration(total))])
    seconds = math.ceil(plan.points / plan.at_once) * total
    if plan.first is not None:
        side = f", {plan.at_once} at a time" if plan.at_once > 1 else ""
        print(f"{counted(plan.points, 'point')}{side}: {duration(seconds)}, if each takes as long as this one.")
    end = datetime.now().astimezone() + timedelta(seconds=seconds)
    print(f"Begun now, it would end at {end:%Y-%m-%d %H:%M %Z}. Not in it: W&B, the export, and what callbacks add.")
    return total
