"""Adapters: what they compute, that nothing else is trained, and how they leave a run."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from benchmarks.train import make_tokenizer
from lmlab.config.compose import read_config
from lmlab.config.models import model_without_weights
from lmlab.data.tokenizers import bpe
from lmlab.errors import UserError
from lmlab.models import adapters, generation, memory
from lmlab.models.adapter_files import take_out
from lmlab.models.flops import Flops
from lmlab.models.hashing import weights_hash
from lmlab.models.loading import pretrained
from lmlab.models.loss import score
from lmlab.models.quantized import linear_layers, quantization_config, quantize
from lmlab.models.torch_module import wrap
from lmlab.runs.directory import RunDirectory
from lmlab.sharing.push import Destination, contents
from lmlab.training.checkpoint_io import load_checkpoint

from ..conftest import Refused, losses, metrics, run_verb, stop_after
from .test_scored import config_of, small

SHORT = ["preprocess.block_size=32", "trainer.max_steps=4", "callbacks.samples.count=0", "logger=file"]


def adapted(architecture: str, causal: bool = True, **options: Any) -> Any:
    """A small model with an adapter whose weights are all random, as after some training."""
    model = small(architecture, causal)
    given = {"base": None, "revision": None, "auto_class": "AutoModelForCausalLM", "seed": 1}
    adapters.lora(model=model, **given | options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"quantization": "nf4"}], ids=str)
@pytest.mark.parametrize(("architecture", "causal"), [("gpt2", True), ("llama", True), ("roberta", False)])
def test_merged_weights_compute_what_the_adapter_does(architecture: str, causal: bool, options: dict[str, Any]) -> None:
    model = adapted(architecture, causal, targets="all-linear", alpha=8, **options)
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        before = small(architecture, causal)(ids).logits
        logits = model(ids).logits
        with adapters.merged_in_evaluation(model):
            in_evaluation = model(ids).logits
            with torch.autocast("cpu", torch.bfloat16):
                in_bf16 = model(ids).logits
        assert torch.equal(model(ids).logits, logits)  # the weights are what they were
        state = adapters.merged_state(model, model.state_dict())
        adapters.remove(model, state)
        model.load_state_dict(state)
        merged = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(in_bf16, model(ids).logits)
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(in_evaluation, merged)
    assert (merged - before).abs().max() > 0.01


@pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_by_hand(rank_stabilised: bool, scale: float, dora: bool) -> None:
    model = adapted("llama", targets=["q_proj"], r=4, alpha=8, rank_stabilised=rank_stabilised, dora=dora)
    state, name = model.state_dict(), "model.layers.1.self_attn.q_proj"
    a, b = (state[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
    expected = state[f"{name}.base_layer.weight"].double() + scale * b @ a
    if dora:
        length = state[f"{name}.lora_magnitude_vector.default.weight"].double()
        expected *= (length / expected.norm(dim=1))[:, None]
    merged = adapters.merged_state(model, state)
    torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert merged.keys() == small("llama", True).state_dict().keys()


@pytest.mark.parametrize(("architecture", "causal"), [("gpt2", True), ("roberta", False)])
def test_a_quantized_base_is_that_of_transformers(architecture: str, causal: bool, tmp_path: Path) -> None:
    """Which quantizes what it loads by bitsandbytes, and computes by its layers; peft adds the adapter beside them."""
    small(architecture, causal).save_pretrained(tmp_path / "base")
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = adapted(architecture, causal, quantization="nf4", base=str(tmp_path / "base"), auto_class=auto.__name__)
    ids = torch.arange(5, 21)[None]
    logits = model(ids).logits
    merged = take_out(model, model.state_dict(), make_tokenizer(100), tmp_path / "adapter")
    file = tmp_path / "adapter" / "quantization_config.json"
    config = json.loads(file.read_text())
    loaded = auto.from_pretrained(tmp_path / "base", quantization_config=BitsAndBytesConfig.from_dict(config))
    beside = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()
    for module in beside.modules():
        if isinstance(module, Linear4bit):
            module.train()  # where nothing is trained, it rounds to bf16 on some CPUs
    torch.testing.assert_close(beside(ids).logits, logits, rtol=1e-5, atol=1e-6)
    state = pretrained(auto.__name__, str(tmp_path / "adapter")).state_dict()
    assert state.keys() == merged.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())
    file.write_text(json.dumps(config | {"bnb_4bit_quant_type": "fp4"}))
    with pytest.raises(UserError, match="quantized in another way"):
        pretrained(auto.__name__, str(tmp_path / "adapter"))


def test_layers_that_transformers_keeps_in_float32_are_not_quantized(tmp_path: Path) -> None:
    config = config_of("t5", num_layers=1, num_heads=2, d_kv=16, d_ff=64)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(tmp_path)
    given = BitsAndBytesConfig.from_dict(quantization_config(model))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=given)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = [name for name in linear if name != "lm_head" and not name.endswith(".wo")]
    assert [*linear_layers(model)] == expected
    assert [name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)] == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_quantized_layer_gives_the_gradient_of_a_dense_one(architecture: str) -> None:
    """And autograd keeps no dense weight of it for the backward pass."""
    model = small(architecture, True)
    names = [*linear_layers(model)]
    shapes = [sorted(model.get_submodule(name).weight.shape) for name in names]
    quantize(model)
    dense = copy.deepcopy(model)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(parent), leaf, dense.get_submodule(name).dense())
    found: list[Any] = []
    for each in (dense, model):
        kept: list[Tensor] = []
        inputs = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            logits = each(inputs_embeds=inputs).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits, inputs.grad, any(sorted(tensor.shape) in shapes for tensor in kept)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert (found[0][2], found[1][2]) == (True, False)


def test_a_quantized_weight_counts_by_its_bytes_and_as_the_numbers_it_stands_for() -> None:
    models = [adapted("llama", quantization=quantization) for quantization in (None, "nf4")]
    assert Flops.from_model(models[0]) == Flops.from_model(models[1])
    assert memory.count_parameters(models[0]) == memory.count_parameters(models[1])
    sizes = [layer.weight.numel() for layer in linear_layers(small("llama", True)).values()]
    saved = sum(4 * n - n // 2 - n // 64 - 4 * math.ceil(n / 64 / 256) - 4 - 4 * 256 for n in sizes)
    dense, quantized = (memory.count_state(model, tensors=3, half=False) for model in models)
    assert (dense[0] - saved, *dense[1:]) == quantized


def test_an_adapter_begins_with_what_the_seed_gives() -> None:
    given = {"base": None, "revision": None, "auto_class": "AutoModelForCausalLM"}
    ids, weights = torch.arange(5, 21)[None], []
    for seed, drawn in ((1, 0), (1, 5), (2, 0)):
        model = small("gpt2", True)
        torch.rand(drawn)  # whatever was drawn before
        state = torch.get_rng_state()
        adapters.lora(model=model, seed=seed, **given)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(ids).logits, small("gpt2", True)(ids).logits)
        weights.append(model.transformer.h[0].attn.c_attn.lora_A["default"].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_frozen_head_gets_no_gradient_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions, targets = torch.arange(5, 21)[None], torch.tensor([1, 5, 7]), torch.tensor([7, 8, 9])
    gradients, made, zeros = [], [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: made.append(size[0]) or zeros(*size, **options))
    for frozen in (False, True):
        model = small("llama", True)
        model.lm_head.requires_grad_(not frozen)
        made.clear()
        score(model, ids, None, positions, targets, chunk_size=2).nll.sum().backward()
        assert (model.lm_head.weight.shape in made) is not frozen
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer, whose vocabulary is that of bytes."""
    path = tmp_path_factory.mktemp("adapters") / "base"
    tokenizer = bpe(["a"], 259)
    tokenizer.save_pretrained(path)
    small("gpt2", True, vocab_size=259, bos_token_id=0, eos_token_id=0).save_pretrained(path)
    return path


