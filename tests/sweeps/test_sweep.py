"""Sweeps: every point is accounted for, whatever becomes of it, and is run to its end once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lmlab.config.compose import read_config
from lmlab.config.files import SWEEPS
from lmlab.distributed import launch
from lmlab.errors import Stopped
from lmlab.runs import status
from lmlab.runs.directory import RunDirectory
from lmlab.sweeps import grid
from lmlab.sweeps.points import add_points, begin_sweep, name_run, read_points, read_sweep, updated_sweep
from tests.conftest import TINY, Refused, losses, metrics, run_verb, stop_after
from tests.test_conf import first_values


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a sweep run in this process: what they need of their own, tests of launch look at."""

    def run(arguments: list[str], ranks: int, log_of: Any, variables: dict[str, str], advice: str) -> None:
        from lmlab.train import train

        os.environ.update(variables)
        _, run_dir, *checkpoint = arguments
        train(read_config(Path(run_dir)), Path(checkpoint[0]) if checkpoint else None)

    monkeypatch.setattr(launch, "launch", run)


def swept(folder: Path, *words: str) -> None:
    run_verb("train", "-m", *TINY, *words, f"hydra.sweep.dir={folder}")


def found(folder: Path) -> list[tuple[list[str], str, str | None]]:
    """The points of a sweep, their states and causes."""
    of = [(point.overrides, status.read_status(point.run)) for point in read_points(folder)]
    return [(overrides, state.name, state.cause) for overrides, state in of]


@pytest.mark.usefixtures("here")
def test_a_failed_point_is_kept_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        swept(tmp_path, "optim.lr=1e30,1e-3", "optim.schedule=linear,linaer", "trainer.log_every_n_steps=1")
    assert found(tmp_path) == [
        (["optim.lr=1e+30", "optim.schedule=linear"], "failed", "non-finite loss"),
        (["optim.lr=1e+30", "optim.schedule=linaer"], "failed", "bad config"),
        (["optim.lr=0.001", "optim.schedule=linear"], "done", None),
        (["optim.lr=0.001", "optim.schedule=linaer"], "failed", "bad config"),
    ]
    out, err = capsys.readouterr()
    assert "3 failed, 1 done" in out
    assert "the loss or its gradient is not finite at step" in out
    assert err.splitlines()[-1].startswith("error: 3 of 4 runs failed. To run what has not come to its end: ")
    # The run directories of what was refused are as free as before.
    assert not RunDirectory(tmp_path / "1").begun()


def test_status_says_how_to_run_the_rest(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_sweep(tmp_path)
    add_points(tmp_path, [["seed=1"], ["seed=2"]])
    shutil.copytree(whole, tmp_path / "0")

    def hint() -> bool:
        run_verb("sweep", "status", tmp_path)
        last = capsys.readouterr().out.splitlines()[-1]
        return last == f"To run what has not come to its end: python -m lmlab.sweep resume {tmp_path}"

    assert hint()
    for place in (tmp_path, tmp_path / "1"):  # the sweep goes on, or the run does
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "held", lambda run, place=place: run.path == place)
            assert not hint()
    shutil.copytree(whole, tmp_path / "1")
    assert not hint()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("submitted", [False, True])
