"""The notebook of the documentation, and runs from Python."""

import ast
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lmlab.errors import UserError
from lmlab.notebook import TrainedRun, train

from .conftest import TINY

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def shown(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell, and returns the value of its last line, which a notebook shows."""
    lines = ast.parse(source).body
    last = lines.pop() if isinstance(lines[-1], ast.Expr) else None
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # type: ignore[attr-defined]


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell, in order, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    values = [shown("".join(cell["source"]), names) for cell in cells]
    metrics, chart, records, again = (values[number] for number in (1, 2, 4, 5))
    assert metrics["val/loss"].notna().any()
    assert chart._repr_png_().startswith(b"\x89PNG")
    assert isinstance(records, pd.DataFrame)
    assert set(again._repr_mimebundle_()) == {"text/plain", "image/png"}
    assert "done, perplexity" in repr(again)


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook gets its words as an error, and no run."""
    with pytest.raises(UserError, match=r'Did you mean "optim\.lr"'):
        train(*TINY, "optim.lrr=1", f"hydra.run.dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match="a sweep"):
        train("-m", "seed=1,2")
    with pytest.raises(UserError, match="no run directory"):
        TrainedRun(tmp_path)
