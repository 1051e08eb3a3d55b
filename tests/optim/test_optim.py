"""Optimizers against torch's own, parameter groups, and schedules."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lmlab.errors import UserError
from lmlab.evaluation import records
from lmlab.optim import SCHEDULES, AdamW, Muon, ScheduleFree
from lmlab.optim.groups import layer_matrices
from lmlab.optim.width import scale_initial_weights, width_factors
from tests.conftest import TINY, losses, metrics, run_verb, stop_after

Train = Callable[..., Path]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    ours, theirs = gpt2(), gpt2()
    optimizer, schedule = Muon(lr=0.01, weight_decay=0.1, schedule="constant")(ours, 9)
    matrices = [p for name, p in theirs.named_parameters() if ".h." in name and p.ndim == 2]
    embeddings = [theirs.transformer.wte.weight, theirs.transformer.wpe.weight]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    assert len(layer_matrices(ours)) == len(matrices) == 8
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    for seed in range(4):
        step(ours, optimizer, seed=seed)
        schedule.step()
        step(theirs, muon, adamw, seed=seed)
        assert same(ours, theirs)
    # What is kept is loaded again, into another model, bit for bit.
    again = gpt2()
    again.load_state_dict(ours.state_dict())
    loaded, _ = Muon(lr=0.01, weight_decay=0.1, schedule="constant")(again, 9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(ours, optimizer, seed=5)
    step(again, loaded, seed=5)
    assert same(ours, again)


def test_a_model_without_matrices() -> None:
    with pytest.raises(UserError, match="optim=muon is for the matrices of layers"):
        Muon().freeze(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))


def test_schedule_free_is_that_of_its_package() -> None:
    ours, theirs = gpt2(), gpt2()
    optimizer, schedule = ScheduleFree(lr=0.01, weight_decay=0.1)(ours, 9)
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim == 1) is v] for v in (False, True))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    expected = AdamWScheduleFree(groups, lr=0.01)
    expected.train()
    for seed in range(4):
        step(ours, optimizer, seed=seed)
        schedule.step()
        step(theirs, expected, seed=seed)
    expected.eval()
    assert not same(ours, theirs)
    optimizer.eval()  # type: ignore[attr-defined]
    assert same(ours, theirs)


def test_a_run_by_schedule_free_exports_what_it_validates(train: Train, tmp_path: Path) -> None:
    """And validations, for which its weights are exchanged, leave those that are trained as they are."""
    runs = [
        train(*TINY, "optim=schedule_free", f"trainer.val_check_interval={n}", run_dir=tmp_path / f"{n}")
        for n in (1, 4)
    ]
    assert [row["train/loss"] for row in metrics(runs[0]) if "train/loss" in row] == [
        row["train/loss"] for row in metrics(runs[1]) if "train/loss" in row
    ]
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    run_verb("evaluate", f"model={runs[1]}", f"hydra.run.dir={tmp_path / 'evaluation'}")
    totals = [records.read(place).certificate["totals"]["nll"] for place in (runs[1], tmp_path / "evaluation")]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_run_goes_on_bit_for_bit(name: str, train: Train, tmp_path: Path) -> None:
    words = [f"optim={name}", "optim.groups={*.wte.*: {lr: 1e-4}}", "trainer.val_check_interval=2"]
    run = train(*TINY, *words)
    stop_after(run, 2, tmp_path / "stopped")
    run_verb("resume", tmp_path / "stopped")
    assert losses(run) == losses(tmp_path / "stopped")
    weights = [load_file(place / "model" / "model.safetensors") for place in (run, tmp_path / "stopped")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_groups(kind: Any) -> None:
    model = gpt2()
    settings = {"*.wte.*": {"lr": 1e-4}, "*ln_1*": {"weight_decay": 0.3}, "*.h.1.mlp.*": {"freeze": True}}
    optim = kind(lr=0.01, weight_decay=0.1, schedule="constant", groups=settings)
    optim.freeze(model)
    optimizer, _ = optim(model, 5)
    found = rates_of(optimizer, model)
    assert found["transformer.wte.weight"] == (1e-4, 0.1)
    assert found["transformer.h.0.ln_1.bias"] == (0.01, 0.3)
    assert found["transformer.h.0.ln_2.bias"] == (0.01, 0.0)
    assert found["transformer.h.1.attn.c_attn.weight"] == (0.01, 0.1)
    assert found.keys() == {name for name, _ in model.named_parameters() if ".h.1.mlp." not in name}
    rows = optim.describe_groups(model)
    assert [row["pattern"] for row in rows] == [*settings, ""]
    assert sum(row["parameters"] for row in rows) == model.num_parameters()
    assert rows[0] == {"pattern": "*.wte.*", "parameters": 160, "lr": 1e-4, "weight_decay": 0.1, "freeze": False}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"*.wtee.*": {"lr": 1}}, "matches no parameter"),
        ({"*.wte.*": {"lr": 1}, "*wte*": {"lr": 2}}, "match transformer.wte.weight"),
        ({"*.wte.*": {"lrr": 1}}, 'Did you mean "lr"'),
        ({"*.wte.*": {"freeze": 1}}, "true or false, not 1"),
        ({"*.wte.*": {"lr": -1}}, "0 or more, not -1"),
        ({"*.wte.*": {"lr": math.nan}}, "0 or more, not nan"),
        ({"*.wte.*": 3}, "has to be a mapping of lr, weight_decay, freeze, not 3"),
        ({"*": {"freeze": True}}, "nothing to train"),
    ],
)
def test_groups_that_can_not_be(settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdamW(groups=settings).freeze(gpt2())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_ends_at_its_floor(name: str) -> None:
    optim = AdamW(lr=1.0, schedule=name, final_ratio=0.1, warmup_steps=10)
    factors = [optim.factor(step, 110) for step in range(111)]
    assert (factors[0], factors[5], factors[10]) == (0, 0.5, 1)
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(later <= factor + 1e-6 for factor, later in pairwise(factors[10:]))
    if name == "one_minus_sqrt":  # the last fifth of the 100 steps after warm-up
        assert factors[90] == pytest.approx(1)
        assert factors[95] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))


def wide(width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=width, n_layer=2, n_head=2))


def test_rates_and_initial_weights_by_width() -> None:
    """As the table of Yang et al. 2022 has them; at the width of the base, nothing changes."""
    model, optimizer = wide(32), AdamW(lr=0.1, weight_decay=0.2, base_width=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale_initial_weights(model, width_factors(model, 8))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"], float((p.detach() / before[names[id(p)]]).nanmedian()))
        for group in optimizer(model, 9)[0].param_groups
        for p in group["params"]
    }
    assert found["transformer.h.0.mlp.c_fc.weight"] == pytest.approx((0.025, 0.8, 0.5))
    assert found["transformer.ln_f.weight"] == pytest.approx((0.025, 0.0, 0.25))
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        assert found[name] == pytest.approx((0.1, 0.2, 1.0))
    assert found["transformer.h.1.ln_1.weight"] == pytest.approx((0.1, 0.0, 1.0))
    same_width, plain = wide(8), wide(8)
    scale_initial_weights(same_width, width_factors(same_width, 8))
    for other, base_width in ((same_width, 8), (plain, None)):
        one, _ = AdamW(lr=0.01, schedule="constant", base_width=base_width)(other, 9)
        step(other, one, seed=1)
    assert same(same_width, plain)


def test_the_norm_before_the_projection_stands_for_a_factor_of_the_logits() -> None:
    """To Adam a norm of m times the weights and the rate is the same as logits of m times the size (table 8)."""
    ours, theirs, ratio = wide(32), wide(32), 8 / 32
    scale_initial_weights(ours, width_factors(ours, 8))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".h." in name and p.ndim == 2:
                p.mul_(ratio**0.5)
    head = theirs.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * ratio,))
    optimizer, _ = AdamW(lr=0.01, schedule="constant", weight_decay=0.0, base_width=8, eps=1e-20)(ours, 9)
    hidden = [p for name, p in theirs.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for p in theirs.parameters() if not any(p is each for each in hidden)]
    reference = torch.optim.AdamW(
        [{"params": others}, {"params": hidden, "lr": 0.01 * ratio}], lr=0.01, weight_decay=0.0, eps=1e-20
    )
    ids = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        losses = []
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            loss = model.eval()(ids, labels=ids).loss
            loss.backward()
            each.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    head.remove()
