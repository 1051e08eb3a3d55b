"""What a report says of the runs of one objective: data, figures, tables and words."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lmlab.evaluation.comparison import paired, shown_p
from lmlab.evaluation.records import BOUND, is_bound
from lmlab.reporting import figures
from lmlab.reporting.figures import Figure, Key
from lmlab.reporting.finals import BEST, Final, finals
from lmlab.reporting.gather import Group
from lmlab.reporting.reading import COUNTS, SPLITS, Run, number
from lmlab.reporting.verdict import verdict
from lmlab.reporting.words import brief, duration, figure, file_name, letter, next_command, parameters, shortened
from lmlab.runs.choices import as_typed

FILE_POINTS = 4000
"""Of curves, in a figure's files."""
KEYS = 8
"""Keys whose effect is drawn."""
MANY = 100
"""Runs beyond which files of curves are drawn against tokens only."""
OPTIONS = 30
"""Values that a filter offers."""


@dataclass(frozen=True)
class Cell:
    """Of a table: what stands there, and what it is sorted by."""

    text: str
    value: float | str | None = None


class Section:
    """The runs of one objective.

    Args:
        group: they.
        slug: begins the names of its files.
        points: of curves that the page has room for, in this section.
    """

    def __init__(self, group: Group, slug: str, points: int):
        self.group, self.slug, self.points = group, slug, points
        self.runs = group.runs
        self.title = group.objective.rpartition(".")[2]
        self.configured = group.configurations
        self.configurations = list(dict.fromkeys(self.configured.values()))  # best first, as the runs
        self.fields = {key: f"k{i}" for i, key in enumerate(group.keys)}
        self.named = {run.place: self.configured[run.name] for run in self.runs} | group.others

    @cached_property
    def figure(self) -> str:
        """What the perplexity is called."""
        return next((run.figure for run in self.runs if run.figure), "perplexity").replace("_", " ")

    @cached_property
    def figures_measured(self) -> list[str]:
        """Of each kind of evaluation what its perplexity is called."""
        return [alike[0].certificate["figure"].replace("_", " ") for alike in self.group.evaluations]

    @cached_property
    def final(self) -> tuple[str, str]:
        """The figure that charts show: perplexity, or bits per byte where tokenizers differ; and its name."""
        tokenizers = {e.certificate["tokenizer_hash"] for alike in self.group.evaluations for e in alike}
        if len(tokenizers) > 1:
            return "bits_per_byte", bits_per_byte(self.figure)
        return "perplexity", self.figure

    @cached_property
    def done(self) -> list[Run]:
        """Those whose final figure is known."""
        return [run for run in self.runs if run.state.name == "done" and finite(run.final[self.final[0]])]

    @property
    def unranked(self) -> int:
        """How many have finished without an evaluation to rank them by."""
        return sum(run.state.name == "done" and run.name not in self.group.ranks for run in self.runs)

    @property
    def many(self) -> bool:
        """Whether curves are too many for a file against each of tokens, steps and time."""
        return len(self.runs) > MANY

    @property
    def several(self) -> bool:
        """Whether runs differ in their seed only."""
        return len(self.configurations) < len(self.runs)

    @property
    def states(self) -> Counter[str]:
        return Counter(run.state.name for run in self.runs)

    @cached_property
    def finals(self) -> list[list[Final]]:
        """The configurations of each kind of evaluation, best first."""
        return [finals(alike, self.named) for alike in self.group.evaluations]

    @property
    def paired(self) -> str:
        """What the statistics are over: documents, or stretches of them."""
        return paired([e for alike in self.group.evaluations for e in alike])

    @cached_property
    def keys(self) -> list[Key]:
        """In which finished runs differ: as fields of the data."""
        found = []
        for key, field in self.fields.items():
            values = [value for run in self.done if (value := self.by_key[key][run.name]) is not None]
            if len(set(values)) > 1:
                found.append(Key(field, shortened(self.group.heads[key], 40), sorted(set(values))))
        return found

    @cached_property
    def by_key(self) -> dict[str, dict[str, Any]]:
        """Of each key the value by run."""
        return {key: self.values(key) for key in self.fields}

    def values(self, key: str) -> dict[str, Any]:
        """A key's value by run: numbers if all are, else words; None of a run that has not said."""
        known = {run.name: run.chosen.get(key) for run in self.runs if run.begun or key in run.chosen}
        if not all(number(value) for value in known.values()):
            # Short, unless that would make two of them one.
            short = {as_typed(value): brief(value) for value in known.values()}
            one_to_one = len(set(short.values())) == len(short)
            known = {name: short[as_typed(value)] if one_to_one else as_typed(value) for name, value in known.items()}
        return {run.name: known.get(run.name) for run in self.runs}

    @cached_property
    def texts(self) -> dict[str, dict[str, str]]:
        """The same in words, by key and run: of numbers no more digits than tell them apart."""
        found = {}
        for key, known in self.by_key.items():
            values = {value for value in known.values() if value is not None}
            digits = next((d for d in (4, 6, 9) if len({f"{v:.{d}g}" for v in values if number(v)}) == len(values)), 17)
            broken = any(isinstance(value, float) for value in values)
            found[key] = {
                name: f"{value:.{digits}g}" if broken else str(value)
                for name, value in known.items()
                if value is not None
            }
        return found

    @cached_property
    def data(self) -> dict[str, list[dict[str, Any]]]:
        """What the figures are drawn from, whole."""
        done = {run.name for run in self.done}
        of_runs = [
            {
                "run": run.name,
                "configuration": self.configured[run.name],
                "evaluation": letter(self.group.ranks[run.name][0]) if run.name in self.group.ranks else "none",
                "state": run.state.name,
                "final": run.final[self.final[0]] if run.name in done else None,
                **{field: self.by_key[key][run.name] for key, field in self.fields.items()},
            }
            for run in self.runs
        ]
        of_curves = [
            {"run": run.name, "configuration": self.configured[run.name], "split": split, **point}
            for run in self.runs
            for split in SPLITS
            for point in run.curve(split)
        ]
        of_finals = [
            {
                "rank": rank,
                "configuration": final.name,
                "label": label,
                "evaluation": letter(kind),
                "runs": len(final.places),
                **with_interval("bits_per_byte", final.bits_per_byte),
                "upper_bound": final.bound,
                **with_interval("perplexity", final.perplexity),
                **with_interval(
                    "difference",
                    (final.difference.value, final.difference.low, final.difference.high)
                    if final.difference
                    else (0.0 if rank == 1 else None, None, None),
                ),
                "p": final.difference.p if final.difference else None,
            }
            for kind, alike in enumerate(self.finals)
            for rank, (final, label) in enumerate(zip(alike, self.labels(alike), strict=True), 1)
        ]
        return {"runs": of_runs, "curves": of_curves, "finals": of_finals}

    def thinned(self, points: int, configurations: list[str] | None = None) -> list[dict[str, Any]]:
        """The rows of the curves at so many points at most, those of some configurations.

        Runs of one configuration keep the same steps, so that their mean stays one of all of them.
        """
        rows = [row for row in self.data["curves"] if not configurations or row["configuration"] in configurations]
        most = max(20, points // max(1, len({(row["run"], row["split"]) for row in rows})))
        steps: dict[tuple[str, str], set[int]] = {}
        for row in rows:
            steps.setdefault((row["configuration"], row["split"]), set()).add(row["step"])
        kept = {where: evenly(sorted(found), most) for where, found in steps.items()}
        return [row for row in rows if row["step"] in kept[row["configuration"], row["split"]]]

    @cached_property
    def thin(self) -> list[dict[str, Any]]:
        """The rows of the curves that the page has room for."""
        return self.thinned(self.points)

    @cached_property
    def drawn(self) -> dict[str, list[dict[str, Any]]]:
        """What the figures' files are drawn from: of curves no more than can be told apart."""
        of_runs = {row["run"]: {key.field: row[key.field] for key in self.keys} for row in self.data["runs"]}
        curves = self.thinned(FILE_POINTS, self.configurations[:BEST])
        drawn = {split: [row | of_runs[row["run"]] for row in curves if row["split"] == split] for split in SPLITS}
        return drawn | {name: self.data[name] for name in ("runs", "finals")}

    @cached_property
    def curves(self) -> dict[str, dict[str, Figure]]:
        """By what is shown, and then by what it is shown against."""
        if not self.data["curves"]:
            return {}
        numeric = [key for key in self.keys if key.numeric]
        by = max(numeric, key=lambda key: len(key.values), default=None)
        seconds = max(run.seconds[-1] for run in self.runs if run.seconds)
        found: dict[str, dict[str, Figure]] = {}
        shown = [(split, y) for split in SPLITS for y in ("loss", "perplexity")] + [("training", "speed")]
        there = {(row["split"], y) for row in self.data["curves"] for y in ("loss", "speed") if row[y] is not None}
        for split, y in shown:
            name = "throughput" if y == "speed" else f"{split}_{y}"
            title = "Throughput" if y == "speed" else f"{split.capitalize()} {self.figure if y == 'perplexity' else y}"
            if (split, "speed" if y == "speed" else "loss") in there:
                specs = figures.curves(split, y, self.figure, self.configurations, self.several, by, seconds)
                found[name] = {
                    x: Figure(
                        f"{self.slug}_{name}" + ("" if x == "tokens" else f"_by_{x}"),
                        title,
                        spec,
                        split,
                        f"{self.slug}_{split}",
                    )
                    for x, spec in specs.items()
                }
        return found

    @cached_property
    def effects(self) -> list[Figure]:
        """The final figure by each key's value, and by all of them at once."""
        values = [value for run in self.done if (value := run.final[self.final[0]]) is not None]
        kinds = {row["evaluation"] for row in self.data["runs"] if row["final"] is not None}
        names, table = {field: key for key, field in self.fields.items()}, f"{self.slug}_effects"
        found: list[Figure] = []
        for key in self.keys[:KEYS]:
            others = [other for other in self.keys if other is not key]
            by = next((other for other in others if len(other.values) <= 8), None)
            spec = figures.effect(key, self.final[1], values, sorted(kinds), by, [other.field for other in others])
            title = f"{self.final[1].capitalize()} by {shortened(names[key.field], 60)}"
            name = f"{self.slug}_effect_{file_name(names[key.field])}"
            if name in {figure.name for figure in found}:
                name += f"_{key.field}"
            found.append(Figure(name, title, spec, "runs", table))
        if len(self.keys) > 1:
            spec = figures.parallel(self.keys[:KEYS], self.final[1], values)
            found.append(Figure(f"{self.slug}_parallel", "All of them at once", spec, "runs", table))
        return found

    @cached_property
    def intervals(self) -> list[tuple[str, str, str, list[Figure], list[tuple[list[int], list[Cell]]]]]:
        """Of each kind of evaluation: its letter, why it stands apart, what its perplexity is called, charts, and a
        table with each row's runs."""
        found = []
        field = self.final[0]
        table = f"{self.slug}_finals"
        for place, (alike, perplexity) in enumerate(zip(self.finals, self.figures_measured, strict=True)):
            kind = letter(place)
            shown = [row for row in self.data["finals"] if row["evaluation"] == kind][:BEST]
            suffix = "" if len(self.finals) == 1 else f"_{kind}"
            best = f", the {BEST} best of {len(alike)}" if len(alike) > BEST else ""
            name = perplexity if field == "perplexity" else bits_per_byte(perplexity)
            spec = figures.final(shown, field, name)
            charts = [Figure(f"{self.slug}_final{suffix}", f"Final {name}{best}", spec, "finals", table)]
            if len(alike) > 1:
                title = f"difference from the best ({bits_per_byte(perplexity)})"
                spec = figures.final(shown, "difference", title, 0.0)
                heading = f"Difference from the best{best}"
                charts.append(Figure(f"{self.slug}_difference{suffix}", heading, spec, "finals", table))
            why = self.group.apart[place - 1] if place else ""
            rows = [(self.members(final), final_cells(row)) for final, row in zip(alike[:BEST], shown, strict=True)]
            found.append((kind, why, perplexity, charts, rows))
        return found

    def labels(self, alike: list[Final]) -> list[str]:
        """What charts call configurations: by the keys in which these differ."""
        of_place = {run.place: run for run in self.runs}
        firsts = [next((of_place[place] for place in final.places if place in of_place), None) for final in alike]
        there = [run.name for run in firsts if run]
        keys = [key for key, known in self.by_key.items() if len({known[name] for name in there}) > 1]
        pairs = zip(firsts, alike, strict=True)
        labels = [
            self.group.configuration(run, keys, len(final.places) > 1) if run and keys else final.name
            for run, final in pairs
        ]
        return labels if len(set(labels)) == len(labels) else [final.name for final in alike]

    def members(self, final: Final) -> list[int]:
        """Its runs, by their place among those of the section; none where it evaluates what is no run of it."""
        return [i for i, run in enumerate(self.runs) if run.place in final.places]

    @property
    def filed(self) -> list[Figure]:
        """Those that have files."""
        left_out = {v.name for variants in self.curves.values() for x, v in variants.items() if x != "tokens"}
        return [figure for figure in self.figures if not self.many or figure.name not in left_out]

    @property
    def figures(self) -> list[Figure]:
        """Every figure of the section."""
        of_curves = [figure for variants in self.curves.values() for figure in variants.values()]
        return of_curves + self.effects + [chart for _, _, _, charts, _ in self.intervals for chart in charts]

    @property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The data of the figures, whole, by the names of their files."""
        found: dict[str, list[dict[str, Any]]] = {}
        for split in SPLITS:
            speed = ("speed",) if split == "training" else ()
            found[split] = [
                {name: row[name] for name in ("run", "configuration", "step", "tokens", "seconds", "loss", *speed)}
                | {"perplexity": exp(row["loss"])}
                for row in self.data["curves"]
                if row["split"] == split
            ]
        found["effects"] = [
            {"run": row["run"], "evaluation": row["evaluation"]}
            | {key: row[field] for key, field in self.fields.items()}
            | {self.final[1]: row["final"]}
            for row in self.data["runs"]
            if self.effects and row["final"] is not None
        ]
        found["finals"] = [{k: v for k, v in row.items() if k != "label"} for row in self.data["finals"]]
        return {f"{self.slug}_{name}": rows for name, rows in found.items() if rows}

    @cached_property
    def columns(self) -> list[tuple[str, str]]:
        """Of the main table: heads, and what they say in full."""
        seeds = {repr(run.chosen.get("seed")) for run in self.runs}
        keys = [*(["seed"] if len(seeds) > 1 else []), *self.group.keys]
        return [
            ("", "rank" if len(self.finals) < 2 else "evaluation and rank in it"),
            ("run", "directory"),
            *((shortened(self.group.heads.get(key, key), 40), key) for key in keys),
            (
                self.figure,
                "of the best weights on the held-out text; so far, and from which step, where the run has not ended",
            ),
            ("bits/byte", bits_per_byte(self.figure)),
            ("state", "state"),
            ("steps", "optimizer steps"),
            ("parameters", "of the model, and how many of them are trainable where not all are"),
            ("tokens", "seen in training"),
            ("FLOPs", "floating-point operations of training: forward and backward passes, over the whole run"),
            ("tokens/s", "over the whole run; the median so far, where it has not ended"),
            ("time", "wall clock, validation included, pauses left out"),
        ]

    def cells(self, run: Run) -> list[Cell]:
        """A row of the main table."""
        rank = self.group.ranks.get(run.name)
        apart = len(self.finals) > 1
        keys = [full for _, full in self.columns if full == "seed" or full in self.group.keys]
        so_far = "" if run.so_far_at is None else f" so far, step {run.so_far_at:,}"
        perplexity, bits = run.final["perplexity"], run.final["bits_per_byte"]
        bound = BOUND if run.records and is_bound(run.records.certificate) else ""
        state = run.state
        of = f" of {state.steps:,}" if state.steps and state.steps != state.step else ""
        seconds = run.seconds[-1] if run.seconds else None
        return [
            Cell(f"{letter(rank[0]) if apart else ''}{rank[1]}", rank[0] * 1e6 + rank[1]) if rank else Cell("", None),
            Cell(run.name, run.name),
            *(self.choice(run, key) for key in keys),
            Cell("" if perplexity is None else f"{figure(perplexity)}{so_far}", perplexity),
            Cell("" if bits is None else f"{bound}{bits:.4f}{so_far}", bits),
            Cell(state.name + (f": {state.cause}" if state.cause else ""), state.name),
            Cell(f"{state.step:,}{of}" if run.begun else "", state.step),
            Cell(parameters(run), run.result.get("parameters")),
            Cell(f"{run.tokens:,}" if run.begun else "", run.tokens),
            Cell(f"{run.result['flops']:.3g}" if "flops" in run.result else "", run.result.get("flops")),
            Cell("" if run.speed is None else f"{run.speed:,.0f}", run.speed),
            Cell("" if seconds is None else duration(seconds), seconds),
        ]

    def choice(self, run: Run, key: str) -> Cell:
        """What a run says of a key."""
        if key in self.by_key:
            return Cell(self.texts[key].get(run.name, ""), self.by_key[key][run.name])
        return Cell(brief(run.chosen[key]) if key in run.chosen else "", run.chosen.get(key))

    @cached_property
    def numeric(self) -> list[bool]:
        """Of each column of the main table: whether it holds numbers."""
        columns = zip(*(self.cells(run) for run in self.runs), strict=True)
        values = [[cell.value for cell in column if cell.value is not None] for column in columns]
        return [bool(found) and all(isinstance(value, int | float) for value in found) for found in values]

    def marks(self, run: Run) -> list[tuple[str, str]]:
        """By what a row of the main table can be filtered."""
        texts = [(field, self.texts[key].get(run.name)) for key, field in self.fields.items()]
        return [("state", run.state.name), *((field, text) for field, text in texts if text is not None)]

    def row(self, run: Run) -> dict[str, Any]:
        """A row of the main table, for other programs."""
        rank = self.group.ranks.get(run.name)
        name = self.figure.replace(" ", "_")
        return {
            "objective": self.group.objective,
            "evaluation": letter(rank[0]) if rank else None,
            "rank": rank[1] if rank else None,
            "run": run.name,
            "run_id": run.manifest.get("run_id"),
            "state": run.state.name,
            "cause": run.state.cause,
            "seed": run.chosen.get("seed"),
            **{key: run.chosen.get(key) for key in self.group.keys},
            name: run.final["perplexity"],
            name.replace("perplexity", "bits_per_byte"): run.final["bits_per_byte"],
            "so_far_at_step": run.so_far_at,
            "step": run.state.step,
            "of_steps": run.state.steps,
            "tokens": run.tokens,
            **{name: run.result.get(name) for name in COUNTS},
            "tokens_per_s": run.speed,
            "seconds": run.seconds[-1] if run.seconds else None,
            "directory": str(run.place),
        }

    @property
    def filters(self) -> list[tuple[str, str, list[str]]]:
        """Of each key with few values: its field, its head, its values."""
        found = []
        for key, field in self.fields.items():
            pairs = {(self.by_key[key][name], text) for name, text in self.texts[key].items()}
            options = [text for _, text in sorted(pairs)]
            if 1 < len(options) <= OPTIONS:
                found.append((field, shortened(self.group.heads[key], 40), options))
        return found

    @property
    def samples(self) -> list[tuple[Run, str, list[dict[str, Any]]]]:
        """Of each run with any: its configuration, and the last of them."""
        return [
            (run, self.configured[run.name], [s for s in run.samples if s["step"] == run.samples[-1]["step"]])
            for run in self.runs
            if run.samples
        ]

    @property
    def troubles(self) -> list[tuple[Run, str]]:
        """Runs that have not come to their end or can't be read in full, each with the command that goes on with it."""
        return [(run, next_command(run)) for run in self.runs if run.state.name not in ("done", "pruned") or run.faults]

    @cached_property
    def verdict(self) -> list[str]:
        """What the final figures decide, and last the best single run, which decides nothing."""
        kinds = list(zip(map(bits_per_byte, self.figures_measured), self.finals, strict=True))
        return [*verdict(kinds, self.states, self.unranked), *self.best]

    @property
    def best(self) -> list[str]:
        """A sentence on the best single run, where one is ranked."""
        run = self.runs[0] if self.runs else None
        if run is None or run.name not in self.group.ranks:
            return []
        kind = self.group.ranks[run.name][0]
        of = f" of {letter(kind)}" if len(self.finals) > 1 else ""
        # Of many choices, a configuration goes by the name of a run.
        choices = [self.configured[run.name]] if 0 < len(self.group.keys) <= 4 else []
        which = ", ".join([run.name, *choices, f"seed {run.chosen.get('seed')}"])
        value = figure(run.final["perplexity"] or math.nan)
        return [f"The best single run{of} is {which}, with {self.figures_measured[kind]} {value}."]


def final_cells(row: dict[str, Any]) -> list[Cell]:
    """A row of the table of final figures."""

    def interval(name: str, form: str) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return "" if low is None else f"{low:{form}} to {high:{form}}"

    low, high = row["perplexity_low"], row["perplexity_high"]
    return [
        Cell(row["configuration"]),
        Cell(str(row["runs"])),
        Cell(figure(row["perplexity"])),
        Cell("" if low is None else f"{figure(low)} to {figure(high)}"),
        Cell(f"{BOUND if row['upper_bound'] else ''}{row['bits_per_byte']:.4f}"),
        Cell(interval("bits_per_byte", ".4f")),
        Cell("" if row["rank"] == 1 or row["difference"] is None else f"{row['difference']:+.4f}"),
        Cell(interval("difference", "+.4f")),
        Cell(shown_p(row["p"])),
    ]


def bits_per_byte(perplexity: str) -> str:
    """What bits per byte are called beside a perplexity of that name."""
    return perplexity.replace("perplexity", "bits per byte")


def with_interval(name: str, values: tuple[float | None, float | None, float | None]) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")


def exp(loss: float) -> float:
    """Infinite where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def evenly(values: list[int], most: int) -> set[int]:
    """So many of them at most, the first and the last included."""
    if len(values) <= most:
        return set(values)
    return {values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)}
