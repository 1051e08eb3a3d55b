"""Students: the loss that a teacher takes part in, against plain torch, and the runs of students."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from lmlab.data.blocks import Blocks
from lmlab.data.datamodule import Batch, BlocksDataModule, collate
from lmlab.data.sampler import draws
from lmlab.models.chunked_loss import logits_chunk_size, nll_and_slope
from lmlab.models.loading import from_scratch
from lmlab.models.loss import score
from lmlab.models.probe import probe
from lmlab.models.teacher import Teacher, compiled_distillation, distillation_and_slope
from lmlab.models.torch_module import TorchModuleConfig
from lmlab.objectives import Example
from lmlab.objectives.clm import CausalLM
from lmlab.objectives.mlm import MaskedLM
from lmlab.optim import AdamW
from lmlab.runs.directory import RunDirectory
from lmlab.training.checkpoint_io import load_checkpoint
from lmlab.training.module import LMModule
from tests.conftest import TINY, TINY_MLM, Refused, losses, metrics, run_verb, stop_after
from tests.models.test_scored import LargestLogits, small

from .test_reference import BATCH, SEED, SIZES, STEPS, VOCABULARY, blocks, fitted, tokenizer

__all__ = ["blocks", "tokenizer"]  # fixtures
LR, SHARE, TEMPERATURE, K = 5e-3, 0.3, 2.0, len(VOCABULARY)


class Weighted(CausalLM):
    """Later targets weigh more."""

    def __call__(self, ids: np.ndarray, key: tuple[int, int, int], first: int = 0) -> Example:
        example = super().__call__(ids, key, first)
        return example._replace(weights=np.linspace(0, 2, len(example.targets)))


class Logged(CSVLogger):
    """Keeps the losses of each step."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.rows: list[list[float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append([metrics[f"train/{name}"] for name in ("loss", "nll", "kl")])


