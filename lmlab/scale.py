"""The command `python -m lmlab.scale DIR [DIR …]`, which fits a scaling law to runs of several sizes and budgets.

Takes ordinary arguments. Each directory is a run, or holds several: a sweep such as `sweeps/ladder_clm.yaml`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lmlab.compare import show
from lmlab.console import counted
from lmlab.distributed.signals import SIGNALS
from lmlab.errors import Arguments, UserError, first_line, nearest, shown_plainly
from lmlab.evaluation import scaling
from lmlab.evaluation.scaling import IsoFlop, Ladder, Law
from lmlab.io import from_here, write_out
from lmlab.reporting.load import LOADER, find_runs
from lmlab.reporting.text import latex, number_text
from lmlab.runs.choices import of_this_version
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import read_status

LADDER = "python -m lmlab.train -cd sweeps -cn ladder_clm"
EXAMPLES = f"""\
  {LADDER}          runs of several sizes and budgets
  python -m lmlab.scale multirun/ladder                      their scaling law
  python -m lmlab.scale multirun/ladder --predict flops=1e13 parameters=1e6 tokens=1e8
"""


@dataclass(frozen=True)
class Observed:
    """A finished run of a ladder."""

    path: Path
    parameters: int
    tokens: int
    flops: int
    loss: float
    alike: dict[str, Any]
    """The facts that have to agree in all runs of a ladder, by what they are called."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    p = Arguments(
        prog="python -m lmlab.scale",
        description="Fit a scaling law to runs of several sizes and budgets, with intervals, and predict others by it.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, or a folder with runs in it")
    p.add_argument(
        "--predict",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what other runs would give: flops=1e13, or parameters=1e6 tokens=1e8; several are allowed",
    )
    p.add_argument("--metric", action="append", help="the metric of the summaries that is fitted (val/loss)")
    p.add_argument("--out", type=Path, help="where tables and charts go (scaling/DATE/TIME)")
    return p


def main() -> None:
    """Runs the command."""
    with shown_plainly(), SIGNALS.heeded():
        scale(parser().parse_args())