def words(base: Path, *more: str) -> list[str]:
    return ["model=pretrained", f"model.name={base}", *SHORT, *more]


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """A run that trains an adapter with dropout."""
    path = base.with_name("run")
    own = ["adapter=lora", "adapter.dropout=0.1", "optim.lr=0.1", "callbacks.series=2", "seed=3"]
    options = ["callbacks.checkpoints.every_steps=2", "trainer.accumulate_grad_batches=2", f"hydra.run.dir={path}"]
    run_verb("train", *words(base, *own, *options))
    return path


def test_only_the_adapter_is_trained(base: Path, run: Path) -> None:
    state = load_checkpoint(run / "checkpoints" / "step-4.ckpt")
    trained = list(state["optimizer_states"][0]["state"])
    weights = {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}
    before = load_file(base / "model.safetensors")
    for name, tensor in before.items():
        kept = name.replace("c_attn.", "c_attn.base_layer.")
        assert torch.equal(weights[kept], tensor)
    manifest, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("manifest", "summary"))
    assert all(".lora_" in name for name in trained)
    count = sum(weights[name.removeprefix("model.")].numel() for name in trained)
    assert count == manifest["trainable_parameters"] == summary["trainable_parameters"] > 0
    assert manifest["parameters"] == count + sum(p.numel() for p in small("gpt2", True, vocab_size=259).parameters())
    val = [line["val/loss"] for line in metrics(run) if "val/loss" in line]
    assert val[-1] < val[0] - 0.01


