"""Cheaper steps that compute the same, and leave no trace in what is saved."""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lmlab.errors import UserError
from lmlab.models.efficiency import (
    check_flex_attention,
    check_sharding,
    checkpoint_activations,
    choose_attention,
    compile_layers,
    fuse_activations,
    layers,
    share_tied_gradient,
)
from lmlab.models.flops import Flops, attention_flops
from lmlab.models.loss import score
from lmlab.training.measure import peak_flops

from ..conftest import TINY, TINY_MLM, metrics
from .test_scored import CAUSAL, MASKED, config_of, small

IDS = torch.randint(5, 100, (3, 16), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([1, 5, 20, 33, 40])


def gradients(model: Any, rows: int | None = 100) -> tuple[Tensor, list[Tensor | None]]:
    nll = score(model, IDS, None, POSITIONS, POSITIONS + 1, rows).nll
    nll.sum().backward()
    return nll.detach(), [p.grad for p in model.parameters()]


def assert_same(one: Any, other: Any) -> None:
    for mine, theirs in zip([one[0], *one[1]], [other[0], *other[1]], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", [*MASKED, *CAUSAL])
def test_layers_are_found(architecture: str) -> None:
    model = small(architecture, architecture in CAUSAL)
    assert len(layers(model)) == 2
    assert len({type(layer) for layer in layers(model)}) == 1


def test_flex_attention_that_can_not_train_is_refused() -> None:
    with pytest.raises(UserError, match="trains on GPUs alone"):
        check_flex_attention(small("llama", True), gpu=False)
    with pytest.raises(
        UserError, match=r"has no dropout, and the model has model.config.attention_probs_dropout_prob=0.1"
    ):
        check_flex_attention(small("roberta", False), gpu=True)
    check_flex_attention(small("llama", True), gpu=True)


def test_fused_activation_is_the_same_function() -> None:
    model = small("gpt2", True)
    other = copy.deepcopy(model)
    fuse_activations(other)
    assert sum(type(module) is nn.GELU for module in other.modules()) == 2
    assert model.state_dict().keys() == other.state_dict().keys()
    assert_same(gradients(other), gradients(model))


class Calls(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, 2])
def test_tied_embedding_adds_rows_to_the_gradient_of_the_head(rows: int | None) -> None:
    model = small("gpt2", True)
    other = copy.deepcopy(model)
    share_tied_gradient(other)
    expected = gradients(model, rows)
    with Calls() as calls:
        found = gradients(other, rows)
    assert_same(found, expected)
    assert not any(gradient.is_sparse for gradient in found[1] if gradient is not None)
    # Only positions have a gradient [V, H] of their own.
    assert calls.names.count("embedding_dense_backward") == 1


def test_untied_embedding_keeps_a_gradient_that_optimizers_take() -> None:
    model = small("llama", True)
    share_tied_gradient(model)
    assert not any(gradient.is_sparse for gradient in gradients(model)[1] if gradient is not None)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta", "llama"])
def test_activations_computed_again_give_the_same(architecture: str) -> None:
    model = small(architecture, architecture != "roberta").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other = copy.deepcopy(model)
    checkpoint_activations(other)

    def kept(m: Any) -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not any(tensor.data_ptr() == p.data_ptr() for p in m.parameters()):
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            m.base_model(input_ids=IDS, use_cache=False)
        return sum(sizes.values())

    assert kept(other) < 0.5 * kept(model)
    assert_same(gradients(other), gradients(model))


@pytest.mark.parametrize("architecture", ["gpt2", "roberta", "llama"])
def test_selective_checkpointing_computes_no_product_again(architecture: str) -> None:
    model = small(architecture, architecture != "roberta").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made, found = [], []
    for selective in (None, True, False):
        other = copy.deepcopy(model)
        if selective is not None:
            checkpoint_activations(other, selective)
        with (calls := Calls()):
            found.append(gradients(other))
        made.append({name: calls.names.count(name) for name in ("addmm", "mm", "bmm", "mul", "add")})
        made[-1]["attention"] = sum("dot_product" in name for name in calls.names)
    assert_same(found[1], found[0])
    plain, kept, again = made
    products = ("addmm", "mm", "bmm", "attention")
    assert [kept[name] for name in products] == [plain[name] for name in products]
    assert sum(kept.values()) > sum(plain.values())  # the rest is
    assert again["attention"] > plain["attention"]


def test_attention_by_name() -> None:
    model = small("gpt2", True)
    expected = gradients(copy.deepcopy(model))
    choose_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    assert_same(gradients(model), expected)
    for name in ("sdpaa", "somebody/kernel", "flash_attention_2"):
        with pytest.raises(UserError, match="Use eager, sdpa"):
            choose_attention(model, name)


@pytest.mark.parametrize(("architecture", "causal"), [("gpt2", True), ("roberta", False), ("llama", True)])
def test_flops_are_those_of_torchs_counter(architecture: str, causal: bool) -> None:
    model = small(architecture, causal)
    choose_attention(model, "eager")  # which the counter sees as plain products
    with FlopCounterMode(display=False) as counter:
        gradients(model, None)
    # Forward, and twice as much backward.
    flops = Flops.from_model(model)
    assert flops
    found = flops.step(IDS.numel(), len(POSITIONS), IDS.shape[1])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("qwen3", {"head_dim": 32}, [(12 * 2 * 32, None)] * 2),  # heads that are wider than their share
        ("mistral", {"sliding_window": 4}, [(12 * 2 * 16, 4)] * 2),
        ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 8}, [(12 * 2 * 16, None), (12 * 32, 8)]),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, [(12 * 2 * 16, None)]),
        ("deberta-v2", {"pos_att_type": ["c2p"]}, None),
        ("mamba", {}, None),
    ],
)
def test_attention_is_counted_as_what_it_is(
    architecture: str, settings: dict[str, Any], expected: list[tuple[int, int | None]] | None
) -> None:
    config = config_of(architecture, **settings)
    found = attention_flops(config)
    assert found == (None if expected is None else tuple(expected))


