"""The benchmarks at a size of seconds: what they compare, and what makes a row void. No speed is asserted."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import data, evaluate, minimal_pairs, results, start, train, utilization
from benchmarks.pairs import ROOT, Side, agreement, in_pairs
from lmlab.errors import UserError

QUICK = ["size=tiny", "batch_size=2", "pairs=2", "turn=0.01"]
FIELDS = {"command", "unit", "sides", "result", "void", "losses", "agreement", "pairs", "memory", "settings"}
FIELDS |= {"machine", "versions", "git", "date", "threads", "device", "steps_per_turn"}
FIELDS |= {"flops_per_step", "peak", "speed"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are written."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(everything, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.longest
@pytest.mark.parametrize(
    ("objective", "peer"), [("clm", "loop"), ("clm", "compiled"), ("clm", "lightning"), ("mlm", "trainer")]
)
def test_train(objective: str, peer: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = train.Settings.parse([*QUICK, f"objective={objective}", f"peer={peer}"])
    results.record("train", settings, train.compare)
    (file,) = folder.iterdir()
    result = json.loads(file.read_text())
    assert result.keys() == FIELDS
    assert result["void"] is None
    assert result["agreement"]["agree"]
    assert [len(losses) for losses in result["losses"].values()] == [2, 2]
    assert result["losses"]["lmlab"][0] == pytest.approx(math.log(200), rel=0.1)  # the mean over targets

    assert [pair["first"] for pair in result["pairs"]] == ["lmlab", peer]
    for pair in result["pairs"]:
        assert pair["ratio"] == pytest.approx(pair[peer]["seconds"] / pair["lmlab"]["seconds"])
        done = result["steps_per_turn"] * 2 * 16
        assert pair["lmlab"]["tokens_per_s"] == pytest.approx(done / pair["lmlab"]["seconds"])
    ratios = [pair["ratio"] for pair in result["pairs"]]
    assert result["result"] == {"median": sum(ratios) / 2, "min": min(ratios), "max": max(ratios)}
    for memory in result["memory"].values():
        assert 2**20 < memory["imported"] <= memory["peak"]
    assert result["threads"] == 1
    assert {"torch", "lightning", "transformers", "accelerate"} <= result["versions"].keys()
    # Nothing of this machine but what it is.
    assert not re.search(r'"/', file.read_text())

    # Shown with the rows, by the command that measures it again.
    words = (
        f"objective={objective} size=tiny {'' if peer == 'trainer' else f'peer={peer} '}batch_size=2 pairs=2 turn=0.01"
    )
    command = f"python -m benchmarks.train {words.removeprefix('objective=clm ')}"
    assert result["command"] == command
    assert f"`{command}` |" in everything.table()


class FakeSide:
    """Answers at once: 2 s a step at first and 0.5 s later, another loss for the peer where it is told so."""

    facts: ClassVar = {"threads": 1, "device": "cpu"}
    log: ClassVar[list[tuple[str, int]]] = []
    dropouts: ClassVar[list[bool]] = []
    peer_loss = 2.0

    def __init__(self, verb: str, name: str, settings: Any, folder: Path):
        self.name, self.turns = name, 0

    def __enter__(self) -> "FakeSide":
        return self

    def __exit__(self, *error: Any) -> None:
        self.log.append((self.name, 0))

    def turn(self, steps: int, dropout: bool) -> dict[str, Any]:
        self.turns += 1
        self.log.append((self.name, steps))
        self.dropouts.append(dropout)
        loss = 2.0 if self.name == "lmlab" else self.peer_loss
        return {"seconds": steps * (2.0 if self.turns == 2 else 0.5), "losses": [loss] * steps}

    def end(self) -> dict[str, Any]:
        return {"peak": 2**30 if self.name == "lmlab" else 2**31, "imported": 2**20}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeSide]:
    monkeypatch.setattr(train, "Side", FakeSide)
    monkeypatch.setattr(train, "make", lambda *arguments: None)
    monkeypatch.setattr(train, "flops_of_step", lambda *arguments: 1e12)
    monkeypatch.setattr(FakeSide, "log", [])
    monkeypatch.setattr(FakeSide, "dropouts", [])
    return FakeSide


def test_turns_are_long_enough(fake: type[FakeSide]) -> None:
    """Two steps without dropout, a warm-up, again as the first was short, and then 3 s: 6 steps of 0.5 s."""
    result = train.compare(train.Settings())
    assert result["steps_per_turn"] == 6
    one, other = "lmlab", "trainer"
    both = [(one, 2), (other, 2), (one, 1), (other, 1), (one, 1), (other, 1)]
    assert fake.log[:-2] == [*both, (one, 6), (other, 6), (other, 6), (one, 6), (one, 6), (other, 6)]
    # A warm-up that is long enough is not repeated, and a turn is a step at least.
    fake.log.clear()
    assert train.compare(train.Settings(turn=1.0))["steps_per_turn"] == 1
    assert fake.log[:6] == [*both[:4], (one, 1), (other, 1)]


def test_other_losses_make_the_row_void(
    fake: type[FakeSide], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loss, void in ((2.0001, False), (2.001, True), (math.nan, True)):
        monkeypatch.setattr(FakeSide, "peer_loss", loss)
        for measure in ("speed", "memory"):
            result = results.record("train", train.Settings(measure=measure), train.compare)
            assert (result["result"] is None) == bool(result["void"]) == void
            assert result["agreement"]["agree"] is not void
            results.show([("row", result, "≥ 1")])
            shown = capsys.readouterr().out
            assert ("void: row\n  the losses differ by" in shown) == void
            assert bool(re.search(r"\d – \d", shown)) != void


def test_dropout_is_off_where_asked_for(fake: type[FakeSide]) -> None:
    train.compare(train.Settings(pairs=1))
    assert fake.dropouts == [False, False, *[True] * 6]
    fake.dropouts.clear()
    train.compare(train.Settings(pairs=1, dropout="off"))
    assert fake.dropouts == [False] * 8


def test_a_row_of_a_gpu(
    fake: type[FakeSide], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 × 128 tokens and 1 TFLOP in half a second: 2 TFLOP/s, of 10 stated and 8 measured. Its table shows that."""
    (row,) = [row for row in everything.GPU_ROWS if "objective=mlm" in row.words and "peer" not in row.words]
    monkeypatch.setattr(fake, "facts", {"threads": 1, "device": "NVIDIA H200"})
    monkeypatch.setattr(train, "peaks", lambda precision: {"stated": 10e12, "measured": 8e12})
    monkeypatch.setattr(everything, "refuse_without_gpu", lambda: None)
    everything.run(row.words, gpu=True)
    shown = capsys.readouterr().out.replace("\n", "")
    (file,) = folder.iterdir()
    assert file.name.startswith("gpu-train-objective=mlm")
    tokens = 64 * 512
    expected = {"step_ms": 500.0, "mfu": 0.2, "mfu_of_measured": 0.25, "tokens_per_s": 2 * tokens}
    speeds = json.loads(file.read_text())["speed"]
    assert speeds == {
        "lmlab": pytest.approx(expected | {"peak_memory_gib": 1.0}),
        "trainer": pytest.approx(expected | {"peak_memory_gib": 2.0}),
    }
    figures = ["65,536 / 65,536", "500.0 / 500.0", "20.0% / 20.0%", "25.0% / 25.0%", "1.0 / 2.0", "1", "1 – 1"]
    assert f"| {' | '.join([row.title, *figures, 'NVIDIA H200'])}, 20" in everything.table()
    assert "20.0% /" in shown

    # A device of an unknown name has no stated peak.
    monkeypatch.setattr(train, "peaks", lambda precision: {"stated": None, "measured": 8e12})
    everything.run(row.words, gpu=True)
    assert " | ? / ? | 25.0% / 25.0% | " in everything.table()


