"""The verb `compare` as a person uses it."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab import compare

from .conftest import TINY


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `python -m lmlab.compare` with arguments; returns what it prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["lmlab.compare", *map(str, arguments)])
        compare.main()
        return capsys.readouterr().out

    return run


def test_two_runs(train: Callable[..., Path], said: Callable[..., str], tmp_path: Path) -> None:
    a = train(*TINY, "optim.lr=1e-3", run_dir=tmp_path / "a")
    b = train(*TINY, "optim.lr=5e-2", run_dir=tmp_path / "b")
    out = said(a, b, "--out", tmp_path / "out", "--documents", 2)
    assert "optim.lr=0.001" in out
    assert "Paired over 25 documents" in out
    assert "one run a side cannot say what another seed would" in out
    with (tmp_path / "out" / "comparison.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["difference"] == ""
    assert float(second["difference"]) == pytest.approx(float(second["value"]) - float(first["value"]))
    assert float(second["low"]) <= float(second["difference"]) <= float(second["high"])
    assert f"{float(second['difference']):+.4f}" in out
    assert len((tmp_path / "out" / "documents.csv").read_text().splitlines()) == 3
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    assert tex.startswith("\\begin{tabular}{lrrrrrr}")
    assert "95 \\% interval" in tex


def test_bad_arguments(tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([tmp_path], [tmp_path / "nowhere", tmp_path], []):
        with pytest.raises(SystemExit) as stopped:
            said(*arguments)
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("error: ")
        assert len(lines) <= 3


def test_output_that_nobody_reads_on(train: Callable[..., Path], tmp_path: Path) -> None:
    """`… | head` ends it without a traceback."""
    places = [str(train(*TINY, f"seed={seed}", run_dir=tmp_path / str(seed))) for seed in (1, 2)]
    command = [sys.executable, "-m", "lmlab.compare", *places, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    assert (tmp_path / "out" / "comparison.csv").is_file()
