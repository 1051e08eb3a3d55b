from collections.abc import Callable
from pathlib import Path

from .conftest import TINY, metrics


def test_run(train: Callable[..., Path]) -> None:
    run = train(*TINY)
    assert metrics(run)[0]["step"] == 0