def test_a_row_that_fails_does_not_stop_the_others(
    fake: type[FakeSide], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "refuse_without_gpu", lambda: None)
    compare = train.compare

    def broken(settings: train.Settings) -> dict[str, Any]:
        if settings.peer == "compiled":
            raise RuntimeError("CUDA error: out of memory")
        return compare(settings)

    monkeypatch.setattr(train, "compare", broken)
    with pytest.raises(UserError, match=r"these rows failed(.*\n)+.*peer=compiled(.*\n)+.*peer=compiled"):
        everything.run("", gpu=True)
    assert capsys.readouterr().err.count("error: CUDA error: out of memory") == 2
    assert len(list(folder.iterdir())) == len(everything.GPU_ROWS) - 2


def test_operations_of_a_step(tmp_path: Path) -> None:
    """Those of the model's matrices, its attention, and the head at the labelled positions, whatever the side does."""
    layers, width, _, positions, vocabulary, _ = train.SIZES["tiny"]
    for objective in ("clm", "mlm"):
        settings = train.Settings.parse([*QUICK, f"objective={objective}", "batch_size=4"])
        folder = tmp_path / objective
        folder.mkdir()
        train.make(folder, "tiny", settings.causal, positions)
        tokens = settings.batch_size * positions
        body = tokens * layers * (6 * 12 * width**2 + 12 * width * positions)
        if settings.causal:
            targets, per_target = settings.batch_size * (positions - 1), 6 * vocabulary * width
        else:
            targets, per_target = 0.15 * tokens, 6 * (vocabulary + width) * width
        assert train.flops_of_step(settings, folder) == pytest.approx(body + targets * per_target, rel=0.02)


