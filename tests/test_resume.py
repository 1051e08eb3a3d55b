"""Runs that go on, and experiments that are run again."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.apply_func import apply_to_collection
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lmlab.config import changes, evaluated
from lmlab.config.build import prepare_data
from lmlab.config.compose import config_of
from lmlab.config.targets import FILES
from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError
from lmlab.models.hashing import weights_hash
from lmlab.optim import AdamW
from lmlab.runs.directory import RunDirectory
from lmlab.runs.status import read_status
from lmlab.training import checkpoint_io

from .conftest import TINY, Refused, losses, metrics, run_verb, stop_after
from .processes import begin, finish, wait_for
from .training.test_width import DROPOUT_OFF

SIX = [*TINY, "trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that came to its end; not to be written to."""
    place = tmp_path_factory.mktemp("whole") / "run"
    run_verb("train", *SIX, f"hydra.run.dir={place}")
    return place


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same, killed after the state of step 4."""
    stop_after(whole, 4, tmp_path / "run")
    return tmp_path / "run"


def resumed(run: Path, *words: object) -> None:
    run_verb("resume", run, *words)


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


def equal(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_goes_on(verb: str, whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = json.loads((stopped / "manifest.json").read_text())
    words = [*SIX, f"hydra.run.dir={stopped}"] if verb == "train" else [stopped]
    run_verb(verb, *words)
    assert f"Resuming run {identity['run_id']} from step 4." in capsys.readouterr().out
    assert equal(stopped, whole)
    assert losses(stopped) == losses(whole)
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert manifest["run_id"] == identity["run_id"]
    assert [attempt["step"] for attempt in manifest["went_on"]] == [4]
    assert json.loads((stopped / "certificate.json").read_text())["went_on"] == manifest["went_on"]
    # Figures, counts and the certificate are those of the whole run.
    for name in ("val/loss", "val/perplexity_before", "steps", "tokens"):
        assert (
            json.loads((stopped / "summary.json").read_text())[name]
            == (json.loads((whole / "summary.json").read_text())[name])
        )
    log = (stopped / "train.log").read_text()
    assert log.index("step 2/6") < log.index("Resuming run") < log.rindex("step 6/6")


def test_the_step_of_a_run_is_that_of_its_last_checkpoint(stopped: Path) -> None:
    """Its metrics may have been logged at an earlier one."""
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:2]))
    assert read_status(RunDirectory(stopped)).step == 4


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_a_run_of_lmlab_0_1_goes_on(verb: str, whole: Path, stopped: Path) -> None:
    """Its config has keys and targets of before, and lacks some; it goes on under their present names."""
    old = config = (stopped / "config.yaml").read_text()
    for later in ("float32_matmul_precision: highest\n", "  extra_tokens: null\n"):
        assert old.count(later) == 1
        old = old.replace(later, "")
    old = old.replace("logits_chunk_size:", "loss_rows:").replace("lmlab.optim.AdamW", "lmlab.training.optim.AdamW")
    assert old.count("loss_rows") == old.count("lmlab.training.optim.AdamW") == 1
    (stopped / "config.yaml").write_text(old)
    run_verb(verb, *([*SIX, f"hydra.run.dir={stopped}"] if verb == "train" else [stopped]))
    assert equal(stopped, whole)
    now = (stopped / "config.yaml").read_text().replace(str(stopped), str(whole))
    assert yaml.safe_load(now) == yaml.safe_load(config)


def test_the_cached_tokenizer_of_lmlab_0_1_is_found(whole: Path, tmp_path: Path) -> None:
    """It has the key of a config that lacks `extra_tokens`; one with such tokens has another."""
    cfg = OmegaConf.load(whole / "config.yaml")
    cfg.cache_dir = str(tmp_path)
    found = []
    for extra in (None, ["<one>"]):
        cfg.tokenizer.extra_tokens = extra
        prepare_data(cfg)
        found.append({path.name for path in tmp_path.glob("tokenizer-*") if path.is_dir()})
    del cfg.tokenizer.extra_tokens
    prepare_data(cfg)
    assert {path.name for path in tmp_path.glob("tokenizer-*") if path.is_dir()} == found[1]
    assert [len(names) for names in found] == [1, 2]


def test_goes_on_where_it_was_moved_to(whole: Path, stopped: Path, tmp_path: Path) -> None:
    stopped.rename(tmp_path / "elsewhere")
    resumed(tmp_path / "elsewhere")
    assert equal(tmp_path / "elsewhere", whole)
    assert not stopped.exists()


def test_best_weights_of_before_the_stop_are_the_best_after(train: Callable[..., Path], tmp_path: Path) -> None:
    harmful = [*SIX, "optim.lr=0.5", "optim.warmup_steps=2", "optim.schedule=constant"]
    run = train(*harmful, "callbacks.checkpoints.keep_best=2", run_dir=tmp_path / "whole")
    values = {line["step"]: line["val/loss"] for line in metrics(run) if line.get("val/loss") and line["step"]}
    best = sorted(values, key=lambda step: values[step])
    assert best[0] == 2
    stop_after(run, 4, tmp_path / "stopped")
    resumed(tmp_path / "stopped")
    for place in (run, tmp_path / "stopped"):
        there = {path.name for path in (place / "checkpoints").iterdir()}
        assert {"step-4.ckpt", "step-6.ckpt", *(f"best-{step}.ckpt" for step in best[:2])} <= there
    assert equal(tmp_path / "stopped", run)


def test_best_weights_with_sums_of_an_older_lmlab(train: Callable[..., Path], tmp_path: Path) -> None:
    """They counted less than a certificate says now: the weights are scored again."""
    run = train(*SIX, "optim.lr=0.5", "optim.warmup_steps=2", "optim.schedule=constant", run_dir=tmp_path / "whole")
    stop_after(run, 4, tmp_path / "stopped")
    for path in (tmp_path / "stopped/checkpoints").glob("*.ckpt"):
        kept = torch.load(path, weights_only=True)
        kept["validation"]["units"] = kept["validation"]["units"][:, :3]
        torch.save(kept, path)
    assert (tmp_path / "stopped/checkpoints/best-2.ckpt").is_file()
    resumed(tmp_path / "stopped")
    certificates = [json.loads((place / "certificate.json").read_text()) for place in (run, tmp_path / "stopped")]
    assert certificates[0]["totals"] == certificates[1]["totals"]


def test_a_run_before_its_end_is_used_by_its_best_weights_so_far(
    stopped: Path,
    evaluate: Callable[..., Path],
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(stopped.rglob("*"))
    text = tmp_path / "text.txt"
    text.write_text("The sun is a star.\nThe moon goes around the earth.\n")
    monkeypatch.setattr("lmlab.data.sources.load_sample", None)  # its tokenizer is at hand without its data
    place = evaluate(f"model={stopped}", "data=files", f"data.validation={text}")
    monkeypatch.undo()
    said = f"{stopped} at step 4, its best weights so far"
    assert f"Evaluating {said}." in capsys.readouterr().out
    certificate = json.loads((place / "certificate.json").read_text())
    assert certificate["model"] == said
    kept = torch.load(stopped / "checkpoints/best-4.ckpt", weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): t for name, t in kept.items() if name.startswith("model.")}
    assert certificate["weights_hash"] == weights_hash(weights)
    assert not (place / "snapshot").exists()
    # The text that it holds out, by its own data.
    own = json.loads((evaluate(f"model={stopped}") / "certificate.json").read_text())
    assert own["figures"]["nll_per_token"] == next(
        v for step, name, v in losses(stopped) if (step, name) == (4, "val/loss")
    )
    capsys.readouterr()
    run_verb("predict", stopped, "The sun", "--greedy", "--max-new-tokens", 3)
    shown = capsys.readouterr()
    assert f"From {said}." in shown.err
    assert shown.out.startswith("The sun")
    assert sorted(stopped.rglob("*")) == before
    # Its config may come from elsewhere, and is run to build the model.
    kept_config = (stopped / "config.yaml").read_text()
    cfg = OmegaConf.load(stopped / "config.yaml")
    cfg.objective["_target_"] = "ours.Objective"
    OmegaConf.save(cfg, stopped / "config.yaml")
    for verb in (["evaluate", f"model={stopped}"], ["predict", stopped, "x"]):
        assert "objective._target_=ours.Objective, which lmlab itself does not use" in refused(*verb)
    assert "ours.Objective can't be imported" in refused("predict", stopped, "x", "--trust", "ours")
    (stopped / "config.yaml").write_text(kept_config)
    for path in (stopped / "checkpoints").iterdir():
        path.unlink()
    for verb in (["evaluate", f"model={stopped}"], ["predict", stopped, "x"]):
        assert "has kept no weights yet" in refused(*verb)


def test_early_stopping_counts_over_a_stop(train: Callable[..., Path], tmp_path: Path) -> None:
    patience = ["callbacks=early_stopping", "callbacks.early_stopping.patience=2", "optim.lr=0.5"]
    words = [*SIX, *patience, "trainer.max_steps=40", "trainer.log_every_n_steps=3"]
    run = train(*words, run_dir=tmp_path / "whole")
    ended = json.loads((run / "summary.json").read_text())["steps"]
    assert ended < 40
    # Before the validation that ends it, and right after it, where no report is due.
    for step in (ended - 2, ended):
        place = tmp_path / str(step)
        stop_after(run, step, place)
        resumed(place)
        assert json.loads((place / "summary.json").read_text())["tokens"] == ended * 8 * 32
        assert json.loads((place / "summary.json").read_text())["steps"] == ended
        assert equal(place, run)
        assert losses(place) == losses(run)


@pytest.mark.longest
def test_at_other_widths(train: Callable[..., Path], tmp_path: Path) -> None:
    """Two processes, then four, then one: the losses are those of one process all along."""
    common = [*DROPOUT_OFF["clm"], *SIX[len(TINY) :], "trainer.accelerator=cpu", "optim.schedule=constant"]
    alone = losses(train(*common, run_dir=tmp_path / "alone"))
    run = train(*common, "trainer.devices=2", "trainer.max_steps=2", run_dir=tmp_path / "run")
    resumed(run, "trainer.devices=4", "trainer.max_steps=5", "callbacks.checkpoints.every_steps=1")
    # At the same width also the last bit is the same: four ranks could add up in another order.
    stop_after(run, 4, tmp_path / "again")
    resumed(tmp_path / "again")
    assert equal(tmp_path / "again", run)
    resumed(run, "trainer.devices=1", "trainer.max_steps=6")
    found = [point for point in losses(run) if point[:2] != (5, "val/loss")]  # the end of it, for a time
    assert [point[:2] for point in found] == [point[:2] for point in alone]
    np.testing.assert_allclose([point[2] for point in found], [point[2] for point in alone], rtol=1e-5)
    # What one device takes at once has not grown: 8 over 2 were 4, over 4 are 2, which is as much as 1 takes then.
    assert OmegaConf.load(run / "config.yaml").trainer.accumulate_grad_batches == 4
    attempts = json.loads((run / "manifest.json").read_text())["went_on"]
    assert [(attempt["step"], attempt["devices"]) for attempt in attempts] == [(2, 4), (5, 1)]


def test_a_width_that_does_not_divide(stopped: Path, refused: Refused) -> None:
    shown = refused("resume", stopped, "trainer=ddp", "trainer.devices=3", "trainer.accelerator=cpu")
    assert "batch_size=8 does not divide over 3 ranks" in shown
    assert "1, 2, 4 or 8" in shown


def test_longer(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "run"
    shutil.copytree(whole, place)
    before = (place / "summary.json").read_bytes()
    for verb, words in {"train": [*SIX, f"hydra.run.dir={place}"], "resume": [place, "trainer.max_steps=5"]}.items():
        run_verb(verb, *words)  # says so, and all is well: a sweep that is repeated goes on
        shown = capsys.readouterr().out
        assert f"{place} is finished: 6 steps" in shown
        assert f"python -m lmlab.resume {place} trainer.max_steps=" in shown
    assert (place / "summary.json").read_bytes() == before
    resumed(place, "trainer.max_steps=8")
    assert json.loads((place / "summary.json").read_text())["steps"] == 8
    assert [step for step, name, _ in losses(place) if name == "train/loss"] == list(range(1, 9))
    # From its first step on at the rate of the longer run's schedule.
    rates = {line["step"]: line["optim/lr"] for line in metrics(place) if "optim/lr" in line}
    optim = AdamW(warmup_ratio=0.05)
    assert [rates[step] for step in (7, 8)] == [optim.lr * optim.factor(step - 1, 8) for step in (7, 8)]


@pytest.mark.long
def test_options_of_a_folder(stopped: Path, tmp_path: Path, refused: Refused) -> None:
    """As `lmlab.train` takes them: of --config-dir."""
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "two.yaml").write_text(
        "defaults: [ddp]\naccelerator: cpu\ndevices: 2\nenable_progress_bar: false\n"
    )
    assert "trainer=two: no such option" in refused("resume", stopped, "trainer=two")
    folder = ["--config-dir", tmp_path / "mine"]
    assert "trainer=three: no such option" in refused("resume", stopped, *folder, "trainer=three")
    assert "there is no such folder" in refused("resume", stopped, "--config-dir", tmp_path / "none", "trainer=two")
    resumed(stopped, *folder, "trainer=two", "trainer.max_steps=5")
    assert OmegaConf.load(stopped / "config.yaml").trainer.devices == 2


def test_a_finished_run_refuses_what_one_that_goes_on_does(refused: Refused, whole: Path, stopped: Path) -> None:
    for words, said in {
        ("optim.lr=0.5",): "optim.lr=0.5 (it was 0.001)",
        ("optim.lr=0.5", "trainer.max_steps=8"): "optim.lr=0.5 (it was 0.001)",
        ("model.config={n_head: 1}",): "model.config.n_head=1 (it was 2)",
        ("trainer.max_steps=abc",): '="abc": it has to be a whole number, 1 or more, or -1',
        ("trainer.max_steps=true",): "=true: it has to be a whole number",
        ("trainer.max_steps=1.5",): "=1.5: it has to be a whole number",
        ("trainer.max_steps=-3",): "trainer.max_steps=-3: it has to be a whole number, 1 or more, or -1",
        ("optim.lr=[1",): "the [ is not closed",
        ("seed", "1"): "Did you mean seed=1?",
    }.items():
        for run in (whole, stopped):
            assert said in refused("resume", run, *words)
    assert json.loads((whole / "summary.json").read_text())["steps"] == 6


def test_of_no_run(refused: Refused, tmp_path: Path, whole: Path) -> None:
    assert "is no run" in refused("resume", tmp_path)
    assert "is no run" in refused("resume", tmp_path / "nowhere")
    (tmp_path / "sweep.json").write_text("{}")
    assert f"is a sweep. To go on with it: python -m lmlab.sweep resume {tmp_path}" in refused("resume", tmp_path)
    assert "required: RUN_DIR." in refused("resume")
    assert "required: action, DIR." in refused("sweep")
    assert 'Did you mean "trainer.max_steps"?' in refused("resume", whole, "trainer.max_step=9")
    assert "--into is for --fresh" in refused("resume", whole, "--into", tmp_path / "x")
    assert "holds a run" in refused("resume", whole, "--fresh", "--into", whole)


def test_a_changed_config_names_its_keys(refused: Refused, stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    shown = refused("train", *SIX, "optim.lr=3e-3", "seed=7", f"hydra.run.dir={stopped}")
    assert "optim.lr=0.003 (it was 0.001)" in shown
    assert "seed=7 (it was 0)" in shown
    assert "trainer.max_steps" not in shown
    assert "For a new run give another directory: hydra.run.dir=DIR" in shown
    assert "batch_size=4 (it was 8)" in refused("resume", stopped, "batch_size=4")
    assert before == {path: path.read_bytes() for path in before}


def test_what_is_refused_changes_nothing(refused: Refused, stopped: Path, whole: Path) -> None:
    for word, said in (
        ("trainer.max_steps=3", "at step 4 already"),
        ("callbacks.checkpoints.monitor=val/nothing", 'monitors "val/nothing"'),
        ("run_dir=/tmp/elsewhere", "--fresh --into DIR"),
        ("hydra.run.dir=/tmp/elsewhere", "--fresh --into DIR"),
        ("model=gpt2", "a run's model can't change"),
        ("~callbacks", "nothing of that name"),
        ("~callbacks.nothing", "nothing of that name"),
        ("callbacks=nothing", "no such option"),
        ("callbacks=null", "callbacks=null: it has to be the name of an option"),
        ("trainer.max_steps=7,8", "one value"),
        ("trainer.devices=null", "trainer.devices=null: it has to be a whole number"),
        ("trainer.max_steps", "KEY=VALUE"),
    ):
        assert said in refused("resume", stopped, word)
    resumed(stopped)
    assert equal(stopped, whole)
    assert losses(stopped) == losses(whole)


@pytest.mark.long
def test_an_extension_that_is_killed_before_it_trains(whole: Path, tmp_path: Path) -> None:
    place, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole, place)
    early = {"lmlab.config.models.build_model": ["die", 1]}
    assert finish("resume", place, "trainer.max_steps=8", out=out, faults=early) < 0
    resumed(place, "trainer.max_steps=8")
    assert json.loads((place / "summary.json").read_text())["steps"] == 8
    # The first command, which asked for less, finds it finished.
    run_verb("train", *SIX, f"hydra.run.dir={place}")
    assert OmegaConf.load(place / "config.yaml").trainer.max_steps == 8


def test_a_callback_that_can_not_be_kept_is_named(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(*SIX, "+callbacks.mine._target_=tests.broken_callback.KeepsASet")
    shown = capsys.readouterr().err
    assert "the state of the callback KeepsASet holds more than tensors and plain values" in shown


def test_files_of_others_among_the_checkpoints_stay(stopped: Path, whole: Path) -> None:
    others = [stopped / "checkpoints" / name for name in ("best-mine.ckpt", "step-old.ckpt")]
    for place in others:
        place.write_bytes(b"mine")
    resumed(stopped)
    assert equal(stopped, whole)
    assert all(place.read_bytes() == b"mine" for place in others)


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "a: {b"])
def test_a_damaged_file_is_named(name: str, content: str, refused: Refused, stopped: Path) -> None:
    (stopped / name).write_text(content)
    for words in (["resume", stopped], ["train", *SIX, f"hydra.run.dir={stopped}"]):
        assert f"{stopped / name}" in refused(*words)


@pytest.mark.parametrize("block", ["data: null", "model: 3", "tokenizer: []", "trainer: x"])
def test_a_block_that_is_no_mapping_is_named(block: str, refused: Refused, whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(whole, place)
    cfg = yaml.safe_load((place / "config.yaml").read_text()) | yaml.safe_load(block)
    (place / "config.yaml").write_text(yaml.safe_dump(cfg))
    for words in (["resume", place], ["evaluate", place, f"hydra.run.dir={tmp_path}/evaluation"]):
        assert f"{place / 'config.yaml'} is damaged: {block.partition(':')[0]} is no mapping" in refused(*words)


def test_a_line_that_a_kill_left_unfinished(stopped: Path, whole: Path, tmp_path: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tra')
    resumed(stopped)
    assert losses(stopped) == losses(whole)


@pytest.mark.long
def test_a_run_that_goes_on_elsewhere_is_locked(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    running = begin("resume", stopped, out=tmp_path / "out", faults={"lmlab.evaluation.scoring.score": ["slow", 0.5]})
    try:
        wait_for(lambda: "Resuming" in (tmp_path / "out").read_text() if (tmp_path / "out").exists() else False)
        for words in (["resume", stopped], ["train", *SIX, f"hydra.run.dir={stopped}"]):
            shown = refused(*words)
            assert f"another process: pid {running.pid} on {os.uname().nodename}" in shown
    finally:
        running.kill()
        running.join()
    resumed(stopped)  # the lock went with its process


def test_data_that_changed(train: Callable[..., Path], refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"The story of number {n} is told here at length." for n in range(200)))
    words = [*SIX, "data=files", f"data.train={file}", "data.document=paragraph"]
    run = train(*words, run_dir=tmp_path / "whole")
    stop_after(run, 4, tmp_path / "run")
    file.write_text(file.read_text() + "\n\nOne more.")
    shown = refused("resume", tmp_path / "run")
    assert "its files have changed" in shown
    assert "data of" in shown


def test_data_and_tokenizer_that_moved(
    train: Callable[..., Path], refused: Refused, evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    """What lies at a path counts, not the path; a run that moved with all it names can go on, and be evaluated."""
    text = "\n\n".join(f"The story of number {n} is told here at length." for n in range(200))
    (tmp_path / "then").mkdir()
    (tmp_path / "then/text.txt").write_text(text)
    bpe(text.split("\n\n"), vocab_size=300).save_pretrained(tmp_path / "then/tokenizer")
    words = [w for w in SIX if not w.startswith("tokenizer.")]
    words += ["tokenizer=pretrained", f"tokenizer.name={tmp_path}/then/tokenizer"]
    words += ["data=files", f"data.train={tmp_path}/then/text.txt", "data.document=paragraph"]
    whole = train(*words, run_dir=tmp_path / "whole")
    stop_after(whole, 4, tmp_path / "run")
    (tmp_path / "then").rename(tmp_path / "now")
    shown = refused("resume", tmp_path / "run")
    assert f"python -m lmlab.resume {tmp_path}/run data.train=PATH tokenizer.name=PATH" in shown
    moved = [f"data.train={tmp_path}/now/text.txt", f"tokenizer.name={tmp_path}/now/tokenizer"]
    (tmp_path / "other.txt").write_text(text + "\n\nOne more.")
    shown = refused("resume", tmp_path / "run", f"data.train={tmp_path}/other.txt", moved[1])
    assert f"data.train={tmp_path}/other.txt (it was {tmp_path}/then/text.txt)" in shown
    resumed(tmp_path / "run", *moved)
    assert equal(tmp_path / "run", whole)
    resumed(tmp_path / "run", "trainer.max_steps=7")  # it knows now
    # An evaluation of the text that the run held out.
    assert "data.train=" in refused("evaluate", f"model={whole}", f"hydra.run.dir={tmp_path}/evaluation")
    again = evaluate(f"model={whole}", moved[0])
    certificates = [json.loads((place / "certificate.json").read_text()) for place in (whole, again)]
    assert certificates[0]["data_hash"] == certificates[1]["data_hash"]
    assert certificates[0]["totals"] == certificates[1]["totals"]


def test_where_two_files_lie_now(
    train: Callable[..., Path],
    refused: Refused,
    evaluate: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The advice names what the run has and does not know yet, keeps what was given, and works."""
    monkeypatch.chdir(tmp_path)
    for name, numbers in {"train": range(150), "val": range(150, 200)}.items():
        Path(f"{name}.txt").write_text("".join(f"The story of number {n} is told here.\n" for n in numbers))
    words = ["data=files", "data.train=train.txt", "data.validation=val.txt", "data.document=line"]
    whole = train(*SIX, *words, run_dir=Path("whole"))
    stop_after(whole, 4, Path("run"))
    for name in ("train", "val"):
        Path(f"{name}.txt").rename(f"my {name}.txt")
    again = "python -m lmlab.resume run"
    given = ["data.train=my train.txt", "data.validation=my val.txt"]
    assert f"{again} data.train=PATH data.validation=PATH\n" in refused("resume", "run")
    assert f"{again} 'data.train=my train.txt' data.validation=PATH\n" in refused("resume", "run", given[0])
    assert f"{again} --fresh data.train=PATH data.validation=PATH\n" in refused("resume", "run", "--fresh")
    shown = refused("resume", "run", "tokenizer.name=x")
    assert 'no key "tokenizer.name"' in shown
    assert "+tokenizer.name" not in shown
    assert "A key that is to be added: +KEY=VALUE" in refused("resume", "run", "trainer.profiler=simple")
    place = f"hydra.run.dir={tmp_path}/evaluation"
    for more in ([], given[:1]):
        shown = refused("evaluate", "whole", *more, place)
        assert "python -m lmlab.evaluate whole data.validation=PATH\n" in shown
    assert "PATH" not in refused("evaluate", "whole", "data.validation=none.txt", place)
    resumed(Path("run"), *given)
    assert equal(Path("run"), whole)
    # What is scored is enough.
    certificates = [
        json.loads((place / "certificate.json").read_text()) for place in (whole, evaluate("whole", given[1]))
    ]
    assert certificates[0]["data_hash"] == certificates[1]["data_hash"]
    assert certificates[0]["totals"] == certificates[1]["totals"]