def test_a_run_leaves_merged_weights_and_an_adapter(base: Path, run: Path) -> None:
    """The former are read by transformers alone, and the latter by peft beside its base."""
    merged, first = load_file(run / "model" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in first.items()}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    ids = torch.arange(40)[None]
    exported = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    original = AutoModelForCausalLM.from_pretrained(base).eval()
    moved = (exported(ids).logits - original(ids).logits).abs().max()
    beside = peft.PeftModel.from_pretrained(original, str(run / "adapter")).eval()
    assert moved > 0.01
    torch.testing.assert_close(beside(ids).logits, exported(ids).logits, rtol=1e-5, atol=1e-6)
    last = load_file(run / "series" / "step-4" / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in merged.items())


def test_a_push_takes_the_adapter_too(run: Path) -> None:
    files, _ = contents(RunDirectory(run), Destination("me/tuned", "mit"))
    for file in (run / "adapter").iterdir():
        assert files[f"adapter/{file.name}"] == file
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert 'PeftModel.from_pretrained(base, "me/tuned", subfolder="adapter")' in card.decode()
    assert "| adapter | r 8, alpha 16, dora False |" in card.decode()


def test_an_evaluation_gives_the_certificate_of_the_run(run: Path, evaluate: Callable[..., Path]) -> None:
    """Of its directory, and of the adapter, which is merged into its base again."""
    of_adapter = [f"model={run / 'adapter'}", "data=sample", "preprocess.block_size=32"]
    found = [run, evaluate(run), evaluate(*of_adapter)]
    certificates = [json.loads((path / "certificate.json").read_text()) for path in found]
    for key in ("weights_hash", "totals", "figures"):
        assert certificates[0][key] == certificates[1][key] == certificates[2][key]


