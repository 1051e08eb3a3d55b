"""The part of a report on the runs of one objective: its tables and its charts."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from lmlab.console import command
from lmlab.evaluation.comparison import Difference
from lmlab.evaluation.metrics import BOUND, DETECTION, EXACT, OF_GENERATORS
from lmlab.evaluation.records import AT_MOST, Records, is_bound
from lmlab.io import from_here
from lmlab.reporting.charts import Chart, draw_curve, draw_effect, draw_final, draw_series
from lmlab.reporting.failures import failure_charts, failure_tables
from lmlab.reporting.load import COUNTS, SPLITS, Run, bits_per_byte, evaluation_metrics, objective_of
from lmlab.reporting.names import differing_keys, name_configurations, name_evaluations, name_series, shorten_keys
from lmlab.reporting.scaling import scaling_charts
from lmlab.reporting.statistics import BEST, final_metrics, split_comparable, verdict
from lmlab.reporting.text import as_text, brief, letter, p_text, shorten
from lmlab.runs.choices import as_typed
from lmlab.runs.status import ENDED

KEYS = 8
"""The greatest number of keys whose effect is drawn."""
HEADS = {"so_far_at_step": "best so far at step", "of_steps": "steps in all", "flops": "FLOPs"}
"""The heads of columns on the page that are not the names of those of the CSV file."""


class Section:
    """The runs of one objective: nothing is compared beyond it.

    Args:
        objective: the dotted name of its class; of evaluations that need none, the name of their metric.
        runs: its runs.
        evaluations: those of other models, by their names.
        slug: the beginning of the names of its files.
        points: the number of points of curves that the report has room for, in this section.
    """

    def __init__(
        self, objective: str, runs: Sequence[Run], evaluations: Mapping[str, Records], slug: str, points: int
    ) -> None:
        self.objective, self.slug = objective, slug
        self.title = objective.rpartition(".")[2].replace("_", " ")
        self.series = {name: records for name, records in evaluations.items() if "series" in records.certificate}
        """The evaluations of models of a series, which are ranked with no others, by their names."""
        evaluations = {name: records for name, records in evaluations.items() if name not in self.series}
        of_runs = [run.records for run in runs if run.records and run.status.name == "done"]
        self.kinds, self.apart = split_comparable([*of_runs, *evaluations.values()])
        self.ranks: dict[Path, tuple[int, int]] = {}
        """The kind of evaluation of each run that has one, and its rank in that, from 1."""
        for number, kind in enumerate(self.kinds):
            paths = {records.path for records in kind}
            ranked = sorted((run for run in runs if run.path in paths), key=by_bits_per_byte)
            self.ranks |= {run.path: (number, rank) for rank, run in enumerate(ranked, 1)}
        last = (len(runs), 0)
        self.runs = sorted(runs, key=lambda run: (*self.ranks.get(run.path, last), by_bits_per_byte(run)))
        self.heads = shorten_keys(differing_keys(self.runs))
        """The keys in which the runs differ, and what each is called."""
        numbers = (int, float, type(None))
        self.numeric = {key for key in self.heads if all(type(run.chosen.get(key)) in numbers for run in self.runs)}
        """The keys whose values are all numbers."""
        self.configurations = name_configurations(self.runs, self.heads)
        """The name of the configuration of each run, by the directory of the run."""
        names = self.configurations | name_evaluations(evaluations, self.runs)
        self.finals = [final_metrics(kind, names) for kind in self.kinds]
        self.several = len(set(self.configurations.values())) < len(self.runs)
        """True if there are runs that differ in their seed only."""
        self.points = max(20, points // max(1, 3 * len(set(self.configurations.values()))))
        """The number of points that the page has room for in each curve."""
        self.statuses = Counter(run.status.name for run in self.runs)
        self.metric = next((run.metric for run in self.runs if run.metric), "perplexity").replace("_", " ")
        """The name of the perplexity; of each kind of evaluation it is one of `kind_metrics`."""
        self.kind_metrics = [kind[0].certificate["figure"].replace("_", " ") for kind in self.kinds]
        # Where tokenizers differ, charts show bits per byte.
        tokenizers = {records.certificate["tokenizer_hash"] for kind in self.kinds for records in kind}
        self.charted = bits_name(self.metric) if len(tokenizers) > 1 else self.metric
        """The metric that charts show."""
        self.failure_tables = failure_tables(evaluations | self.models_of_series())
        """The tables of the evaluations on where models fail, see `failures.py`."""
        self.failures = failure_charts(self.failure_tables, slug)
        """The charts of that."""
        self.domains = [*dict.fromkeys(domain for run in self.runs for domain in run.by_domain)]
        """The names of the parts of the held-out text of the runs."""
        longest = max((run.seconds for run in self.runs), default=0)
        self.time = (3600, "h") if longest > 7200 else (60, "min") if longest > 120 else (1, "s")
        """The unit of times: its seconds, and its name."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of runs, whole, for other programs."""
        rows = []
        for run in self.runs:
            kind, rank = self.ranks.get(run.path, (None, None))
            rows.append(
                {
                    "objective": self.objective,
                    "evaluation": None if kind is None else letter(kind),
                    "rank": rank,
                    "run": run.name,
                    "run_id": run.manifest.get("run_id"),
                    "configuration": self.configurations[run.path],
                    "seed": run.chosen.get("seed"),
                    **{key: run.chosen.get(key) for key in self.heads},
                    self.metric.replace(" ", "_"): run.final["perplexity"],
                    bits_name(self.metric).replace(" ", "_"): run.final["bits_per_byte"],
                    **{f"{domain}_bits_per_byte": run.by_domain.get(domain) for domain in self.domains},
                    "so_far_at_step": run.so_far_at,
                    "status": run.status.name,
                    "cause": run.status.cause,
                    "step": run.status.step,
                    "of_steps": run.status.steps,
                    **{name: run.summary.get(name) for name in COUNTS},
                    "tokens": run.tokens,
                    "tokens_per_s": run.speed,
                    "seconds": run.seconds,
                    "directory": str(run.path),
                }
            )
        return pd.DataFrame(rows, dtype=object)

    @property
    def page_table(self) -> pd.DataFrame:
        """The table of runs without the zeros of those that logged nothing: their step, tokens and time are empty."""
        table = self.table.copy()
        table.loc[[run.metrics.empty for run in self.runs], ["step", "tokens", "seconds"]] = None
        return table

    @cached_property
    def shown(self) -> pd.DataFrame:
        """The table of runs for a person: what differs between them, in few columns."""
        table, perplexity = self.page_table, self.metric.replace(" ", "_")
        bound = {
            perplexity: [run.metric == BOUND for run in self.runs],
            bits_per_byte(perplexity): [bool(run.records and is_bound(run.records.certificate)) for run in self.runs],
        }
        for name, flags in bound.items():
            table[name] = bounded(table[name], flags, name.replace("_", " "))
        for key in self.heads.keys() - self.numeric:
            table[key] = [brief(run.chosen[key]) if key in run.chosen else None for run in self.runs]
        table["seconds"] /= self.time[0]
        left_out = ["objective", "run_id", "configuration", "directory"]
        left_out += [] if self.apart else ["evaluation"]
        left_out += [] if table["seed"].nunique() > 1 else ["seed"]
        left_out += ["trainable_parameters"] if table["trainable_parameters"].equals(table["parameters"]) else []
        table = table.drop(columns=left_out).dropna(axis="columns", how="all")
        heads = {name: name.replace("_", " ") for name in table.columns}
        return table.rename(columns=heads | HEADS | self.heads | {"seconds": f"time ({self.time[1]})"})

    @cached_property
    def done(self) -> pd.DataFrame:
        """The finished runs as charts show them: run, configuration, kind of evaluation, keys, final metric."""
        done = self.table[self.table["status"] == "done"].rename(columns={self.charted.replace(" ", "_"): "final"})
        done = done[np.isfinite(done["final"].astype(float))].fillna({"evaluation": "none"})
        texts = {key: done[key].map(as_typed) for key in self.heads if key not in self.numeric}
        columns = ["run", "configuration", "evaluation", *self.heads, "final"]
        return done.assign(**texts)[columns].infer_objects()

    @cached_property
    def curve_data(self) -> pd.DataFrame:
        """The curves of the runs, a row for each point of each."""
        frames = [run.curves() for run in self.runs if len(run.metrics)]
        if not frames:
            return pd.DataFrame(
                columns=["run", "configuration", "split", "step", "flops", "speed", "loss"], dtype=float
            )
        curves = pd.concat(frames)
        names = {run.name: self.configurations[run.path] for run in self.runs}
        curves.insert(1, "configuration", curves["run"].map(names))
        with np.errstate(over="ignore"):
            return curves.assign(**{self.metric.replace(" ", "_"): np.exp(curves["loss"])})

    @cached_property
    def final_data(self) -> pd.DataFrame:
        """The final metrics, a row for each configuration."""
        rows = [
            {
                "rank": rank,
                "configuration": final.name,
                "evaluation": letter(number),
                "runs": len(final.paths),
                **with_ends("bits_per_byte", final.bits_per_byte),
                "upper_bound": final.bound,
                **with_ends("perplexity", final.perplexity),
                **with_ends("difference", (gap.difference, gap.low, gap.high)),
                "p": gap.p,
            }
            for number, finals in enumerate(self.finals)
            for rank, final in enumerate(finals, 1)
            for gap in [final.difference or Difference(0.0 if rank == 1 else None)]
        ]
        return pd.DataFrame(rows)

    def final_table(self, number: int) -> pd.DataFrame:
        """Returns the table of the final metrics of a kind of evaluation for a person."""
        data = self.final_data[self.final_data["evaluation"] == letter(number)][:BEST]
        metric, bounds = self.kind_metrics[number], data["upper_bound"]
        data = data.drop(columns=["rank", "evaluation", "upper_bound"])
        for name in ("bits_per_byte", "perplexity", "difference"):
            ends = zip(data.pop(f"{name}_low"), data.pop(f"{name}_high"), strict=True)
            texts = [" to ".join(filter(None, (as_text(end, name.replace("_", " ")) for end in both))) for both in ends]
            data.insert(data.columns.get_loc(name) + 1, f"{name}, 95 %", texts)
        data["p"] = [p_text(final.difference.p if final.difference else None) for final in self.finals[number][:BEST]]
        data["bits_per_byte"] = bounded(data["bits_per_byte"], bounds, "per byte")
        if metric.replace(" ", "_") == BOUND:
            data["perplexity"] = bounded(data["perplexity"], bounds, "perplexity")
        names = {"bits_per_byte": bits_name(metric), "perplexity": metric}
        for name in ("bits_per_byte", "perplexity"):
            names[f"{name}, 95 %"] = f"{names[name]}, 95 %"
        return data.rename(columns=names)

    def models_of_series(self) -> dict[str, Records]:
        """Returns the evaluations of models of a series in the order of their steps, which their names say."""
        names = name_series(self.series, self.runs)
        steps = {name: records.certificate["series"]["step"] for name, records in self.series.items()}
        ordered = sorted(self.series, key=lambda name: (names[name], steps[name]))
        return {f"{names[name]}, step {steps[name]:,}": self.series[name] for name in ordered}

    @cached_property
    def series_data(self) -> pd.DataFrame:
        """The curves of series of models, a row for each model of each: series, step, tokens, dtype and metrics."""
        names = name_series(self.series, self.runs)
        rows = [
            {
                "series": names[name],
                **{key: records.certificate["series"][key] for key in ("step", "tokens", "dtype")},
                "metric": records.certificate["figure"],
                **evaluation_metrics(records),
                "upper_bound": is_bound(records.certificate),
                "evaluation": name,
            }
            for name, records in self.series.items()
        ]
        return pd.DataFrame(rows).sort_values(["series", "metric", "step"]) if rows else pd.DataFrame()

    @property
    def csv(self) -> dict[str, pd.DataFrame]:
        """The data of the charts, whole, by the names of their files."""
        tables = {split: self.curve_data[self.curve_data["split"] == split].drop(columns="split") for split in SPLITS}
        tables["validation"] = tables["validation"].drop(columns="speed")
        tables["finals"] = self.final_data
        tables["series"] = self.series_data
        if self.effects:
            tables["effects"] = self.done.drop(columns="configuration").rename(columns={"final": self.charted})
        tables |= {f"by_{view}": table for view, table in self.failure_tables.items()}
        return {f"{self.slug}_{name}": table for name, table in tables.items() if len(table)}

    @property
    def counts_flops(self) -> bool:
        """True if the computation of some run was counted, so that its curve can be drawn against it."""
        return bool(self.curve_data["flops"].notna().any())

    @property
    def thinned(self) -> bool:
        """True if charts show fewer points of curves than there are."""
        steps = self.curve_data.groupby(["configuration", "split"])["step"].nunique()
        return bool((steps > self.points).any())

    @cached_property
    def curves(self) -> list[Chart]:
        """The charts of the loss and the speed over training, and of the bits per byte of series of models."""
        scored = "" if self.metric.replace(" ", "_") in (EXACT, BOUND) else "scored "
        loss = f"loss (nats per {scored}token)"
        select, table = f"#against-{self.slug}", f"{self.slug}_series"
        numeric = [key for key in self.chart_heads if key in self.numeric]
        by = max(numeric, key=lambda key: self.done[key].nunique(), default=None)
        data = self.curve_data
        if by:
            data = data.assign(**{by: data["run"].map(self.table.set_index("run")[by])})
        with_curves = set(data["configuration"])
        names = dict.fromkeys(self.configurations.values())  # best first, as the runs
        configurations = [name for name in names if name in with_curves]
        drawn = []
        for name, title, split, y in [
            ("validation_loss", "Validation loss", "validation", ("loss", loss)),
            ("training_loss", "Training loss", "training", ("loss", loss)),
            ("throughput", "Throughput", "training", ("speed", "tokens per second")),
        ]:
            points = data[(data["split"] == split) & np.isfinite(data[y[0]])]
            if len(points):
                key = (by, self.heads[by]) if by else None
                spec = draw_curve(points, y, self.time, configurations, key, select, self.points)
                drawn.append(Chart(f"{self.slug}_{name}", title, spec, f"{self.slug}_{split}"))
        for metric, points in self.series_data.groupby("metric") if self.series else ():
            bits = bits_name(metric)
            file = f"{self.slug}_series_{bits.replace(' ', '_')}"
            drawn.append(Chart(file, f"Series of models: {bits}", draw_series(points, bits, select), table))
        return drawn

    @cached_property
    def chart_heads(self) -> dict[str, str]:
        """The keys in which finished runs differ, and what each is called."""
        return {key: head for key, head in self.heads.items() if self.done[key].nunique() > 1}

    @cached_property
    def effects(self) -> list[Chart]:
        """The charts of the final metric by the value of each key."""
        drawn: dict[str, Chart] = {}
        for key in list(self.chart_heads)[:KEYS]:
            spec = draw_effect(self.done, key, self.chart_heads, self.charted)
            file = f"{self.slug}_effect_{re.sub(r'[^A-Za-z0-9._-]+', '-', key)[:80]}"
            file = f"{file}_{len(drawn)}" if file in drawn else file
            title = f"{self.charted.capitalize()} by {shorten(key, 60)}"
            drawn[file] = Chart(file, title, spec, f"{self.slug}_effects")
        return list(drawn.values())

    @cached_property
    def scaling(self) -> list[Chart]:
        """The charts of the scaling law of runs of several sizes and budgets on the same data, measured alike."""
        alike = [run for run in self.runs if run.path in self.ranks and self.ranks[run.path][0] == 0]
        of_data = {(run.manifest["data_fingerprint"], run.manifest["tokenizer_hash"]) for run in alike}
        return scaling_charts(alike, self.slug) if len(of_data) == 1 else []

    @cached_property
    def intervals(self) -> list[list[Chart]]:
        """The charts of the final metrics of each kind of evaluation."""
        drawn = []
        for number, perplexity in enumerate(self.kind_metrics):
            data = self.final_data[self.final_data["evaluation"] == letter(number)]
            best = f", the {BEST} best of {len(data)}" if len(data) > BEST else ""
            bits = bits_name(perplexity)
            field, metric = ("perplexity", perplexity) if self.charted == self.metric else ("bits_per_byte", bits)
            ending, table = f"_{letter(number)}" if self.apart else "", f"{self.slug}_finals"
            spec = draw_final(data[:BEST], field, metric)
            kind = [Chart(f"{self.slug}_final{ending}", f"Final {metric}{best}", spec, table)]
            if len(data) > 1:
                spec = draw_final(data[:BEST], "difference", f"difference from the best ({bits})")
                kind.append(Chart(f"{self.slug}_difference{ending}", f"Difference from the best{best}", spec, table))
            drawn.append(kind)
        return drawn

    @property
    def charts(self) -> list[Chart]:
        """All charts of the section."""
        finals = [chart for kind in self.intervals for chart in kind]
        return [*self.curves, *self.effects, *self.scaling, *finals, *self.failures]

    @cached_property
    def troubles(self) -> pd.DataFrame:
        """The table of the runs that have not ended or can't be read in full, with why, and how to go on."""
        table = self.page_table[["run", "configuration", "status", "cause", "step", "of_steps"]].assign(
            message=["\n".join([run.status.message or "", *run.faults]).strip() for run in self.runs],
            command=[next_command(run) for run in self.runs],
        )
        table = table[[run.status.name not in ENDED or bool(run.faults) for run in self.runs]]
        return table.rename(columns=HEADS | {"command": "to go on"})

    @cached_property
    def verdict(self) -> list[str]:
        """The sentences that say what the final metrics decide, and last the best single run, which decides nothing."""
        unranked = sum(run.status.name == "done" and run.path not in self.ranks for run in self.runs)
        kinds = list(zip(map(bits_name, self.kind_metrics), self.finals, strict=True))
        sentences = verdict(kinds, self.statuses, unranked)
        run = self.runs[0] if self.runs else None
        if run and run.path in self.ranks:
            kind = self.ranks[run.path][0]
            of = f" of {letter(kind)}" if self.apart else ""
            # With many choices, a configuration goes by the name of a run.
            choices = [self.configurations[run.path]] if 0 < len(self.heads) <= 4 else []
            which = ", ".join([run.name, *choices, f"seed {run.chosen.get('seed')}"])
            value = f"{AT_MOST if run.metric == BOUND else ''}{as_text(run.final['perplexity'], 'perplexity')}"
            sentences.append(f"The best single run{of} is {which}, with {self.kind_metrics[kind]} {value}.")
        for (name, metric), points in self.series_data.groupby(["series", "metric"]) if self.series else ():
            bits, best = bits_name(metric), points.loc[points["bits_per_byte"].idxmin()]
            sign = AT_MOST if points["upper_bound"].any() else ""
            ends = [
                f"{sign}{as_text(row['bits_per_byte'], bits)} at step {row['step']:,}" for row in (points.iloc[0], best)
            ]
            if len(points) == 1:
                sentences.append(f"The model of {name} has {bits} of {ends[0]}.")
                continue
            sentences.append(f"The {len(points)} models of {name} have {bits} from {ends[0]} to, at best, {ends[1]}.")
        ranked = [kind for kind in [*self.kinds, [*self.series.values()]] if len(kind) > 1]
        if DETECTION in [records.certificate["figure"] for kind in ranked for records in kind]:
            sentences.append(OF_GENERATORS)
        return sentences


