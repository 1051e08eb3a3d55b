"""What a preview says on the terminal."""

from datetime import datetime, timedelta
from statistics import median
from textwrap import indent
from typing import Any

from omegaconf import DictConfig
from rich.text import Text

from lmlab.config import schema
from lmlab.console import console, show_result, show_rows
from lmlab.data.datamodule import Batch
from lmlab.preview import job
from lmlab.preview.cost import Term, lasting
from lmlab.preview.planning import Planned, changed_keys
from lmlab.runs.choices import said


def show_config(plan: Planned) -> None:
    if plan.swept:
        which = "A sweep of" if plan.jobs is None else "A search of"
        print(f"{which} {plan.points} points; shown: {' '.join(word.lstrip('+') for word in plan.first)}")
    changed = changed_keys(plan)
    if not changed:
        print("Config: the default. All of it: --cfg job")
        return
    console().print(Text("Config, and in brackets the default; all of it: --cfg job", style="italic"))
    for key, (now, default) in changed.items():
        console().print(Text.assemble("  ", (key, "bold"), f": {said(now)} ", (f"({said(default)})", "dim")))


def show_parts(found: dict[str, Any]) -> None:
    whole = sum(count for _, count, _ in found["parts"]) or 1
    rows = [(name, f"{n:,}", f"{n / whole:.1%}", f"{trained:,}") for name, n, trained in found["parts"]]
    rows.append(("all", f"{whole:,}", "", f"{sum(trained for _, _, trained in found['parts']):,}"))
    show_rows("Parameters", ("part", "parameters", "share", "trainable"), rows)


def show_measured(cfg: DictConfig, found: dict[str, Any], first: Batch) -> None:
    """Memory and time of the steps that were made."""
    world, later = schema.world(cfg.trainer), found["steps"][1:] or found["steps"]
    step = median(later)
    tokens = first.tokens * cfg.trainer.accumulate_grad_batches * world
    rows = {name: f"{size / 2**20:,.1f} MiB" for name, size in found["bytes"].items()}
    rows["peak memory"] = f"{found['peak']:.2f} GiB of {'the GPU' if schema.uses_gpu(cfg.trainer) else 'the process'}"
    rows["first step"] = lasting(found["steps"][0])
    rows["a step"] = f"{lasting(step)} (median of {len(later)}, {lasting(min(later))} to {lasting(max(later))})"
    flops = f", {found['flops'] / step / 1e9:,.1f} GFLOP/s of a device" if found["flops"] else ""
    rows["speed"] = f"{tokens / step:,.0f} tokens/s{flops}"
    rows["validation batch"] = lasting(sum(found["validation"]) / len(found["validation"]))
    rows["state"] = f"{lasting(found['state'])} to write" if "state" in found else "no room here to write one"
    if world > 1:
        rows["devices"] = f"one of {world} measured, with its share of the batch; what they say to each other is not"
        if cfg.trainer.strategy == "fsdp":
            rows["sharding"] = "not measured: sharded, a device holds less than this one did"
    show_result(rows, "Measured")


def show_estimate(plan: Planned, parts: list[Term], total: float) -> None:
    width = at_once(plan)
    rows = [(term.name, f"{term.times:,}", lasting(term.each), lasting(term.seconds)) for term in parts]
    show_rows("Time", ("", "count", "each", "in all"), [*rows, ("a run", "", "", lasting(total))])
    rounds = -(-plan.points // width)
    if plan.swept:
        side = f", {width} at a time" if width > 1 else ""
        print(f"{plan.points} points{side}: {lasting(rounds * total)}, if each takes as long as this one.")
    end = datetime.now().astimezone() + timedelta(seconds=rounds * total)
    print(f"Begun now, it would end at {end:%Y-%m-%d %H:%M %Z}. Not in it: W&B, the export, and what callbacks add.")


def at_once(plan: Planned) -> int:
    """How many points of a sweep run at the same time."""
    return min(plan.points, plan.jobs or plan.points, (plan.launcher or {}).get("array_parallelism", 1))


def show_job(plan: Planned, found: dict[str, Any], total: float | None) -> None:
    """The script of a SLURM job, and its limits against its run."""
    if plan.launcher is None:
        print("The job can't be shown without Hydra's plugin for SLURM: pip install 'lmlab[slurm]'")
        return
    script = job.script(plan.launcher, min(plan.points, plan.jobs or plan.points))
    print("Job, as it would be submitted:\n")
    print(indent(script, "    "))
    print("\nIts limits:")
    for met, says in job.checks(plan.launcher, plan.cfg, found, total):
        print(f"  {'met' if met else 'unknown' if met is None else 'NOT MET':<8} {says}")
    if not plan.swept:
        print("Without -m the command runs here, and no job is submitted.")