def scale(arguments: argparse.Namespace) -> None:
    """Prints the scaling law, and writes its tables and charts."""
    if len(arguments.metric or ()) > 1:
        raise UserError(f"--metric {' --metric '.join(arguments.metric)}: a law is of one metric. Fit them one by one.")
    metric = (arguments.metric or ["val/loss"])[0]
    asked = [request for words in arguments.predict for request in read_requests(words)]
    runs, left_out = read_runs(arguments.directories, metric)
    check_one_ladder(runs)
    ladder = Ladder(*np.array([(run.parameters, run.tokens, run.flops, run.loss) for run in runs], float).T)
    check_fit(ladder, left_out)

    counts = ladder.samples()
    isoflop, law = scaling.fit_isoflop(ladder, counts), scaling.fit_law(ladder, counts)
    powers = scaling.power_laws(ladder, isoflop)
    tables = {
        "runs": [
            {"run": str(run.path), "parameters": run.parameters, "tokens": run.tokens, "flops": run.flops}
            | {"budget": ladder.budget_flops[budget], metric: run.loss}
            for run, budget in zip(runs, ladder.budgets, strict=True)
        ],
        "budgets": budget_rows(ladder, isoflop),
        "law": law_rows(law, powers),
        "largest_budget": scaling.predict_largest(ladder),
        "predictions": [row for request in asked for row in prediction_rows(request, law, powers)],
    }
    texts = {name: [row_texts(row, metric) for row in rows] for name, rows in tables.items()}

    from pandas import DataFrame  # only here: what is refused need not wait for it

    from lmlab.reporting.charts import image_files
    from lmlab.reporting.scaling import ladder_charts

    files: dict[str, str | bytes] = {
        f"{name}.csv": DataFrame(rows, dtype=object).to_csv(index=False) for name, rows in tables.items() if rows
    }
    files["law.tex"] = latex(DataFrame(texts["law"]), "llrr")
    files |= dict(image_files(ladder_charts(ladder, isoflop, law, metric)))
    out = arguments.out or Path(f"scaling/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    write_out(out, files.items(), instead_of=("largest_budget.csv", "predictions.csv"))

    print(*(f"left out: {line}" for line in left_out), sep="\n", end="\n" if left_out else "")
    faults = [row.pop("fault") for row in texts["budgets"]]
    show(f"Lowest {metric} of each budget", texts["budgets"], words=0)
    for row, fault in zip(texts["budgets"], faults, strict=True):
        if fault:
            print(f"{row['FLOPs']} FLOPs have no part in the isoFLOP law: {fault}.")
    show(f"The law of {counted(len(runs), 'run')}", texts["law"], words=2)
    print("\n".join(law_notes(law, powers)))
    if tables["largest_budget"]:
        show("The largest budget, predicted from the others", texts["largest_budget"], words=0)
        print(largest_text(tables["largest_budget"]))
    optima = [row for row in texts["predictions"] if row["FLOPs"]]
    sizes = [row for row in texts["predictions"] if not row["FLOPs"]]
    if optima:
        show("The best sizes for FLOPs", optima, words=0)
    if sizes:  # whose other columns are empty
        show("Runs of other sizes", [{head: row[head] for head in row if row[head]} for row in sizes], words=0)
    if asked:
        print(beyond_text(asked, ladder))
    print(f"Written to {from_here(out.resolve())}: {', '.join(files)}")


def law_notes(law: Law, powers: np.ndarray) -> list[str]:
    """Returns the lines that say how the table of the law is to be read."""
    gamma, log_kappa = law.cost
    lines = [
        "Optimal parameters and tokens are factor · FLOPs^exponent: of the minima above (isoFLOP), and of the loss",
        "E + A / parameters^alpha + B / tokens^beta (parametric). Parameters include those of embeddings; FLOPs are",
        f"{math.exp(log_kappa):.3g} · parameters^{gamma:.3f} · tokens, by least squares over the runs.",
    ]
    if np.isnan(powers[0, 0, 0]):
        lines.append("There is no isoFLOP law: it takes the minima of two budgets.")
    if np.isnan(law.optimum(np.ones(1))[0][0, 0]):
        lines.append("The parametric law has no optimum: its loss does not fall with both parameters and tokens.")
    return lines


def read_requests(words: Sequence[str]) -> list[dict[str, float]]:
    """Reads what is to be predicted: each `flops=` is a request, and each pair of `parameters=` and `tokens=`.

    Raises:
        UserError: a word is none of these, or one of a pair is missing.
    """
    requests: list[dict[str, float]] = []
    for word in words:
        key, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if key not in ("flops", "parameters", "tokens") or not 0 < value < math.inf:
            raise UserError(
                f"--predict {word}: it has to be flops=1e13, or parameters=1e6 tokens=1e8, with numbers above 0.\n"
                "Directories come before --predict."
            )
        open_pair = bool(requests) and "flops" not in requests[-1] and len(requests[-1]) < 2
        if key != "flops" and open_pair and key not in requests[-1]:
            requests[-1][key] = value
        else:
            requests.append({key: value})
    for request in requests:
        if "flops" not in request and len(request) < 2:
            given, missing = next(iter(request)), ({"parameters", "tokens"} - request.keys()).pop()
            raise UserError(f"--predict {given}={request[given]:g}: it takes {missing}=… beside it.")
    return requests


def read_runs(paths: Sequence[Path], metric: str) -> tuple[list[Observed], list[str]]:
    """Reads the finished runs in directories and under them.

    Returns:
        the runs, and a line on each that is left out.

    Raises:
        UserError: a directory does not exist, or no run is left.
    """
    runs: list[Observed] = []
    left_out: list[str] = []
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no directory.\nName run directories, or a folder with runs in it.")
        found |= dict.fromkeys(find_runs(path, left_out))
    for path in found:
        run, name = RunDirectory(path), from_here(path)
        if run.certificate.is_file() and not run.finished():  # an evaluation
            continue
        status = read_status(run)
        if status.name != "done":
            left_out.append(f"{name} is {status.name}{f' ({status.cause})' if status.cause else ''}")
            continue
        summary, manifest = run.read_summary(), run.read_manifest()
        if "flops" not in summary:
            left_out.append(f"{name} has no FLOPs: those of its kind of model are not counted")
            continue
        if metric not in summary:
            others = [key for key in summary if key.startswith("val/")]
            raise UserError(
                f"--metric {metric}: {name} has none.{nearest(metric, others)}\nIt has {', '.join(others)}."
            )
        loss = summary[metric]
        if not isinstance(loss, int | float) or not 0 < loss < math.inf:
            left_out.append(f"{name} has a {metric} of {loss}, which has no logarithm")
            continue
        try:
            config = of_this_version(yaml.load(run.config.read_bytes(), LOADER))
        except (OSError, yaml.YAMLError) as error:
            left_out.append(f"{name} has a config that can't be read: {first_line(error)}")
            continue
        alike = {"objectives": config["objective"], "data": manifest["data_fingerprint"]}
        alike |= {"tokenizers": manifest["tokenizer_hash"], "preprocessing": config["preprocess"]}
        runs.append(Observed(name, summary["parameters"], summary["tokens"], summary["flops"], loss, alike))
    if not runs:
        raise UserError(
            f"{paths[0]} holds no finished run to fit a law to{f': {left_out[0]}' if left_out else ''}.\n"
            f"For runs of several sizes and budgets: {LADDER}"
        )
    return runs, left_out


def check_one_ladder(runs: Sequence[Observed]) -> None:
    """Refuses runs whose losses do not mean the same.

    Raises:
        UserError: two of them differ in objective, data, tokenizer or preprocessing.
    """
    for run in runs[1:]:
        for name, value in run.alike.items():
            if value != runs[0].alike[name]:
                raise UserError(
                    f"{runs[0].path} and {run.path} are of no one ladder: their {name} differ.\n"
                    "Name the runs of one objective on the same data."
                )


def check_fit(ladder: Ladder, left_out: Sequence[str]) -> None:
    """Refuses a ladder that no law can be fitted to.

    Raises:
        UserError: it has one budget, or too few runs or sizes.
    """
    flops = ladder.budget_flops
    why = scaling.why_unfit(ladder)
    if len(flops) == 1:
        runs = counted(len(ladder.losses), "run")
        why = f"a scaling law takes several budgets; there is one, of {number_text(flops[0])} FLOPs in {runs}"
    if why:
        also = f" ({counted(len(left_out), 'run')} left out: {left_out[0]})" if left_out else ""
        raise UserError(f"{why}{also}.\nFor runs of several sizes and budgets: {LADDER}")


def budget_rows(ladder: Ladder, isoflop: IsoFlop) -> list[dict[str, Any]]:
    """Returns a row for each budget: its runs, and the minimum of its parabola."""
    low, high = scaling.intervals(np.exp(isoflop.minima[..., 0]))
    rows = []
    for budget, flops in enumerate(ladder.budget_flops):
        runs = ladder.budgets == budget
        log_n, log_d, loss = isoflop.minima[0, budget]
        row = {"FLOPs": flops, "runs": int(runs.sum()), "sizes": len(np.unique(ladder.parameters[runs]))}
        row |= {"parameters": math.exp(log_n), "low": low[budget], "high": high[budget], "tokens": math.exp(log_d)}
        rows.append(row | {"loss": loss, "fault": isoflop.faults[budget]})
    return rows


def law_rows(law: Law, powers: np.ndarray) -> list[dict[str, Any]]:
    """Returns a row for each constant that there is of both approaches, with its interval."""
    factors = law.optimum(np.ones(1))
    values = []
    for i, name in enumerate(("parameters", "tokens")):
        values.append(("isoFLOP", f"optimal {name}: factor", np.exp(powers[i][:, 1])))
        values.append(("isoFLOP", f"optimal {name}: exponent", powers[i][:, 0]))
    for i, name in enumerate(("parameters", "tokens")):
        values.append(("parametric", f"optimal {name}: factor", factors[i][:, 0]))
        values.append(("parametric", f"optimal {name}: exponent", law.exponents[i]))
    values += [("parametric", f"loss: {name}", samples) for name, samples in law.constants.items()]
    rows = []
    for approach, name, samples in values:
        low, high = scaling.intervals(samples[:, None])
        rows.append({"approach": approach, "constant": name, "value": samples[0], "low": low[0], "high": high[0]})
    return [row for row in rows if not math.isnan(row["value"])]


def prediction_rows(request: dict[str, float], law: Law, powers: np.ndarray) -> list[dict[str, Any]]:
    """Returns the rows of what is predicted for FLOPs, by both approaches, or for parameters and tokens."""
    if "flops" not in request:
        given = [np.array([request[key]]) for key in ("parameters", "tokens")]
        losses = law.scattered(law.loss(*given))
        return [prediction_row(math.nan, "", *(np.array([value, [math.nan]]) for value in given), losses)]
    flops = np.array([request["flops"]])
    lines = np.exp(powers[..., :1] * np.log(flops) + powers[..., 1:])  # [2, S, 1]
    parameters, tokens = law.optimum(flops)
    losses = law.scattered(law.loss(parameters, tokens))
    rows = [
        prediction_row(flops[0], "isoFLOP", *lines, np.full((2, 1), np.nan)),
        prediction_row(flops[0], "parametric", parameters, tokens, losses),
    ]
    return [row for row in rows if not math.isnan(row["parameters"])]


def prediction_row(flops: float, approach: str, *samples: np.ndarray) -> dict[str, Any]:
    """Returns a row of predictions.

    Args:
        samples: of parameters, tokens and loss, each [S, 1]; all but the first nan where there is no interval.
    """
    row: dict[str, Any] = {"FLOPs": flops, "approach": approach}
    for name, values in zip(("parameters", "tokens", "loss"), samples, strict=True):
        low, high = scaling.intervals(values)
        row |= {name: values[0, 0], f"{name}_low": low[0], f"{name}_high": high[0]}
    return row


def row_texts(row: dict[str, Any], metric: str) -> dict[str, str]:
    """Returns a row of a table for a person, by its columns: the ends of an interval are one."""
    texts: dict[str, str] = {}
    for name, value in row.items():
        if name.endswith("low"):
            low, high = number_text(value), number_text(row[f"{name.removesuffix('low')}high"])
            # Spaces tell the columns of several intervals apart: they are the keys of one dict.
            texts["95 %" + " " * sum(head.startswith("95 %") for head in texts)] = f"{low} to {high}" if low else ""
        elif not name.endswith("high"):
            texts[metric if name == "loss" else name] = number_text(value)
    return texts


def largest_text(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the sentence on how well the largest budget was predicted."""
    inside = sum(row["low"] <= row["measured"] <= row["high"] for row in rows)
    error = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    return (
        f"{inside} of {counted(len(rows), 'run')} lie in the interval that the smaller budgets predict for them; "
        f"the largest error is {error:.1%}."
    )


def beyond_text(asked: Sequence[dict[str, float]], ladder: Ladder) -> str:
    """Returns the sentence on what the intervals of predictions hold, and on how far these are from the runs."""
    ranges = {"flops": ladder.flops, "parameters": ladder.parameters, "tokens": ladder.tokens}
    times = {key: max([request.get(key, 0) / ranges[key].max() for request in asked]) for key in ranges}
    far = [f"{times[key]:,.3g} times the {key.replace('flops', 'FLOPs')}" for key in ranges if times[key] > 10]
    text = "The interval of a loss holds what other runs of the ladder would give, and the scatter of single runs."
    if far:
        text += f"\nPredictions go up to {' and '.join(far)} of any run: no interval says if the law holds there."
    return text


if __name__ == "__main__":
    main()
