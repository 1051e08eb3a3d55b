"""The verb `report` as a person uses it: its files, its words, and its page in a real browser."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import vl_convert

from lmlab.evaluation import comparison, records
from lmlab.evaluation.sides import make_sides
from lmlab.reporting import page as pages
from lmlab.reporting.charts import COLOURS
from lmlab.reporting.load import load_runs
from lmlab.reporting.section import Section, make_sections
from lmlab.reporting.statistics import final_metrics
from lmlab.runs.directory import RunDirectory

from ..conftest import HOME, TINY, TINY_MLM, Refused, run_verb
from .synthetic import made

STEPS = ["trainer.max_steps=8", "trainer.log_every_n_steps=1", "trainer.val_check_interval=2"]
HOSTILE = "</script><script>document.title='taken'</script><b>bold</b>"


@pytest.fixture(scope="module")
def trained() -> dict[str, Path]:
    """Two real runs, by objective."""
    places = {name: Path(HOME) / "report" / name for name in ("clm", "mlm")}
    for place, overrides in zip(places.values(), (TINY, TINY_MLM), strict=True):
        run_verb("train", *overrides, *STEPS, f"hydra.run.dir={place}")
    return places


@pytest.fixture(scope="module")
def study(trained: dict[str, Path]) -> Path:
    """A sweep of 3 rates × 2 widths × 2 seeds, not all of it finished, and two masked runs beside it."""
    folder = Path(HOME) / "report" / "study"
    points = []
    for rate in (1e-4, 3e-4, 1e-3):
        for width in (64, 128):
            for seed in (1, 2):
                number = len(points)
                points.append([f"optim.lr={rate}", f"model.config.n_embd={width}", f"seed={seed}"])
                if number in (10, 11):
                    continue
                changes = {"optim.lr": rate, "model.config.n_embd": width, "seed": seed}
                end = "killed" if number == 4 else "done"
                made(trained["clm"], folder / str(number), changes, 1 + number / 100, end, steps=8)
    (folder / "11").mkdir()
    failure = {"state": "failed", "cause": "bad config", "message": f"no such key {HOSTILE}", "time": ""}
    (folder / "11" / "failure.json").write_text(json.dumps(failure))
    (folder / "sweep.json").write_text(json.dumps({"arguments": [], "points": points}))
    samples = [{"step": step, "text": "It would", "said": f" drift {HOSTILE}"} for step in (4, 8)]
    (folder / "0" / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    for seed in (1, 2):
        made(trained["mlm"], folder / f"masked{seed}", {"seed": seed}, 1 + seed / 10)
    return folder


@pytest.fixture(scope="module")
def report(study: Path) -> Path:
    """The folder of the study's report."""
    out = study.parent / "out"
    run_verb("report", study, "--out", out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install it")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any) -> Callable[..., Any]:
    """Open a report: its page, once all is drawn. `page.said` is what its console and its requests were."""

    def open_report(folder: Path, width: int = 1280) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.said.append(request.url))
        page.goto(f"file://{folder / 'report.html'}")
        page.wait_for_selector("html[data-drawn=all]", timeout=120_000)
        return page

    return open_report


def table(place: Path) -> list[dict[str, str]]:
    with place.open() as file:
        return list(csv.DictReader(file))


def sections_of(folder: Path) -> list[Section]:
    """The sections of a report on what lies in a folder."""
    runs, evaluations, _ = load_runs([folder])
    return make_sections(runs, evaluations, pages.POINTS)


def test_files(report: Path, study: Path) -> None:
    charts = [chart for section in sections_of(study) for chart in section.charts]
    assert len(charts) == 11
    for chart in charts:
        assert (report / f"{chart.name}.svg").read_text().count("<path") > 2
        assert (report / f"{chart.name}.png").read_bytes().startswith(b"\x89PNG")
        assert table(report / f"{chart.table}.csv")
        alt.Chart.from_dict(chart.spec, validate=True)
    assert not list(report.glob(".*"))