def test_a_sweep_that_is_stopped(
    submitted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(launch, "launch", stop)
    monkeypatch.setattr(grid, "lost_jobs_answered", lambda launcher: nullcontext())
    monkeypatch.setattr(grid, "submits", lambda launcher: submitted)
    with pytest.raises(Stopped):
        swept(tmp_path, "seed=1,2")
    jobs = "; submitted jobs go on" if submitted else ""
    assert f"The sweep was stopped{jobs}. To go on: python -m lmlab.sweep resume" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    def forward(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 12 bytes")

    monkeypatch.setattr(nn.Embedding, "forward", forward)
    with pytest.raises(SystemExit, match="1"):
        swept(tmp_path, "seed=1,2")
    assert [row[1:] for row in found(tmp_path)] == [("failed", "out of memory")] * 2
    said = status.read_status(RunDirectory(tmp_path / "0")).message
    assert said is not None
    assert "trainer.accumulate_grad_batches=2" in said


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_only_what_is_missing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done points are left alone, one that was stopped goes on, one that never began begins; a sweep may grow."""
    swept(tmp_path, "seed=1,2,3", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
    whole = {number: losses(tmp_path / str(number)) for number in range(3)}
    untouched = (tmp_path / "0" / "summary.json").stat().st_mtime_ns
    stop_after(tmp_path / "1", 2, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "stopped").rename(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    assert [row[1:] for row in found(tmp_path)] == [("done", None), ("failed", "killed"), ("waiting", None)]
    capsys.readouterr()
    run_verb("sweep", "resume", tmp_path)
    assert "Resuming run" in capsys.readouterr().out
    assert {number: losses(tmp_path / str(number)) for number in range(3)} == whole
    assert (tmp_path / "0" / "summary.json").stat().st_mtime_ns == untouched
    swept(tmp_path, "seed=0,1,2,3", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
    assert [row[0] for row in found(tmp_path)] == [["seed=1"], ["seed=2"], ["seed=3"], ["seed=0"]]
    assert read_config(tmp_path / "3").seed == 0
    assert (tmp_path / "0" / "summary.json").stat().st_mtime_ns == untouched


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_what_a_resume_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All points that were ever asked for, each once, however they were written; a damaged one holds up none."""
    swept(tmp_path, "optim.lr=1e-3,1e-3,2e-3", "seed=1,2")
    assert [row[0] for row in found(tmp_path)] == [
        [f"optim.lr={lr}", f"seed={s}"] for lr in (0.001, 0.002) for s in (1, 2)
    ]
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "2" / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="1"):
        swept(tmp_path, "seed=1,2", "++optim.lr=1e-3,3e-3")
    states_now = [row[1:] for row in found(tmp_path)]
    assert states_now == [("done", None)] * 2 + [("failed", "damaged")] + [("done", None)] * 3
    capsys.readouterr()
    (tmp_path / "2" / "summary.json").unlink()
    config = (tmp_path / "0" / "config.yaml").read_text()
    (tmp_path / "0" / "config.yaml").unlink()
    run_verb("sweep", "resume", tmp_path)
    assert "config.yaml can't be read" in capsys.readouterr().err
    (tmp_path / "0" / "config.yaml").write_text(config)
    run_verb("sweep", "resume", tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == "6 done"


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_secret_is_given_again(tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    """By no more of its key than the name, or by the whole command."""
    swept(tmp_path, "+hydra.job.env_set.OF_TEST=planted", "seed=1,2")
    assert "planted" not in (tmp_path / "sweep.json").read_text()
    capsys.readouterr()
    run_verb("sweep", "resume", tmp_path)
    *_, counts, said = capsys.readouterr().out.splitlines()
    assert counts == "2 done"
    assert said.startswith("All runs have ended.")
    assert said.endswith("hydra.job.env_set.OF_TEST=…")
    with updated_sweep(tmp_path) as content:
        before = content["shared"]
        content["shared"] = [*before, "trainer.max_steps=6"]
    assert "held a secret" in refused("sweep", "resume", tmp_path)  # a command for longer had not come to all
    with updated_sweep(tmp_path) as content:
        content["shared"] = before
    (tmp_path / "1" / "summary.json").unlink()
    said = refused("sweep", "resume", tmp_path)
    assert "hydra.job.env_set.OF_TEST held a secret, which was not kept" in said
    assert "add hydra.job.env_set.OF_TEST=… to the command" in said
    run_verb("sweep", "resume", tmp_path, "hydra.job.env_set.OF_TEST=another")
    swept(tmp_path, "+hydra.job.env_set.OF_TEST=a-third", "seed=1,2")
    assert capsys.readouterr().out.splitlines()[-1] == "2 done"


@pytest.mark.usefixtures("here")
def test_params_of_a_file(tmp_path: Path) -> None:
    """Lists and nulls are as YAML has them, and the command line wins, however it is written."""
    (tmp_path / "mine.yaml").write_text(
        "defaults: [train, _self_]\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      seed: [1, 2]\n      model.config.n_layer: 1,2\n      trainer.gradient_clip_val: null\n"
    )
    words = [word for word in TINY if "n_layer" not in word]
    place = ["-cd", tmp_path, "-cn", "mine", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    run_verb("train", *place, "model.config.n_layer=1")
    assert [row[0] for row in found(tmp_path / "sweep")] == [["seed=1"], ["seed=2"]]
    cfg = read_config(tmp_path / "sweep" / "1")
    assert (cfg.model.config.n_layer, cfg.trainer.gradient_clip_val) == (1, None)


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_sweep_goes_on_for_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept(tmp_path, "seed=1,2")
    run_verb("sweep", "resume", tmp_path, "trainer.max_steps=6")
    assert [RunDirectory(tmp_path / name).read_summary()["steps"] for name in "01"] == [6, 6]
    # As the command now says; also where it was interrupted before it came to all of them.
    capsys.readouterr()
    run_verb("resume", tmp_path / "0", "trainer.max_steps=8")
    with updated_sweep(tmp_path) as content:
        content["arguments"].append("trainer.max_steps=8")
        content["shared"] = [word for word in content["shared"] if "max_steps" not in word] + ["trainer.max_steps=8"]
    run_verb("sweep", "resume", tmp_path)
    assert "2 done" in capsys.readouterr().out
    assert [RunDirectory(tmp_path / name).read_summary()["steps"] for name in "01"] == [8, 8]


def test_runs_of_a_sweep_share_a_group_in_wandb(tmp_path: Path) -> None:

    folder = tmp_path / "sweep"
    begin_sweep(folder)
    add_points(folder, [["optim.lr=0.1", "seed=1"], ["optim.lr=0.1", "seed=2"]])
    cfg = OmegaConf.create({"run_dir": str(folder / "1"), "logger": {"wandb": {"group": None, "name": None}}})
    name_run(cfg)
    assert cfg.logger.wandb == {"group": str(folder), "name": "optim.lr=0.1 seed=2"}
    given = OmegaConf.create({"run_dir": str(folder / "1"), "logger": {"wandb": {"group": "mine", "name": "this"}}})
    name_run(given)
    assert given.logger.wandb == {"group": "mine", "name": "this"}
    name_run(OmegaConf.create({"run_dir": str(folder / "1"), "logger": None}))


def test_states(tmp_path: Path, whole: Path) -> None:
    """What a directory says of its run."""

    def place(name: str, *gone: str) -> RunDirectory:
        shutil.copytree(whole, tmp_path / name)
        for file in gone:
            (tmp_path / name / file).unlink()
        return RunDirectory(tmp_path / name)

    assert status.read_status(RunDirectory(tmp_path / "nowhere")) == status.Status("waiting")
    assert status.read_status(RunDirectory(whole)) == status.Status("done", step=4, steps=4)
    killed = place("killed", "summary.json")
    assert status.read_status(killed).cause == "killed"
    assert (status.read_status(killed).step, status.read_status(killed).steps) == (4, 4)
    with killed.metrics.open("a") as file:
        file.write('{"step": 5, "ti')  # half of a row
    assert status.read_status(killed).step == 4
    status.write_failure(killed, Stopped(signal.SIGINT))
    assert status.read_status(killed).name == "stopped"
    assert status.read_status(killed).cause == "SIGINT"
    status.write_failure(killed, Stopped(signal.SIGUSR2))
    assert status.read_status(killed).cause == "timed out"
    status.write_failure(killed, OSError(28, "No space left on device"))
    assert status.read_status(killed).cause == "disk full"
    status.write_failure(killed, ZeroDivisionError("no"))
    assert status.read_status(killed).message == "ZeroDivisionError: no"
    pruned = place("pruned")
    pruned.summary.write_text(json.dumps(pruned.read_summary() | {"pruned": 4}))
    assert status.read_status(pruned).name == "pruned"
    # POSIX locks are a process's own, so it takes another one to see it.
    script = f"""
from lmlab.runs import status
from lmlab.runs.directory import RunDirectory
print(status.read_status(RunDirectory({str(killed.path)!r})).name)
"""
    with killed.lock():
        assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "running"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "failed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "run"
    run_verb("train", *TINY, f"hydra.run.dir={place}")
    return place


@pytest.mark.long
def test_a_sweep_that_can_not_be_is_refused_before_it_begins(refused: Refused, tmp_path: Path) -> None:
    place, there = tmp_path / "sweeps" / "sweep", tmp_path / "there"
    there.mkdir()
    (there / "mine").touch()
    for words, said in (
        (["optim.lrr=1,2"], 'there is no key "optim.lrr". Did you mean "optim.lr"?'),
        (["optim=adamw,sgd"], "optim=sgd: no such option."),
        (["model=null,gpt2"], "model=null: it has to be the name of an option. Options: "),
        (["model=gpt2,3"], "model=3: it has to be the name of an option. Options: "),
        (
            ["optim.lr=1e-3,abc", "seed=1,2"],
            'the point optim.lr=abc seed=1 is refused: optim.lr="abc": it has to be a number',
        ),
        (
            ["seed=1,2", "+optim.lrr=1"],
            'the point seed=1 is refused: there is no key "optim.lrr". Did you mean "optim.lr"?',
        ),
        (["seed=1,2", "data=files"], "the point seed=1 is refused: data.train has to be given"),
        (["seed=1,2", "trainer.devices=9", "trainer=gpu"], "there is no GPU here"),
        (["hydra/sweeper=optuna", "batch_size=0,8"], "the point batch_size=0 is refused"),
        (["hydra/sweeper=optuna", "optim.lr=1,2", "hydra.sweeper.storage=nothing://"], "can't be opened"),
        (["optim.lr=interval(1,2)"], "has no end of values. To search it: hydra/sweeper=optuna"),
        (["hydra/sweeper=optuna"], "nothing to search"),
        (
            ["hydra/sweeper=optuna", "optim.lr=1,2", "hydra.sweeper.sampler.name=TPEsampler"],
            'Did you mean "TPESampler"?',
        ),
        (
            ["hydra/sweeper=optuna", "optim.lr=1,2", "+hydra.sweeper.pruner.patience=1"],
            "MedianPruner does not take that",
        ),
    ):
        for folder in (place, there):
            assert said in refused("train", "-m", *TINY, *words, f"hydra.sweep.dir={folder}")
        assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine"]


@pytest.mark.usefixtures("here")
def test_another_sweep_does_not_go_on_in_its_folder(refused: Refused, tmp_path: Path) -> None:
    swept(tmp_path, "seed=1")
    before = (tmp_path / "sweep.json").read_bytes()
    other = refused("train", "-m", *TINY, "seed=1", "optim.weight_decay=0.2", f"hydra.sweep.dir={tmp_path}")
    assert "holds a sweep that was begun with other choices: optim.weight_decay" in other
    search = ["hydra/sweeper=optuna", "optim.lr=1,2", f"hydra.sweep.dir={tmp_path}"]
    assert "other choices: kind" in refused("train", "-m", *TINY, *search[:2], "seed=1", search[2])
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_of_no_sweep(refused: Refused, tmp_path: Path) -> None:
    for what in ("status", "resume"):
        assert "holds no sweep (no sweep.json)" in refused("sweep", what, tmp_path)
        assert "holds no sweep" in refused("sweep", what, tmp_path / "nowhere")
    assert "invalid choice" in refused("sweep", "stat", tmp_path)
    for content in ('{"points": [["see', "[]", '{"a": 1}', '{"points": [["a=1"]]}', '{"points": [1], "arguments": []}'):
        (tmp_path / "sweep.json").write_text(content)
        for what in ("status", "resume"):
            assert "is damaged" in refused("sweep", what, tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_starts(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = first_values(file)
    if file.stem == "hpo_mlm":  # a search draws them
        values = ["hydra.sweeper.n_trials=1"]
    small = ["tokenizer.vocab_size=300", "trainer.max_steps=2", "trainer.val_check_interval=1.0", "logger=file"]
    if file.stem.startswith("ladder"):  # of characters, and as long as a budget says
        small = [*small[2:], "budget.flops=1e8"]
        values = [value for value in values if not value.startswith("budget")]
    run_verb("train", "-cd", SWEEPS, "-cn", file.stem, *small, *values, f"hydra.sweep.dir={tmp_path}")
    assert [row[1] for row in found(tmp_path)] == ["done"]
    assert "val/loss" in capsys.readouterr().out
    if file.stem == "mask_mlm":
        assert json.loads((tmp_path / "0" / "certificate.json").read_text())["policy"]["objective"] == {
            "_target_": "lmlab.objectives.mlm.MaskedLM",
            "mask_probability": 0.15,
            "replace_mask": 0.8,
            "replace_random": 0.1,
        }
        assert read_config(tmp_path / "0").objective.mask_probability == 0.1


def test_shapes_of_the_shipped_sweep_have_equal_compute() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = OmegaConf.load(SWEEPS / "shape_clm.yaml").hydra.sweeper.params
    (shapes,) = OverridesParser.create().parse_overrides([f"model.config={params['model.config']}"])
    found = list(shapes.sweep_iterator())
    assert len(found) >= 3
    assert len({shape["n_layer"] * shape["n_embd"] ** 2 for shape in found}) == 1
    assert all(shape["n_embd"] % shape["n_head"] == 0 for shape in found)


def test_a_study_that_is_gone_ends_no_run(train: Callable[..., Path], tmp_path: Path) -> None:
    block = "{_target_:lmlab.sweeps.pruning.Prune,storage:'sqlite:////nowhere/study.db',study:a,trial:0}"
    run = train(*TINY, f"+callbacks.pruning={block}")
    assert RunDirectory(run).finished()
    assert "the study sqlite:////nowhere/study.db could not be told" in (run / "train.log").read_text()


class TestSearch:
    WORDS = ("hydra/sweeper=optuna", "optim.lr=tag(log,interval(1e-4,1e-1))", "trainer.max_steps=6")
    WORDS += ("trainer.val_check_interval=2",)

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_draws_do_not_hang_on_stops(self, tmp_path: Path) -> None:
        """A search that is stopped after each trial tries what one in one go does."""
        swept(tmp_path / "one", *self.WORDS, "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=null")
        for trials in (1, 2, 3):
            swept(tmp_path / "two", *self.WORDS, f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.pruner=null")
        assert found(tmp_path / "one") == found(tmp_path / "two")
        assert len({row[0][0] for row in found(tmp_path / "one")}) == 3
        values = [float(row[0][0].removeprefix("optim.lr=")) for row in found(tmp_path / "one")]
        assert all(1e-4 <= value <= 1e-1 for value in values)
        assert [read_config(tmp_path / "one" / name).optim.lr for name in "012"] == values

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_hopeless_runs_are_pruned(self, tmp_path: Path) -> None:
        early = ["hydra.sweeper.pruner.n_startup_trials=2", "hydra.sweeper.sampler={name:RandomSampler,seed:5}"]
        swept(tmp_path, *self.WORDS, *early, "hydra.sweeper.n_trials=6")
        rows = found(tmp_path)
        study = study_of(tmp_path)
        told = {"done": "COMPLETE", "pruned": "PRUNED"}
        assert [trial.state.name for trial in study.trials] == [told[row[1]] for row in rows]
        pruned = [number for number, row in enumerate(rows) if row[1] == "pruned"]
        assert 0 < len(pruned) < 6
        for number in pruned:
            run = RunDirectory(tmp_path / str(number))
            assert run.read_summary()["steps"] == run.read_summary()["pruned"] < 6
            assert run.certificate.is_file()
            # As the median of those before it, at the same validation, says.
            at = len(study.trials[number].intermediate_values)
            before = [trial.intermediate_values for trial in study.trials[:number] if trial.state.name == "COMPLETE"]
            median = sorted(values[at] for values in before if at in values)
            assert min(study.trials[number].intermediate_values.values()) > median[(len(median) - 1) // 2]
        for number, trial in enumerate(study.trials):
            if number not in pruned:
                assert trial.value == RunDirectory(tmp_path / str(number)).read_summary()["val/loss"]

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_a_failed_trial_stays_open(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Others go on; the search that is resumed tries it once more."""
        for trials in (3, 4):
            with pytest.raises(SystemExit, match="1"):
                swept(tmp_path, "hydra/sweeper=optuna", "optim.lr=1e30,1e-3", f"hydra.sweeper.n_trials={trials}")
        told = {"done": "COMPLETE", "failed": "RUNNING", "pruned": "PRUNED"}
        rows = found(tmp_path)
        assert [trial.state.name for trial in study_of(tmp_path).trials] == [told[row[1]] for row in rows]
        assert {"failed"} < {row[1] for row in rows}
        assert "Resuming run" in capsys.readouterr().out

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_a_wrong_metric_ends_the_search_and_can_be_mended(self, tmp_path: Path) -> None:
        words = ["hydra/sweeper=optuna", "optim.lr=1e-2,1e-3", "hydra.sweeper.n_trials=2"]
        with pytest.raises(SystemExit, match="1"):
            swept(tmp_path, *words, "hydra.sweeper.metric=val/lss")
        assert [row[1:] for row in found(tmp_path)] == [("failed", "bad config")]
        run_verb("sweep", "resume", tmp_path, "hydra.sweeper.metric=val/bits_per_byte")
        assert [row[1] for row in found(tmp_path)] == ["done", "done"]
        figures = [RunDirectory(tmp_path / name).read_summary()["val/bits_per_byte"] for name in "01"]
        assert [trial.value for trial in study_of(tmp_path).trials] == figures

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_another_search_does_not_go_on_in_its_folder(self, tmp_path: Path, refused: Refused) -> None:
        words = ["hydra/sweeper=optuna", "optim.schedule=shuffle(linear,cosine,constant)", "hydra.sweeper.n_trials=1"]
        swept(tmp_path, *words)
        swept(tmp_path, *words, "hydra.sweeper.n_trials=2")  # however they are shuffled
        before = (tmp_path / "sweep.json").read_bytes()
        where = f"hydra.sweep.dir={tmp_path}"
        other = ["hydra/sweeper=optuna", "optim.schedule=linear,cosine", where]
        assert "other choices: values" in refused("train", "-m", *TINY, *other)
        for word in ("trainer.max_steps=9", "hydra.sweeper.direction=maximize"):
            assert "other choices: " in refused("train", "-m", *TINY, *words, word, where)
        assert (tmp_path / "sweep.json").read_bytes() == before
        (tmp_path / "study.db").unlink()
        assert "does not hold the search that the runs" in refused("train", "-m", *TINY, *words, where)

    @pytest.mark.usefixtures("here")
    def test_a_trial_can_be_trained_longer(self, tmp_path: Path) -> None:
        swept(tmp_path, *self.WORDS, "hydra.sweeper.n_trials=1")
        run_verb("resume", tmp_path / "0", "trainer.max_steps=8")
        assert RunDirectory(tmp_path / "0").read_summary()["steps"] == 8
        assert len(study_of(tmp_path).trials[0].intermediate_values) == 3

    @pytest.mark.long
    @pytest.mark.usefixtures("here")
    def test_a_trial_whose_process_was_killed_goes_on(self, tmp_path: Path) -> None:
        swept(tmp_path, *self.WORDS, "hydra.sweeper.n_trials=2", "hydra.sweeper.pruner=null")
        whole = losses(tmp_path / "1")
        # As if the process had been killed during the last trial, and another one at work on a third.
        stop_after(tmp_path / "1", 4, tmp_path / "stopped")
        shutil.rmtree(tmp_path / "1")
        (tmp_path / "stopped").rename(tmp_path / "1")
        study = study_of(tmp_path)
        reopen(tmp_path / "study.db", 1)
        other = study.ask({"optim.lr": study.trials[0].distributions["optim.lr"]})
        script = f"""
import sys, time
from pathlib import Path
from lmlab.io import kept_locked
with kept_locked(Path({str(tmp_path)!r}) / ".search" / "other"):
    print("held", flush=True)
    sys.stdin.read()
"""
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with updated_sweep(tmp_path) as content:
                content["owners"][str(other.number)] = "other"
            swept(tmp_path, *self.WORDS, "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=null")
            assert process.stdin is not None
            process.stdin.close()
        assert losses(tmp_path / "1") == whole
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
        assert [row[1] for row in found(tmp_path)] == ["done", "done", "waiting"]
        # When that one has ended, its trial is taken up.
        swept(tmp_path, *self.WORDS, "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=null")
        assert [row[1] for row in found(tmp_path)] == ["done"] * 3


def study_of(folder: Path) -> Any:
    """The study of a search."""
    import optuna

    name = read_sweep(folder)["study"]
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")


def reopen(database: Path, number: int) -> None:
    """Take back what a study was told of a trial."""
    import sqlite3

    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = ?", (number,))
        connection.execute(
            "DELETE FROM trial_values WHERE trial_id IN (SELECT trial_id FROM trials WHERE number = ?)", (number,)
        )


FOUR = ["objective=clm,mlm", "optim.lr=3e-4,1e-3", "trainer.max_steps=6", "logger=file"]
FOUR += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "preprocess.block_size=32", "batch_size=16"]
FOUR += ["tokenizer.vocab_size=300", "callbacks.samples.count=1"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_four_points_killed_and_gone_on_with(tmp_path: Path) -> None:
    """Killed in the middle of a point, gone on with, and reported: 4 done, none run twice to the end."""
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "lmlab.train", "-m", *FOUR, f"hydra.sweep.dir={folder}"]
    third = folder / "2"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        patience = time.monotonic() + 300
        while not list(third.glob("checkpoints/step-2.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    wait_until_free(third)
    assert [row[1] for row in found(folder)] == ["done"] * 2 + ["failed", "waiting"]
    assert found(folder)[2][2] == "killed"
    before = {number: (folder / str(number) / "summary.json").stat().st_mtime_ns for number in range(2)}
    status = subprocess.check_output([sys.executable, "-m", "lmlab.sweep", "status", folder], text=True)
    assert "2 done, 1 failed, 1 waiting" in status
    shown = subprocess.check_output([sys.executable, "-m", "lmlab.sweep", "resume", folder], text=True)
    assert shown.splitlines()[-1] == "4 done"
    assert before == {number: (folder / str(number) / "summary.json").stat().st_mtime_ns for number in range(2)}
    for number in range(4):
        went_on = RunDirectory(folder / str(number)).read_manifest().get("went_on", [])
        assert [attempt["step"] >= 2 for attempt in went_on] == ([True] if number == 2 else [])
        steps = [row["step"] for row in metrics(folder / str(number)) if "train/loss" in row]
        assert steps == list(range(1, 7))
    report = tmp_path / "report"
    subprocess.run([sys.executable, "-m", "lmlab.report", folder, "--out", report], check=True)
    assert len((report / "runs.csv").read_text().splitlines()) == 5
    assert (report / "report.html").is_file()


def wait_until_free(place: Path) -> None:
    """Until what trained there has ended with the process that started it."""
    patience = time.monotonic() + 30
    while RunDirectory(place).held():
        assert time.monotonic() < patience
        time.sleep(0.05)


@pytest.mark.long
def test_a_search_in_two_processes(tmp_path: Path) -> None:
    words = ["hydra/sweeper=optuna", "optim.lr=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=4"]
    command = [sys.executable, "-m", "lmlab.train", "-m", *TINY, *words, f"hydra.sweep.dir={tmp_path}"]
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    processes = []
    for log in logs:
        with log.open("w") as stream:
            processes.append(subprocess.Popen(command, stdout=stream, stderr=stream))
    assert [process.wait(240) for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert len(found(tmp_path)) == 4
    assert len({tuple(row[0]) for row in found(tmp_path)}) == 4
    assert {row[1] for row in found(tmp_path)} <= {"done", "pruned"}
    shares = [log.read_text().count("Launching 1 jobs") for log in logs]
    assert sum(shares) == 4
    assert min(shares) >= 1


def with_fatal(place: Path) -> dict[str, str]:
    """An environment with the callback `fatal.Fatal`, which kills the run of seed 1 as the system does."""
    (place / "fatal.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Fatal(Callback):\n"
        "    def on_train_batch_end(self, trainer, module, *args):\n"
        "        if module.seed == 1:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    return os.environ | {"PYTHONPATH": f"{place}:{Path(__file__).parents[2]}"}


@pytest.mark.long
def test_a_killed_point_does_not_end_the_others(tmp_path: Path) -> None:
    """By the system, as where memory runs out: the sweep's own process lives on."""
    folder = tmp_path / "sweep"
    words = ["seed=1,2", *TINY, "trainer.max_steps=4"]
    env = with_fatal(tmp_path)
    command = [sys.executable, "-m", "lmlab.train", "-m", *words, "+callbacks.fatal._target_=fatal.Fatal"]
    done = subprocess.run([*command, f"hydra.sweep.dir={folder}"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert found(folder) == [(["seed=1"], "failed", "killed"), (["seed=2"], "done", None)]
    assert "its process was killed by SIGKILL. The system does that when memory runs out." in done.stdout


@pytest.mark.longest
@pytest.mark.timeout(400)
def test_submitit_on_this_machine(tmp_path: Path) -> None:
    """Jobs of submitit's local executor, one of them on two devices; a killed one hides none."""
    folder = tmp_path / "sweep"
    env = with_fatal(tmp_path)
    words = [*TINY, "trainer.accelerator=cpu", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    words += ["+callbacks.fatal._target_=fatal.Fatal", "seed=1,2", f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "lmlab.train", "-m", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert [row[1:] for row in found(folder)] == [("failed", "killed"), ("done", None)]
    assert (folder / ".submitit").stat().st_mode & 0o777 == 0o700  # jobs have their secrets
    # The rest of it, another way, on two devices.
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "hydra/launcher=basic", "~callbacks.fatal"]
    subprocess.run([sys.executable, "-m", "lmlab.sweep", "resume", folder, *two], env=env, check=True)
    assert [row[1] for row in found(folder)] == ["done"] * 2
    assert RunDirectory(folder / "0").read_manifest().get("went_on", [{"devices": 2}])[0]["devices"] == 2
