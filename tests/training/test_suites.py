"""Accuracy on minimal pairs while a model is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.evaluation.suites import certificates
from tests.conftest import TINY, TINY_MLM, losses, metrics, run_verb

Train = Callable[..., Path]
PAIRS = "good,bad,phenomenon\nThe cats are old.,The cats is old.,agreement\nYou can see it.,You see can it.,order\n"
ACCURACY = "val/pairs/accuracy"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.csv").write_text(PAIRS + PAIRS.partition("\n")[2])
    return str(tmp_path / "pairs.csv")


@pytest.mark.parametrize("tiny", [TINY, pytest.param(TINY_MLM, marks=pytest.mark.long)], ids=["causal", "masked"])
def test_the_best_weights_by_accuracy(tiny: list[str], train: Train, pairs: str, tmp_path: Path) -> None:
    """Logged is what an evaluation of the exported weights measures; the steps are those of a run without it."""
    words = [*tiny, "trainer.val_check_interval=1", "optim.lr=0.1"]
    own = [f"callbacks.suites.pairs={pairs}", f"callbacks.checkpoints.monitor={ACCURACY}"]
    run = train(*words, *own)
    logged = {row["step"]: row[ACCURACY] for row in metrics(run) if ACCURACY in row}
    assert [*logged] == [0, 1, 2, 3, 4]
    row = next(row for row in metrics(run) if ACCURACY in row)
    assert row[ACCURACY] == (row["val/pairs/agreement/accuracy"] + row["val/pairs/order/accuracy"]) / 2
    run_verb("evaluate", f"model={run}", "suite=minimal_pairs", f"pairs={pairs}", f"hydra.run.dir={tmp_path / 'e'}")
    best = certificates.read(tmp_path / "e").certificate["figures"]["pairs_accuracy"]
    assert best == max(accuracy for step, accuracy in logged.items() if step)
    assert losses(run) == losses(train(*words, run_dir=tmp_path / "without"))


def test_what_can_not_be_monitored(train: Train, pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    electra = [*TINY_MLM[5:], "objective=electra", "model=electra_small", f"callbacks.suites.pairs={pairs}"]
    for words, said in (
        ([*TINY, f"callbacks.checkpoints.monitor={ACCURACY}"], f'monitors "{ACCURACY}", which is not there'),
        (electra, "suite=minimal_pairs is for causal and masked models"),
    ):
        with pytest.raises(SystemExit):
            train(*words)
        assert said in capsys.readouterr().err