def make_sections(runs: Sequence[Run], evaluations: Mapping[str, Records], points: int) -> list[Section]:
    """Returns a section for each objective, each with a slug of its own for the names of its files.

    Args:
        points: the number of points of curves that the report has room for in all.
    """
    sections: list[Section] = []
    # An evaluation that needs no objective is shown with the runs of its metric.
    of_metric = {run.metric: run.objective for run in reversed(runs)}
    metrics = {name: records.certificate["figure"] for name, records in evaluations.items()}
    shown_in = {name: objective_of(evaluations[name]) or of_metric.get(of, of) for name, of in metrics.items()}
    for objective in dict.fromkeys([*(run.objective for run in runs), *shown_in.values()]):
        module = ([*objective.split("."), ""][-3:-1] or [""])[0].lower()
        slug = re.sub(r"\W", "-", module) or "runs"
        if slug in {section.slug for section in sections}:
            slug = f"{slug}{len(sections) + 1}"
        own = [run for run in runs if run.objective == objective]
        others = {name: records for name, records in evaluations.items() if shown_in[name] == objective}
        sections.append(Section(objective, own, others, slug, points * len(own) // max(1, len(runs))))
    return sections


def by_bits_per_byte(run: Run) -> float:
    """Returns what runs are ranked by: bits per byte compare across tokenizers too."""
    value = run.final["bits_per_byte"]
    return math.inf if value is None or math.isnan(value) else value


def with_ends(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns a value and the ends of its interval by the names of their columns."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def bits_name(perplexity: str) -> str:
    """Returns what bits per byte are called beside a perplexity of that name."""
    return bits_per_byte(perplexity.replace(" ", "_")).replace("_", " ")


def bounded(values: Sequence[float | None], flags: Sequence[bool], head: str) -> list[object]:
    """Returns the values of a column, those that are upper bounds as texts with their sign."""
    return [
        f"{AT_MOST}{as_text(value, head)}" if flag and as_text(value) else value
        for value, flag in zip(values, flags, strict=True)
    ]


def next_command(run: Run) -> str:
    """Returns the command that goes on with a run; empty where there is nothing to do."""
    if run.status.name in ("done", "pruned", "running"):
        return ""
    if run.begun:
        return command("python", "-m", "lmlab.resume", from_here(run.path))
    return command("python", "-m", "lmlab.sweep", "resume", from_here(run.sweep)) if run.sweep else ""
