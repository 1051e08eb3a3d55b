"""The part of a report on the runs of one objective: its tables, its charts, and what they are drawn from."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lmlab.console import command
from lmlab.evaluation.comparison import Difference, run_choices
from lmlab.evaluation.records import BOUND, Records, is_bound
from lmlab.io import from_here
from lmlab.reporting import charts
from lmlab.reporting.charts import Chart, Key
from lmlab.reporting.load import COUNTS, SPLITS, Run, objective_of
from lmlab.reporting.statistics import BEST, Final, final_metrics, split_comparable, verdict
from lmlab.reporting.text import brief, duration, interval_text, letter, p_text, perplexity_text, shorten

LABEL = 64
"""Characters of the name of a configuration: no chart has room for more."""
HEAD = 40
"""Characters of a key at the top of a column, and on an axis."""
KEYS = 8
"""Keys whose effect is drawn."""
OPTIONS = 30
"""Values that a filter offers."""


class Cell(NamedTuple):
    """A cell of the main table."""

    head: str
    """The title of its column."""
    meaning: str
    """What the column holds, in full."""
    text: str
    value: Any
    """What the column is sorted by."""


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
            paths = {records.place for records in kind}
            ranked = sorted((run for run in runs if run.path in paths), key=by_bits_per_byte)
            self.ranks |= {run.path: (number, rank) for rank, run in enumerate(ranked, 1)}
        last = (len(runs), 0)
        self.runs = sorted(runs, key=lambda run: (*self.ranks.get(run.path, last), by_bits_per_byte(run)))
        self.keys = differing_keys(self.runs)
        self.heads = {key: shorten(head, HEAD) for key, head in shortest_ends(self.keys).items()}
        self.fields = {key: f"k{number}" for number, key in enumerate(self.keys)}
        self.configurations = self.name_configurations()
        names = {run.manifest["run_id"]: run.name for run in self.runs if run.begun}
        self.finals = [
            final_metrics(kind, self.configurations | name_evaluations(evaluations, names)) for kind in self.kinds
        ]

    def name_configurations(self) -> dict[Path, str]:
        """Returns what each run shares with those that differ from it in their seed only, in few words."""
        if not self.keys:
            return dict.fromkeys((run.path for run in self.runs), "all runs")
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            alike.setdefault(tuple(identity(run.chosen.get(key)) for key in self.keys), []).append(run)
        names: dict[Path, str] = {}
        for runs in alike.values():
            name = f"{shorten(runs[0].name, LABEL - 14)}{' and its seeds' if len(runs) > 1 else ''}"
            if len(self.keys) <= 4:
                name = self.name_choices(runs[0], LABEL)
                if len(name) > LABEL:
                    name = self.name_choices(runs[0], max(8, LABEL // (2 * len(self.keys))))
            if name in names.values():  # what tells them apart was cut off
                name = f"{name} ({shorten(runs[0].name, 20)})"
            names |= {run.path: name for run in runs}
        return names

    def name_choices(self, run: Run, most: int) -> str:
        """Returns a run's choices in words, of so many characters each."""
        return ", ".join(
            f"{shorten(self.heads[key], most)}={brief(run.chosen.get(key), min(most, HEAD))}" for key in self.keys
        )

    @property
    def metric(self) -> str:
        """The name of the perplexity."""
        return next((run.metric for run in self.runs if run.metric), "perplexity").replace("_", " ")

    @cached_property
    def charted(self) -> tuple[str, str]:
        """The final metric that charts show, perplexity or, where tokenizers differ, bits per byte; and its name."""
        tokenizers = {records.certificate["tokenizer_hash"] for kind in self.kinds for records in kind}
        return ("bits_per_byte", bits_name(self.metric)) if len(tokenizers) > 1 else ("perplexity", self.metric)

    @property
    def kind_metrics(self) -> list[str]:
        """The name of the perplexity of each kind of evaluation."""
        return [kind[0].certificate["figure"].replace("_", " ") for kind in self.kinds]

    @property
    def several(self) -> bool:
        """Whether there are runs that differ in their seed only."""
        return len(set(self.configurations.values())) < len(self.runs)

    @property
    def statuses(self) -> Counter[str]:
        """How many runs have each status."""
        return Counter(run.status.name for run in self.runs)

    @property
    def unit(self) -> str:
        """What the statistics are over: documents, or stretches of them."""
        return next((final.unit for finals in self.finals for final in finals), "documents")

    @cached_property
    def texts(self) -> dict[str, dict[Path, str]]:
        """The value of each key of each run, as short as tells it from the others; none of a run that has not said."""
        texts = {}
        for key in self.keys:
            values = {run.path: run.chosen.get(key) for run in self.runs if run.begun or key in run.chosen}
            different = len(set(map(identity, values.values())))
            for digits in (4, 6, 9, 17):
                texts[key] = {
                    path: f"{value:.{digits}g}" if isinstance(value, float) else brief(value, 10 * digits)
                    for path, value in values.items()
                }
                if len(set(texts[key].values())) == different:
                    break
        return texts

    @cached_property
    def run_data(self) -> pd.DataFrame:
        """The runs as charts show them: name, configuration, kind of evaluation, final metric, values of the keys."""
        rows = []
        for run in self.runs:
            final = run.final[self.charted[0]] if run.status.name == "done" else None
            kind = letter(self.ranks[run.path][0]) if run.path in self.ranks else "none"
            row = {"run": run.name, "configuration": self.configurations[run.path], "evaluation": kind, "final": final}
            rows.append(row | {field: self.texts[key].get(run.path) for key, field in self.fields.items()})
        data = pd.DataFrame(rows, columns=["run", "configuration", "evaluation", "final", *self.fields.values()])
        for key, field in self.fields.items():
            values = [run.chosen.get(key) if run.path in self.texts[key] else None for run in self.runs]
            if all(type(value) in (int, float, type(None)) for value in values):
                data[field] = pd.to_numeric(pd.Series(values, dtype=object))
        return data

    @cached_property
    def curve_data(self) -> pd.DataFrame:
        """The curves, a row for each point of each."""
        columns = ["run", "configuration", "split", "step", "tokens", "seconds", "loss", "speed"]
        rows = (
            {"run": run.name, "configuration": self.configurations[run.path]} | point
            for run in self.runs
            for point in run.curves()
        )
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

    @cached_property
    def chart_data(self) -> dict[str, pd.DataFrame]:
        """What the charts are drawn from, by the names that they know it by; curves no denser than a screen shows."""
        curves = self.curve_data
        most = max(20, self.points // max(1, len(curves[["run", "split"]].drop_duplicates())))

        def chosen(steps: pd.Series) -> pd.Series:
            # Runs of one configuration keep the same steps, so that their mean stays one of all of them.
            known = np.unique(steps)
            return steps.isin(known[np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int)])

        if len(curves):
            curves = curves.round(4)[curves.groupby(["configuration", "split"])["step"].transform(chosen)]
        columns = ["run", "step", "tokens", "seconds", "loss", "speed"]
        by_split = {split: curves.loc[curves["split"] == split, columns] for split in SPLITS}
        return by_split | {"runs": self.run_data, "finals": self.final_data}

    @property
    def thinned(self) -> bool:
        """Whether charts show fewer points of curves than there are."""
        return sum(len(self.chart_data[split]) for split in SPLITS) < len(self.curve_data)

    @cached_property
    def chart_keys(self) -> list[Key]:
        """The keys in which finished runs differ."""
        done = self.run_data[self.run_data["final"].notna()]
        different = {key: sorted(done[field].dropna().unique().tolist()) for key, field in self.fields.items()}
        return [Key(self.fields[key], self.heads[key], values) for key, values in different.items() if len(values) > 1]

    @cached_property
    def curves(self) -> list[dict[str, Chart]]:
        """The charts of curves: each against tokens, steps and time."""
        configurations = list(dict.fromkeys(self.configurations.values()))  # best first, as the runs
        by = max((key for key in self.chart_keys if key.numeric), key=lambda key: len(key.values), default=None)
        longest = self.curve_data["seconds"].max()
        divisor, unit = (3600, "h") if longest > 7200 else (60, "min") if longest > 120 else (1, "s")
        against = {
            "tokens": ("datum.tokens", "tokens seen in training"),
            "steps": ("datum.step", "optimizer steps"),
            "time": (f"datum.seconds / {divisor}", f"time ({unit})"),
        }
        token = "scored token" if "masked" in self.metric else "token"
        shown = [
            (split, y, title, f"{split.capitalize()} {title.partition(' (')[0]}")
            for split in SPLITS
            for y, title in (("loss", f"loss (nats per {token})"), ("perplexity", self.metric))
        ]
        shown += [("training", "speed", "tokens per second", "Throughput")]
        return [
            {
                x: Chart(
                    f"{self.slug}_{name}" + ("" if x == "tokens" else f"_by_{x}"),
                    heading,
                    charts.curve(split, axis, (y, title), configurations, self.several, by),
                    (split, "runs"),
                    f"{self.slug}_{split}",
                )
                for x, axis in against.items()
            }
            for split, y, title, heading in shown
            for name in ["throughput" if y == "speed" else f"{split}_{y}"]
            if self.chart_data[split]["speed" if y == "speed" else "loss"].notna().any()
        ]

    @cached_property
    def effects(self) -> list[Chart]:
        """The charts of the final metric by the value of each key."""
        done = self.run_data[self.run_data["final"].notna()]
        metric = self.charted[1]
        values, kinds = done["final"].tolist(), sorted(done["evaluation"].unique())
        names = {self.fields[key]: key for key in self.keys}
        drawn: dict[str, Chart] = {}
        for key in self.chart_keys[:KEYS]:
            others = [other for other in self.chart_keys if other is not key]
            name = f"{self.slug}_effect_{file_name(names[key.field])}"
            name = f"{name}_{key.field}" if name in drawn else name
            title = f"{metric.capitalize()} by {shorten(names[key.field], 60)}"
            spec = charts.effect(key, others, metric, values, kinds)
            drawn[name] = Chart(name, title, spec, ("runs",), f"{self.slug}_effects")
        return list(drawn.values())

    @cached_property
    def intervals(self) -> list[list[Chart]]:
        """The charts of the final metrics of each kind of evaluation."""
        drawn = []
        for number, metric in enumerate(self.kind_metrics):
            data = self.final_data[self.final_data["evaluation"] == letter(number)]
            best = f", the {BEST} best of {len(data)}" if len(data) > BEST else ""
            field, bits = self.charted[0], bits_name(metric)
            metric = metric if field == "perplexity" else bits
            shown = [("final", field, metric, f"Final {metric}{best}")]
            if len(data) > 1:
                title = f"difference from the best ({bits})"
                shown.append(("difference", "difference", title, f"Difference from the best{best}"))
            suffix = f"_{letter(number)}" if len(self.kinds) > 1 else ""
            drawn.append(
                [
                    Chart(
                        f"{self.slug}_{name}{suffix}",
                        heading,
                        charts.final(data[:BEST], field, title),
                        ("finals",),
                        f"{self.slug}_finals",
                    )
                    for name, field, title, heading in shown
                ]
            )
        return drawn

    @property
    def charts(self) -> list[Chart]:
        """All charts that have files: curves are drawn against tokens there."""
        curves = [variants["tokens"] for variants in self.curves]
        return [*curves, *self.effects, *(chart for kind in self.intervals for chart in kind)]

    @property
    def csv(self) -> dict[str, str]:
        """The data of the charts, whole, by the names of their files."""
        tables = {}
        curves = self.curve_data.assign(perplexity=[exp(loss) for loss in self.curve_data["loss"]])
        for split in SPLITS:
            left_out = ["split"] if split == "training" else ["split", "speed"]
            tables[split] = curves[curves["split"] == split].drop(columns=left_out)
        names = {field: key for key, field in self.fields.items()} | {"final": self.charted[1]}
        effects = self.run_data[["run", "evaluation", *self.fields.values(), "final"]]
        tables["effects"] = effects[effects["final"].notna()].rename(columns=names)[: None if self.effects else 0]
        tables["finals"] = self.final_data
        return {f"{self.slug}_{name}": table.to_csv(index=False) for name, table in tables.items() if len(table)}

    def cells(self, run: Run) -> list[Cell]:
        """Returns a row of the main table for a person."""
        kind, rank = self.ranks.get(run.path, (None, None))
        several = len(self.kinds) > 1
        place = "" if kind is None else f"{letter(kind) if several else ''}{rank}"
        seeds = {repr(run.chosen.get("seed")) for run in self.runs}
        seed = [Cell("seed", "seed", str(run.chosen.get("seed", "")), run.chosen.get("seed"))] if len(seeds) > 1 else []
        keys = [Cell(self.heads[key], key, self.texts[key].get(run.path, ""), run.chosen.get(key)) for key in self.keys]
        so_far = "" if run.so_far_at is None else f" so far, step {run.so_far_at:,}"
        value, bits = run.final["perplexity"], run.final["bits_per_byte"]
        bound = BOUND if run.records and is_bound(run.records.certificate) else ""
        status, counts = run.status, [run.summary.get(name) for name in COUNTS]
        of = f" of {status.steps:,}" if status.steps and status.steps != status.step else ""
        parameters, trainable, flops = (None if count is None else f"{count:,}" for count in counts)
        seconds = run.seconds[-1] if run.seconds else None
        held_out = "of the best weights on the held-out text; so far, and from which step, where the run has not ended"
        return [
            Cell(
                "rank", "rank, after the kind of evaluation where there are several", place, place if several else rank
            ),
            Cell("run", "directory", run.name, run.name),
            *seed,
            *keys,
            Cell(self.metric, held_out, perplexity_text(value) + (so_far if value else ""), value),
            Cell("bits/byte", bits_name(self.metric), "" if bits is None else f"{bound}{bits:.4f}{so_far}", bits),
            Cell("state", "state", status.name + (f": {status.cause}" if status.cause else ""), status.name),
            Cell("steps", "optimizer steps", f"{status.step:,}{of}" if run.begun else "", status.step),
            Cell(
                "parameters",
                "of the model, and how many of them are trainable where not all are",
                f"{parameters or ''}{f' ({trainable})' if trainable != parameters else ''}",
                counts[0],
            ),
            Cell("tokens", "seen in training", f"{run.tokens:,}" if run.begun else "", run.tokens),
            Cell(
                "FLOPs",
                "floating-point operations of training: forward and backward passes, over the whole run",
                "" if flops is None else f"{counts[2]:.3g}",
                counts[2],
            ),
            Cell(
                "tokens/s",
                "over the whole run; the median so far, where it has not ended",
                "" if run.speed is None else f"{run.speed:,.0f}",
                run.speed,
            ),
            Cell(
                "time",
                "wall clock, validation included, pauses left out",
                "" if seconds is None else duration(seconds),
                seconds,
            ),
        ]

    @cached_property
    def numeric(self) -> list[bool]:
        """Whether each column of the main table holds numbers."""
        columns = ([cell.value for cell in column] for column in zip(*map(self.cells, self.runs), strict=True))
        return [all(isinstance(value, int | float | None) for value in column) for column in columns]

    def row(self, run: Run) -> dict[str, Any]:
        """Returns a row of the main table for other programs."""
        kind, rank = self.ranks.get(run.path, (None, None))
        name = self.metric.replace(" ", "_")
        return {
            "objective": self.objective,
            "evaluation": None if kind is None else letter(kind),
            "rank": rank,
            "run": run.name,
            "run_id": run.manifest.get("run_id"),
            "state": run.status.name,
            "cause": run.status.cause,
            "seed": run.chosen.get("seed"),
            **{key: run.chosen.get(key) for key in self.keys},
            name: run.final["perplexity"],
            name.replace("perplexity", "bits_per_byte"): run.final["bits_per_byte"],
            "so_far_at_step": run.so_far_at,
            "step": run.status.step,
            "of_steps": run.status.steps,
            "tokens": run.tokens,
            **{name: run.summary.get(name) for name in COUNTS},
            "tokens_per_s": run.speed,
            "seconds": run.seconds[-1] if run.seconds else None,
            "directory": str(run.path),
        }

    @property
    def filters(self) -> dict[str, tuple[str, list[str]]]:
        """The head and the values of each field of few values by which rows can be filtered."""
        offered = {"state": ("state", list(self.statuses))}
        for key, field in self.fields.items():
            texts, values = self.texts[key], self.run_data[field]
            of_runs = {texts.get(run.path): value for run, value in zip(self.runs, values, strict=True)}
            of_runs.pop(None, None)
            offered[field] = self.heads[key], sorted(of_runs, key=lambda text: of_runs[text])
        return {field: (head, values) for field, (head, values) in offered.items() if 1 < len(values) <= OPTIONS}

    def marks(self, run: Run) -> dict[str, str]:
        """Returns the values of a run by which its row can be filtered."""
        texts = {field: self.texts[key].get(run.path, "") for key, field in self.fields.items()}
        return {"state": run.status.name} | texts

    def members(self, final: Final) -> list[int]:
        """Returns the indices of the runs of a configuration; none where it evaluates what is no run of the section."""
        return [i for i, run in enumerate(self.runs) if run.path in final.paths]

    def final_texts(self, number: int) -> pd.DataFrame:
        """Returns the table of the final metrics of a kind of evaluation for a person."""
        rows = self.final_data[self.final_data["evaluation"] == letter(number)][:BEST].astype(object)
        rows = rows.where(rows.notna(), None).to_dict("records")
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
        texts = [
            [
                row["configuration"],
                str(row["runs"]),
                perplexity_text(row["perplexity"]),
                interval_text(row["perplexity_low"], row["perplexity_high"], ",.2f"),
                f"{BOUND if row['upper_bound'] else ''}{row['bits_per_byte']:.4f}",
                interval_text(row["bits_per_byte_low"], row["bits_per_byte_high"], ".4f"),
                "" if row["rank"] == 1 or row["difference"] is None else f"{row['difference']:+.4f}",
                interval_text(row["difference_low"], row["difference_high"]),
                p_text(row["p"]),
            ]
            for row in rows
        ]
        return pd.DataFrame(texts, columns=heads)

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
            (i, run, next_command(run))
            for i, run in enumerate(self.runs)
            if run.status.name not in ("done", "pruned") or run.faults
        ]

    @cached_property
    def verdict(self) -> list[str]:
        """What the final metrics decide, and last the best single run, which decides nothing."""
        unranked = sum(run.status.name == "done" and run.path not in self.ranks for run in self.runs)
        kinds = list(zip(map(bits_name, self.kind_metrics), self.finals, strict=True))
        sentences = verdict(kinds, self.statuses, unranked)
        run = self.runs[0] if self.runs else None
        if run and run.path in self.ranks:
            kind = self.ranks[run.path][0]
            of = f" of {letter(kind)}" if len(self.kinds) > 1 else ""
            # With many choices, a configuration goes by the name of a run.
            choices = [self.configurations[run.path]] if 0 < len(self.keys) <= 4 else []
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


