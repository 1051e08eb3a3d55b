"""The workspace and the report page of a W&B project."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Refused, run_verb
from tests.wandb_server import serving


def strings(spec: Any) -> Iterator[str]:
    """All texts in a specification."""
    if isinstance(spec, str):
        yield spec
    elif isinstance(spec, dict):
        yield from (text for value in spec.values() for text in strings(value))
    elif isinstance(spec, list):
        yield from (text for value in spec for text in strings(value))


def panels(spec: Any) -> Iterator[dict[str, Any]]:
    """All panels in a specification."""
    if isinstance(spec, dict):
        if "viewType" in spec:
            yield spec
        for value in spec.values():
            yield from panels(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from panels(value)


def figures(spec: Any) -> set[str]:
    """Metrics of quality that a part of a page shows."""
    names = {text.removeprefix("summary:") for text in strings(spec)}
    return {name for name in names if name.startswith(("val/", "train/"))}


def meaning(name: str) -> str:
    """What a metric of quality is of, by its name: "masked_", "bound_" or the text itself."""
    return name.partition("/")[2].partition(",")[0].removesuffix("perplexity").removesuffix("bits_per_byte")


def test_what_would_be_made(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # where nobody answers
    run_verb("dashboard", "me/lmlab", "--dry-run", "--columns", "optim.lr", "seed")
    said = capsys.readouterr().out
    assert "Workspace of me/lmlab" in said
    assert "Report of me/lmlab" in said
    for panel in (
        "LinePlot: val/perplexity by data/tokens_seen",
        "LinePlot: val/masked_perplexity by data/tokens_seen",
        "LinePlot: val/bound_perplexity by data/tokens_seen",
        "LinePlot: perf/tokens_per_s by data/tokens_seen",
        "BarPlot: val/bits_per_byte",
        "ParallelCoordinatesPlot: optim.lr, seed, val/bits_per_byte",
        "samples",
    ):
        assert panel in said


def test_it_is_made(tmp_path: Path) -> None:
    with serving() as server:
        env = os.environ | server.environment | {"HOME": str(tmp_path)}
        command = [sys.executable, "-m", "lmlab.dashboard", "me/lmlab"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not server.faults
        workspace, report = server.views
    addresses = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert len(addresses) == 2
    assert all(address.startswith(f"{server.url}/me/lmlab") for address in addresses)
    assert [view["entityName"] for view in (workspace, report)] == ["me", "me"]
    assert [view["type"] for view in (workspace, report)] == ["project-view", "runs"]
    for view in (workspace, report):
        shown = list(panels(json.loads(view["spec"])))
        assert len(shown) > 10
        for panel in shown:
            assert len({meaning(name) for name in figures(panel)}) <= 1, panel
    # A grid's runs have the metric that is shown of them, and no other is.
    grids = [block for block in json.loads(report["spec"])["blocks"] if block.get("type") == "panel-grid"]
    assert len(grids) == 15
    for grid in grids:
        (runs,) = grid["metadata"]["runSets"]
        (only,) = runs["filters"]["filters"]
        assert (only["key"]["section"], only["op"], only["value"]) == ("summary", ">=", 0)
        assert all(meaning(name) == meaning(only["key"]["name"]) for name in figures(grid)), figures(grid)
    coordinates = [panel for panel in panels(grids) if panel["viewType"] == "Parallel Coordinates Plot"]
    assert len(coordinates) == 3
    assert "config:optim.value.lr" in set(strings(coordinates[0]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lmlab"], "entity/project, such as me/lmlab, not lmlab"),
        (["me/"], "entity/project"),
        (["me/lmlab"], "WANDB_MODE=offline"),
    ],
)
def test_what_is_refused(words: list[str], says: str, refused: Refused) -> None:
    assert says in refused("dashboard", *words)


def test_without_a_key(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        said = refused("dashboard", "me/lmlab")
    assert "no key" in said
    assert "--dry-run" in said


def test_with_a_bad_key(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
        assert "--dry-run" in refused("dashboard", "me/lmlab")