def test_tables(report: Path, study: Path) -> None:
    rows = table(report / "runs.csv")
    assert len(rows) == 14
    causal = [row for row in rows if row["objective"].endswith("CausalLM")]
    ranked = [row["run"] for row in causal if row["rank"]]
    assert ranked == ["0", "1", "2", "3", "5", "6", "7", "8", "9"]  # their losses rise with their numbers
    assert causal[0]["optim.lr"] == "0.0001"
    summary = RunDirectory(study / "0").read_summary()
    for count in ("parameters", "trainable_parameters", "flops"):
        assert causal[0][count] == str(summary[count])
        assert causal[-1][count] == ""
    assert f"{summary['parameters']:,}" in (report / "report.html").read_text()
    assert float(causal[0]["perplexity"]) == RunDirectory(study / "0").read_summary()["val/perplexity"]
    assert {row["run"]: row["status"] for row in causal if not row["rank"]} == {
        "4": "failed",
        "10": "waiting",
        "11": "failed",
    }
    masked = [row for row in rows if row["objective"].endswith("MaskedLM")]
    assert [(row["run"], row["rank"]) for row in masked] == [("masked1", "1"), ("masked2", "2")]
    assert masked[0]["perplexity"] == ""
    assert masked[0]["masked_perplexity"]
    tex = (report / "runs.tex").read_text()
    assert tex.count("\\begin{tabular}") == 2
    assert "n\\_embd" in tex
    assert not re.search(r"\d\.\d{6}", tex)
    html = (report / "report.html").read_text()
    for head in ("FLOPs", "steps in all"):
        assert f'<th class="number"><button>{head}</button>' in html


def test_a_run_that_logged_nothing_has_no_zeros_on_the_page(report: Path, study: Path) -> None:
    section = next(section for section in sections_of(study) if section.objective.endswith("CausalLM"))
    for shown, heads in (
        (section.shown, ["step", "tokens", f"time ({section.time[1]})"]),
        (section.troubles, ["step"]),
    ):
        rows = shown.set_index("run")[heads]
        assert rows.loc[["10", "11"]].isna().all(axis=None)
        assert rows.loc["4"].notna().all()
    (row,) = [row for row in table(report / "runs.csv") if row["run"] == "11"]
    assert (row["step"], row["tokens"], row["seconds"]) == ("0", "0", "0.0")