def test_peak_is_measured_by_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product of 64 × 64 matrices is 2 · 64³ operations, and takes a millisecond by this clock."""
    products, mm = [0], torch.mm

    def counted(*matrices: Any, out: Any) -> Any:
        products[0] += 1
        return mm(*matrices, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    monkeypatch.setattr(utilization.time, "perf_counter", lambda: products[0] / 1000)
    assert utilization.matmul_flops(torch.device("cpu"), 64) == pytest.approx(2 * 64**3 * 1000)
    assert products[0] == 1 + 1 + 100 + 5 * 100
    assert utilization.peaks("bf16-mixed") == {"stated": None, "measured": None}  # there is no GPU here


def test_memory_of_one_side_after_the_other(fake: type[FakeSide]) -> None:
    result = train.compare(train.Settings(measure="memory", peer="lmlab"))
    assert fake.log == [("lmlab", 1), ("lmlab", 1), ("lmlab", 0), ("plain", 1), ("plain", 1), ("plain", 0)]
    assert result["result"]["median"] == 0.5
    assert result["sides"] == {"lmlab": 1024.0, "plain": 2048.0}


@pytest.mark.parametrize("wrong", [[1.0, 2.001], [1.0, math.nan], [math.nan, 2.0]])
def test_one_step_that_differs_is_enough(wrong: list[float]) -> None:
    assert agreement({"a": [1.0, 2.0], "b": [1.0, 2.0001]}, 1e-4)["void"] is None
    assert agreement({"a": [1.0, 2.0], "b": wrong}, 1e-4)["void"]


def test_sides_take_turns() -> None:
    log: list[str] = []

    def turn(name: str) -> dict[str, Any]:
        log.append(name)
        return {"tokens_per_s": {"a": 6.0, "b": 3.0}[name]}

    pairs = in_pairs(("a", "b"), 3, turn)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert [pair["ratio"] for pair in pairs] == [2.0] * 3
    assert [pair["first"] for pair in pairs] == ["a", "b", "a"]


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    why = "the side lmlab ended before its work was done:\n(.*\n)*.*No module named 'benchmarks.tra'"
    with Side("tra", "lmlab", train.Settings(), tmp_path) as side, pytest.raises(UserError, match=why):
        side.turn(steps=1, dropout=True)


@pytest.mark.longest
@pytest.mark.parametrize("peer", ["forward", "blocks"])
def test_evaluate(peer: str) -> None:
    settings = evaluate.Settings.parse([f"peer={peer}", "size=tiny", "blocks=8", "pairs=1"])
    result = evaluate.compare(settings)
    names = ["blocks", "forward"] if peer == "forward" else ["sliding", "blocks"]
    assert list(result["sides"]) == list(result["losses"]) == names
    assert result["void"] is None
    assert (result["agreement"] is None) == (peer == "blocks")
    (pair,) = result["pairs"]
    # By default half a block from window to window: twice the cost of blocks is allowed.
    allowed = 1 if peer == "forward" else 2
    assert pair["ratio"] == pytest.approx(allowed * pair[names[1]]["seconds"] / pair[names[0]]["seconds"])


@pytest.mark.longest
@pytest.mark.parametrize(("task", "tampered"), [("blocks", False), ("group_texts", True)])
def test_data(task: str, tampered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Side.turn
    found: list[str] = []

    def turn_of_other_blocks(side: Side, **order: Any) -> dict[str, Any]:
        done = turn(side, **order)
        found.append(done["hash"])
        return done | ({"hash": "another"} if side.name == "guide" and tampered else {})

    monkeypatch.setattr(Side, "turn", turn_of_other_blocks)
    # More records than the guide groups at once.
    result = data.compare(data.Settings.parse([f"task={task}", "records=1400", "tokens=300000", "pairs=1"]))
    assert found[0] == found[1]
    assert (result["result"] is None) == bool(result["void"]) == tampered
    (pair,) = result["pairs"]
    assert pair["lmlab"]["blocks"] == pair["guide"]["blocks"] > 1000


def test_help_is_timed() -> None:
    result = start.compare(start.Settings.parse(["what=help", "runs=1"]))
    assert result["result"]["median"] == result["seconds"][0] > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch_sise=4", 'there is no key "batch_sise". Did you mean "batch_size"?'),
        ("pairs", 'there is no key "pairs". Did you mean "pairs"?'),
        ("objective=mlmm", 'objective is one of clm, mlm, not "mlmm". Did you mean "mlm"?'),
        ("pairs=0", "pairs is more than 0, not 0."),
        ("turn=nan", "turn is more than 0, not nan."),
        ("pairs=some", "pairs is a number, not some."),
        ("logits_chunk_size=4", 'there is no key "logits_chunk_size". Did you mean "lmlab.logits_chunk_size"?'),
    ],
)
def test_words_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        train.Settings.parse([word], lambda: {"logits_chunk_size", "compile"})
    assert str(refused.value).startswith(message)


@pytest.mark.longest
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_minimal_pairs(objective: str) -> None:
    """minicons gives each sentence the same score."""
    pytest.importorskip("minicons")
    words = [f"objective={objective}", "size=tiny", "count=20", "pairs=2"]
    result = minimal_pairs.compare(minimal_pairs.Settings.parse(words))
    assert result["void"] is None
    assert result["agreement"]["largest_relative_difference"] < 1e-5
    assert result["unit"] == "pairs/s"


@pytest.mark.parametrize("module", [train, evaluate, data, minimal_pairs, start])
def test_words_and_help(module: Any) -> None:
    settings = module.Settings()
    assert settings.words() == []
    for field in fields(settings):
        default = getattr(settings, field.name)
        assert (f"\n  {field.name}={default}" if field.name != "lmlab" else "\n  lmlab.KEY=") in module.__doc__
    again = module.Settings.parse([f"{key}={value}" for key, value in asdict(settings).items() if key != "lmlab"])
    assert again == settings


def test_rows() -> None:
    """Each row is what its command says, and has a file of its own."""
    files = []
    rows = [(row, "cpu") for row in everything.ROWS] + [(row, "gpu") for row in everything.GPU_ROWS]
    for row, device in rows:
        _, settings = row.parsed()
        assert row.words.split()[1:] == settings.words()
        files.append(results.place(row.words.split()[0], settings, device))
    assert len(set(files)) == len(files)
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    for row, _ in rows:
        assert f"`{row.command}" in readme, row.command


@pytest.mark.longest
def test_commands(tmp_path: Path) -> None:
    """As they are typed, from the command line to an exit code."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)

    done = run("benchmarks.train", "obective=mlm")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith('error: there is no key "obective". Did you mean "objective"?')
    assert "rows=mlm" in run("benchmarks", "--help").stdout
    assert "| target | command |" in run("benchmarks", "--table").stdout
    done = run("benchmarks", "gpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no GPU here")
