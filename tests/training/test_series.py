"""A series of exported models: written while a run trains, each step once, and evaluated as a curve."""

import csv
import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmlab.evaluation import records
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint_io import load_checkpoint, load_weights
from lmlab.training.series import write_model

from ..conftest import TINY, Refused, run_verb, stop_after

SIX = [*TINY, "trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a series; not to be written to."""
    place = tmp_path_factory.mktemp("series") / "run"
    run_verb("train", *SIX, "callbacks.series=log", "callbacks.checkpoints.background=true", f"hydra.run.dir={place}")
    return place


def steps(run: Path) -> list[int]:
    """The steps of the index, for each of which there is a folder, and no other."""
    entries = RunDirectory(run).read_series()
    assert {entry["path"] for entry in entries} == {file.name for file in (run / "series").iterdir()} - {"index.json"}
    return [entry["step"] for entry in entries]


def exported(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "series" / f"step-{step}" / "model.safetensors")


def trained(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights in the checkpoint of a step, under the names of an export."""
    path = run / "checkpoints" / f"step-{step}.ckpt"
    state = load_weights(path, load_checkpoint(path))
    return {name.removeprefix("model."): weight for name, weight in state.items() if name.startswith("model.")}


def same(series: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    """Whether an export has these weights, but for the head, which is tied."""
    return series.keys() == weights.keys() - {"lm_head.weight"} and all(
        torch.equal(series[name], weights[name]) for name in series
    )


def test_models_are_those_of_the_checkpoints(run: Path) -> None:
    assert steps(run) == [0, 1, 2, 4, 6]  # the last step too
    assert [entry["tokens"] for entry in RunDirectory(run).read_series()] == [0, 256, 512, 1024, 1536]
    for step in (4, 6):
        assert same(exported(run, step), trained(run, step))
        assert not same(exported(run, step), trained(run, 10 - step))
    path = run / "series" / "step-4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(run / "model").get_vocab()


def test_resumed(run: Path, tmp_path: Path) -> None:
    """A run that goes on leaves what is there, and writes what comes after its checkpoint again, each step once."""
    copy = tmp_path / "run"
    stop_after(run, 4, copy)
    shutil.copytree(copy / "series" / "step-4", copy / "series" / "step-5")  # a kill came before the index
    (copy / "series" / ".step-8.partial").mkdir()
    stale = copy / "series" / "step-6" / "model.safetensors"
    stale.write_bytes(b"")
    kept = {file: file.stat().st_mtime_ns for step in (0, 1, 2, 4) for file in (copy / f"series/step-{step}").iterdir()}
    run_verb("resume", copy, "callbacks.checkpoints.background=false")
    assert steps(copy) == steps(run)
    assert same(exported(copy, 6), trained(run, 6))
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
    # Longer, with another spacing and half the bytes; from its checkpoint, in whose place a model is missing.
    run_verb("resume", copy, "callbacks.series=[3,log]", "callbacks.series.dtype=bfloat16", "trainer.max_steps=9")
    assert steps(copy) == [0, 1, 2, 4, 6, 8, 9]
    rounded = {name: weight.bfloat16() for name, weight in trained(copy, 9).items()}
    assert same(exported(copy, 9), rounded)
    assert [entry["dtype"] for entry in RunDirectory(copy).read_series()][-3:] == ["float32", "bfloat16", "bfloat16"]
    assert AutoModelForCausalLM.from_pretrained(copy / "series" / "step-9").dtype == torch.bfloat16
    run_verb("predict", copy / "series" / "step-9", "It would", "--max-new-tokens", "2")


@pytest.mark.long
def test_evaluated(
    run: Path, evaluate: Callable[..., Path], refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificate of the last model is that of the run, whose best weights it has; its text is prepared once."""
    place = evaluate(run, "series=true", "calibration=true")
    shown = capsys.readouterr().out
    certificates = [records.read(place / f"step-{step}").certificate for step in steps(run)]
    own = records.read(run).certificate
    for key in ("totals", "figures", "policy", "records_hash", "weights_hash", "data_hash", "run", "precision"):
        assert certificates[-1][key] == own[key]
    assert [found["series"] for found in certificates] == RunDirectory(run).read_series()
    perplexities = [found["figures"]["perplexity"] for found in certificates]
    assert perplexities == sorted(perplexities, reverse=True)
    for perplexity in perplexities:
        assert f"{perplexity:.4f}" in shown
    run_verb("report", place, run, "--out", tmp_path / "report")
    assert "The 5 models of " in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "report" / "clm_series.csv").open()))
    assert [int(row["step"]) for row in rows] == steps(run)
    assert [float(row["perplexity"]) for row in rows] == perplexities
    assert len(list(csv.DictReader((tmp_path / "report" / "clm_finals.csv").open()))) == 1  # the run alone is ranked
    of_each = list(csv.DictReader((tmp_path / "report" / "clm_by_calibration.csv").open()))
    names = [*dict.fromkeys(row["evaluation"] for row in of_each)]
    assert [name.rpartition(", ")[2] for name in names] == [f"step {step}" for step in (0, 1, 2, 4, 6)]
    drawn = (tmp_path / "report" / "clm_series_bits_per_byte.svg").read_text()
    assert drawn.count('aria-roledescription="point"') == 4  # all but step 0, as steps double
    stop_after(run, 4, tmp_path / "stopped")
    place = evaluate(tmp_path / "stopped", "series=[4,1]", "context=document")  # before a run ends
    assert sorted(folder.name for folder in place.glob("step-*")) == ["step-1", "step-4"]
    nowhere = f"hydra.run.dir={tmp_path / 'nowhere'}"
    assert "no model of step 3.\nIt has those of the steps 0, 1, 2, 4, 6." in refused(
        "evaluate", run, "series=[3]", nowhere
    )
    assert "leave one of them out" in refused("evaluate", run, "series=true", "check=true", nowhere)
    index = tmp_path / "stopped" / "series" / "index.json"
    index.write_text('{"models": [{"step": "../4"}]}')
    assert "index.json is damaged" in refused("evaluate", tmp_path / "stopped", "series=true", nowhere)
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model without room is warned of, and is not in the index; training goes on."""
    copy, model = RunDirectory(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(run / "model")
    copy.path.mkdir()
    shutil.copytree(run / "tokenizer", copy.tokenizer)
    entries = [{"step": step, "tokens": step, "path": f"step-{step}", "dtype": "float32"} for step in (1, 2, 4)]
    write_model(copy, model, model.state_dict(), entries[0])
    with monkeypatch.context() as patched:

        def full(*unused: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(shutil, "copystat", full)  # of `copytree`, which has an error of its own for it
        write_model(copy, model, model.state_dict(), entries[1])
    assert "step-2 of the series could not be kept, as the disk is full" in caplog.text
    write_model(copy, model, model.state_dict(), entries[2])
    assert copy.read_series() == [entries[0], entries[2]]
    assert steps(copy.path) == [1, 4]


@pytest.mark.long
def test_sharded(run: Path, train: Callable[..., Path], evaluate: Callable[..., Path]) -> None:
    """Rank 0 writes whole weights, and two ranks score them as one does."""
    words = [word for word in SIX if "accumulate" not in word]
    sharded = train(*words, "callbacks.series=log", "trainer=fsdp", "trainer.accelerator=cpu")
    assert steps(sharded) == steps(run)
    assert same(exported(sharded, 4), trained(sharded, 4))
    assert same(exported(sharded, 6), trained(sharded, 6))
    place = evaluate(sharded, "series=[4,6]", "trainer=ddp", "trainer.accelerator=cpu")
    assert records.read(place / "step-4").certificate["weights_hash"]
    (last, own) = (records.read(path).certificate for path in (place / "step-6", sharded))
    assert last["totals"]["nll"] == pytest.approx(own["totals"]["nll"], rel=1e-6)
    assert last["weights_hash"] == own["weights_hash"]
