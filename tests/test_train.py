"""A run, from the command to what lies in its directory."""

import json
import math
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from lmlab.console import show_result
from lmlab.data.datamodule import Batches
from lmlab.errors import UserError
from lmlab.runs.directory import RunDirectory
from lmlab.training.callbacks import ShowProgress
from lmlab.training.module import LMModule

from .conftest import TINY, TINY_MLM, losses, metrics, stop_after

METRICS = ["perplexity", "bits_per_byte", "bits_per_word", "word_perplexity"]
"""The names of the metrics of a causal model."""


def test_a_warm_up_as_long_as_the_run_is_warned_of(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, "optim.warmup_steps=4")
    assert "the warm-up is as long as the run, 4 steps" in capsys.readouterr().out


@pytest.mark.long
def test_a_report_without_a_target(train: Callable[..., Path]) -> None:
    """Of a few blocks of which none has a masked token."""
    words = [
        *TINY_MLM,
        "preprocess.block_size=8",
        "batch_size=1",
        "trainer.max_steps=20",
        "trainer.log_every_n_steps=1",
    ]
    losses = [row["train/loss"] for row in metrics(train(*words)) if "train/loss" in row]
    assert len(losses) == 20
    assert any(map(math.isnan, losses))
    assert not all(map(math.isnan, losses))


def test_run_directory_holds_everything(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0o027)
    try:
        run = train(*TINY, "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "seed=7")
    finally:
        os.umask(umask)
    assert {oct(path.stat().st_mode & 0o777) for path in run.rglob("*") if path.is_file()} == {"0o640"}
    shown = capsys.readouterr().out
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "overrides.yaml",
        "manifest.json",
        "ledger.json",
        "metrics.jsonl",
        "summary.json",
        "certificate.json",
        "records.parquet",
        "checkpoints",
        "model",
    }
    assert not list(run.rglob("*partial*"))
    assert OmegaConf.load(run / "config.yaml").seed == 7
    assert "seed=7" in OmegaConf.load(run / "overrides.yaml")

    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seeds"] == {"run": 7, "split": 0}
    assert manifest["packages"]["torch"] == version("torch")
    assert len(manifest["data_fingerprint"]) == len(manifest["tokenizer_hash"]) == 32
    assert {"run_id", "command", "git", "machine", "python", "lmlab", "started"} <= manifest.keys()

    ledger = json.loads((run / "ledger.json").read_text())
    for counts in ledger.values():
        assert counts["tokens_dropped"] == counts["tokens_truncated"] == 0
        assert counts["blocks"] == math.ceil(counts["tokens"] / 32)
    assert f"{ledger['train']['tokens']:,}" in shown

    lines = metrics(run)
    first, trained = lines[0], [line for line in lines if "train/loss" in line]
    assert first["step"] == 0
    assert first["val/perplexity"] == pytest.approx(math.exp(first["val/loss"]))
    # Each beside it, and each from the same sum.
    per_byte = first["val/bits_per_byte"] * math.log(2) * ledger["validation"]["bytes"]
    assert first["val/loss"] < first["val/bits_per_word"] * math.log(2)
    assert first["val/word_perplexity"] == pytest.approx(2 ** first["val/bits_per_word"])
    # The first token of a block is not scored, nor are its bytes.
    assert 0.9 < per_byte / (first["val/loss"] * ledger["validation"]["tokens"]) < 1.1
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2, 4]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert trained[0].keys() >= {
        "train/loss",
        "train/perplexity",
        "optim/lr",
        "optim/grad_norm",
        "perf/tokens_per_s",
        "perf/step_ms",
        "perf/data_wait",
        "perf/peak_memory_gib",
        "data/tokens_seen",
    }
    assert all(0 < line["perf/data_wait"] < 1 for line in trained)
    assert 0.1 < trained[-1]["perf/peak_memory_gib"] < 20
    assert "perf/mfu" not in trained[-1]  # nobody promises what a CPU could do
    assert trained[-1]["data/tokens_seen"] == 4 * 8 * 32

    summary = json.loads((run / "summary.json").read_text())
    assert summary["val/perplexity_before"] == first["val/perplexity"]
    assert summary["val/loss"] == min(line["val/loss"] for line in lines[1:] if "val/loss" in line)
    assert "perplexity before" in shown
    assert "│ generated " in shown
    # By the python that runs this, which may be called python3.
    assert re.search(r"python\S* -m lmlab\.predict ", shown[shown.index("Next: ") :])


