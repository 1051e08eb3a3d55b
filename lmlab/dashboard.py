"""The command `python -m lmlab.dashboard ENTITY/PROJECT`, which shows a W&B project's runs at a glance.

Takes ordinary arguments. Makes a workspace and a report page. Metrics of different names never share a panel or a
ranking.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, first_line, shown_plainly, stopped_with
from lmlab.evaluation.metrics import BOUND, EXACT, metric_prefix

TOKENS = "data/tokens_seen"
COLUMNS = ("optim.lr", "optim.weight_decay", "batch_size", "preprocess.block_size", "seed")
THROUGHPUT = ("perf/tokens_per_s", "perf/step_ms", "perf/data_wait", "perf/peak_memory_gib")
TRAINING = ("optim/lr", "optim/grad_norm")
METRICS = (EXACT, BOUND, "masked_perplexity")
SWEPT = {"masked_perplexity": ("objective.mask_probability",)}
"""The config keys that only the sweeps of runs with a metric have."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.dashboard",
        description="Make a workspace and a report page for the runs of a W&B project. Each call makes new ones.",
    )
    p.add_argument(
        "project", type=read_project, metavar="ENTITY/PROJECT", help="as in the address of the project's page"
    )
    p.add_argument("--columns", nargs="+", default=COLUMNS, metavar="KEY", help=f"of sweeps ({' '.join(COLUMNS)})")
    p.add_argument(
        "--metrics", nargs="+", default=METRICS, metavar="NAME", help=f"perplexities to show ({' '.join(METRICS)})"
    )
    p.add_argument("--dry-run", action="store_true", help="only say what would be made; needs no network and no key")
    return p


def read_project(text: str) -> tuple[str, str]:
    """Returns entity and project of an argument, or refuses it."""
    parts = text.split("/")
    if len(parts) != 2 or not all(parts):
        raise argparse.ArgumentTypeError(f"entity/project, such as me/lmlab, not {text}")
    return parts[0], parts[1]


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        arguments = parser().parse_args()
        if not arguments.dry_run:
            check_reachable()
        entity, project = arguments.project
        views = [
            make_workspace(entity, project, arguments.metrics),
            make_report(entity, project, arguments.metrics, arguments.columns),
        ]
        if arguments.dry_run:
            for view in views:
                print("\n".join(outline(view)))
            return
        with stopped_with(""):
            for view in views:
                print(f"{type(view).__name__}: {save(view)}")


def check_reachable() -> None:
    """Refuses to begin without a service that takes the key."""
    from lmlab.doctor import checks

    try:
        checks.check_wandb()
    except (UserError, checks.Skip) as error:
        raise UserError(f"W&B: {first_line(error)}\nTo see what would be made without it: --dry-run") from error


def save(view: Any) -> str:
    """Makes a workspace or report on the server, and returns its address."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    wandb.setup(wandb.Settings(silent=True))
    try:
        return view.save().url
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise UserError(f"W&B made no {type(view).__name__.lower()}: {first_line(error)}") from error


def title(metric: str) -> str:
    """Returns the heading of what is shown of the runs that have a metric."""
    return metric.replace("_", " ").capitalize()


def bits_per_byte(metric: str) -> str:
    """Returns the logged name of the bits per byte beside a perplexity of that name."""
    return f"val/{metric_prefix(metric)}bits_per_byte"


def curves(metric: str) -> list[Any]:
    """Returns the panels that say how well models with this perplexity do."""
    return line_plots([f"val/{metric}", bits_per_byte(metric), f"train/{metric}"])


def make_workspace(entity: str, project: str, metrics: Sequence[str]) -> Any:
    """Returns the project's workspace: curves by what they are of."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(title(metric), panels=curves(metric), is_open=True) for metric in metrics]
    sections += [
        ws.Section("Throughput", panels=line_plots(THROUGHPUT), is_open=True),
        ws.Section("Training", panels=line_plots(TRAINING)),
        ws.Section("Samples", panels=[wr.WeavePanelSummaryTable(table_name="samples")]),
    ]
    settings = ws.WorkspaceSettings(x_axis=TOKENS, max_runs=50)
    return ws.Workspace(entity, project, name="lmlab", sections=sections, settings=settings)


def make_report(entity: str, project: str, metrics: Sequence[str], columns: Sequence[str]) -> Any:
    """Returns the report page: each metric with the runs that have it."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.P(
            "Metrics are of held-out text, and those of different names do not mean the same: a bound is an upper "
            "bound of perplexity, and a masked perplexity is no measure of a causal model's."
        ),
        wr.TableOfContents(),
    ]
    for metric in metrics:
        best = wr.SummaryMetric(bits_per_byte(metric))  # the same text, whatever the tokenizer
        runs = wr.Runset(
            entity,
            project,
            name=f"{title(metric)}, best first",
            filters=[expr.Summary(best.name) >= 0],  # true of the runs that have it
            order=[wr.OrderBy(best, ascending=True)],
        )
        keys = [*columns, *SWEPT.get(metric, ())]
        swept = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key == "optim.lr") for key in keys]
        swept.append(wr.ParallelCoordinatesPlotColumn(best, inverted=True))
        parts = {
            "curves by tokens": curves(metric),
            "best runs": [wr.BarPlot(title=f"{best.name}, of the best weights", metrics=[best], max_bars_to_show=20)],
            "sweeps": [
                wr.ParallelCoordinatesPlot(title=", ".join([*keys, best.name]), columns=swept),
                wr.ParameterImportancePlot(with_respect_to=best.name),
            ],
            "throughput": line_plots(THROUGHPUT),
            "samples": [wr.WeavePanelSummaryTable(table_name="samples")],
        }
        blocks.append(wr.H1(title(metric)))
        for part, panels in parts.items():
            for number, panel in enumerate(panels):
                panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=24 // min(2, len(panels)), h=8)
            blocks += [wr.H2(f"{title(metric)}: {part}"), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(project, entity, title="lmlab", blocks=blocks, width="fluid")


def line_plots(names: Sequence[str]) -> list[Any]:
    """Returns a panel of curves over the tokens seen for each metric."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=name, x=TOKENS, y=[name], title_x="tokens", log_y=name.endswith("perplexity"))
        for name in names
    ]


def outline(view: Any) -> Iterator[str]:
    """Yields the lines of what a workspace or report has."""
    yield f"{type(view).__name__} of {view.entity}/{view.project}: {getattr(view, 'name', None) or view.title}"
    for block in getattr(view, "sections", None) or view.blocks:
        heading = getattr(block, "name", None) or getattr(block, "text", None)
        if heading and type(block).__name__ != "P":
            yield f"{'    ' if type(block).__name__ == 'H2' else '  '}{heading}"
        for panel in getattr(block, "panels", ()):
            names = (getattr(panel, attribute, None) for attribute in ("title", "table_name", "with_respect_to"))
            axis = f" by {panel.x}" if type(panel).__name__ == "LinePlot" else ""
            yield f"      {type(panel).__name__}: {next(filter(None, names))}{axis}"


if __name__ == "__main__":
    main()
