"""Replaced token detection: against a loop in plain torch and transformers, and as a user trains and evaluates it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from lmlab.data.datamodule import collate
from lmlab.data.sampler import Draw
from lmlab.errors import UserError
from lmlab.models.efficiency import check_sharding, layers
from lmlab.models.electra import GeneratorAndDiscriminator
from lmlab.models.loading import from_scratch, pretrained
from lmlab.models.torch_module import wrap
from lmlab.objectives import Example, check_shapes
from lmlab.objectives.electra import ReplacedTokenDetection, draw_tokens
from lmlab.runs.directory import RunDirectory
from lmlab.sharing.card import build_card

from ..conftest import Refused, losses, metrics, run_verb, stop_after
from .reference import agrees, tokenizer

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
TINY_ELECTRA = [
    "objective=electra",
    *(f"model.config.{key}" for key in ("hidden_size=32", "embedding_size=16", "num_hidden_layers=1")),
    *(f"model.config.{key}" for key in ("num_attention_heads=2", "intermediate_size=64")),
    "model.generator={hidden_size:16}",
    "tokenizer.vocab_size=300",
    "preprocess.block_size=32",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "logger=file",
]
IDS = np.random.default_rng(0).integers(90, size=64, dtype=np.int32)


def pair(**generator: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return from_scratch(tokenizer(), "AutoModelForPreTraining", "electra", SIZES, generator or {"hidden_size": 16})


def loss_of_step(model: PreTrainedModel, samples: list[tuple[np.ndarray, Example]]) -> Tensor:
    """The generator's mean nll per hidden token of each text, and the discriminator's of all tokens of the step."""
    assert isinstance(model, GeneratorAndDiscriminator)
    total, count = torch.zeros(()), 0
    for text, example in samples:
        assert example.draws is not None
        ids = torch.from_numpy(text.astype(np.int64))[None]
        hidden = torch.from_numpy(np.flatnonzero(example.draws >= 0))
        shown = ids.clone()
        shown[0, hidden] = 93  # the mask
        np.testing.assert_array_equal(shown[0], example.inputs)
        logits = model.generator(shown).logits[0, hidden]
        total = total + len(text) * F.cross_entropy(logits, ids[0, hidden])
        corrupted = ids.clone()
        for position, row in zip(hidden.tolist(), logits.detach().double().softmax(1).cumsum(1).numpy(), strict=True):
            corrupted[0, position] = int(np.searchsorted(row, example.draws[position], side="right"))
        found = model.discriminator(corrupted).logits[0]
        total = total + F.binary_cross_entropy_with_logits(found, (corrupted != ids)[0].float(), reduction="sum")
        count += len(text)
    return total / count


@pytest.mark.parametrize("rows", [None, 7])
def test_against_a_written_out_loop(rows: int | None, tmp_path: Path) -> None:
    """Its weight of 1 makes the loss the sum of what is logged."""
    objective, model = ReplacedTokenDetection(tokenizer(), discriminator_weight=1.0), pair()
    assert model.generator.electra.embeddings is model.discriminator.electra.embeddings
    agrees(objective, model, loss_of_step, rows, tmp_path)


def test_weight_of_the_discriminator() -> None:
    model, draw = pair(), [Draw(0, 0, 0)]
    one, fifty = (
        objective.losses(model, collate([IDS], draw, objective, 0, 92))
        for objective in (ReplacedTokenDetection(tokenizer(), 0.15, weight) for weight in (1.0, 50.0))
    )
    assert one.loss is not None
    assert fifty.loss is not None
    torch.testing.assert_close(50 * one.loss, fifty.loss)
    torch.testing.assert_close(one.nll, fifty.nll)
    (gradient,) = torch.autograd.grad(one.loss.sum(), model.generator.generator_lm_head.bias, allow_unused=True)
    assert gradient is None  # that of the discriminator does not reach the generator


def test_example() -> None:
    """A share of the tokens is hidden, none of them special, and each token is a target."""
    objective = ReplacedTokenDetection(tokenizer(), 0.3)
    ids = np.concatenate([IDS, [91, 91]]).astype(np.int32)
    example = objective(ids, (0, 0, 5))
    check_shapes(objective, example, len(ids))
    assert example.draws is not None
    assert example.weights is not None
    hidden = np.flatnonzero(example.draws >= 0)
    assert len(hidden) == math.ceil(0.3 * 66)
    assert set(hidden) == set(np.flatnonzero(example.inputs != ids))
    assert hidden.max() < 64
    assert (example.inputs[hidden] == 93).all()
    np.testing.assert_array_equal(example.targets, ids)
    assert example.weights.sum() == pytest.approx(66)
    again, other = objective(ids, (0, 0, 5)), objective(ids, (0, 1, 5))
    np.testing.assert_array_equal(example.draws, again.draws)
    assert (example.draws != other.draws).any()
    assert objective(ids[-2:], (0, 0, 0)).weights.sum() == 0  # type: ignore[union-attr]
    with pytest.raises(UserError, match="draws that are neither"):
        check_shapes(objective, example._replace(draws=2 * example.draws), len(ids))


def test_tokens_are_drawn_from_the_generators_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    draws = (torch.arange(4000) + 0.5) / 4000
    shares = torch.bincount(draw_tokens(logits.expand(4000, 4), draws), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(1)[0], atol=1e-3, rtol=0)
    assert draw_tokens(logits, torch.ones(1)) == 3  # a draw that float32 rounds up to 1


def test_embeddings_of_other_shapes_are_not_shared() -> None:
    model = pair(embedding_size=8, hidden_size=16)
    assert model.generator.get_input_embeddings() is not model.discriminator.get_input_embeddings()
    assert layers(model) == [*model.generator.electra.encoder.layer, *model.discriminator.electra.encoder.layer]
    with pytest.raises(UserError, match="not sharded"):
        check_sharding(model)
    with pytest.raises(UserError, match="no torch module"):
        wrap(torch.nn.Embedding(94, 94), tokenizer(), "AutoModelForPreTraining")


def test_an_exported_pair_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = pair()
    model.save_pretrained(tmp_path)
    loaded = pretrained("AutoModelForPreTraining", str(tmp_path))
    assert loaded.generator.electra.embeddings is loaded.discriminator.electra.embeddings
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    (tmp_path / "generator").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\+model.generator="):
        pretrained("AutoModelForPreTraining", str(tmp_path))
    named = pretrained("AutoModelForPreTraining", str(tmp_path), generator=str(tmp_path / "elsewhere"))
    assert isinstance(named, GeneratorAndDiscriminator)
    with pytest.raises(UserError, match="objective=electra"):
        pretrained("AutoModelForMaskedLM", str(tmp_path / "elsewhere"), generator=str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("electra") / "run"
    run_verb("train", *TINY_ELECTRA, f"hydra.run.dir={folder}")
    return folder


def test_run(run: Path, evaluate: Callable[..., Path], capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    """It is evaluated to the same totals from its directory and from its exported model, which transformers loads."""
    assert "val/detection_perplexity" in metrics(run)[0]
    assert any("train/aux_loss" in line for line in metrics(run))
    assert len(json.loads((run / "samples.jsonl").read_text().splitlines()[0])["said"].splitlines()) == 4
    trained = json.loads((run / "certificate.json").read_text())
    assert trained["figure"] == "detection_perplexity"
    assert not [*(run / "checkpoints").glob("best-*")]  # the weights are the last ones, however they score
    assert trained["totals"]["nll"] / trained["totals"]["tokens"] == pytest.approx(metrics(run)[-1]["val/loss"])
    for evaluation in (evaluate(run), evaluate(run / "model", "data=sample", "preprocess.block_size=32")):
        totals = json.loads((evaluation / "certificate.json").read_text())["totals"]
        assert totals["nll"] == pytest.approx(trained["totals"]["nll"], rel=1e-6)
        assert totals["tokens"] == trained["totals"]["tokens"]
    run_verb("compare", run, evaluation, "--out", run / "comparison")
    assert "generators are alike" in capsys.readouterr().out
    run_verb("predict", run, "The cat sat.", "", "--json")
    tokens, of_no_text = (json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines())
    assert of_no_text == []
    assert "".join(token["token_str"] for token in tokens) == "The cat sat."
    assert all(0 < token["score"] < 1 for token in tokens)
    assert type(AutoModelForPreTraining.from_pretrained(run / "model")).__name__ == "ElectraForPreTraining"
    AutoModelForMaskedLM.from_pretrained(run / "model" / "generator")
    card = build_card(RunDirectory(run), "me/electra", "mit")["README.md"].decode()
    assert "model-index" not in card  # the hub lists metrics by tasks, and has none for it
    assert "masked models" in refused("evaluate", run, "score=pseudo")
    assert "has no tokenizer" in refused("predict", run / "model" / "generator", "The <mask> sat.")


def test_run_that_goes_on(run: Path, tmp_path: Path) -> None:
    """After two steps and a kill it has the losses of one that was not stopped."""
    stop_after(run, 2, tmp_path / "stopped")
    run_verb("train", *TINY_ELECTRA, f"hydra.run.dir={tmp_path / 'stopped'}")
    assert losses(tmp_path / "stopped") == losses(run)
