"""Checkpoints of sharded models on the disk, written and read here by one rank."""

import errno
import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lmlab.errors import UserError
from lmlab.training import checkpoint_io
from lmlab.training.checkpoint_io import AtomicCheckpointIO, damage, load_checkpoint, load_shards, load_weights
from lmlab.training.sharded import ShardedStrategy

WEIGHT, MOMENT = torch.arange(12.0).view(4, 3), torch.arange(5.0)


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[dict[str, Any]]:
    """One with two tied weights, a moment of an optimizer, and values that are not sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    weight, moment = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (WEIGHT, MOMENT))
    yield {
        "state_dict": {"model.embedding": weight, "model.head": weight, "tokens": torch.tensor(7)},
        "optimizer_states": [{"state": {"model.embedding": {"exp_avg": moment, "step": torch.tensor(3.0)}}}],
        "global_step": 3,
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(checkpoint: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def test_all_of_it_comes_back(saved: Path) -> None:
    again = AtomicCheckpointIO().load_checkpoint(saved)
    state, optimizer = again["state_dict"], again["optimizer_states"][0]["state"]["model.embedding"]
    assert torch.equal(state["model.embedding"], WEIGHT)
    assert state["model.head"] is state["model.embedding"]
    assert torch.equal(optimizer["exp_avg"], MOMENT)
    assert (int(state["tokens"]), float(optimizer["step"]), again["global_step"]) == (7, 3.0, 3)
    assert load_weights(saved, load_checkpoint(saved)).keys() == state.keys()


def test_shapes_are_there_before_any_tensor_is_read(saved: Path) -> None:
    state = load_checkpoint(saved)["state_dict"]
    assert state["model.head"].is_meta
    assert state["model.head"].shape == WEIGHT.shape
    assert sum(file.stat().st_size for file in saved.glob("shard-*")) < 2 * 4 * (12 + 5) + 1000  # the tied one once


def test_tensors_are_loaded_into_those_of_a_sharded_model(checkpoint: dict[str, Any], saved: Path) -> None:
    own = {"state_dict": {name: torch.zeros_like(t) for name, t in checkpoint["state_dict"].items()}}
    loaded = load_shards(saved, {"state_dict": load_checkpoint(saved)["state_dict"]}, own)["state_dict"]
    assert loaded["model.embedding"] is own["state_dict"]["model.embedding"]
    assert torch.equal(loaded["model.embedding"].full_tensor(), WEIGHT)


def test_any_bit_that_turned_is_damage(saved: Path) -> None:
    draw = random.Random(0)
    for file in saved.iterdir():
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), 50):
            turned = bytearray(content)
            turned[bit // 8] ^= 1 << bit % 8
            file.write_bytes(turned)
            if file.name == checkpoint_io.CHECKSUMS and damage(saved) is None:
                assert turned.split() == content.split()  # white space
            elif file.name != checkpoint_io.CHECKSUMS:
                assert damage(saved) == f"the checksum of {file.name} is another"
        file.unlink()
        assert damage(saved) == f"{file.name} is missing"
        file.write_bytes(content)
    assert damage(saved) is None


def test_code_in_it_does_not_run(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    path = tmp_path / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint | {"more": Runs()}, path)
    with pytest.raises(UserError, match="holds code"):
        load_checkpoint(path)
    assert not (tmp_path / "it ran").exists()


def test_a_full_disk_leaves_nothing(
    checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_io.HuggingFaceStorageWriter, "write_data", full)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-3.ckpt")
    assert "step-3.ckpt could not be kept, as the disk is full" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_same_step_of_a_model_that_is_sharded_or_not(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path, plain = tmp_path / "step-3.ckpt", {"state_dict": {"weight": WEIGHT}}
    for content in (checkpoint, plain, checkpoint):
        AtomicCheckpointIO().save_checkpoint(content, path)
        assert load_checkpoint(path)["state_dict"].keys() == content["state_dict"].keys()
    assert [file.name for file in tmp_path.iterdir()] == ["step-3.ckpt"]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.usefixtures("checkpoint")  # its process group
def test_a_parameter_without_a_gradient_has_no_state(sharded: bool, tmp_path: Path) -> None:
    """Such as those that read an encoder, in BART's decoder."""

    def strategy() -> ShardedStrategy:
        model = nn.Sequential(OrderedDict(used=nn.Linear(3, 4), unused=nn.Linear(3, 4)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        made = ShardedStrategy(1)
        made.model, made.optimizers = model, [torch.optim.AdamW(model.parameters())]
        return made

    first, again = strategy(), strategy()
    assert first.model is not None
    weight = first.model.get_parameter("used.weight")
    weight.grad = torch.ones_like(weight)
    first.optimizers[0].step()
    saved = {
        "state_dict": first.lightning_module_state_dict(),
        "optimizer_states": [first.optimizer_state(first.optimizers[0])],
    }
    if not sharded:
        saved = checkpoint_io.map_tensors(
            saved, lambda name, tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        )
    AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "step-1.ckpt")
    again.load_checkpoint(tmp_path / "step-1.ckpt")
    states = [made.optimizer_state(made.optimizers[0])["state"]["used.weight"] for made in (first, again)]
    assert torch.equal(states[1]["exp_avg"].full_tensor(), states[0]["exp_avg"].full_tensor())
    for name, weight in first.lightning_module_state_dict().items():
        assert torch.equal(again.lightning_module_state_dict()[name].full_tensor(), weight.full_tensor())
