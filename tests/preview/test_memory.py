"""The memory of each GPU on paper, against what a trace of real steps has in use and against models that are made."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import train
from benchmarks.trace import Settings
from lmlab.config.models import model_without_weights
from lmlab.models import loading, memory
from lmlab.models.efficiency import layers
from lmlab.preview import memory as on_paper
from tests.conftest import TINY, run_verb

TRACE = (
    "import os, sys\n"
    "from benchmarks import trace\n"
    "print(trace.trace(trace.Settings.parse(sys.argv[1:]))[0].most_in_use, flush=True)\n"
    "os._exit(0)\n"  # as the command itself ends
)
ONE_GPU: dict[str, Any] = {
    "tensors": 3,
    "precision": "bf16-mixed",
    "shards": 1,
    "tokens": 1024,
    "targets": 1000,
    "checkpointing": False,
    "chunk_size": None,
}
LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None, reason="the trace needs a torch for CPUs alone"
)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["objective=clm"], marks=pytest.mark.long),
        pytest.param(["objective=mlm"], marks=pytest.mark.longest),
        pytest.param(["objective=clm", "documents=9"], marks=pytest.mark.longest),
        pytest.param(["objective=mlm", "checkpointing=true"], marks=pytest.mark.long),
        pytest.param(["objective=clm", "checkpointing=selective"], marks=pytest.mark.longest),
    ],
    ids=" ".join,
)
def test_estimate_is_what_a_trace_has_in_use(words: list[str]) -> None:
    words = [*words, "size=small", "batch_size=64"]
    done = subprocess.run([sys.executable, "-c", TRACE, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    settings = Settings.parse(words)
    tokenizer = train.make_tokenizer(train.vocabulary_of(settings.size, settings.causal))
    tokens = settings.batch_size * settings.positions
    estimate = memory.estimate_training(
        train.make_model(tokenizer, settings.size, settings.causal, settings.positions),
        **ONE_GPU
        | {
            "tokens": tokens,
            "targets": tokens - settings.batch_size if settings.causal else round(0.15 * tokens),
            "checkpointing": {"false": False, "true": True}.get(settings.checkpointing, settings.checkpointing),
            "masked_positions": settings.positions if settings.documents else 0,
        },
    )
    assert sum(estimate) == pytest.approx(int(done.stdout), rel=0.05)
    assert estimate.activations > 0.15 * sum(estimate)  # so that a wrong number of them is seen


def scratch(architecture: str, **config: Any) -> Any:
    """The block `model` of a model from scratch."""
    target = f"{loading.__name__}.from_scratch"
    return OmegaConf.create({"_target_": target, "architecture": architecture, "config": config})


@pytest.mark.parametrize(
    ("block", "auto_class"),
    [
        (scratch("gpt2", n_embd=32, n_layer=2, n_head=2), "AutoModelForCausalLM"),
        (scratch("llama", **LLAMA, num_key_value_heads=2), "AutoModelForCausalLM"),
        (scratch("modernbert", hidden_size=64, num_attention_heads=2, num_hidden_layers=2), "AutoModelForMaskedLM"),
    ],
    ids=lambda value: getattr(value, "architecture", ""),
)
def test_models_on_paper_are_those_that_are_made(block: Any, auto_class: str, tmp_path: Path) -> None:
    tokenizer = train.make_tokenizer(300)
    made = loading.from_scratch(tokenizer, auto_class, block.architecture, OmegaConf.to_container(block.config))
    made.save_pretrained(tmp_path)
    loaded = OmegaConf.create({"_target_": f"{loading.__name__}.pretrained", "name": str(tmp_path), "config": {}})
    for each in (block, loaded):
        model = model_without_weights(OmegaConf.create({"model": each}), tokenizer, auto_class)
        assert model is not None
        assert model.device.type == "meta"
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
        assert memory.estimate_training(model, **ONE_GPU) == memory.estimate_training(made, **ONE_GPU)


def llama(**config: Any) -> Any:
    return on_meta(scratch("llama", **LLAMA | config))


def on_meta(block: Any) -> Any:
    cfg = OmegaConf.create({"model": block})
    return model_without_weights(cfg, train.make_tokenizer(300), "AutoModelForCausalLM")


def test_parts_follow_from_strategy_and_precision() -> None:
    model = llama()
    count, layer = (memory.count_parameters(part)[0] for part in (model, layers(model)[0]))
    one = memory.estimate_training(model, **ONE_GPU)
    assert one[:3] == (4 * count, 4 * count, 8 * count)
    assert one.copies == 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1) - 2 * 300 * 64  # no embedding
    half = memory.estimate_training(model, **ONE_GPU | {"precision": "bf16-true"})
    assert half[:4] == (2 * count, 2 * count, 4 * count, 0)
    assert half.activations < one.activations
    full = memory.estimate_training(model, **ONE_GPU | {"precision": "32-true"})
    assert full[:4] == (4 * count, 4 * count, 8 * count, 0)
    assert full.activations > one.activations
    sharded = memory.estimate_training(model, **ONE_GPU | {"shards": 8})
    assert sharded[:3] == tuple(size // 8 for size in one[:3])
    assert sharded.copies == 2 * (count - 2 * layer)  # one of three layers, and what is outside of them
    assert sharded[4:] == one[4:]
    unknown = memory.estimate_training(model, **ONE_GPU | {"tensors": 1})
    assert (unknown.gradients, unknown.optimizer) == (4 * count, 0)


def test_layers_of_other_shapes() -> None:
    """In bytes per token: the table of `layer_bytes`, by its parts."""

    def taken(model: Any) -> int:
        return memory.layer_bytes(layers(model)[0], 64, "bf16-mixed")

    assert taken(llama()) == 12 * 64 + 2 * 160 + 6 * 64 + 6 * 160 + 16 * 64
    assert taken(llama()) - taken(llama(num_key_value_heads=1)) == 2 * 2 * 48  # keys and values of 16 rather than 64
    gpt2 = on_meta(scratch("gpt2", n_embd=64, n_head=2))
    assert taken(gpt2) == 38 * 64
    config = LLAMA | {"num_key_value_heads": 4}
    mixture = on_meta(scratch("mixtral", **config))
    assert [memory.is_plain(layers(model)[0]) for model in (llama(), gpt2, mixture)] == [True, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_model_that_no_machine_here_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 billion parameters on 8 GPUs; nothing of them is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    model = ["model=scratch", "model.architecture=llama"]  # its size by default is that of Llama 7B
    words = [word for word in TINY if not word.startswith("model.")]
    run_verb("preview", *words, *model, "trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=8")
    said = capsys.readouterr().out
    count = int(re.search(r"For ([\d,]+) parameters, divided over 8 GPUs", said)[1].replace(",", ""))  # type: ignore[index]
    assert count > 6e9
    rows = dict(re.findall(r"│ (.+?) +│ ([\d.]+) GiB", said))
    assert float(rows["weights"]) == pytest.approx(4 * count / 8 / 2**30, abs=0.01)
    assert float(rows["optimizer"]) == pytest.approx(8 * count / 8 / 2**30, abs=0.01)
    assert "in bf16-mixed." in said
    assert "It fits a GPU of 24 GB." in said
    assert "Nothing was measured. trainer.accelerator=gpu: there is no GPU here" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("needed", "says"),
    [(1, "It fits a GPU of 24 GB."), (40 * 10**9, "GPU of 80 GB."), (141 * 10**9, "No GPU of up to 141 GB")],
)
def test_smallest_gpu_with_room(needed: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in on_paper.comparison(needed)


def test_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    assert on_paper.comparison(7 * 2**30) == "The GPU here has 8.00 GiB, which is enough."
    assert on_paper.comparison(9 * 2**30) == "The GPU here has 8.00 GiB, which is too little."
