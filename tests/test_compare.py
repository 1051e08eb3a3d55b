"""The verb `compare` as a person uses it."""

import csv
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
    assert tex.startswith("\\begin{tabular}{lrrrrr}")
    assert "95 \\% interval" in tex


def test_bad_arguments(tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([tmp_path], [tmp_path / "nowhere", tmp_path], []):
        with pytest.raises(SystemExit) as stopped:
            said(*arguments)
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("error: ")
        assert len(lines) <= 3