def test_where_domains_and_sources_lie_now(tmp_path: Path) -> None:
    """Each file has a key of its own, and an evaluation asks for what it scores alone."""
    files = {"train": f"{tmp_path}/none", "validation": {"news": "n", "law": ["a", "b"]}}
    sources = {"web": {"train": "w"}, "both": files, "hub": {"path": "x/y", "train": "train"}}
    for data, keys in (
        ({"_target_": FILES, **files}, ["data.train", "data.validation.news", "data.validation.law"]),
        (
            {"_target_": "lmlab.data.mixture.mix", "sources": sources},
            [
                *("data.sources.web.train", "data.sources.both.train", "data.sources.both.validation.news"),
                *("data.sources.both.validation.law", "data.sources.hub.path"),
            ],
        ),
    ):
        run = OmegaConf.create({"data": data, "model": {}, "tokenizer": {}, "preprocess": {}})
        scored = [key for key in keys if key not in ("data.train", "data.sources.both.train")]
        assert changes.location_overrides(run, run) == [f"{key}=PATH" for key in keys]
        assert changes.location_overrides(run, run, evaluation=True) == [f"{key}=PATH" for key in scored]
        law = next(key for key in keys if key.endswith("law"))
        cfg = OmegaConf.from_dotlist([f"{law}=here", "preprocess.block_size=null"])
        evaluated.take_data(cfg, run, [f"{law}=here"])
        assert OmegaConf.select(cfg, law.replace("validation.law", "train")) is None
        words = changes.location_overrides(cfg, run, evaluation=True)
        assert words == [f"{key}={'here' if key == law else 'PATH'}" for key in scored]


