"""The command `python -m lmlab.dashboard ENTITY/PROJECT`, which shows a W&B project's runs at a glance.

Takes ordinary arguments. Makes a workspace and a report page. Metrics of causal and of masked models never share a
panel or a ranking.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, first_line, shown_plainly, stopped_with

TOKENS = "data/tokens_seen"
COLUMNS = ("optim.lr", "optim.weight_decay", "batch_size", "preprocess.block_size", "seed")
THROUGHPUT = ("perf/tokens_per_s", "perf/step_ms", "perf/data_wait", "perf/peak_memory_gib")
TRAINING = ("optim/lr", "optim/grad_norm")


class Kind(NamedTuple):
    """An objective, and the prefix of the names of its metrics."""

    title: str
    objective: str
    prefix: str
    columns: tuple[str, ...]
    """The config keys that only its sweeps have."""

    @property
    def quality(self) -> list[str]:
        """The metrics that say how well its models do."""
        names = ("val/{}perplexity", "val/{}bits_per_byte", "train/{}perplexity")
        return [name.format(self.prefix) for name in names]


KINDS = (
    Kind("Causal models", "lmlab.objectives.clm.CausalLM", "", ()),
    Kind("Masked models", "lmlab.objectives.mlm.MaskedLM", "masked_", ("objective.mask_probability",)),
)


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
        views = [make_workspace(entity, project), make_report(entity, project, arguments.columns)]
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


def make_workspace(entity: str, project: str) -> Any:
    """Returns the project's workspace: curves by what they are of."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(kind.title, panels=line_plots(kind.quality), is_open=True) for kind in KINDS]
    sections += [
        ws.Section("Throughput", panels=line_plots(THROUGHPUT), is_open=True),
        ws.Section("Training", panels=line_plots(TRAINING)),
        ws.Section("Samples", panels=[wr.WeavePanelSummaryTable(table_name="samples")]),
    ]
    settings = ws.WorkspaceSettings(x_axis=TOKENS, max_runs=50)
    return ws.Workspace(entity, project, name="lmlab", sections=sections, settings=settings)


def make_report(entity: str, project: str, columns: Sequence[str]) -> Any:
    """Returns the report page: each kind of model with runs of its own."""
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
        keys = [*columns, *kind.columns]
        swept = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key == "optim.lr") for key in keys]
        swept.append(wr.ParallelCoordinatesPlotColumn(best, inverted=True))
        parts = {
            "perplexity by tokens": line_plots(kind.quality),
            "best runs": [wr.BarPlot(title=f"{best.name}, of the best weights", metrics=[best], max_bars_to_show=20)],
            "sweeps": [
                wr.ParallelCoordinatesPlot(title=", ".join([*keys, best.name]), columns=swept),
                wr.ParameterImportancePlot(with_respect_to=best.name),
            ],
            "throughput": line_plots(THROUGHPUT),
            "samples": [wr.WeavePanelSummaryTable(table_name="samples")],
        }
        blocks.append(wr.H1(kind.title))
        for title, panels in parts.items():
            for number, panel in enumerate(panels):
                panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=24 // min(2, len(panels)), h=8)
            blocks += [wr.H2(f"{kind.title}: {title}"), wr.PanelGrid(runsets=[runs], panels=panels)]
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
