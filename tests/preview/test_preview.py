"""What `lmlab.preview` shows before a run, against what the run then is."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from rich.console import Console

from lmlab.config import build, files, targets
from lmlab.config.short_run import Measurement
from lmlab.console import duration
from lmlab.data.datamodule import Batch, collate
from lmlab.data.sampler import Draw
from lmlab.errors import UserError
from lmlab.models import loading
from lmlab.objectives import Example
from lmlab.preview import batch as batches
from lmlab.preview import job
from lmlab.preview.plan import Plan, plan_command
from lmlab.training.module import LMModule
from tests.conftest import TINY, TINY_MLM, run_verb

SWEEPS = files.CONF.parent / "sweeps"
STEPS = 250  # of the run that an estimate is held against: its steps take as long as its start


def command(*words: str) -> Namespace:
    """Words as Hydra reads them."""
    words = tuple(f"++{word}" if word.startswith("model.config.") else word for word in words)
    return get_args_parser().parse_args(words)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a preview prints; it leaves nothing, neither where it is called nor among temporary files."""
    said: dict[tuple[str, ...], str] = {}

    def show(*words: str) -> str:
        if words not in said:
            here, temporary = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
            out, before, tempfile.tempdir = io.StringIO(), Path.cwd(), str(temporary)
            os.chdir(here)
            os.environ["TMPDIR"] = str(temporary)
            try:
                with redirect_stdout(out):
                    run_verb("preview", *words)
            finally:
                os.chdir(before)
                tempfile.tempdir = None
                del os.environ["TMPDIR"]
            assert not [*here.iterdir(), *temporary.iterdir()]
            said[words] = out.getvalue()
        return said[words]

    return show


@pytest.mark.parametrize(
    "tiny",
    [pytest.param(TINY, marks=pytest.mark.long, id="clm"), pytest.param(TINY_MLM, marks=pytest.mark.longest, id="mlm")],
)
def test_all_parts(shown: Callable[..., str], tiny: list[str]) -> None:
    text = shown(*tiny, f"trainer.max_steps={STEPS}", "callbacks.series=log", "callbacks.series.dtype=bfloat16")
    assert "  preprocess.block_size: 32 (128)\n" in text
    assert "run_dir" not in text
    assert re.search(r"bytes +│ +143,686 │ +14,301 ", text)  # the ledger that the run prints
    assert "of each GPU" not in text
    assert "3 of the 8 samples" in text
    for name in ("parameters", "weights", "gradients", "optimizer state", "peak memory", "first step"):
        assert f"│ {name} " in text
    assert re.search(rf"│ steps +│ +{STEPS - 1} │", text)  # behind the first
    assert re.search(r"it would end at \d{4}-\d\d-\d\d \d\d:\d\d", text)
    assert "SBATCH" not in text
    (parameters,) = re.findall(r"│ parameters +│ ([\d,]+)", text)
    size = 10 * 2 * int(parameters.replace(",", "")) / 2**20  # steps 0, 1, 2, … 128, and the last one
    assert f"Series: 10 exported models, {size:,.1f} MiB in all." in text


@pytest.mark.long
def test_masks_are_marked(shown: Callable[..., str]) -> None:
    text = shown(*TINY_MLM, f"trainer.max_steps={STEPS}")
    assert len(re.findall(r"\[masked:[^…\]]", text)) >= 5
    assert "(unmarked)  read, and no target" in text


@pytest.mark.longest
def test_estimate_is_that_of_the_run(shown: Callable[..., str], tmp_path: Path) -> None:
    """The time in all, and of the steps alone: start-up would hide that they are wrong."""
    text = shown(*TINY, f"trainer.max_steps={STEPS}")
    words = ["train", *TINY, f"trainer.max_steps={STEPS}", f"hydra.run.dir={tmp_path / 'run'}"]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "lmlab.train", *words[1:]], check=True, capture_output=True)
    took = time.monotonic() - began
    assert 1 / 4 < seconds(text, "a run") / took < 4  # others may use the machine meanwhile
    training = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    assert 1 / 4 < seconds(text, "steps") / training < 4


def seconds(text: str, row: str) -> float:
    """The last figure of a row of the table of times."""
    found = re.search(rf"│ {row} .* ([\d.]+) (ms|s) │", text)
    assert found, text
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


@pytest.mark.parametrize("tiny", [TINY, TINY_MLM], ids=["clm", "mlm"])
def test_batch_is_the_one_that_training_begins_with(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny: list[str]
) -> None:
    seen: list[Any] = []
    step = LMModule.training_step
    monkeypatch.setattr(LMModule, "training_step", lambda self, b, i: [seen.append(b), step(self, b, i)][1])
    words = [*tiny, "trainer.max_steps=1", "trainer.accumulate_grad_batches=2", "seed=3"]
    train(*words)
    cfg = plan_command(command(*words)).cfg
    data = build.prepare_data(cfg)
    objective = targets.build(cfg.objective, "objective", tokenizer=data.tokenizer)
    first = batches.first_batch(cfg, data, objective, 1, data.tokenizer.pad_token_id)
    assert first.number == seen[0].number == 0
    for name in ("input_ids", "positions", "targets"):
        assert torch.equal(getattr(first, name), getattr(seen[0], name))


