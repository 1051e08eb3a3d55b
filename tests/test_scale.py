"""The verb `scale` as a person uses it, on run directories that are written by hand."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import altair as alt
import numpy as np
import pytest
import yaml

from lmlab import scale
from lmlab.evaluation import scaling
from lmlab.reporting import charts
from lmlab.reporting.scaling import scaling_charts

from .evaluation.test_scaling import simulated


def write_run(place: Path, summary: dict[str, Any] | None, **manifest: str) -> None:
    place.mkdir(parents=True)
    config = {"run_dir": str(place), "optim": {"lr": 1}, "preprocess": {"block_size": 128}}
    config["objective"] = {"_target_": manifest.pop("objective", "lmlab.objectives.clm.CausalLM")}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"run_id": place.name, "data_fingerprint": "d", "tokenizer_hash": "t"} | manifest
    (place / "manifest.json").write_text(json.dumps(facts))
    if summary is not None:
        (place / "summary.json").write_text(json.dumps({"steps": 1} | summary))


def summaries(budgets: int = 5) -> list[dict[str, Any]]:
    """The summaries of the runs of a simulated ladder."""
    ladder = simulated(0.004, budgets=budgets)
    columns = (ladder.parameters, ladder.tokens, ladder.flops, ladder.losses)
    return [
        {"parameters": int(n), "tokens": int(d), "flops": int(c), "val/loss": loss, "val/bits_per_byte": 2 * loss}
        for n, d, c, loss in zip(*columns, strict=True)
    ]


def write_ladder(folder: Path, runs: list[dict[str, Any]]) -> Path:
    for number, summary in enumerate(runs):
        write_run(folder / str(number), summary)
    return folder


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "REPLICATES", 40)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `python -m lmlab.scale` with arguments; returns what it prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["lmlab.scale", *map(str, arguments)])
        scale.main()
        return capsys.readouterr().out

    return run


def table(place: Path) -> list[dict[str, str]]:
    with place.open() as file:
        return list(csv.DictReader(file))


def test_a_ladder(said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_ladder(tmp_path / "ladder", summaries()), tmp_path / "out"
    write_run(folder / "killed", None)
    odd = {key: value for key, value in summaries()[0].items() if key != "flops"}
    write_run(folder / "uncounted", odd)
    asked = ["flops=1e13", "parameters=1e6", "tokens=1e8"]
    shown = said(folder, "--predict", *asked, "--predict", "tokens=1e7", "parameters=1e5", "--out", out)
    assert f"left out: {folder / 'killed'} is failed (killed)" in shown
    assert f"left out: {folder / 'uncounted'} has no FLOPs" in shown
    assert len(table(out / "runs.csv")) == 30
    budgets = table(out / "budgets.csv")
    assert [float(row["FLOPs"]) for row in budgets] == pytest.approx([3e10 * 2**n for n in range(5)], rel=1e-6)
    law = {(row["approach"], row["constant"]): row for row in table(out / "law.csv")}
    alpha = law["parametric", "loss: alpha"]
    assert float(alpha["low"]) < 0.45 < float(alpha["high"])
    ladder = simulated(0.004)
    fitted = scaling.fit_law(ladder, ladder.samples()[:1])
    iso, parametric, first, second = table(out / "predictions.csv")
    assert iso["loss"] == ""
    # A power law of the minima agrees with the parametric one as far as parabolas do.
    assert float(iso["parameters"]) == pytest.approx(float(parametric["parameters"]), rel=0.2)
    for row, size, tokens in ((first, 1e6, 1e8), (second, 1e5, 1e7)):
        expected = fitted.loss(np.array([size]), np.array([tokens]))[0, 0]
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["loss_low"]) < expected < float(row["loss_high"])
    largest = [{key: float(value) for key, value in row.items()} for row in table(out / "largest_budget.csv")]
    inside = sum(row["low"] <= row["measured"] <= row["high"] for row in largest)
    assert f"{inside} of 6 runs lie in the interval" in shown
    assert "Predictions go up to 20.8 times the FLOPs" in shown
    for name in ("isoflop", "frontier"):
        assert (out / f"{name}.svg").read_text().count("<path") > 30
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "law.tex").read_text().startswith("\\begin{tabular}{llrr}")
    # In the same folder nothing stays of the predictions; and the law of another metric is another.
    monkeypatch.setattr(charts, "image_files", lambda _: [])  # which take a second
    said(folder, "--metric", "val/bits_per_byte", "--out", out)
    assert not (out / "predictions.csv").exists()
    twice = {(row["approach"], row["constant"]): row for row in table(out / "law.csv")}
    ratio = float(twice["parametric", "loss: E"]["value"]) / float(law["parametric", "loss: E"]["value"])
    assert ratio == pytest.approx(2, rel=1e-4)


def test_a_ladder_without_minima_has_a_parametric_law(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes of each budget make no parabola."""
    monkeypatch.setattr(charts, "image_files", lambda _: [])
    runs = [run for number, run in enumerate(summaries()) if number // 5 - number % 5 in (0, 1)]
    folder = write_ladder(tmp_path / "ladder", runs)
    shown = said(folder, "--predict", "flops=1e12", "--out", tmp_path / "out")
    assert "3e10 FLOPs have no part in the isoFLOP law: fewer than 3 sizes." in shown
    assert "There is no isoFLOP law" in shown
    assert [row["approach"] for row in table(tmp_path / "out" / "predictions.csv")] == ["parametric"]


def test_a_report_shows_the_charts_of_a_ladder() -> None:
    runs: list[Any] = [SimpleNamespace(summary=summary) for summary in summaries()]
    drawn = scaling_charts(runs, "clm")
    assert [chart.name for chart in drawn] == ["clm_isoflop", "clm_frontier"]
    for chart in drawn:
        alt.Chart.from_dict(chart.spec, validate=True)
    assert not scaling_charts(runs[::5], "clm")  # of one budget
    assert not scaling_charts([SimpleNamespace(summary={})], "clm")  # type: ignore[list-item]


FEW = [
    (["x"], "x is no directory"),
    (["empty"], "empty holds no finished run to fit a law to"),
    (["one"], r"several budgets; there is one, of 3e10 FLOPs in 6 runs\."),
    (["four"], "has 5 parameters, and takes as many runs; there are 4"),
    (["two_sizes"], "takes 3 sizes and 3 numbers of tokens; there are 2 and 10"),
    (["uncounted"], r"has no FLOPs: those of its kind of model are not counted\."),
    (["one", "other"], "other are of no one ladder: their objectives differ"),
    (["one", "--metric", "val/los"], 'val/los: one/0 has none. Did you mean "val/loss"?'),
    (["one", "--metric", "val/loss", "--metric", "val/bits_per_byte"], "a law is of one metric"),
    (["one", "--predict", "flops=many"], "--predict flops=many: it has to be flops=1e13, or"),
    (["one", "--predict", "flops=-1"], "--predict flops=-1: it has to be"),
    (["--predict", "flops=1e13", "one"], "required"),
    (["one", "--predict", "flops=1e13", "one"], "Directories come before --predict"),
    (["one", "--predict", "tokens=1e9", "flops=1e13"], "--predict tokens=1e.09: it takes parameters=… beside it"),
]


@pytest.fixture(scope="module")
def ladders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladders")
    runs = summaries()
    write_ladder(folder / "one", summaries(budgets=1))
    write_ladder(folder / "four", runs[:4])
    write_ladder(folder / "two_sizes", runs[:10])
    (folder / "empty").mkdir()
    write_run(folder / "other", runs[0], objective="lmlab.objectives.mlm.MaskedLM")
    write_run(folder / "uncounted", {key: value for key, value in runs[0].items() if key != "flops"})
    return folder


@pytest.mark.parametrize(("words", "says"), FEW, ids=[" ".join(words) for words, _ in FEW])
def test_what_is_refused(
    words: list[str], says: str, ladders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ladders)
    monkeypatch.setattr("sys.argv", ["lmlab.scale", *words])
    with pytest.raises(SystemExit) as stopped:
        scale.main()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert re.search(says, message.replace("\n", " ")), message
    assert len(message.splitlines()) <= 3
    assert not (ladders / "scaling").exists()
