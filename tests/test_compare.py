"""The verb `compare` as a person uses it."""

import csv
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab import compare
from lmlab.evaluation import comparison, records

from .conftest import TINY, Refused
from .evaluation.test_documents import of_version_1
from .reporting.synthetic import made


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
    first, second = table(tmp_path / "out" / "comparison.csv")
    assert first["difference"] == ""
    assert float(second["difference"]) == pytest.approx(float(second["value"]) - float(first["value"]))
    assert float(second["low"]) <= float(second["difference"]) <= float(second["high"])
    assert f"{float(second['difference']):+.4f}" in out
    assert len((tmp_path / "out" / "documents.csv").read_text().splitlines()) == 3
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    assert tex.startswith("\\begin{tabular}{lrrrrrr}")
    assert "95 \\% interval" in tex


def test_sides_scored_on_unlike_parts_of_the_text_are_named(
    train: Callable[..., Path], said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [train(*TINY, f"seed={seed}", run_dir=tmp_path / str(seed)) for seed in (1, 2)]
    assert "of text." not in said(*runs, "--out", tmp_path / "out")
    rows = comparison.compare_sides

    def unlike(*args: Any) -> list[dict[str, Any]]:
        return [row | {"bytes": row["bytes"] / n} for n, row in enumerate(rows(*args), 1)]

    monkeypatch.setattr(comparison, "compare_sides", unlike)
    assert re.search(
        "Row 2 was scored on [0-9,]+ bytes of the text, and row 1 on", said(*runs, "--out", tmp_path / "o")
    )


def test_a_tokenizer_that_can_not_spell_the_text_does_not_win(
    train: Callable[..., Path], evaluate: Callable[..., Path], said: Callable[..., str], tmp_path: Path
) -> None:
    """Half of the held-out text is Chinese, and a token for anything costs a character tokenizer next to nothing."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["The cat sat on the mat.", "猫坐在垫子上，另一只猫坐在老鼠上。"] * 20))
    words = ["data=files", f"data.validation={text}", "data.document=line"]
    runs = {name: train(*only(TINY, name), f"tokenizer={name}", run_dir=tmp_path / name) for name in ("bpe", "char")}
    places = {name: evaluate(f"model={run}", *words, "context=document") for name, run in runs.items()}
    bpe, char = (records.read(place).certificate for place in places.values())
    assert "unknown_bytes" in char["totals"]
    assert char["totals"]["unknown_bytes"] == 20 * len("猫坐在垫子上，另一只猫坐在老鼠上。".encode())
    assert bpe["totals"]["unknown_bytes"] == 0
    naive = char["totals"]["nll"] / char["totals"]["bytes"] / math.log(2)
    charged = naive + 8 * char["totals"]["unknown_bytes"] / char["totals"]["bytes"]
    assert naive < bpe["figures"]["bits_per_byte"]
    assert char["figures"]["bits_per_byte"] == pytest.approx(charged)
    out = said(*places.values(), "--out", tmp_path / "out")
    assert "≤ Row 2 is an upper bound: its tokenizer has no token for 1,020 of" in out
    first, second = table(tmp_path / "out" / "comparison.csv")
    assert float(second["difference"]) > 0
    assert (first["unknown_bytes"], second["unknown_bytes"]) == ("0", "1020")


def only(words: list[str], tokenizer: str) -> list[str]:
    return [word for word in words if tokenizer == "bpe" or not word.startswith("tokenizer.")]


def test_one_long_text_is_compared_by_its_stretches(
    train: Callable[..., Path], evaluate: Callable[..., Path], said: Callable[..., str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"{i}. " + "The cat sat on the mat and looked at the rat. " * (8 + i % 5) for i in range(30))
    )
    places = []
    for rate in ("1e-3", "5e-2"):
        run = train(*TINY, f"optim.lr={rate}", run_dir=tmp_path / rate)
        places.append(evaluate(f"model={run}", "data=files", f"data.validation={text}"))
    out = said(*places, "--out", tmp_path / "out")
    assert "stretches of 1 document " in out
    assert "too few" not in out
    _, second = table(tmp_path / "out" / "comparison.csv")
    assert float(second["low"]) < float(second["difference"]) < float(second["high"])
    # With an evaluation of an older lmlab, which has one row for the whole text, there is nothing to pair.
    of_version_1(places[0])
    shutil.rmtree(tmp_path / "out")
    assert "too few documents" in said(*places, "--out", tmp_path / "out")


def table(place: Path) -> list[dict[str, str]]:
    with place.open() as file:
        return list(csv.DictReader(file))


def test_all_pairs_and_another_row(
    train: Callable[..., Path], said: Callable[..., str], refused: Refused, full_disk: Path, tmp_path: Path
) -> None:
    source = train(*TINY, run_dir=tmp_path / "source")
    rates = {0.01: 1.0, 0.02: 1.05, 0.03: 0.97}
    places = [made(source, tmp_path / str(rate), {"optim.lr": rate}, factor) for rate, factor in rates.items()]
    asked = [*places, "--against", "optim.lr=0.02", "--out", tmp_path / "out"]
    out = said(*asked, "--pairs")
    assert "A difference is from row 2, and below 0 better." in out
    assert "Documents that differ most from row 2" in out
    assert "p (Holm) is corrected for the number of pairs" in out
    rows = table(tmp_path / "out" / "comparison.csv")
    values = [float(row["value"]) for row in rows]
    assert [row["difference"] and float(row["difference"]) for row in rows] == [
        pytest.approx(values[0] - values[1]),
        "",
        pytest.approx(values[2] - values[1]),
    ]
    assert {row["row"] for row in table(tmp_path / "out" / "documents.csv")} == {"1", "3"}
    pairs = table(tmp_path / "out" / "pairs.csv")
    assert [(row["side"][-4:], row["from_side"][-4:]) for row in pairs] == [
        ("0.02", "0.01"),
        ("0.03", "0.01"),
        ("0.03", "0.02"),
    ]
    for row, (one, other) in zip(pairs, [(1, 0), (2, 0), (2, 1)], strict=True):
        assert float(row["difference"]) == pytest.approx(values[one] - values[other])
        assert float(row["low"]) < float(row["difference"]) < float(row["high"])
        assert float(row["p_holm"]) == pytest.approx(3 * float(row["p"]))  # all as small as they can be
        assert f"{float(row['difference']):+.4f}" in (tmp_path / "out" / "pairs.tex").read_text()
    # Those of an earlier comparison do not stay beside another.
    assert "Corrected for their number: --pairs" in said(*asked)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.tex", "documents.csv"}
    for row in ("4", "0", "optim.lr=0.04"):
        assert f"--against {row}: there is no such row." in refused("compare", *places, "--against", row)
    # A disk with no room for all of it gets none of it.
    (full_disk / "filler").write_bytes(b"x" * 196 * 1024)
    assert "No space left" in refused("compare", *places, "--documents", 25, "--out", full_disk / "out")
    assert [file.name for file in full_disk.iterdir()] == ["filler"]


def test_bad_arguments(tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([tmp_path], [tmp_path / "nowhere", tmp_path], []):
        with pytest.raises(SystemExit) as stopped:
            said(*arguments)
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("error: ")
        assert len(lines) <= 3


@pytest.mark.long
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