def test_flops_of_a_mixture_are_those_of_the_experts_that_a_token_uses() -> None:
    few, many = (Flops.from_model(small("mixtral", True, num_local_experts=count)) for count in (2, 4))
    assert few
    assert many
    routers = 6 * 2 * 32 * 2  # two layers, one more row of a router for each of the two experts
    assert many.per_token - few.per_token == routers


def test_a_window_bounds_what_a_longer_block_costs() -> None:
    flops = Flops(100, ((10, None), (10, 4)), 7)
    assert [flops.step(1, 0, length) for length in (2, 4, 8)] == [140, 180, 220]


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA H200 NVL", "16-mixed", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "32-true", None),
        ("NVIDIA H100", "bf16-mixed", None),  # which of them it is can't be known
    ],
)
def test_peaks_are_of_devices_by_their_exact_names(
    name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None


def test_a_tied_head_is_counted_once_for_each_scored_position() -> None:
    model = small("gpt2", True)
    flops = Flops.from_model(model)
    assert flops
    assert flops.per_target == 6 * model.get_output_embeddings().weight.numel()


@pytest.mark.longest
@pytest.mark.parametrize("options", [TINY, TINY_MLM])
def test_compiled_run(options: list[str], train: Callable[..., Path], tmp_path: Path) -> None:
    """Compiles once per kind of layer: not for each step's scored positions, not for held-out text."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    common = [*options, "trainer.log_every_n_steps=1", "trainer.val_check_interval=2", "preprocess.test_size=0.07"]
    common += ["+model.config.embd_pdrop=0", "+model.config.resid_pdrop=0"] if options is TINY else []
    common += ["+model.config.hidden_dropout_prob=0"] if options is TINY_MLM else []
    compiled = train(*common, "compile=true", run_dir=tmp_path / "compiled")
    stats = dict(torch._dynamo.utils.counters["stats"])
    plain = train(*common, run_dir=tmp_path / "plain")
    assert stats["unique_graphs"] == 1
    one, other = ([line.get("train/loss", line.get("val/loss")) for line in metrics(run)] for run in (compiled, plain))
    assert one == pytest.approx(other, rel=1e-4)
    names = [set(torch.load(run / "checkpoints" / "step-4.ckpt")["state_dict"]) for run in (compiled, plain)]
    assert names[0] == names[1]


def test_layers_are_compiled_in_training_only() -> None:
    model = small("gpt2", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(model)
    with torch.no_grad():
        model.eval()(IDS)
    assert not torch._dynamo.utils.counters["frames"]


COLLECTIVES = """
import json, torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from lmlab.models.efficiency import shard
from tests.models.test_scored import small

moved = {}

class Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.strip("_")
        if name.startswith(("allgather", "reduce_scatter")):
            whole = max((t for t in args if isinstance(t, torch.Tensor)), key=torch.Tensor.numel)
            kind = f"{name.split('_base')[0]} {whole.dtype}"
            moved[kind] = moved.get(kind, 0) + whole.numel() / count
        return function(*args, **(kwargs or {}))

init_process_group("fake", rank=0, world_size=2, store=FakeStore())
model = small("llama", True).train()
count = sum(p.numel() for p in model.parameters())
shard(model, init_device_mesh("cpu", (2,)), bf16=True)
model.model.layers[1].register_forward_pre_hook(lambda module, args: moved.update({f"stream {args[0].dtype}": 0}))
with Collectives():
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=torch.arange(16)[None]).logits.float().logsumexp(-1).sum()
        loss.backward()
print(json.dumps(moved))
"""


@pytest.mark.long
def test_sharded_weights_are_gathered_in_bf16_and_gradients_summed_once_a_step() -> None:
    """Counted on one of two ranks, whose other one is a fake: of a step of two batches, in parameters of the model."""
    done = subprocess.run([sys.executable, "-c", COLLECTIVES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout.splitlines()[-1])
    assert moved.keys() == {"allgather torch.bfloat16", "reduce_scatter torch.float32", "stream torch.float32"}
    assert moved["allgather torch.bfloat16"] <= 4  # for the forward and the backward pass of each batch: 2 bytes each
    assert moved["reduce_scatter torch.float32"] == pytest.approx(1)


@pytest.mark.parametrize(("architecture", "key"), [("opt", "layerdrop"), ("bart", "decoder_layerdrop")])
def test_layers_left_out_at_random_are_not_sharded(architecture: str, key: str) -> None:
    check_sharding(small(architecture, True))
    with pytest.raises(UserError, match=rf"model\.config\.{key}=0\.5: .*\nSet model\.config\.{key}=0, or train"):
        check_sharding(small(architecture, True, **{key: 0.5}))


def test_checkpointing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint_activations(small("llama", True))