def make(tokenizer: PreTrainedTokenizerFast, architecture: str, width: int, dropout: float, rows: int) -> Any:
    """A small model, whose embedding has more rows than the tokenizer has tokens."""
    task = "Masked" if architecture == "roberta" else "Causal"
    config: dict[str, Any] = {"vocab_size": rows}
    if architecture == "gpt2":
        config |= {"n_positions": 64, "n_embd": width, "n_layer": 1, "n_head": 2}
        config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    else:
        config |= {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if architecture == "roberta":
        config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if architecture == "gemma2":  # its logits are more than a projection
        config |= {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0}
    return from_scratch(tokenizer, f"AutoModelFor{task}LM", architecture, config)


def reference_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Loss, nll and kl of a batch [3], from all logits of both models."""
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = student(**given).logits.flatten(0, 1)[batch.positions]
    with torch.no_grad():
        soft = (teacher(**given).logits.flatten(0, 1)[batch.positions, :K] / TEMPERATURE).softmax(1)
    nll = F.cross_entropy(logits, batch.targets, reduction="none")
    kl = F.kl_div((logits[:, :K] / TEMPERATURE).log_softmax(1), soft, reduction="none").sum(1)
    loss = (1 - SHARE) * nll + SHARE * TEMPERATURE**2 * kl
    weights = torch.ones(len(nll)) if batch.weights is None else batch.weights
    return torch.stack([(weights * values).sum() / batch.divisor for values in (loss, nll, kl)])


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [("causal", "gpt2", "gpt2"), ("weighted", "gpt2", "gemma2"), ("masked", "roberta", "roberta")],
)
def test_steps_agree_with_plain_torch(
    kind: str, student: str, teacher: str, chunk: int | None, tokenizer: Any, blocks: Blocks, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    objective: Any = {"causal": CausalLM(), "weighted": Weighted()}.get(kind) or MaskedLM(tokenizer, 0.3)
    model = make(tokenizer, student, 32, 0.0, rows=K + 3)
    taught = make(tokenizer, teacher, 16, 0.1, rows=K + 7)
    for p in taught.parameters():  # one that is sure of something
        p.data.mul_(3)
    assert probe(taught).projects == (teacher != "gemma2")
    assert chunk is None or logits_chunk_size(model, chunk, on_gpu=False) == chunk

    reference, expected = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    untouched = copy.deepcopy(taught).eval()
    for step in range(STEPS):
        drawn = draws(SEED, step * BATCH, BATCH, len(blocks))
        batch = collate(blocks, drawn, objective, SEED, 92, step, step / STEPS)
        values = reference_loss(reference, untouched, batch)
        optimizer.zero_grad()
        values[0].backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        expected.append(values.tolist())

    logger = Logged(tmp_path)
    module = LMModule(
        model,
        AdamW(lr=LR, weight_decay=0.0, schedule="constant"),
        steps=STEPS,
        logits_chunk_size=chunk,
        teacher=Teacher(taught.train(), K, SHARE, TEMPERATURE),
        **SIZES,
    )
    data = BlocksDataModule(blocks, [], objective, 92, BATCH, STEPS, SEED)  # type: ignore[arg-type]  # not validated
    fitted(module, data, STEPS, logger=logger, log_every_n_steps=1)

    np.testing.assert_allclose(logger.rows, expected, rtol=1e-4)
    assert expected[0][2] > 0.005  # the teacher has something to say
    assert expected[-1][0] < 0.99 * expected[0][0]
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # Adam turns rounding into a share of lr where a gradient is all but zero.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-2 * LR)
    for now, then in zip(taught.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(("chunk", "held"), [(None, 60), (40, 40)])  # the matrix itself has 32
def test_logits_of_both_are_held_a_few_rows_at_a_time(chunk: int | None, held: int) -> None:
    model, teacher = small("gpt2", True), Teacher(small("llama", True), 90)
    ids, positions = torch.randint(2, 90, (4, 16)), torch.arange(60)
    with LargestLogits(100) as largest, LargestLogits(90) as largest_cut:
        distilled = score(model, ids, None, positions, positions % 90, chunk, teacher=teacher)
        assert distilled.loss is not None
        distilled.loss.sum().backward()
    assert largest.rows == largest_cut.rows == held


@pytest.mark.parametrize("chunk", [None, 4])
def test_nothing_to_learn(chunk: int | None) -> None:
    """A masked batch may have no target."""
    model, none = small("gpt2", True), torch.zeros(0, dtype=torch.long)
    ids = torch.ones(2, 8, dtype=torch.long)
    nll, _, loss, kl = score(model, ids, None, none, none, chunk, teacher=Teacher(small("gpt2", True), 90))
    assert loss is not None
    assert kl is not None
    assert nll.shape == loss.shape == kl.shape == (0,)
    loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivative_in_16_bits(dtype: torch.dtype) -> None:
    """As autograd has it, rounded once: with rows of padding, weights, and the factor of a scaler."""
    logits, taught, targets = 3 * torch.randn(12, 90), 3 * torch.randn(12, 85), torch.randint(85, (12,))
    logits[:, 88:] = -torch.inf
    factors = 100 * torch.rand(12, 1)
    leaf = logits.clone().requires_grad_()
    soft = (taught / TEMPERATURE).softmax(1)
    kl = F.kl_div((leaf[:, :85] / TEMPERATURE).log_softmax(1), soft, reduction="none").sum(1)
    nll = F.cross_entropy(leaf, targets, reduction="none")
    loss = (1 - SHARE) * nll + SHARE * TEMPERATURE**2 * kl
    (factors[:, 0] * loss).sum().backward()
    found = distillation_and_slope(logits.clone(), targets, dtype, factors, taught, SHARE, TEMPERATURE)
    torch.testing.assert_close(found[:2], (nll.detach(), kl.detach()))
    assert leaf.grad is not None
    torch.testing.assert_close(found[2], leaf.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    # Without a teacher's share it is that of the nll, to the bit.
    _, alone = nll_and_slope(logits.clone(), targets, dtype, factors)
    found = distillation_and_slope(logits.clone(), targets, dtype, factors, taught, 0.0, TEMPERATURE)
    assert alone is not None
    assert found[2] is not None
    assert torch.equal(found[2], alone)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_a_chunk_gives_the_same() -> None:
    """As on a GPU, with chunks of two sizes: the last one of a batch is shorter."""
    for rows in (8, 3):
        logits, taught = (torch.randn(rows, tokens).bfloat16() for tokens in (90, 85))
        rest = torch.randint(85, (rows,)), torch.bfloat16, torch.rand(rows, 1), taught, SHARE, TEMPERATURE
        found = compiled_distillation("cpu")(logits.clone(), *rest)
        torch.testing.assert_close(found, distillation_and_slope(logits.clone(), *rest))


# --- runs ---

FOUR = [*TINY, "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of it and a run without one, and what can't teach them; not to be written to."""
    place = tmp_path_factory.mktemp("runs")
    run_verb("train", *FOUR, "seed=7", "model.config.n_embd=16", f"hydra.run.dir={place / 'teacher'}")
    run_verb("train", *FOUR, f"hydra.run.dir={place / 'plain'}")
    words = ["+distill=teacher", f"distill.model={place / 'teacher'}", "distill.temperature=2"]
    run_verb("train", *FOUR, *words, f"hydra.run.dir={place / 'student'}")
    exported = place / "teacher" / "model"
    shutil.copytree(place / "teacher", place / "unfinished", ignore=shutil.ignore_patterns("model"))
    (place / "empty").mkdir()
    shutil.copytree(exported, place / "encoder")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, **small)).save_pretrained(place / "encoder")
    shutil.copytree(exported, place / "headless")
    weights = load_file(exported / "model.safetensors")
    weights.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(weights, place / "headless" / "model.safetensors", {"format": "pt"})
    shutil.copytree(exported, place / "module")
    TorchModuleConfig(architectures=["TorchModuleForCausalLM"]).save_pretrained(place / "module")
    return place


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_student_is_a_model_like_any_other(runs: Path) -> None:
    """The teacher changes its weights, and is itself nowhere in the run."""
    student, plain = RunDirectory(runs / "student"), RunDirectory(runs / "plain")
    assert not same(student.path, plain.path)
    assert weights(student.path).keys() == weights(plain.path).keys()
    one, two = (load_checkpoint(run.checkpoint_files()[-1]) for run in (student, plain))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert student.read_summary()["parameters"] == plain.read_summary()["parameters"]
    rows = [row for row in metrics(student.path) if "train/loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["train/loss"] == pytest.approx(0.5 * row["train/nll"] + 0.5 * 4 * row["train/kl"])
        assert row["train/perplexity"] == pytest.approx(np.exp(row["train/nll"]))
    # Before the first step they are one model, and what is held out is scored without the teacher.
    assert losses(student.path)[0] == losses(plain.path)[0]


def test_without_weight_the_teacher_changes_nothing(train: Callable[..., Path], runs: Path) -> None:
    words = ["distill=teacher", f"distill.model={runs / 'teacher' / 'model'}", "distill.weight=0"]
    student = train(*FOUR, *words)
    assert same(student, runs / "plain")
    assert losses(student) == losses(runs / "plain")


def test_a_student_goes_on(runs: Path, tmp_path: Path, refused: Refused) -> None:
    """Bit for bit, also where its teacher has moved; not with another one."""
    run = tmp_path / "run"
    stop_after(runs / "student", 2, run)
    assert "was begun with other choices" in refused("resume", run, "distill.temperature=3")
    assert "a run's distill can't change" in refused("resume", run, "distill=teacher")
    before = (run / "config.yaml").read_text()
    assert f"the teacher of {run} is not what the run was begun with" in refused(
        "resume", run, f"distill.model={runs / 'plain'}"
    )
    assert (run / "config.yaml").read_text() == before
    shutil.copytree(runs / "teacher" / "model", tmp_path / "moved")
    run_verb("resume", run, f"distill.model={tmp_path / 'moved'}")
    assert same(run, runs / "student")
    assert losses(run) == losses(runs / "student")


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("nowhere", TINY, 'could not load teacher "{}": no such directory. Give one that is there as distill.model.'),
        ("empty", TINY, 'could not load teacher "{}" from there'),
        ("unfinished", TINY, "distill.model={} holds no model: it is an evaluation, or a run that has not ended."),
        ("encoder", TINY, "no causal, masked or encoder-decoder language model"),
        ("module", TINY, "distill.model={} holds a torch module, which can be a student, but no teacher."),
        ("headless", TINY, "distill.model={} holds no weights for transformer.h.0.mlp.c_fc.weight"),
        ("teacher", TINY_MLM, "{}/model is a causal model, and the objective trains a masked one."),
        ("teacher", [*TINY, "tokenizer.vocab_size=320"], "another tokenizer (300 tokens) than the student"),
        (
            "teacher",
            [*TINY, "preprocess.block_size=300", "model.config.n_positions=300"],
            "distill.model={}/model: preprocess.block_size=300 is more than the 256 positions of the model.",
        ),
    ],
)
def test_what_can_not_teach(
    name: str, overrides: list[str], said: str, runs: Path, refused: Refused, tmp_path: Path
) -> None:
    words = [*overrides, "distill=teacher", f"distill.model={runs / name}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert said.format(runs / name) in refused("train", *words)
    assert not (tmp_path / "run").exists()


def test_the_manifest_names_the_weights_of_the_teacher(runs: Path) -> None:
    manifest, certificate = (
        json.loads((runs / name).read_text()) for name in ("student/manifest.json", "teacher/certificate.json")
    )
    assert manifest["teacher_hash"] == certificate["weights_hash"]