def test_curves_are_whole(report: Path, study: Path) -> None:
    rows = table(report / "clm_training.csv")
    logged = [json.loads(line) for line in (study / "3" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in logged if "train/loss" in row]
    assert [float(row["loss"]) for row in rows if row["run"] == "3"] == losses
    found = [float(row["perplexity"]) for row in rows if row["run"] == "3"]
    assert found == pytest.approx([math.exp(loss) for loss in losses])
    assert any(row["run"] == "4" for row in rows)  # the killed one, as far as it went


def test_a_curve_of_one_point_is_a_dot(trained: dict[str, Path], tmp_path: Path) -> None:
    """And the legend lists those that a chart has points of."""
    for number in range(3):
        made(trained["clm"], tmp_path / str(number), {"optim.lr": 1 / (number + 3)})
    first = (tmp_path / "1" / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "1" / "metrics.jsonl").write_text(first)
    (tmp_path / "2" / "metrics.jsonl").unlink()
    validation, training, _ = sections_of(tmp_path)[0].curves
    dots = 'aria-roledescription="circle"'
    svg = vl_convert.vegalite_to_svg(validation.spec)
    assert svg.count(dots) == 1
    assert re.findall(r">(lr=[\d.]+)<", svg) == ["lr=0.3333", "lr=0.25"]
    svg = vl_convert.vegalite_to_svg(training.spec)
    assert dots not in svg
    assert re.findall(r">(lr=[\d.]+)<", svg) == ["lr=0.3333"]


def test_colours_by_number_are_titled_as_a_column_is(trained: dict[str, Path], tmp_path: Path) -> None:
    for number in range(COLOURS + 1):
        made(trained["clm"], tmp_path / str(number), {"optim.lr": 1 / (number + 3)})
    for chart in sections_of(tmp_path)[0].curves:
        assert chart.spec["layer"][0]["encoding"]["color"]["title"] == "lr"


def test_curves_of_runs_that_log_at_different_steps_are_thinned_together(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    for seed in (0, 1):
        metrics = made(trained["clm"], tmp_path / str(seed), {"seed": seed}, rows=30) / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] // 10 % 2 == seed))
    runs, _, _ = load_runs([tmp_path])
    (section,) = make_sections(runs, {}, points=1)
    assert max(section.curve_data.groupby(["run", "split"]).size()) < section.points
    assert section.thinned
    assert not sections_of(tmp_path)[0].thinned


def test_intervals_are_those_of_compare(study: Path) -> None:
    read = [records.read(study / name) for name in ("0", "1", "2", "3")]
    best, other = final_metrics(read, {run.path: str(int(run.path.name) // 2) for run in read})
    assert [path.name for path in best.paths] == ["0", "1"]
    sides = make_sides(read)
    expected = comparison.difference(sides[1], sides[0])
    assert other.difference == expected
    for side, found in zip(sides, (best, other), strict=True):
        value, low, high = found.bits_per_byte
        assert value == pytest.approx(float(side.ratios.mean()))
        assert low is not None
        assert high is not None
        assert low < value < high
        assert found.perplexity[0] == pytest.approx(
            math.prod(run.certificate["figures"]["perplexity"] for run in side.runs) ** 0.5
        )


def test_a_killed_run_was_down_for_no_time(trained: dict[str, Path], tmp_path: Path) -> None:
    place = made(trained["clm"], tmp_path / "run")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    gone_on = lines[5]["time"] + 5000
    for line in lines[6:]:
        line["time"] += 5000
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((place / "manifest.json").read_text())
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(gone_on))
    (place / "manifest.json").write_text(json.dumps(manifest | {"went_on": [{"time": stamp, "step": 2}]}))
    run = load_runs([place])[0][0]
    assert run.seconds < lines[-1]["time"] - lines[0]["time"] - 4990


def test_other_evaluations_are_ranked_apart(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, block, factor in (("a", 32, 1.2), ("b", 32, 1.1), ("c", 64, 1.0)):
        made(trained["clm"], tmp_path / "runs" / name, {"preprocess.block_size": block}, factor)
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert "B is not compared with A: block_size is 32 in one and 64 in" in capsys.readouterr().out
    rows = {row["run"]: row for row in table(tmp_path / "out" / "runs.csv")}
    assert [(rows[name]["evaluation"], rows[name]["rank"]) for name in "abc"] == [("A", "2"), ("A", "1"), ("B", "1")]
    assert "block_size is 32 in one and 64 in the other" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_finished(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = made(trained["clm"], tmp_path / "runs" / "a", end="killed", steps=8)
    code = (
        "import sys, time; from lmlab.runs.directory import RunDirectory\n"
        f"with RunDirectory({str(made(trained['clm'], tmp_path / 'runs' / 'b', end='running', steps=8))!r}).lock():\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
        other.kill()
    said = capsys.readouterr().out
    assert "1 failed, 1 running" in said
    assert "None has finished" in said
    html = (tmp_path / "out" / "report.html").read_text()
    assert "so none is ranked" in html
    assert "metrics.jsonl ends in half a line, which is left out." in html
    assert f"python -m lmlab.resume {place}" in html
    assert (tmp_path / "out" / "clm_validation_loss.svg").is_file()


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_before_its_end_is_shown_with_its_best_so_far(
    trained: dict[str, Path], tmp_path: Path, status: str
) -> None:
    """Stopped, or killed while it went on after an end that it once had: its certificate is of that end.

    What it began with, here lower than all that followed, is none of its weights.
    """
    made(trained["clm"], tmp_path / "runs" / "done", factor=1.1)
    run = RunDirectory(made(trained["clm"], tmp_path / "runs" / "before", factor=0.9))
    run.summary.unlink()
    if status == "stopped":
        run.certificate.unlink()
        run.failure.write_text(json.dumps({"state": "stopped", "cause": "SIGINT", "message": "Stopped.", "time": ""}))
    rises = {2: 7.0, 4: 6.0, 6: 6.5, 8: 6.5}
    edited(
        run.metrics,
        lambda row: (
            row | {"val/perplexity": math.exp(rises[row["step"]]), "val/bits_per_byte": rises[row["step"]] / 2}
            if row["step"] in rises and "val/loss" in row
            else row
        ),
    )
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    done, before = table(tmp_path / "out" / "runs.csv")
    assert (before["run"], before["rank"], before["status"]) == ("before", "", status)
    assert (float(before["perplexity"]), float(before["bits_per_byte"])) == (math.exp(6), 3.0)
    assert (before["so_far_at_step"], done["so_far_at_step"], done["rank"]) == ("4", "", "1")
    html = (tmp_path / "out" / "report.html").read_text()
    assert ">403.43</td>" in html
    assert '<th class="number"><button>best so far at step</button>' in html  # though the first row has none
    assert "1 run has not finished, and has no part in this.<br>The best single run is done, " in html
    assert any(row["run"] == "before" for row in table(tmp_path / "out" / "clm_validation.csv"))
    assert {row["configuration"]: row["runs"] for row in table(tmp_path / "out" / "clm_finals.csv")} == {
        "all runs": "1"
    }


def test_damaged_files_are_named(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        made(trained["clm"], tmp_path / "runs" / name)
    (tmp_path / "runs" / "b" / "manifest.json").write_text("{")
    metrics = tmp_path / "runs" / "c" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:3], "nonsense\n", *lines[4:]]))
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert "not read: b: " in capsys.readouterr().out
    assert "metrics.jsonl is damaged in line 4" in (tmp_path / "out" / "report.html").read_text()


def edited(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A file of one JSON object a line with each changed."""
    file.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in file.read_text().splitlines()))


def test_one_damaged_run_spoils_no_report(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name in ("good", "tokens", "loss", "time", "manifest", "config", "certificate"):
        made(trained["clm"], runs / name)
    edited(runs / "tokens" / "metrics.jsonl", lambda row: row | {"data/tokens_seen": None})
    edited(runs / "loss" / "metrics.jsonl", lambda row: row | ({"val/loss": "low"} if "val/loss" in row else {}))
    edited(runs / "time" / "metrics.jsonl", lambda row: row | {"time": "yesterday"})
    (runs / "manifest" / "manifest.json").write_text('{"run_id": "x", "packages": null}')
    config = (runs / "config" / "config.yaml").read_text()
    (runs / "config" / "config.yaml").write_text(f"{config}\nobjective: null\n")
    (runs / "certificate" / "certificate.json").write_text("{}")
    (runs / "sweep.json").write_text("{}")
    run_verb("report", runs, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "not read: manifest: " in said
    assert "not read: config: " in said
    assert "sweep.json is damaged" in said
    rows = {row["run"]: row for row in table(tmp_path / "out" / "runs.csv")}
    assert set(rows) == {"good", "tokens", "loss", "time", "certificate"}
    assert rows["good"]["rank"]
    assert not rows["certificate"]["rank"]
    assert rows["certificate"]["perplexity"] == rows["good"]["perplexity"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("metrics.jsonl is damaged in line 1") == 3
    assert "without an evaluation to rank it by" in html


def test_finished_without_an_evaluation(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(trained["clm"], tmp_path / "runs" / "a")
    (run / "certificate.json").unlink()
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 run finished, without an evaluation to rank it by." in said
    assert "None has finished" not in said
    assert "1 run finished, without an evaluation to rank it by." in (tmp_path / "out" / "report.html").read_text()


def test_the_headline_is_of_configurations_not_of_a_lucky_seed(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (rate, seed, factor) in enumerate([(1e-3, 1, 1.0), (1e-3, 2, 1.02), (3e-3, 1, 0.99), (3e-3, 2, 1.2)]):
        made(trained["clm"], tmp_path / "runs" / str(number), {"optim.lr": rate, "seed": seed}, factor)
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    best, other = table(tmp_path / "out" / "clm_finals.csv")
    low, high = float(other["difference_low"]), float(other["difference_high"])
    assert low < 0 < high
    verdict = (
        f"lr=0.001 is best in the mean: {float(best['bits_per_byte']):.4f} against {float(other['bits_per_byte']):.4f} "
        f"bits per byte for lr=0.003, 95 % interval of the difference {low:+.4f} to {high:+.4f}: "
        "not decided by 2 seeds."
    )
    single = "The best single run is 2, lr=0.003, seed 1, with perplexity "
    html = (tmp_path / "out" / "report.html").read_text()
    assert f"<strong>{verdict}</strong><br>{single}" in html
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{verdict} {single}" in said


def test_a_bound_is_shown_as_one_and_apart(trained: dict[str, Path], tmp_path: Path) -> None:
    """Runs of masked diffusion beside a causal one, and evaluations whose scores need no objective."""
    runs = tmp_path / "runs"
    made(trained["clm"], runs / "causal")
    words = [word for word in TINY_MLM if word != "objective=mlm"]
    run_verb("train", "objective=diffusion", "objective.draws=2", *words, f"hydra.run.dir={runs / 'diffusion'}")
    for score in ("elbo", "pseudo"):
        more = ["draws=2", "context=blocks"] if score == "elbo" else ["sample=0.02"]
        run_verb("evaluate", trained["mlm"], f"score={score}", *more, f"hydra.run.dir={runs / score}")
    causal, diffusion, pseudo = sections = sections_of(runs)
    assert [section.title for section in sections] == ["CausalLM", "MaskedDiffusion", "pseudo perplexity"]
    assert [section.metric for section in sections[:2]] == ["perplexity", "bound perplexity"]
    summary = RunDirectory(runs / "diffusion").read_summary()
    (row,) = diffusion.shown.to_dict("records")
    assert row["bound perplexity"] == f"≤ {summary['val/bound_perplexity']:,.2f}"
    assert row["bound bits per byte"] == f"≤ {summary['val/bound_bits_per_byte']:.4f}"
    finals = diffusion.final_table(0)
    assert len(finals) == 2  # the elbo of another model is a bound as well
    assert all(value.startswith("≤ ") for name in ("perplexity", "bits per byte") for value in finals[f"bound {name}"])
    assert f"with bound perplexity ≤ {summary['val/bound_perplexity']:,.2f}." in diffusion.verdict[-1]
    assert not any("≤" in text for section in (causal, pseudo) for text in section.verdict)
    (row,) = causal.shown.to_dict("records")
    assert isinstance(row["perplexity"], float)
    assert [*pseudo.final_table(0)["pseudo perplexity"]] == [
        records.read(runs / "pseudo").certificate["figures"]["pseudo_perplexity"]
    ]


def test_seeds_only_are_one_row(trained: dict[str, Path], tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        # Whole numbers may be written as such or not.
        changes = {"seed": seed, "optim.weight_decay": 0 if seed == 1 else 0.0}
        changes |= {"profile": seed == 2, "trainer.devices": seed, "trainer.accumulate_grad_batches": 4 - seed}
        made(trained["clm"], tmp_path / "runs" / str(seed), changes, 1 + seed / 100)
    run_verb("report", tmp_path / "runs", "--out", tmp_path / "out")
    (row,) = table(tmp_path / "out" / "clm_finals.csv")
    assert row["runs"] == "3"
    assert float(row["perplexity_low"]) < float(row["perplexity"]) < float(row["perplexity_high"])


def test_names_of_groups_say_whether_seeds_differ(trained: dict[str, Path], tmp_path: Path) -> None:
    for number in range(6):
        changes: dict[str, Any] = {f"optim.k{i}": number // 3 for i in range(5)}
        changes |= {"seed": number} if number < 3 else {"trainer.devices": number}
        made(trained["clm"], tmp_path / str(number), changes, 1 + number / 100)
    names = sections_of(tmp_path)[0].configurations.values()
    assert list(dict.fromkeys(names)) == ["0 and its seeds", "3 and 2 more"]


def test_choices_of_any_length(trained: dict[str, Path], tmp_path: Path) -> None:
    values = ["x" * 300 + "a", "x" * 300 + "b", "two\nlines", "x" * 150 + "a" + "x" * 150]
    for number, value in enumerate(values):
        made(trained["clm"], tmp_path / "runs" / str(number), {"data._target_": value, "optim.lr": 1 / (3 + number)})
    sections = sections_of(tmp_path / "runs")
    names = list(dict.fromkeys(sections[0].configurations.values()))
    assert len(set(names)) == 4
    assert max(map(len, names)) < 100
    assert "lr=0.3333" in names[0]
    assert len(pages.runs_latex(sections).splitlines()) == 4 + 7
    made(trained["clm"], tmp_path / "more" / "1", {f"optim.{'k' * 260}": 1})
    made(trained["clm"], tmp_path / "more" / "2", {f"optim.{'k' * 260}": 2})
    for chart in sections_of(tmp_path / "more")[0].charts:
        assert len(chart.name) < 150


@pytest.mark.long
def test_into_a_folder_with_something_in_it(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        made(trained["clm"], tmp_path / "runs" / str(number), {"optim.lr": 1 / (3 + number)})
    out = tmp_path / "out"
    run_verb("report", tmp_path / "runs", "--out", out)
    (out / "note.txt").write_text("mine")
    run_verb("report", tmp_path / "runs" / "0", "--out", out)
    there = {file.name for file in out.iterdir()}
    assert there == {*json.loads((out / "report.json").read_text())["files"], "report.json", "note.txt"}
    with pytest.raises(SystemExit):
        run_verb("report", tmp_path / "runs", "--out", tmp_path / "runs")
    assert "holds other things than a report" in capsys.readouterr().err


@pytest.mark.long
def test_a_full_disk_leaves_the_report_before(
    trained: dict[str, Path], tmp_path: Path, full_disk: Path, refused: Refused
) -> None:
    """Nothing of a new report stays, and nothing of an earlier one goes, where there is no room for all of it."""
    run = made(trained["clm"], tmp_path / "runs" / "a")
    assert f"{full_disk}/new/out can't be written: No space left" in refused(
        "report", run, "--out", full_disk / "new/out"
    )
    assert not list(full_disk.iterdir())
    out = full_disk / "out"
    out.mkdir()
    before = {"report.json": '{"files": ["report.html", "old.svg"]}', "report.html": "old", "old.svg": "<svg/>"}
    for name, text in before.items():
        (out / name).write_text(text)
    assert "No space left" in refused("report", run, "--out", out)
    assert {file.name: file.read_text() for file in out.iterdir()} == before


def test_where_runs_went_on_and_links(trained: dict[str, Path], tmp_path: Path) -> None:
    run = made(trained["clm"], tmp_path / "runs" / "a")
    manifest = json.loads((run / "manifest.json").read_text())
    attempt = {"time": manifest["started"], "step": 4, "host": "elsewhere", "packages": {"torch": "9.9"}, "devices": 2}
    git = {"commit": "abcdef" * 7, "dirty": False}
    (run / "manifest.json").write_text(json.dumps(manifest | {"went_on": [attempt | {"git": git}]}))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(tmp_path / "runs")
    (tmp_path / "linked" / "circle").symlink_to(tmp_path / "linked")
    run_verb("report", tmp_path / "linked", "--out", tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "from step 4 on elsewhere, 2 devices, commit abcdefabcdef, torch 9.9" in html
    assert [row["run"] for row in table(tmp_path / "out" / "runs.csv")] == ["a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is no directory"),
        ({}, "holds no run"),
        ({"failure.json": "{}", "logs": ""}, "holds no run"),  # what never began
        ({"manifest.json": '{"name": "a web app"}'}, "can be read"),
    ],
)
def test_bad_places(
    content: dict[str, str] | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    if content is not None:
        place.mkdir()
        for name, text in content.items():
            (place / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run_verb("report", place, "--out", tmp_path / "out")
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    assert 1 <= len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_in_a_browser(report: Path, opened: Callable[..., Any]) -> None:
    page = opened(report)
    assert page.said == [f"file://{report / 'report.html'}"]  # no word in the console, no other request
    assert "taken" not in page.title()
    assert "<b>bold</b>" in page.locator(".troubles").first.inner_text()
    assert page.locator(".samples").count() == 1
    charts = page.locator(".chart")
    assert charts.count() == 11
    for i in range(charts.count()):
        marks = "g.mark-line > path, g.mark-symbol > path, g.mark-rule > line, g.mark-area > path"
        assert charts.nth(i).locator(marks).count() > 0, charts.nth(i).get_attribute("data-chart")


def test_sorting_finding_and_the_axis_of_curves(report: Path, opened: Callable[..., Any]) -> None:
    page = opened(report)
    section = page.locator("section").first

    def shown() -> list[str]:
        return section.locator(".runs tbody tr:visible td:nth-child(2)").all_inner_texts()

    assert shown()[:3] == ["0", "1", "2"]
    head = section.locator(".runs th button", has_text="perplexity")
    head.click()
    assert shown()[0] == "0"
    head.click()
    assert shown()[0] == "9"
    assert shown()[-2:] == ["10", "11"]  # what is not known stays last
    assert section.locator('[data-chart="clm_effect_optim.lr"] g.mark-symbol.role-mark path').count() == 9
    section.locator(".find").fill("killed")
    assert shown() == ["4"]
    chart = section.locator('[data-chart="clm_validation_loss"]')
    assert "tokens seen in training" in chart.inner_text()
    section.get_by_label("against").select_option("time")
    chart.get_by_text("time (s)").wait_for()
    section.get_by_label("against").select_option("flops")
    chart.get_by_text("floating-point operations").wait_for()
    assert page.said == [f"file://{report / 'report.html'}"]


def test_on_a_phone_and_on_paper(report: Path, opened: Callable[..., Any]) -> None:
    page = opened(report, 390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") >= 2


@pytest.mark.longest
def test_five_hundred_runs(trained: dict[str, Path], tmp_path: Path, opened: Callable[..., Any]) -> None:
    for number in range(500):
        changes = {
            "optim.lr": 10 ** (-5 + 3 * (number * 0.618 % 1)),
            "seed": number % 3,
            "optim.eps": 1e-8 * (number % 7 + 1),
        }
        end = "done" if number % 17 else "killed"
        made(trained["clm"], tmp_path / "runs" / str(number), changes, 1 + number % 91 / 900, end, rows=400)
    began = time.perf_counter()
    command = [sys.executable, "-m", "lmlab.report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - began
    html = tmp_path / "out" / "report.html"
    assert html.stat().st_size < 15e6
    assert "thinned to what a screen can show" in html.read_text()
    assert len(table(tmp_path / "out" / "clm_training.csv")) > 180_000
    opened(tmp_path / "out")
    print(f"{took:.1f} s")
    assert took < 60  # under 20 s on two idle cores; tests run side by side