def test_exported_model_is_the_best_and_loads_in_transformers(train: Callable[..., Path]) -> None:
    # The first step of a warm-up changes nothing, the second at this rate harms: the best is not the last.
    run = train(*TINY, "trainer.max_steps=2", "trainer.val_check_interval=1", "optim.lr=0.5", "optim.warmup_steps=1")
    losses = [line["val/loss"] for line in metrics(run) if "val/loss" in line][1:]
    best, last = (
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best-1", "step-2")
    )
    exported = load_file(run / "model" / "model.safetensors")
    weight = "transformer.wpe.weight"
    assert losses[-1] > min(losses)
    assert torch.equal(exported[weight], best[f"model.{weight}"])
    assert not torch.equal(exported[weight], last[f"model.{weight}"])

    generator = pipeline("text-generation", model=str(run / "model"))
    assert generator("The Milky Way", max_new_tokens=5)[0]["generated_text"].startswith("The Milky Way")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(run / "model")) == 300


def test_utilisation_where_the_peak_is_known(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmlab.training.measure.peak_flops", lambda device, precision: 1e12)
    run = train(*TINY, "trainer.log_every_n_steps=2")
    last = metrics(run)[-2]
    # 6 per weight and token, of a block of 32: the body's matrices, the head's on 31 tokens, and attention.
    per_block = 32 * (6 * 12 * 32**2 + 12 * 32 * 32) + 31 * 6 * 300 * 32
    per_second = 8 * per_block / (last["perf/step_ms"] / 1000)
    assert last["perf/mfu"] == pytest.approx(per_second / 10**12, rel=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["mfu"] > 0
    assert summary["flops"] == 4 * 8 * per_block
    shown = capsys.readouterr().out
    assert "of what the device could do" in shown
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert summary["parameters"] == summary["trainable_parameters"] == model.num_parameters()
    assert re.search(rf"parameters +│ {model.num_parameters():,} ", shown)


def test_profile_writes_a_trace(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(*TINY, "trainer.max_steps=8", "profile=true")
    trace = json.loads((run / "profile" / "rank0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any(name.startswith("aten::addmm") for name in names)
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    short = train(*TINY, "trainer.max_steps=3", "profile=true", run_dir=run.parent / "short")
    assert not (short / "profile").exists()
    assert "no trace" in capsys.readouterr().out


def test_a_pretrained_model_trains_with_its_dropout(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads models for use: with dropout off, until somebody turns it on."""
    modes = []
    step = LMModule.training_step

    def watched(self: LMModule, *args: Any) -> Any:
        modes.append({module.training for module in self.model.modules()})
        return step(self, *args)

    monkeypatch.setattr(LMModule, "training_step", watched)
    first = train(*TINY, "trainer.max_steps=2", "trainer.val_check_interval=1")
    any_model = [override for override in TINY if not override.startswith(("model.", "tokenizer."))]
    train(*any_model, "model=pretrained", f"model.name={first / 'model'}", run_dir=first.parent / "second")
    assert modes == [{True}] * 6


def test_waiting_for_a_batch_after_a_validation_counts(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = Batches.__getitem__

    def slow(self: Batches, drawn: Any) -> Any:
        time.sleep(0.1)
        return item(self, drawn)

    monkeypatch.setattr(Batches, "__getitem__", slow)
    run = train(*TINY, "trainer.val_check_interval=1", "trainer.log_every_n_steps=1")
    lines = [line for line in metrics(run) if "perf/data_wait" in line]
    assert all(line["perf/step_ms"] > 100 and line["perf/data_wait"] < 1 for line in lines[1:])


def test_masked_run(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(*TINY_MLM)
    lines = metrics(run)
    # A masked metric never goes by the causal one's name.
    names = {key for line in lines for key in line}
    assert not {f"{stage}/{name}" for stage in ("train", "val") for name in METRICS} & names
    assert {f"val/masked_{name}" for name in METRICS} <= names
    assert lines[0]["val/masked_perplexity"] == pytest.approx(math.exp(lines[0]["val/loss"]))
    shown = capsys.readouterr().out
    assert not [name for name in METRICS if f" {name}" in shown.replace("_", " ").replace("masked perplexity", "")]

    fill = pipeline("fill-mask", model=str(run / "model"))
    assert len(fill("The Milky Way is a <mask> galaxy.", top_k=3)) == 3
    AutoModelForMaskedLM.from_pretrained(run / "model")


@pytest.mark.long
def test_same_command_same_numbers_with_workers_too(train: Callable[..., Path], tmp_path: Path) -> None:
    figures = []
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        run = train(*TINY, "trainer.log_every_n_steps=1", f"num_workers={workers}", run_dir=tmp_path / name)
        figures.append([(line.get("train/loss"), line.get("val/loss")) for line in metrics(run)])
    assert figures[0] == figures[1] == figures[2]


@pytest.mark.parametrize(("typed", "precision"), [("bf16", "bf16-mixed"), ("bf16-true", "bf16-true")])
def test_precision(typed: str, precision: str, train: Callable[..., Path]) -> None:
    run = train(*TINY, f"trainer.precision={typed}")
    assert OmegaConf.load(run / "config.yaml").trainer.precision == precision
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["precision"] == certificate["run"]["config"]["trainer"]["precision"] == precision
    assert math.isfinite(metrics(run)[-1]["val/loss"])


def test_a_text_too_short_for_its_vocabulary(train: Callable[..., Path]) -> None:
    """Is said, in the log; where the vocabulary is filled, nothing is."""
    for wanted, said in ((300, False), (100_000, True)):
        run = train(*TINY, "trainer.max_steps=1", "preprocess.max_records=20", f"tokenizer.vocab_size={wanted}")
        tokens = len(AutoTokenizer.from_pretrained(run / "model"))
        line = f"the text gives {tokens:,} tokens, fewer than tokenizer.vocab_size={wanted}."
        assert (line in (run / "train.log").read_text()) == said
        shutil.rmtree(run)


def test_early_stopping_ends_the_run_and_still_exports(train: Callable[..., Path]) -> None:
    run = train(
        *TINY,
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "trainer.max_steps=50",
        "trainer.val_check_interval=1",
        "optim.lr=0.5",
    )
    assert json.loads((run / "summary.json").read_text())["steps"] < 50
    assert (run / "model" / "model.safetensors").is_file()


def test_a_piece_from_outside_needs_no_edit_here(train: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "second.yaml").write_text("_target_: my_objective.EverySecond\nevery: 2\n")
    (tmp_path / "my_objective.py").write_text(
        "from lmlab.objectives.clm import CausalLM\n"
        "class EverySecond(CausalLM):\n"
        "    metric = 'every_second_perplexity'\n"
        "    def __init__(self, every): self.every = every\n"
        "    def __call__(self, ids, key):\n"
        "        ids, positions, targets, *_ = super().__call__(ids, key)\n"
        "        return ids, positions[::self.every], targets[::self.every]\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        run = train("--config-dir", str(tmp_path / "conf"), "objective=second", *TINY)
    finally:
        sys.path.remove(str(tmp_path))
    assert (run / "model").is_dir()


def wandb_rows(folder: Path) -> list[tuple[int, frozenset[str]]]:
    """Returns the step and the names of each row that an offline run logged."""
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            names = frozenset(n for n in items if not n.startswith(("_", "samples."))) - {"trainer/global_step"}
            rows.append((int(items["trainer/global_step"]), names))
    return rows


def wandb_records(folder: Path) -> list:
    """Returns the records of an offline run, which are a LevelDB log (blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, place, gathered, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        gathered += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(gathered))
            gathered = b""
    return records


@pytest.mark.long
def test_an_error_of_the_ranks_is_shown_once(train: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(*TINY, "optim.lr=1e30", "trainer.max_steps=20", "trainer=ddp", "trainer.accelerator=cpu")
    assert stopped.value.code == 1
    shown = capfd.readouterr().err
    assert shown.count("not finite at step") == 1
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 3


@pytest.mark.long
def test_a_bad_batch_of_another_rank_is_named(train: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """DDP overwrites a module's buffers with those of rank 0; what rank 1 saw has to survive that."""
    with pytest.raises(SystemExit):
        train(
            *TINY,
            "model._target_=tests.broken_model.from_scratch_and_fails_once",
            "trainer=ddp",
            "trainer.accelerator=cpu",
            "trainer.max_steps=8",
            "trainer.log_every_n_steps=8",
        )
    assert "not finite at step 3." in capfd.readouterr().err


@pytest.mark.long
def test_cheaper_validations_look_at_the_same_documents_and_the_last_one_at_all(
    train: Callable[..., Path], evaluate: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = [*TINY, "validation.max_documents=6", "trainer.val_check_interval=2"]
    run, other = (train(*part, f"seed={seed}", run_dir=tmp_path / str(seed)) for seed in (0, 1))
    assert "(6 of 25 held-out documents)" in capsys.readouterr().out
    rows = [line for line in metrics(run) if "val/loss" in line]
    assert [(row["step"], row["val/documents"]) for row in rows] == [(0, 6), (2, 6), (4, 6)]
    before = [next(line["val/loss"] for line in metrics(r) if "val/loss" in line) for r in (run, other)]
    assert before[0] == pytest.approx(before[1], rel=0.01)  # random weights of two seeds say much the same of one text
    certificates = [json.loads((place / "certificate.json").read_text()) for place in (run, evaluate(f"model={run}"))]
    assert certificates[0]["totals"] == certificates[1]["totals"]
    assert certificates[0]["weights_hash"] == certificates[1]["weights_hash"]
    assert certificates[0]["totals"]["documents"] == 25
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val/loss"] == certificates[0]["figures"]["nll_per_token"]
    assert summary["val/loss"] != rows[-1]["val/loss"]
    # With as many as there are, nothing is different from a run that looks at all.
    whole = train(*TINY, "validation.max_documents=25", run_dir=tmp_path / "whole")
    assert all("val/documents" not in line for line in metrics(whole))


def test_a_validation_says_where_it_is(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    train(*TINY, "callbacks.progress.every_seconds=0", "trainer.val_check_interval=2")
    shown = capsys.readouterr().out
    batches = re.findall(r"step (\d)/4  validation (\d+)/(\d+)  ETA [\d.]+ m?s", shown)
    assert "  ETA 0 ms\n" in shown
    assert {step for step, _, _ in batches} == {"0", "2", "4"}
    assert batches[0][1] == "1"
    assert shown.index("step 0/4  validation 1/") < shown.index("step 0/4  val/loss")


def test_time_left_counts_validations_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmlab.training.callbacks.time.perf_counter", lambda: 130.0)
    progress = ShowProgress()
    progress.began, progress.first_step, progress.validation_seconds = 100.0, 0, [5.0, 5.0]
    at = SimpleNamespace(global_step=10), SimpleNamespace(steps=25, val_interval=10)
    # 15 steps of 2 seconds, and validations at 20 and at 25.
    assert progress.seconds_left(*at) == 15 * 2 + 2 * 5  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_are_not_kept(train: Callable[..., Path], tmp_path: Path) -> None:
    """A loss that is a number may have a gradient that is none; the weights after that step are lost."""
    with pytest.raises(SystemExit):
        train(
            *TINY,
            "model._target_=tests.broken_model.from_scratch_and_explodes",
            "callbacks.checkpoints.every_steps=1",
            "trainer.log_every_n_steps=10",
        )
    run = tmp_path / "run"
    assert "gradient is not finite at step 3." in json.loads((run / "failure.json").read_text())["message"]
    assert sorted(path.name for path in run.glob("checkpoints/step-*")) == ["step-1.ckpt", "step-2.ckpt"]


def test_the_summary_has_the_metrics_of_the_exported_weights(train: Callable[..., Path]) -> None:
    run = train(*TINY, "callbacks.checkpoints.mode=max", "trainer.val_check_interval=1")
    losses = {line["step"]: line["val/loss"] for line in metrics(run) if "val/loss" in line}
    best = max(list(losses)[1:], key=lambda step: losses[step])
    kept = torch.load(run / "checkpoints" / f"best-{best}.ckpt", weights_only=True)
    assert kept["global_step"] == best
    assert json.loads((run / "summary.json").read_text())["val/loss"] == losses[best]
    exported = load_file(run / "model" / "model.safetensors")
    assert torch.equal(exported["transformer.wpe.weight"], kept["state_dict"]["model.transformer.wpe.weight"])


def test_logged_rate_is_the_one_the_step_used(train: Callable[..., Path]) -> None:
    run = train(*TINY, "optim.lr=0.01", "optim.warmup_steps=2", "trainer.log_every_n_steps=1")
    assert [line["optim/lr"] for line in metrics(run) if "optim/lr" in line] == pytest.approx([0, 0.005, 0.01, 0.005])


def test_runs_with_other_masks_are_scored_on_the_same(train: Callable[..., Path], tmp_path: Path) -> None:
    plain = train(*TINY_MLM, run_dir=tmp_path / "plain")
    words = ["objective.mask_probability=0.4", "objective.validation_mask_probability=0.15"]
    other = train(*TINY_MLM, *words, run_dir=tmp_path / "other")
    before = [metrics(run)[0]["val/loss"] for run in (plain, other)]
    assert before[0] == before[1]
    assert metrics(plain)[-1]["val/loss"] != metrics(other)[-1]["val/loss"]
    policies = [json.loads((run / "certificate.json").read_text())["policy"] for run in (plain, other)]
    assert policies[0] == policies[1]


def test_a_schedule_of_masks_goes_on(train: Callable[..., Path], tmp_path: Path) -> None:
    """A run that was stopped is as one that was not; held-out text is masked as at the end of each run."""
    common = [
        *TINY_MLM,
        "objective.mask_schedule=linear",
        "objective.mask_probability=0.6",
        "objective.whole_word=true",
    ]
    common += ["objective.final_mask_probability=0.15", "trainer.max_steps=6", "trainer.val_check_interval=3"]
    common += ["trainer.log_every_n_steps=1"]
    whole = train(*common, run_dir=tmp_path / "whole")
    stop_after(whole, 3, tmp_path / "stopped")
    assert losses(train(*common, run_dir=tmp_path / "stopped")) == losses(whole)
    plain = train(*TINY_MLM, "objective.whole_word=true", run_dir=tmp_path / "plain")
    assert metrics(plain)[0]["val/loss"] == metrics(whole)[0]["val/loss"]
    policies = [json.loads((run / "certificate.json").read_text())["policy"]["objective"] for run in (plain, whole)]
    assert policies[0] == policies[1]
    assert policies[0]["whole_word"] is True
    assert "mask_schedule" not in policies[0]


@pytest.mark.longest
def test_devices_as_a_swept_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmlab import train as verb

    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1,2"]
    monkeypatch.setattr("sys.argv", ["lmlab.train", "-m", *ddp, *TINY, f"hydra.sweep.dir={tmp_path}"])
    verb.main()
    one, two = (metrics(tmp_path / name)[-1]["val/loss"] for name in "01")
    assert one == pytest.approx(two, rel=1e-2)  # dropout is each rank's own


def test_code_that_comes_with_a_model_does_not_run(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    auto_map = {"AutoConfig": "configuration_theirs.TheirConfig", "AutoModelForCausalLM": "configuration_theirs.M"}
    (place / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto_map}))
    (place / "configuration_theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # whatever is asked, somebody says yes
    with pytest.raises(SystemExit):
        train("model=pretrained", f"model.name={place}", "tokenizer=bpe", "logger=file")
    assert "does not do" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    RunDirectory(tmp_path).start({"run": 1})
    with pytest.raises(UserError, match="holds a run or an evaluation already"):
        RunDirectory(tmp_path).start({"run": 2})


def test_markup_in_what_a_model_says_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_result({"generated": "quote [/quote] [bold]end"})
    assert "quote [/quote] [bold]end" in capsys.readouterr().out


def test_user_error_is_an_exception_for_notebooks() -> None:
    """Rooms below the verbs raise; only verbs print and exit."""
    from lmlab.data.sources import load_files

    with pytest.raises(UserError, match="no such file"):
        load_files("nowhere/*.txt")
