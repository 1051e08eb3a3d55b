"""`python -m lmlab.dashboard ENTITY/PROJECT`: a W&B project's runs at a glance.

Takes ordinary arguments. Makes a workspace and a report page. Causal and masked figures never
share a panel or a ranking.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, first_line, shown_plainly, stopped_with

TOKENS = "data/tokens_seen"
COLUMNS = ("optim.lr", "optim.weight_decay", "batch_size", "preprocess.block_size", "seed")


class Kind(NamedTuple):
    """An objective, and what the names of its figures begin with."""

    title: str
    objective: str
    prefix: str
    columns: tuple[str, ...]
    """Config keys of sweeps that others do not have."""


KINDS = (
    Kind("Causal models", "lmlab.objectives.clm.CausalLM", "", ()),
    Kind("Masked models", "lmlab.objectives.mlm.MaskedLM", "masked_", ("objective.mask_probability",)),
)


def parser() -> argparse.ArgumentParser:
    p = Arguments(
        prog="python -m lmlab.dashboard",
        description="Make a workspace and a report page for the runs of a W&B project. Each call makes new ones.",
    )
    p.add_argument("project", type=path, metavar="ENTITY/PROJECT", help="as in the address of the project's page")
    p.add_argument("--columns", nargs="+", default=COLUMNS, metavar="KEY", help=f"of sweeps ({' '.join(COLUMNS)})")
    p.add_argument("--dry-run", action="store_true", help="only say what would be made; needs no network and no key")
    return p


def path(text: str) -> tuple[str, str]:
    """Entity and project."""
    parts = text.split("/")
    if len(parts) != 2 or not all(parts):
        raise argparse.ArgumentTypeError(f"entity/project, such as me/lmlab, not {text}")
    return parts[0], parts[1]


def main() -> None:
    with shown_plainly(), SIGNALS.heeded():
        arguments = parser().parse_args()
        entity, project = arguments.project
        if not arguments.dry_run:
            check_reachable()
        views = [workspace(entity, project), report(entity, project, arguments.columns)]
        if arguments.dry_run:
            for view in views:
                print("\n".join(outline(view)))
            return
        with stopped_with(""):
            for view in views:
                print(f"{type(view).__name__}: {saved(view)}")


def check_reachable() -> None:
    """Refuse to begin without a service that takes the key."""
    from lmlab.doctor import checks

    try:
        checks.check_wandb()
    except (UserError, checks.Skip) as error:
        raise UserError(f"W&B: {first_line(error)}\nTo see what would be made without it: --dry-run") from error


def saved(view: Any) -> str:
    """Make a workspace or report on the server; returns its address."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    wandb.setup(wandb.Settings(silent=True))
    try:
        return view.save().url
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise UserError(f"W&B made no {type(view).__name__.lower()}: {first_line(error)}") from error


def workspace(entity: str, project: str) -> Any:
    """The project's workspace: curves by what they are of."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    curves = [ws.Section(kind.title, panels=quality(kind), is_open=True) for kind in KINDS]
    training = ("optim/lr", "optim/grad_norm")
    return ws.Workspace(
        entity,
        project,
        name="lmlab",
        sections=[
            *curves,
            ws.Section("Throughput", panels=[*throughput()], is_open=True),
            ws.Section("Training", panels=[wr.LinePlot(title=name, x=TOKENS, y=[name]) for name in training]),
            ws.Section("Samples", panels=[wr.WeavePanelSummaryTable(table_name="samples")]),
        ],
        settings=ws.WorkspaceSettings(x_axis=TOKENS, max_runs=50),
    )


def report(entity: str, project: str, columns: list[str]) -> Any:
    """The report page: each kind of model with runs of its own."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.P("Perplexities are of held-out text. Those of a masked model are no measure of a causal one."),
        wr.TableOfContents(),
    ]
    for kind in KINDS:
        best = wr.SummaryMetric(f"val/{kind.prefix}bits_per_byte")  # the same text, whatever the tokenizer
        runs = wr.Runset(
            entity,
            project,
            name=f"{kind.title}, best first",
            filters=[expr.Config("objective.value._target_") == kind.objective],  # as W&B's own pages write it
            order=[wr.OrderBy(best, ascending=True)],
        )
        swept = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key == "optim.lr") for key in columns]
        swept += [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in kind.columns]
        parts = {
            "perplexity by tokens": quality(kind),
            "best runs": [wr.BarPlot(title=f"{best.name}, of the best weights", metrics=[best], max_bars_to_show=20)],
            "sweeps": [
                wr.ParallelCoordinatesPlot(
                    title="what was swept", columns=[*swept, wr.ParallelCoordinatesPlotColumn(best, inverted=True)]
                ),
                wr.ParameterImportancePlot(with_respect_to=best.name),
            ],
            "throughput": throughput(),
            "samples": [wr.WeavePanelSummaryTable(table_name="samples")],
        }
        blocks.append(wr.H1(kind.title))
        for title, panels in parts.items():
            for number, panel in enumerate(panels):
                panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=24 // min(2, len(panels)), h=8)
            blocks += [wr.H2(f"{kind.title}: {title}"), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(project, entity, title="lmlab", blocks=blocks, width="fluid")


def quality(kind: Kind) -> list[Any]:
    """Curves of how well models of a kind do."""
    import wandb_workspaces.reports.v2 as wr

    names = [f"val/{kind.prefix}perplexity", f"val/{kind.prefix}bits_per_byte", f"train/{kind.prefix}perplexity"]
    return [
        wr.LinePlot(title=name, x=TOKENS, y=[name], title_x="tokens", log_y=name.endswith("perplexity"))
        for name in names
    ]


def throughput() -> list[Any]:
    """Curves of how fast runs are, and of what they need."""
    import wandb_workspaces.reports.v2 as wr

    names = ("perf/tokens_per_s", "perf/step_ms", "perf/data_wait", "perf/peak_memory_gib")
    return [wr.LinePlot(title=name, x=TOKENS, y=[name], title_x="tokens") for name in names]


def outline(view: Any) -> Iterator[str]:
    """What a workspace or report has, line by line."""
    entity, project = view.entity, view.project
    yield f"{type(view).__name__} of {entity}/{project}: {getattr(view, 'name', None) or view.title}"
    for section in getattr(view, "sections", ()):
        yield f"  {section.name}"
        yield from (f"    {shown(panel)}" for panel in section.panels)
    for block in getattr(view, "blocks", ()):
        if type(block).__name__ in ("H1", "H2"):
            yield f"  {'  ' * (type(block).__name__ == 'H2')}{block.text}"
        for panel in getattr(block, "panels", ()):
            yield f"      {shown(panel)}"


def shown(panel: Any) -> str:
    """A panel in words."""
    kind = type(panel).__name__
    if kind == "LinePlot":
        return f"{kind}: {', '.join(panel.y)} by {panel.x}"
    if kind == "ParallelCoordinatesPlot":
        return f"{kind}: {', '.join(column.metric.name for column in panel.columns)}"
    if kind == "BarPlot":
        return f"{kind}: {', '.join(metric.name for metric in panel.metrics)}"
    if kind == "ParameterImportancePlot":
        return f"{kind}: with respect to {panel.with_respect_to}"
    return f"{kind}: {panel.table_name}"


if __name__ == "__main__":
    main()
