"""The part of a report on the runs of one objective: its tables, its charts, and the data that these are drawn from."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lmlab.console import command
from lmlab.evaluation.comparison import Difference
from lmlab.evaluation.records import BOUND, Records, is_bound
from lmlab.io import from_here
from lmlab.reporting.charts import Chart, Key, draw_curve, draw_effect, draw_final
from lmlab.reporting.load import COUNTS, SPLITS, Run, objective_of
from lmlab.reporting.names import differing_keys, name_configurations, name_evaluations, shorten_keys, value_texts
from lmlab.reporting.statistics import BEST, Final, final_metrics, split_comparable, verdict
from lmlab.reporting.text import duration, interval_text, letter, number_text, p_text, perplexity_text, shorten
from lmlab.runs.status import ENDED

KEYS = 8
"""Keys whose effect is drawn."""
OPTIONS = 30
"""Values that a filter offers."""


class Cell(NamedTuple):
    """A value of a run in the table of runs."""

    name: str
    """The name of its column in the CSV file."""
    value: Any
    head: str = ""
    """The title of its column on the page; empty where only the CSV file has it."""
    text: str = ""
    """What the page shows."""
    meaning: str = ""
    """What the column holds, in full."""


class Section:
    """The runs of one objective: nothing is compared beyond it.

    Args:
        objective: the dotted name of its class.
        runs: its runs.
        evaluations: those of other models, by their names.
        slug: what the names of its files begin with.
        points: of curves that the report has room for, in this section.
    """

    def __init__(
        self, objective: str, runs: Sequence[Run], evaluations: Mapping[str, Records], slug: str, points: int
    ) -> None:
        self.objective, self.slug, self.points = objective, slug, points
        self.title = objective.rpartition(".")[2]
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
        self.texts = {key: value_texts(self.runs, key) for key in self.heads}
        self.fields = {key: f"k{number}" for number, key in enumerate(self.heads)}
        """The name of each key in data for charts: Vega takes a dot for a part of a thing."""
        self.configurations = name_configurations(self.runs, self.heads)
        names = self.configurations | name_evaluations(evaluations, self.runs)
        self.finals = [final_metrics(kind, names) for kind in self.kinds]
        self.several = len(set(self.configurations.values())) < len(self.runs)
        """Whether there are runs that differ in their seed only."""
        self.seeds = len({repr(run.chosen.get("seed")) for run in self.runs})
        self.statuses = Counter(run.status.name for run in self.runs)
        self.metric = next((run.metric for run in self.runs if run.metric), "perplexity").replace("_", " ")
        """The name of the perplexity; of each kind of evaluation it is one of `kind_metrics`."""
        self.kind_metrics = [kind[0].certificate["figure"].replace("_", " ") for kind in self.kinds]
        # Where tokenizers differ, charts show bits per byte.
        one_tokenizer = len({records.certificate["tokenizer_hash"] for kind in self.kinds for records in kind}) < 2
        self.charted = ("perplexity", self.metric) if one_tokenizer else ("bits_per_byte", bits_name(self.metric))

    def cells(self, run: Run) -> list[Cell]:
        """Returns the row of a run in the table of runs."""
        kind, rank = self.ranks.get(run.path, (None, None))
        evaluation = None if kind is None else letter(kind)
        seed, status = run.chosen.get("seed"), run.status
        value, bits, bits_head = run.final["perplexity"], run.final["bits_per_byte"], bits_name(self.metric)
        so_far = "" if run.so_far_at is None else f" so far, step {run.so_far_at:,}"
        value_text = perplexity_text(value) + so_far if value is not None else ""
        bound = BOUND if run.records and is_bound(run.records.certificate) else ""
        bits_text = f"{bound}{bits:.4f}{so_far}" if bits is not None else ""
        of_steps = f" of {status.steps:,}" if status.steps not in (None, status.step) else ""
        steps, tokens = (f"{status.step:,}{of_steps}", f"{run.tokens:,}") if run.begun else ("", "")
        size, trainable, flops = (run.summary.get(name) for name in COUNTS)
        size_text = number_text(size) + (f" ({trainable:,})" if trainable != size else "")
        seconds = run.seconds[-1] if run.seconds else None
        held_out = "of the best weights on the held-out text; so far, and from which step, where the run has not ended"
        keys = [
            Cell(key, run.chosen.get(key), head, self.texts[key].get(run.path, ""), key)
            for key, head in self.heads.items()
        ]
        return [
            Cell("objective", self.objective),
            Cell("evaluation", evaluation, "evaluation" if self.apart else "", evaluation or "", "kind of evaluation"),
            Cell("rank", rank, "rank", number_text(rank), "rank among evaluations of its kind"),
            Cell("run", run.name, "run", run.name, "directory"),
            Cell("run_id", run.manifest.get("run_id")),
            Cell("seed", seed, "seed" if self.seeds > 1 else "", "" if seed is None else str(seed), "seed"),
            *keys,
            Cell(self.metric.replace(" ", "_"), value, self.metric, value_text, held_out),
            Cell(bits_head.replace(" ", "_"), bits, "bits/byte", bits_text, bits_head),
            Cell("so_far_at_step", run.so_far_at),
            Cell("state", status.name, "state", ": ".join(filter(None, (status.name, status.cause))), "state"),
            Cell("cause", status.cause),
            Cell("step", status.step, "steps", steps, "optimizer steps"),
            Cell("of_steps", status.steps),
            Cell("parameters", size, "parameters", size_text, "how many of them are trainable, where not all are"),
            Cell("trainable_parameters", trainable),
            Cell("tokens", run.tokens, "tokens", tokens, "seen in training"),
            Cell("flops", flops, "FLOPs", number_text(flops, ".3g"), "operations of training, over the whole run"),
            Cell("tokens_per_s", run.speed, "tokens/s", number_text(run.speed, ",.0f"), "the median, before the end"),
            Cell("seconds", seconds, "time", duration(seconds), "wall clock, validation included, pauses left out"),
            Cell("directory", str(run.path)),
        ]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of runs for other programs."""
        return pd.DataFrame([{cell.name: cell.value for cell in self.cells(run)} for run in self.runs], dtype=object)

    @cached_property
    def rows(self) -> list[list[Cell]]:
        """The table of runs for a person, a row for each run."""
        return [[cell for cell in self.cells(run) if cell.head] for run in self.runs]

    @cached_property
    def numeric(self) -> list[bool]:
        """Returns whether each column of `rows` holds numbers."""
        columns = zip(*self.rows, strict=True)
        return [all(isinstance(cell.value, int | float | None) for cell in column) for column in columns]

    def marks(self, run: Run) -> dict[str, str]:
        """Returns the values of a run by which its row can be filtered."""
        texts = {field: self.texts[key].get(run.path, "") for key, field in self.fields.items()}
        return {"state": run.status.name} | texts

    @property
    def filters(self) -> dict[str, tuple[str, list[str]]]:
        """The head and the values of each field of few values by which rows can be filtered."""
        offered = {"state": ("state", [*self.statuses])}
        for key, field in self.fields.items():
            pairs = zip(self.runs, self.run_data[field], strict=True)
            values = {self.texts[key][run.path]: value for run, value in pairs if run.path in self.texts[key]}
            offered[field] = self.heads[key], sorted(values, key=values.__getitem__)
        return {field: (head, values) for field, (head, values) in offered.items() if 1 < len(values) <= OPTIONS}

    @cached_property
    def run_data(self) -> pd.DataFrame:
        """The runs as charts show them: name, configuration, kind of evaluation, final metric, values of the keys."""
        data = pd.DataFrame(
            {
                "run": [run.name for run in self.runs],
                "configuration": [self.configurations[run.path] for run in self.runs],
                "evaluation": [
                    letter(self.ranks[run.path][0]) if run.path in self.ranks else "none" for run in self.runs
                ],
                "final": [run.final[self.charted[0]] if run.status.name == "done" else None for run in self.runs],
            }
        )
        data["final"] = data["final"].astype(float).replace(math.inf, math.nan)
        for key, field in self.fields.items():
            values = [run.chosen.get(key) if run.path in self.texts[key] else None for run in self.runs]
            numbers = all(type(value) in (int, float, type(None)) for value in values)
            data[field] = values if numbers else [self.texts[key].get(run.path) for run in self.runs]
        return data

    @cached_property
    def curve_data(self) -> pd.DataFrame:
        """The curves, a row for each point of each."""
        rows = (
            {"run": run.name, "configuration": self.configurations[run.path], **point, "perplexity": exp(point["loss"])}
            for run in self.runs
            for point in run.curves()
        )
        columns = ["run", "configuration", "split", "step", "tokens", "seconds", "loss", "speed", "perplexity"]
        return pd.DataFrame(rows, columns=columns)

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

    @property
    def csv(self) -> dict[str, str]:
        """The data of the charts, whole, by the names of their files."""
        tables = {"finals": self.final_data}
        for split in SPLITS:
            left_out = ["split"] if split == "training" else ["split", "speed"]
            tables[split] = self.curve_data[self.curve_data["split"] == split].drop(columns=left_out)
        if self.effects:
            names = {field: key for key, field in self.fields.items()} | {"final": self.charted[1]}
            effects = self.run_data[["run", "evaluation", *self.fields.values(), "final"]]
            tables["effects"] = effects[effects["final"].notna()].rename(columns=names)
        return {f"{self.slug}_{name}": table.to_csv(index=False) for name, table in tables.items() if len(table)}

    @cached_property
    def chart_data(self) -> dict[str, pd.DataFrame]:
        """The data of the charts, by the names that they know it by; curves no denser than a screen shows."""
        curves = self.curve_data.round(4)
        most = max(20, self.points // max(1, len(curves[["run", "split"]].drop_duplicates())))

        def select(steps: pd.Series) -> pd.Series:
            # Runs of one configuration keep the same steps, so that their mean stays one of all of them.
            known = np.unique(steps)
            return steps.isin(known[np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int)])

        if len(curves):
            curves = curves[curves.groupby(["configuration", "split"])["step"].transform(select)]
        columns = ["run", "step", "tokens", "seconds", "loss", "speed"]
        by_split = {split: curves.loc[curves["split"] == split, columns] for split in SPLITS}
        return by_split | {"runs": self.run_data, "finals": self.final_data}

    @property
    def thinned(self) -> bool:
        """True if charts show fewer points of curves than there are."""
        return sum(len(self.chart_data[split]) for split in SPLITS) < len(self.curve_data)

    @cached_property
    def chart_keys(self) -> dict[str, Key]:
        """The keys in which finished runs differ."""
        done = self.run_data[self.run_data["final"].notna()]
        values = {key: sorted(done[field].dropna().unique().tolist()) for key, field in self.fields.items()}
        return {key: Key(self.fields[key], self.heads[key], of) for key, of in values.items() if len(of) > 1}

    @cached_property
    def curves(self) -> list[dict[str, Chart]]:
        """The charts of curves: each against tokens, steps and time."""
        configurations = list(dict.fromkeys(self.configurations.values()))  # best first, as the runs
        numeric = [key for key in self.chart_keys.values() if key.numeric]
        by = max(numeric, key=lambda key: len(key.values), default=None)
        longest = self.curve_data["seconds"].max()
        divisor, unit = (3600, "h") if longest > 7200 else (60, "min") if longest > 120 else (1, "s")
        against = {
            "tokens": ("datum.tokens", "tokens seen in training"),
            "steps": ("datum.step", "optimizer steps"),
            "time": (f"datum.seconds / {divisor}", f"time ({unit})"),
        }
        loss = f"loss (nats per {'scored ' if 'masked' in self.metric else ''}token)"
        shown = [
            (f"{split}_{y}", f"{split.capitalize()} {title.partition(' (')[0]}", split, y, title)
            for split in SPLITS
            for y, title in (("loss", loss), ("perplexity", self.metric))
        ]
        shown.append(("throughput", "Throughput", "training", "speed", "tokens per second"))
        drawn = []
        for name, heading, split, y, title in shown:
            if self.chart_data[split]["speed" if y == "speed" else "loss"].notna().any():
                file, table = f"{self.slug}_{name}", f"{self.slug}_{split}"
                specs = {
                    x: draw_curve(split, axis, (y, title), configurations, self.several, by)
                    for x, axis in against.items()
                }
                names = {x: file if x == "tokens" else f"{file}_by_{x}" for x in specs}
                drawn.append({x: Chart(names[x], heading, spec, (split, "runs"), table) for x, spec in specs.items()})
        return drawn

    @cached_property
    def effects(self) -> list[Chart]:
        """The charts of the final metric by the value of each key."""
        done, metric = self.run_data[self.run_data["final"].notna()], self.charted[1]
        drawn: dict[str, Chart] = {}
        for name, key in list(self.chart_keys.items())[:KEYS]:
            others = [other for other in self.chart_keys.values() if other is not key]
            spec = draw_effect(key, others, metric, done["final"].tolist(), sorted(done["evaluation"].unique()))
            file = f"{self.slug}_effect_{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}"
            file = f"{file}_{key.field}" if file in drawn else file
            title = f"{metric.capitalize()} by {shorten(name, 60)}"
            drawn[file] = Chart(file, title, spec, ("runs",), f"{self.slug}_effects")
        return list(drawn.values())

    @cached_property
    def intervals(self) -> list[list[Chart]]:
        """The charts of the final metrics of each kind of evaluation."""
        drawn = []
        for number, perplexity in enumerate(self.kind_metrics):
            data = self.final_data[self.final_data["evaluation"] == letter(number)]
            best = f", the {BEST} best of {len(data)}" if len(data) > BEST else ""
            field, bits = self.charted[0], bits_name(perplexity)
            metric = perplexity if field == "perplexity" else bits
            file, table = f"{self.slug}_{{}}{f'_{letter(number)}' if self.apart else ''}", f"{self.slug}_finals"
            spec = draw_final(data[:BEST], field, metric)
            kind = [Chart(file.format("final"), f"Final {metric}{best}", spec, ("finals",), table)]
            if len(data) > 1:
                spec = draw_final(data[:BEST], "difference", f"difference from the best ({bits})")
                title = f"Difference from the best{best}"
                kind.append(Chart(file.format("difference"), title, spec, ("finals",), table))
            drawn.append(kind)
        return drawn

    @property
    def charts(self) -> list[Chart]:
        """All charts that have files: curves are drawn against tokens there."""
        curves = [variants["tokens"] for variants in self.curves]
        return [*curves, *self.effects, *(chart for kind in self.intervals for chart in kind)]

    def members(self, final: Final) -> list[int]:
        """Returns the indices of the runs of a configuration; none where it evaluates what is no run of the section."""
        return [i for i, run in enumerate(self.runs) if run.path in final.paths]

    def final_texts(self, number: int) -> pd.DataFrame:
        """Returns the table of the final metrics of a kind of evaluation for a person."""
        ends = "95 % interval"
        heads = [
            "configuration",
            "runs",
            self.kind_metrics[number],
            ends,
            "bits/byte",
            ends,
            "from the best",
            ends,
            "p",
        ]
        rows = []
        for final in self.finals[number][:BEST]:
            gap = final.difference or Difference()
            rows.append(
                [
                    final.name,
                    str(len(final.paths)),
                    perplexity_text(final.perplexity[0]),
                    " to ".join(map(perplexity_text, final.perplexity[1:])) if final.perplexity[1] else "",
                    f"{BOUND if final.bound else ''}{final.bits_per_byte[0]:.4f}",
                    interval_text(*final.bits_per_byte[1:], ".4f"),
                    number_text(gap.difference, "+.4f"),
                    interval_text(gap.low, gap.high),
                    p_text(gap.p),
                ]
            )
        return pd.DataFrame(rows, columns=heads)

    @property
    def samples(self) -> list[tuple[int, Run, list[dict[str, Any]]]]:
        """The index of each run with samples, the run, and the last of them."""
        return [
            (i, run, [sample for sample in run.samples if sample["step"] == run.samples[-1]["step"]])
            for i, run in enumerate(self.runs)
            if run.samples
        ]

    @property
    def troubles(self) -> list[tuple[int, Run, str]]:
        """The index of each run that has not ended, or can't be read in full, the run, and how to go on with it."""
        return [
            (i, run, next_command(run)) for i, run in enumerate(self.runs) if run.status.name not in ENDED or run.faults
        ]

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
            value = perplexity_text(run.final["perplexity"])
            sentences.append(f"The best single run{of} is {which}, with {self.kind_metrics[kind]} {value}.")
        return sentences


def make_sections(runs: Sequence[Run], evaluations: Mapping[str, Records], points: int) -> list[Section]:
    """Returns a section for each objective, each with a slug of its own for the names of its files.

    Args:
        points: of curves that the report has room for in all.
    """
    sections: list[Section] = []
    for objective in dict.fromkeys([*(run.objective for run in runs), *map(objective_of, evaluations.values())]):
        module = ([*objective.split("."), ""][-3:-1] or [""])[0].lower()
        slug = re.sub(r"\W", "-", module) or "runs"
        if slug in {section.slug for section in sections}:
            slug = f"{slug}{len(sections) + 1}"
        own = [run for run in runs if run.objective == objective]
        others = {name: records for name, records in evaluations.items() if objective_of(records) == objective}
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
    return perplexity.replace("perplexity", "bits per byte")


def exp(loss: float) -> float:
    """Returns the exponential; infinity where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def next_command(run: Run) -> str:
    """Returns the command that goes on with a run; empty where there is nothing to do."""
    if run.status.name in ("done", "pruned", "running"):
        return ""
    if run.begun:
        return command("python", "-m", "lmlab.resume", from_here(run.path))
    return command("python", "-m", "lmlab.sweep", "resume", from_here(run.sweep)) if run.sweep else ""