def differing_keys(runs: Iterable[Run]) -> list[str]:
    """Returns the keys in which runs differ, the seed left out."""
    # A run that has not begun has only what its sweep varies.
    begun = [run.chosen for run in runs if run.begun]
    others = [run.chosen for run in runs if not run.begun]

    def differs(key: str) -> bool:
        values = [chosen.get(key) for chosen in begun] + [chosen[key] for chosen in others if key in chosen]
        return any(value != values[0] for value in values)

    keys = dict.fromkeys(key for chosen in [*begun, *others] for key in chosen)
    return [key for key in keys if key not in ("seed", "objective") and differs(key)]


def shortest_ends(keys: Sequence[str]) -> dict[str, str]:
    """Returns each dotted key by its last part, or by as many as tell it from the others."""
    ends = {}
    for key in keys:
        parts = key.split(".")
        candidates = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in keys if other != key]
        ends[key] = next((end for end in candidates if not any(o.endswith(f".{end}") for o in others)), key)
    return ends


def identity(value: Any) -> str:
    """Returns what is equal for the same choices: 0 and 0.0 are, True and 1 are not."""
    return repr(float(value)) if type(value) in (int, float) else repr(value)


def name_evaluations(evaluations: Mapping[str, Records], runs: Mapping[str, str]) -> dict[Path, str]:
    """Returns the names of the evaluations of other models: what was evaluated, and where the evaluation lies.

    Those of several seeds that were evaluated alike have one name.

    Args:
        evaluations: by their names in the report.
        runs: the names of the report's runs, by their ids.
    """
    names: dict[str, str] = {}
    found = {}
    for name, records in evaluations.items():
        trained, model = records.certificate["run"], records.certificate["model"]
        of_run = runs.get(trained.get("run_id", "")) if trained else None
        evaluated = of_run or (Path(model).name if Path(model).is_absolute() else model)
        alike = repr([records.certificate["policy"], sorted((run_choices(records) | {"seed": None}).items())])
        text = f"{shorten(evaluated, LABEL // 2)}, evaluated in {shorten(name, LABEL // 2)}"
        found[records.place] = names.setdefault(alike, text)
    return found


def by_bits_per_byte(run: Run) -> float:
    """Returns what runs are ranked by: bits per byte compare across tokenizers too."""
    value = run.final["bits_per_byte"]
    return float("inf") if value is None or value != value else value


def with_ends(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns a value and the ends of its interval by the names of their columns."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def bits_name(perplexity: str) -> str:
    """Returns what bits per byte are called beside a perplexity of that name."""
    return perplexity.replace("perplexity", "bits per byte")


def exp(loss: float) -> float:
    """Returns the exponential; infinity where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def file_name(key: str) -> str:
    """Returns a key as a part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)[:80]


def next_command(run: Run) -> str:
    """Returns the command that goes on with a run; empty where there is nothing to do."""
    if run.status.name in ("done", "pruned", "running"):
        return ""
    if run.begun:
        return command("python", "-m", "lmlab.resume", from_here(run.path))
    return command("python", "-m", "lmlab.sweep", "resume", from_here(run.sweep)) if run.sweep else ""