def test_before_the_first_checkpoint_nothing_may_move(whole: Path) -> None:
    """The manifest may not say yet what lay there."""
    kept = config_of(RunDirectory(whole))
    cfg = OmegaConf.merge(kept, {"data": {"train": "elsewhere.txt"}})
    changes.check_same(cfg, kept, (*changes.CHANGEABLE, *changes.LOCATED))
    with pytest.raises(UserError, match=r"data\.train=elsewhere\.txt \(it was not there\)"):
        changes.check_same(cfg, kept, changes.CHANGEABLE)


def test_other_versions_are_named(stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest["packages"]["torch"] = "1.0"
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    resumed(stopped)
    assert f"torch 1.0 → {version('torch')}" in capsys.readouterr().out
    assert equal(stopped, whole)


def test_a_state_of_another_model(train: Callable[..., Path], refused: Refused, stopped: Path, tmp_path: Path) -> None:
    other = train(*SIX, "model.config.n_embd=16", run_dir=tmp_path / "other")
    shutil.copy(other / "checkpoints" / "step-4.ckpt", stopped / "checkpoints" / "step-4.ckpt")
    shown = refused("resume", stopped)
    assert "is of another model" in shown
    assert "(300, 16)" in shown
    assert "(300, 32)" in shown


@pytest.mark.parametrize("damage", ["empty", 0.1, 0.5, 0.99, -1, "flipped", "renamed text"])
def test_a_damaged_state_is_noticed(
    damage: str | float, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tmp_path / "run"
    stop_after(whole, 6, stopped)
    place = stopped / "checkpoints" / "step-6.ckpt"
    content = bytearray(place.read_bytes())
    if damage == "flipped":  # one bit, of a weight
        content[len(content) // 2] ^= 1
    elif damage == "renamed text":
        content = bytearray(b"no checkpoint")
    elif damage == "empty":
        content = bytearray()
    else:
        assert isinstance(damage, float | int)
        del content[int(damage * len(content)) if damage > 0 else int(damage) :]
    place.write_bytes(content)
    resumed(stopped)
    shown = capsys.readouterr().out
    assert "step-6.ckpt is damaged" in shown
    assert "from step 4." in shown
    assert (stopped / "checkpoints" / "step-6.ckpt.damaged").read_bytes() == content
    assert equal(stopped, whole)
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_state_that_can_not_be_read_now_is_not_taken_for_damaged(
    number: int, stopped: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in (stopped / "checkpoints").iterdir()}

    def fail(place: Any, *args: Any) -> None:
        raise OSError(number, os.strerror(number), str(place))

    with monkeypatch.context() as patched:
        patched.setattr(zipfile, "ZipFile", fail)
        shown = refused("resume", stopped)
    assert f"step-4.ckpt can't be read: {os.strerror(number)}." in shown
    assert {path.name: path.read_bytes() for path in (stopped / "checkpoints").iterdir()} == before


def test_any_bit_that_turned_is_damage_or_harms_nothing(tmp_path: Path) -> None:
    """None of them is an error to wait for, and none is told to be a file that holds code."""
    whole, place = tmp_path / "whole.ckpt", tmp_path / "state.ckpt"
    torch.save({"weight": torch.arange(4.0), "step": 3}, whole)
    content = whole.read_bytes()
    found = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 500):
        turned = bytearray(content)
        turned[bit // 8] ^= 1 << bit % 8
        place.write_bytes(turned)
        if checkpoint_io.damage(place) is not None:
            found += 1
            continue
        state = checkpoint_io.load_checkpoint(place)
        assert state["step"] == 3
        assert state["weight"].tolist() == [0, 1, 2, 3]
    assert found > 100  # what is left lies in no part's content: padding, dates, names of systems


def test_no_state_is_whole(refused: Refused, stopped: Path) -> None:
    for place in (stopped / "checkpoints").glob("step-*.ckpt"):
        place.write_bytes(b"")
    shown = refused("resume", stopped)
    assert "no checkpoint" in shown
    assert "--fresh" in shown


def test_code_in_a_state_does_not_run(refused: Refused, stopped: Path, tmp_path: Path) -> None:
    place = stopped / "checkpoints" / "step-4.ckpt"

    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(torch.load(place, weights_only=True) | {"more": Runs()}, place)
    shown = refused("resume", stopped)
    assert "holds code" in shown
    assert not (tmp_path / "it ran").exists()


def test_fresh(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resumed(whole, "--fresh", "--into", tmp_path / "again")
    shown = capsys.readouterr().out
    assert f"Code, versions, data and tokenizer are those of {whole}." in shown
    assert "The loss curve is the same, bit for bit: 10 points, to step 6." in shown
    assert equal(tmp_path / "again", whole)
    ids = [json.loads((run / "manifest.json").read_text()) for run in (whole, tmp_path / "again")]
    assert ids[0]["run_id"] != ids[1]["run_id"] == ids[1]["run_id"]
    assert ids[1]["repeats"]["run_id"] == ids[0]["run_id"]


def test_fresh_says_what_differs(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "run"
    shutil.copytree(whole, place)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["packages"]["numpy"], manifest["tokenizer_hash"] = "1.0", "0" * 32
    manifest["git"] = {"commit": "0" * 40, "dirty": False}
    (place / "manifest.json").write_text(json.dumps(manifest))
    resumed(place, "optim.lr=2e-3", "--fresh", "--into", tmp_path / "again")
    shown = capsys.readouterr().out
    for line in ("numpy 1.0 → ", "tokenizer hash: changed", "commit 000000000000 → ", "config: optim.lr=2e-3"):
        assert f"differs from {place}: {line}" in shown
    assert "The loss curves differ from step" in shown


def test_a_run_before_its_first_state_begins_again(whole: Path, stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    resumed(stopped)
    assert losses(stopped) == losses(whole)
    assert equal(stopped, whole)


def test_full_disk_ends_no_run(
    train: Callable[..., Path], full_disk: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """States of some 300 KiB do not fit; the run goes on, says so, and can be gone on with where there is room."""
    subprocess.run(["mount", "-o", "remount,size=280k", str(full_disk)], check=True)
    train(*SIX, "callbacks.checkpoints.keep_best=0", run_dir=full_disk / "run")
    shown = capsys.readouterr().out
    assert shown.count("could not be kept, as the disk is full: training goes on") == 3
    assert losses(full_disk / "run") == losses(whole)
    assert "(last weights, held-out text)" in shown
    assert not list(full_disk.rglob("*.ckpt"))
    assert not list(full_disk.rglob("*partial*"))


def test_the_older_state_stays_on_a_full_disk(
    stopped: Path, whole: Path, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=900k", str(full_disk)], check=True)
    place = full_disk / "run"
    shutil.copytree(stopped, place, ignore=shutil.ignore_patterns("wandb", "best-6.ckpt"))
    fill = full_disk / "taken"
    with pytest.raises(OSError, match="No space"):
        fill.write_bytes(bytes(2**20))
    os.truncate(fill, fill.stat().st_size - 60_000)  # room for figures
    with pytest.raises(SystemExit):  # the export needs room
        resumed(place)
    assert "step-6.ckpt could not be kept" in capsys.readouterr().out
    assert [path.name for path in place.glob("checkpoints/step-*")] == ["step-4.ckpt"]
    fill.unlink()
    resumed(place)
    assert equal(place, whole)
    assert losses(place) == losses(whole)


@pytest.mark.long
def test_the_best_weights_stay_on_a_full_disk(train: Callable[..., Path], tmp_path: Path) -> None:
    """However many states in a row can't be written: those that are there still speak of them."""
    best_first = [*SIX, "trainer.max_steps=14", "callbacks.checkpoints.mode=max"]
    whole = train(*best_first, run_dir=tmp_path / "whole")
    run, out = tmp_path / "run", tmp_path / "out"
    no_room = {"lmlab.training.checkpoint_io.write_beside": ["full", 3]}
    assert finish("train", *best_first, f"hydra.run.dir={run}", out=out, faults=no_room) == 0, out.read_text()
    assert out.read_text().count("as the disk is full") == 5
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-2.ckpt", "step-4.ckpt", "best-2.ckpt"}
    assert equal(run, whole)


def test_a_directory_that_is_read_only(refused: Refused, stopped: Path, full_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=2m", str(full_disk)], check=True)
    shutil.copytree(stopped, full_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    for words in (["resume", full_disk / "run"], ["train", *SIX, f"hydra.run.dir={full_disk / 'new'}"]):
        assert "Read-only file system" in refused(*words)


def test_states_by_time_and_by_steps(train: Callable[..., Path], tmp_path: Path) -> None:
    rarely = [*SIX, "trainer.val_check_interval=6", "callbacks.checkpoints.every_minutes=null"]
    for name, words, kept in (
        ("rarely", [], ["step-6.ckpt"]),
        ("steps", ["callbacks.checkpoints.every_steps=4"], ["step-4.ckpt", "step-6.ckpt"]),
        ("time", ["callbacks.checkpoints.every_minutes=1e-6"], ["step-5.ckpt", "step-6.ckpt"]),
    ):
        run = train(*rarely, *words, run_dir=tmp_path / name)
        assert sorted(path.name for path in run.glob("checkpoints/step-*")) == kept


def test_written_in_the_background(train: Callable[..., Path], tmp_path: Path, whole: Path) -> None:
    run = train(*SIX, "callbacks.checkpoints.background=true", run_dir=tmp_path / "run")
    assert equal(run, whole)
    for name in ("step-4.ckpt", "step-6.ckpt", "best-6.ckpt"):
        kept = [torch.load(place / "checkpoints" / name, weights_only=True)["state_dict"] for place in (run, whole)]
        assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[1])


def test_no_more_than_one_save_waits_for_the_one_that_is_written(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slower than training: copies in memory would pile up."""
    copies, most = set[int](), list[int]()
    keep = checkpoint_io.write_checkpoint

    def slowly(content: dict[str, Any], *others: Any) -> None:
        time.sleep(0.3)
        keep(content, *others)
        copies.discard(id(content))

    def copied(content: Any, *args: Any) -> Any:
        made = apply_to_collection(content, *args)
        copies.add(id(made[0]))
        most.append(len(copies))
        return made

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", slowly)
    monkeypatch.setattr(checkpoint_io, "apply_to_collection", copied)
    train(*SIX, "callbacks.checkpoints.background=true", "callbacks.checkpoints.every_steps=1")
    assert len(most) >= 6
    assert max(most) == 2


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("keep_best=-1", "a whole number, 0 or more"),
        ("every_steps=0", "a whole number, 1 or more, or null"),
        ("every_minutes=0", "a number, more than 0, or null"),
        ("mode=least", "one of min, max"),
        ("max_requeues=-1", "a whole number, 0 or more"),
    ],
)
def test_checkpoints_that_can_not_be(key: str, kind: str, refused: Refused, tmp_path: Path) -> None:
    shown = refused("train", *SIX, f"callbacks.checkpoints.{key}", f"hydra.run.dir={tmp_path / 'run'}")
    assert f"callbacks.checkpoints.{key.partition('=')[0]}=" in shown
    assert f": it has to be {kind}" in shown


@pytest.mark.long
def test_wandb_is_one_run_without_gap_or_overlap(tmp_path: Path) -> None:
    """A killed process and the one that went on, offline: together each row is there once."""
    from .test_train import wandb_rows

    run, env = tmp_path / "run", os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "lmlab.train", *SIX[:-3], "logger=default", "trainer.max_steps=40"]
    command += ["trainer.val_check_interval=10", "trainer.log_every_n_steps=2", f"hydra.run.dir={run}"]
    command.remove("logger=file")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    wait_for(lambda: any(line["step"] >= 14 for line in metrics(run)) if (run / "metrics.jsonl").exists() else False)
    process.kill()
    process.wait()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    identity = json.loads((run / "manifest.json").read_text())["run_id"]
    expected = [(line["step"], frozenset(set(line) - {"step", "time"})) for line in metrics(run)]
    # The last one has all rows, and uploading it is enough; what the killed one lost is in it.
    (folder,) = run.glob("wandb/offline-run-*")
    assert wandb_rows(folder) == expected
    (earlier,) = run.glob("wandb/earlier-offline-run-*")
    assert folder.name.endswith(identity)
    assert earlier.name.endswith(identity)
    assert wandb_rows(earlier) == expected[: len(wandb_rows(earlier))]


@pytest.mark.long
def test_a_cooldown_ends_as_a_run_from_the_start(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins at any step that is kept, and leaves the run that it is of as it was."""
    words = ["optim.schedule=constant", "optim.warmup_steps=2", "trainer.val_check_interval=2"]
    run = train(*TINY, *words, "trainer.max_steps=8", "callbacks.checkpoints.keep_every=2")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    run_verb("resume", run, "--cooldown", 3, "--step", 4, "--into", tmp_path / "cooled")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    whole = [*words[1:], "optim.schedule=one_minus_sqrt", "optim.decay_steps=3", "trainer.max_steps=7"]
    whole_run = train(*TINY, *whole, run_dir=tmp_path / "whole")
    assert losses(tmp_path / "cooled") == losses(whole_run)
    weights = [load_file(place / "model" / "model.safetensors") for place in (tmp_path / "cooled", whole_run)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    manifest = json.loads((tmp_path / "cooled" / "manifest.json").read_text())
    assert manifest["cooldown"]["step"] == 4
    assert manifest["cooldown"]["run_id"] != manifest["run_id"]
    capsys.readouterr()
    for place, options, said in (
        (run, ["--cooldown", 3, "--step", 5], "no whole checkpoint of step 5. There are those of 2, 4, 6, 8."),
        (tmp_path / "cooled", ["--cooldown", 3], "at step 7 the learning rate is 0 of the full one"),
        (run, ["--cooldown", 3, "optim.schedule=linear"], "optim.schedule=linear does not decay over the last 3 steps"),
        (run, ["--cooldown", 3, "optim.lr=1"], "can't go on with optim.lr=1"),
        (run, ["--cooldown", 3, "trainer.max_steps=9"], "takes the steps of --cooldown"),
        (run, ["--cooldown", 3, "--into", tmp_path], "is there already, and not an empty directory"),
        (run, ["--cooldown", 3, "--fresh"], "leave one of them out"),
    ):
        with pytest.raises(SystemExit):
            run_verb("resume", place, *options)
        assert said in capsys.readouterr().err