def test_a_killed_run_goes_on_to_the_same_bits(
    base: Path, run: Path, tmp_path: Path, train: Callable[..., Path], evaluate: Callable[..., Path]
) -> None:
    stop_after(run, 2, tmp_path / "stopped")
    unfinished = json.loads((evaluate(tmp_path / "stopped") / "certificate.json").read_text())
    at_two = AutoModelForCausalLM.from_pretrained(run / "series" / "step-2")
    assert unfinished["weights_hash"] == weights_hash(at_two.state_dict())
    run_verb("resume", tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(run)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (run / name).read_bytes()


def test_an_unfinished_run_is_not_evaluated_without_the_library_of_its_adapter(
    run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(run, 2, tmp_path / "stopped")
    monkeypatch.setattr("lmlab.errors.find_spec", lambda name: None)
    assert "adapter=… takes peft, which is not installed" in refused("evaluate", tmp_path / "stopped")


def test_a_quantized_run_that_is_killed_goes_on_to_the_same_bits(
    base: Path, tmp_path: Path, evaluate: Callable[..., Path]
) -> None:
    """And its certificate is that of its merged weights, and of its adapter beside the base, quantized again."""
    path = tmp_path / "run"
    options = ["adapter.dropout=0.1", "optim.lr=0.1", "callbacks.checkpoints.every_steps=2", f"hydra.run.dir={path}"]
    run_verb("train", *words(base, "adapter=qlora", *options))
    stop_after(path, 2, tmp_path / "stopped")
    run_verb("resume", tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(path)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (path / name).read_bytes()
    found = [path, evaluate(path), evaluate(f"model={path / 'adapter'}", "data=sample", "preprocess.block_size=32")]
    certificates = [json.loads((each / "certificate.json").read_text()) for each in found]
    for key in ("weights_hash", "totals", "figures"):
        assert certificates[0][key] == certificates[1][key] == certificates[2][key]
    card = contents(RunDirectory(path), Destination("me/tuned", "mit"))[0]["README.md"]
    assert isinstance(card, bytes)
    assert "quantization_config=BitsAndBytesConfig.from_dict({" in card.decode()
    assert "alpha 16, dora False, quantization nf4 |" in card.decode()


def test_an_adapter_is_not_used_beside_other_weights(base: Path, run: Path, tmp_path: Path, refused: Refused) -> None:
    """Neither when it is merged, nor when its run goes on; a copy of the base is the base."""
    moved = shutil.copytree(base, tmp_path / "base")
    stop_after(run, 2, tmp_path / "stopped")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    merged = pretrained("AutoModelForCausalLM", str(tmp_path / "adapter")).state_dict()
    assert weights_hash(merged) == json.loads((run / "certificate.json").read_text())["weights_hash"]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.transformer.h[1].ln_1.bias.data += 1e-3
    model.save_pretrained(moved)
    with pytest.raises(UserError, match="is not what it was trained beside"):
        pretrained("AutoModelForCausalLM", str(tmp_path / "adapter"))
    for other in (moved, run / "adapter"):  # of an adapter no hash is known
        assert "the base of the adapter of" in refused("resume", tmp_path / "stopped", f"model.name={other}")


def test_a_run_that_does_not_know_its_base_leaves_no_hash_of_another(base: Path, run: Path, tmp_path: Path) -> None:
    """Such as one that was begun with an adapter as its base."""
    stop_after(run, 2, tmp_path / "stopped")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.pop("base_hash") == json.loads((run / "adapter/base.json").read_text())["layers_hash"]
    (tmp_path / "stopped/manifest.json").write_text(json.dumps(manifest))
    run_verb("resume", tmp_path / "stopped")
    assert "base_hash" not in json.loads((tmp_path / "stopped/manifest.json").read_text())
    assert not (tmp_path / "stopped/adapter/base.json").exists()


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_an_adapter_beside_a_base_in_bf16_writes_as_its_run_does(base: Path, tmp_path: Path, adapter: str) -> None:
    """The run trains it beside the base in float32."""
    half = shutil.copytree(base, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    run_verb("train", *words(half, f"adapter={adapter}", "optim.lr=0.1", f"hydra.run.dir={tmp_path / 'run'}"))
    whole, beside = (generation.load(str(tmp_path / "run" / name))[0].state_dict() for name in ("model", "adapter"))
    assert weights_hash(beside) == weights_hash(whole)


def test_memory_is_counted_for_what_is_trained(run: Path) -> None:
    cfg = read_config(run)
    model = model_without_weights(cfg, bpe(["a"], 259), "AutoModelForCausalLM")
    assert model is not None
    weights, gradients, optimizer = memory.count_state(model, tensors=3, half=False)
    manifest = json.loads((run / "manifest.json").read_text())
    assert weights == 4 * manifest["parameters"]
    assert gradients == optimizer / 2 == 4 * manifest["trainable_parameters"]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["c_atn"], 'c_atn is no layer of the model. Did you mean "c_attn"?'),
        (["c_attn", "wte"], "wte is of the type Embedding, and no linear layer."),
        (["lm_head"], "the weights of lm_head are those of the embedding too"),
        ([], "no linear layer of gpt2 was found. Name some as adapter.targets."),
    ],
)
def test_targets_that_can_have_no_adapter(targets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        adapted("gpt2", targets=targets, dora=True)


def test_targets_that_peft_refuses() -> None:
    with pytest.raises(UserError, match=r"out_proj.* incompatible with Mamba.*\nName other layers as adapter.targets"):
        adapted("mamba", targets=["out_proj"])


def test_a_torch_module_can_have_no_adapter() -> None:
    module = wrap(nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 300)), make_tokenizer(300), "AutoModelForCausalLM")
    with pytest.raises(UserError, match="the model is a torch module"):
        adapters.lora(model=module, base=None, revision=None, auto_class="AutoModelForCausalLM", seed=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["adapter=lora", "adapter.r=0"], "adapter.r=0: it has to be a whole number, 1 or more."),
        (["adapter=dora", "model=gpt2"], "those of this one are random"),
        (["adapter=lora", "trainer=fsdp", "trainer.devices=2"], "is not for a sharded model"),
        (["adapter=qlora", "trainer.precision=bf16-true"], "is not for trainer.precision=bf16-true"),
        (["adapter=lora", "optim.groups={*.base_layer.*: {lr: 1e-3}}"], "matches no parameter that is trained"),
    ],
)
def test_a_run_that_can_have_no_adapter(base: Path, refused: Refused, given: list[str], said: str) -> None:
    options = SHORT if "model=gpt2" in given else words(base)
    assert said in refused("train", *options, *given)