class Letters:
    """A tokenizer of letters; 0 ends a document, 1 pads, 2 masks."""

    eos_token_id, sep_token_id, mask_token_id = 0, None, 2

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("|.#abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def test_masked_sample_is_read_back() -> None:
    """Each of the four fates of a token, an edge and the padding."""
    ids = np.arange(3, 9)  # abcdef
    inputs = np.array([3, 2, 5, 20, 7, 0])

    def objective(block: np.ndarray, key: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scored = np.array([1, 2, 3])
        return (inputs, scored, ids[scored]) if len(block) == 6 else (block, scored[:0], block[:0])

    made = collate([ids, np.arange(3, 11)], [Draw(0, 0), Draw(1, 0)], objective, 0, 1)  # type: ignore[arg-type]
    found = batches.sample_pieces(made, 0, Letters(), shift=0)
    assert [tuple(piece) for piece in found] == [
        ("input", "a"),
        ("masked", "b"),
        ("kept", "c"),
        ("random", "d→r"),
        ("input", "e"),
        ("end", "|"),
        ("padding", " pad×2"),
    ]
    text = batches.render(found, "input")
    assert str(text) == "a[masked:b][kept:c][random:d→r]e[end:|] [padding:pad×2]"
    assert [str(span.style) for span in text.spans][:3] == [
        batches.KINDS[name][0] for name in ("masked", "kept", "random")
    ]


def test_characters_of_several_tokens_and_of_control() -> None:
    """They are whole, and no sequence of theirs gets to the terminal."""
    from types import SimpleNamespace

    text = "a 🎉\x1b[31m\n"
    tokenizer = SimpleNamespace(
        decode=lambda ids, **options: bytes(ids).decode(errors="replace"), eos_token_id=None, sep_token_id=None
    )
    ids = torch.tensor([list(text.encode())])
    none = torch.empty(0, dtype=torch.int64)
    one = Batch(ids, None, none, none, ids.numel(), 0, 0)
    assert batches.render(batches.sample_pieces(one, 0, tokenizer, shift=1), "input").plain == "a 🎉␛[31m↵"


def test_causal_targets_are_those_of_the_token_before() -> None:
    from lmlab.objectives.clm import CausalLM

    made = collate([np.array([3, 4, 0, 5])], [Draw(0, 0)], CausalLM(), 0, 1)  # type: ignore[arg-type]
    assert [tuple(piece) for piece in batches.sample_pieces(made, 0, Letters(), shift=1)] == [
        ("input", "a"),
        ("target", "b"),
        ("end", "|"),
        ("target", "c"),
    ]


def test_hidden_tokens_that_are_predicted_one_position_earlier() -> None:
    """A hidden token says that it is, and where it stands; other targets are unmarked as in a causal sample."""

    def objective(block: np.ndarray, key: Any) -> Example:
        return Example(np.array([3, 2, 5, 20]), np.array([0, 1, 2]), block[1:], prefix=4)

    made = collate([np.arange(3, 7)], [Draw(0, 0)], objective, 0, 1)  # type: ignore[arg-type]
    found = batches.sample_pieces(made, 0, Letters(), shift=1)
    assert found == [("input", "a"), ("masked", "b"), ("target", "c"), ("random", "d→r")]


def test_a_hidden_end_of_text_is_shown_as_hidden() -> None:
    def objective(block: np.ndarray, key: Any) -> Example:
        return Example(np.array([3, 2, 4, 0]), np.array([1]), block[1:2])

    made = collate([np.array([3, 0, 4, 0])], [Draw(0, 0)], objective, 0, 1)  # type: ignore[arg-type]
    assert batches.sample_pieces(made, 0, Letters(), shift=0) == [
        ("input", "a"),
        ("masked", "|"),
        ("input", "b"),
        ("end", "|"),
    ]


@pytest.mark.parametrize("weights", [None, [[0.5, 0.5], [1.0, 2.5]]])
def test_weights_are_told(weights: list[list[float]] | None) -> None:
    """Of each sample, and what the sum of the losses is divided by."""

    def objective(block: np.ndarray, key: tuple[int, int, int]) -> Example:
        own = {} if weights is None else {"weights": np.array(weights[key[2]]), "divisor": 4}
        return Example(block, np.array([1, 2]), block[2:], **own)

    made = collate([np.arange(3, 7)] * 2, [Draw(0, 0), Draw(1, 0)], objective, 0, 1)  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=120)
    batches.show_samples(made, Letters(), 1, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1  [input:ab]cd\n" in said
    told = [line.strip() for line in said.splitlines() if "weight" in line]
    assert told == (
        []
        if weights is None
        else [
            "weight of each target: 0.5",
            "weight of each target: 1 to 2.5",
            "Loss of all 2 samples: the nll of 4 targets, each times its weight, in sum, divided by 8",
        ]
    )


@pytest.mark.long
def test_bytes_are_those_of_adamw(shown: Callable[..., str]) -> None:
    text = shown(*TINY, f"trainer.max_steps={STEPS}")
    parameters = int(re.search(r"│ parameters +│ ([\d,]+) ", text)[1].replace(",", ""))  # type: ignore[index]
    for name, times in (("weights", 1), ("gradients", 1), ("optimizer state", 2)):
        said = float(re.search(rf"│ {name} +│ ([\d.,]+) MiB", text)[1])  # type: ignore[index]
        assert said == pytest.approx(4 * times * parameters / 2**20, abs=0.06)


@pytest.mark.parametrize(
    "words",
    [
        ["optmi.lr=3"],
        ["data=files"],
        ["optim.lr=1,2"],
        ["model=gtp_small"],
        ["optim.leraning_rate=1"],
        ["+callbacks.certificate.nothing=1"],
        ["trainer.precision=16"],
        ["batch_size=0"],
        ["--bogus"],
        ["-cd", "/nowhere"],
    ],
)
def test_refused_as_train_does(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = []
    for verb in ("train", "preview"):
        with pytest.raises(SystemExit) as ended:
            run_verb(verb, *words, *([] if words[0] == "--bogus" else [f"hydra.run.dir={tmp_path / 'run'}"]))
        assert ended.value.code == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] != ""


def test_sweep_is_counted() -> None:
    plan = plan_command(command("-m", "optim.lr=1e-4,1e-3", "seed=range(5)", "objective=mlm", "batch_size=4"))
    assert (plan.points, plan.first, plan.jobs) == (10, ["optim.lr=0.0001", "seed=0"], 10)
    assert (plan.cfg.optim.lr, plan.cfg.seed, plan.cfg.batch_size) == (1e-4, 0, 4)
    assert plan.cfg.objective._target_.endswith("MaskedLM")
    assert plan.default.optim.lr == 1e-3
    assert "multirun" in plan.cfg.run_dir


def test_sweep_of_a_file_and_a_search() -> None:
    plan = plan_command(command("-cd", str(SWEEPS), "-cn", "lr_mlm", "batch_size=2"))
    assert plan.first
    assert plan.points == 9
    assert plan.cfg.batch_size == 2
    with pytest.raises(UserError, match="no end of values"):
        plan_command(command("-m", "optim.lr=interval(1,2)"))
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", "optim.lr=tag(log, interval(1e-4,1e-2))"]
    plan = plan_command(command("-m", *words, "batch_size=int(interval(2,9))"))
    assert (plan.points, plan.jobs, plan.cfg.batch_size) == (7, 1, 2)


def test_experiment_of_ones_own_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: {lr: 0.5}\n")
    assert plan_command(command("-cd", str(tmp_path), "experiment=mine")).cfg.optim.lr == 0.5


def test_whole_config_is_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_verb("preview", "objective=mlm", "optim.lr=0.5", f"hydra.run.dir={tmp_path}", "--cfg", "job")
    text = capsys.readouterr().out
    assert "  lr: 0.5   # default: 0.001\n" in text
    assert "    hidden_size: 128   # default: not there\n" in text
    assert "# default, and not here: model.config.n_embd=128\n" in text
    assert OmegaConf.create(text).seed == 0
    assert not any(tmp_path.iterdir())


def slurm(*words: str) -> Plan:
    return plan_command(command("-m", "hydra/launcher=slurm", *words))


MEASURED = Measurement(
    start=10.0, steps=[2.0, 1.0, 1.0], validation_batch=3.0, checkpoint=4.0, host_memory=2.0, device_memory=2.0
)


@pytest.mark.parametrize(
    ("words", "taken", "says"),
    [
        ([], 3600.0, None),
        (["hydra.launcher.tasks_per_node=4"], 3600.0, "tasks per node × nodes: 4 × 1, for 1 × 1 devices"),
        (["hydra.launcher.timeout_min=30"], 7200.0, "time: 30 min is less than the 2 h 00 min .* re-queued 4 times"),
        (["hydra.launcher.timeout_min=5"], 7200.0, "leave none to train: raise hydra.launcher.timeout_min"),
        (
            ["hydra.launcher.timeout_min=30", "callbacks.checkpoints.max_requeues=3"],
            7200.0,
            "re-queued 4 times, and callbacks.checkpoints.max_requeues=3",
        ),
        (["hydra.launcher.timeout_min=30", "~callbacks.checkpoints"], 7200.0, "no callback writes checkpoints"),
        (
            ["hydra.launcher.timeout_min=30", "hydra.launcher.additional_parameters.requeue=false"],
            7200.0,
            "additional_parameters.requeue=true",
        ),
        (["hydra.launcher.mem_gb=1"], 3600.0, "memory: 1 GB of a node, 2.0 GiB measured for 1 task$"),
        (["num_workers=8"], 3600.0, "CPUs: 8 per task, for 8 workers"),
        (["hydra.launcher.signal_delay_s=6"], 3600.0, "signal: 6 s ahead of the limit, .* takes 7.0 s"),
        (["trainer=ddp", "hydra.launcher.gpus_per_node=1"], 3600.0, "GPUs: 1 per node, for 2"),
    ],
)
def test_limits_of_a_job(words: list[str], taken: float, says: str | None) -> None:
    plan = slurm(*words)
    unmet = [text for met, text in job.checks(plan.launcher, plan.cfg, MEASURED, taken) if not met]
    assert (len(unmet) == 1 and re.search(says, unmet[0])) if says else not unmet


def test_script_is_submitits() -> None:
    plan = slurm(
        "seed=1,2,3", "trainer=ddp", "trainer.devices=8", "trainer.num_nodes=4", "hydra.launcher.partition=big"
    )
    lines = job.script(plan.launcher, plan.points).splitlines()
    wanted = ["array=0-2%3", "nodes=4", "ntasks-per-node=8", "time=240", "partition=big", "signal=USR2@300"]
    assert {f"#SBATCH --{line}" for line in wanted} <= set(lines)
    assert sum(line.startswith("srun ") for line in lines) == 1


@pytest.mark.longest
def test_job_is_shown(shown: Callable[..., str]) -> None:
    """For more nodes than this machine is; one rank's share is measured, and a short time limit is said."""
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30"]
    words = ["trainer.num_nodes=2", "trainer.max_steps=100000", *limits, "seed=1,2"]
    text = shown("-m", "hydra/launcher=slurm", *TINY, *words)
    assert "A sweep of 2 points; shown: seed=1\n" in text
    assert "3 of the 4 samples" in text
    assert "one of 2 measured" in text
    assert "#SBATCH --nodes=2\n" in text
    assert re.search(r"NOT MET  time: 60.0 s is less than the .* re-queued \d+ times", text)


def test_gpus_of_another_machine(shown: Callable[..., str]) -> None:
    """Where jobs are submitted from, there may be none."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    text = shown("-m", "hydra/launcher=slurm", *TINY, "trainer=gpu", "trainer.devices=4")
    assert "2 of the 2 samples" in text
    assert "Memory of each GPU, estimated" in text
    assert "Nothing was measured" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert "unknown  time: 4 h 00 min; the run's is not measured" in text


def too_large(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """A model that asks for more memory than there is, once it trains."""

    def allocate(module: torch.nn.Module, *args: Any) -> None:
        if module.training:
            torch.empty(2**50)

    model = loading.from_scratch(tokenizer, auto_class, architecture, config)
    model.register_forward_pre_hook(allocate)
    return model


def killed(tokenizer: Any, auto_class: str, architecture: str, config: dict[str, Any]) -> Any:
    """A model whose process the system kills, as it does when memory ends."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("too_large", r"error: a step does not fit here. out of memory: .*can't allocate memory"),
        pytest.param(
            "killed",
            r"error: the model does not fit here. out of memory: the system killed the process",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_does_not_fit(
    model: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(files.CONF.parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_verb("preview", *TINY, f"model._target_={__name__}.{model}")
    said = capsys.readouterr()
    assert re.search(says, said.err)
    assert "activation_checkpointing=true" in said.err  # what to do
    assert "First batch" in said.out
    assert ("│ parameters" in said.out) == (model == "too_large")
    assert not any(tmp_path.iterdir())


def test_help_is_quick() -> None:
    code = (
        "import sys; sys.argv = ['preview', *{words}]\n"
        "from lmlab.preview.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'transformers', 'datasets', 'lightning', 'wandb', 'pyarrow', 'numpy', 'pandas'}}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    for words, says in ((["--help"], "lmlab.preview"), (["optim.lr=3", "--cfg", "job"], "lr: 3   # default: 0.001")):
        out = subprocess.run(
            [sys.executable, "-c", code.format(words=words)], capture_output=True, text=True, check=True
        ).stdout
        assert says in out
        assert out.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("number", "said"),
    [(0.0123, "12.3 ms"), (0.5, "500 ms"), (42.0, "42.0 s"), (3000, "50 min"), (7200, "2 h 00 min"), (3e5, "3 d 11 h")],
)
def test_times(number: float, said: str) -> None:
    assert duration(number) == said
