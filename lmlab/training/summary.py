"""The end of a run: its summary on disk, and a table on the terminal."""

from typing import TYPE_CHECKING, Any

from lmlab.console import command, show_result
from lmlab.errors import UserError, first_line
from lmlab.evaluation.certify import precision_of
from lmlab.io import from_here, write_json
from lmlab.runs.directory import RunDirectory
from lmlab.training import suites
from lmlab.training.measure import Measure
from lmlab.training.validation import of_average

if TYPE_CHECKING:
    from lmlab.training.module import LMModule


def summarize(run: RunDirectory, trainer: Any, module: "LMModule", best: dict[str, Any] | None) -> dict[str, Any]:
    """Writes the summary of a run, which finishes it, and returns it.

    Args:
        best: the checkpoint of the exported weights; None for the last ones.

    Returns:
        the metrics of the exported weights on held-out text, those before training, and what training took.
    """
    measure = next(callback for callback in trainer.callbacks if isinstance(callback, Measure))
    pruned = [step for callback in trainer.callbacks if (step := getattr(callback, "pruned", None)) is not None]
    metric = f"val/{module.metric}"
    average = best and best.get("average")
    metrics = module.validations[trainer.global_step if best is None else best["global_step"]]
    if average:  # what else was measured, was of the weights themselves
        names = {name: of_average(name, average["kind"]) for name in module.metric_names}
        metrics = {name: metrics[own] for name, own in names.items() if own in metrics}
    summary = {
        **(module.final or metrics),
        **({"average": average} if average else {}),
        f"{metric}_before": module.validations[0][metric],
        "steps": trainer.global_step,
        **measure.result(),
        **({"pruned": pruned[0]} if pruned else {}),
    }
    write_json(run.summary, summary)
    return summary


def show_summary(run: RunDirectory, summary: dict[str, Any], module: "LMModule", data: Any, best: bool) -> None:
    """Prints the summary of a run, what its model generates, and the command that lets it generate more.

    Args:
        data: the `BlocksDataModule` that the module was trained on.
        best: whether the exported weights are the best ones rather than the last.
    """
    before, metric, part = module.validations[0], f"val/{module.metric}", ""
    held_out = (data.whole or data.held_out).documents
    documents = f"{len(held_out):,} held-out documents"
    if data.whole is not None:  # validations looked at a part of them, and all were scored at the end
        part = f"   ({len(data.held_out.documents):,} of {documents})"
    path = from_here(run.path)
    try:
        block = held_out.tokens[: module.block_size].tolist()
        text, generated = data.batches.objective.sample(module.model.eval(), data.tokenizer, block)
    except (UserError, RuntimeError) as error:  # the run is finished all the same
        text, generated = "…", f"(nothing: {first_line(error)})"
    rows = {
        f"{title(metric)} before": f"{before[metric]:,.2f}{part}",
        f"{title(metric)} after": f"{summary[metric]:,.2f}   ({'best' if best else 'last'} weights"
        f"{f', {average_text(summary)}' if 'average' in summary else ''}, "
        f"{f'all {documents}' if part else 'held-out text'})",
        **{title(name): f"{value:.4f}" for name, value in summary.items() if name.endswith("bits_per_byte")},
        **({"pairs accuracy": f"{summary[suites.METRIC]:.4f}"} if suites.METRIC in summary else {}),
        "parameters": parameters_text(summary["parameters"], summary["trainable_parameters"]),
        "tokens": f"{summary['tokens']:,} trained on in {summary['seconds']:.1f} s",
    }
    if "flops" in summary:
        rows["FLOPs"] = f"{summary['flops']:.3g} of forward and backward passes"
    rows["speed"] = f"{summary['tokens_per_s']:,.0f} tokens/s, {summary['data_wait']:.1%} of the time waiting for data"
    if "mfu" in summary:
        rows["mfu"] = f"{summary['mfu']:.1%} of what the device could do"
    rows["precision"] = precision_of(module.trainer)
    rows["peak memory"] = f"{summary['peak_memory_gib']:.2f} GiB"
    rows |= {"run directory": str(path), "model": str(path / run.model.name), "generated": generated}
    show_result(rows)
    print("Next:", command("python", "-m", "lmlab.predict", path, text))


def average_text(summary: dict[str, Any]) -> str:
    """Returns what the exported weights of a run are an average of."""
    average = summary["average"]
    if average["kind"] == "ema":
        return f"their moving average by {average['decay']:g}"
    return f"the mean of the last {average['weights']}"


def parameters_text(count: int, trainable: int) -> str:
    """Returns a number of parameters in words, and that of the trainable ones where not all are."""
    return f"{count:,}" + (f", {trainable:,} of them trainable" if trainable < count else "")


def title(metric: str) -> str:
    """A metric's name for people, such as `bits per byte`."""
    return metric.removeprefix("val/").replace("_", " ")