def test_a_model_whose_head_is_random_can_have_no_adapter(base: Path, tmp_path: Path, refused: Refused) -> None:
    """It would stay random, and no adapter could be used without it."""
    bpe(["a"], 259).save_pretrained(tmp_path)
    small("roberta", False, vocab_size=259).base_model.save_pretrained(tmp_path)
    assert "holds no weights for lm_head" in refused("train", *words(tmp_path, "objective=mlm", "adapter=lora"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "the type LORA alone.\nLet peft merge it"),
        ({"base_model_name_or_path": "/nowhere"}, "no such directory"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "."}, "whose base is itself"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "has megatron_config={'a': 1}, which"),
        ({"init_lora_weights": "pissa"}, "was initialised with a change of its base"),
        ({"target_modules": ["c_fc"]}, "does not fit its base"),
    ],
)
def test_an_adapter_that_is_not_read(run: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "adapter_model.safetensors").symlink_to(run / "adapter" / "adapter_model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=re.escape(said)):
        pretrained("AutoModelForCausalLM", str(tmp_path))


def test_an_adapter_without_safetensors_is_not_read(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "adapter" / "adapter_config.json", tmp_path)
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors.*\nLet peft load it and write it again"):
        pretrained("AutoModelForCausalLM", str(tmp_path))


def own(*, model: Any, base: str, revision: str | None, auto_class: str, seed: int) -> Any:
    """A target that adds an adapter, and keeps no hash of the base."""
    adapters.inject(peft.LoraConfig(target_modules=["c_attn"]), model, seed)
    return model


def test_a_target_of_ones_own_adds_an_adapter(base: Path, tmp_path: Path) -> None:
    target = f"+adapter._target_={__name__}.own"
    run_verb("train", *words(base, target, "trainer.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
