"""Training with a sharded model: the mesh of its ranks, and checkpoints of which each rank has its shards."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lmlab.training.checkpoint_io import load_checkpoint, load_shards


class ShardedStrategy(ModelParallelStrategy):
    """Lets a module shard its model over groups of ranks (FSDP2), and replicate it over the groups (HSDP).

    Lightning's own strategy would gather a checkpoint on rank 0, or write it into a folder that a kill leaves behind
    half-written, in a format whose files run code when they are read.
    """

    def __init__(self, shards: int):
        """Takes the number of ranks that hold a copy of the model between them."""
        super().__init__()
        self.shards = shards

    def setup_environment(self) -> None:
        self._setup_distributed()
        shape, names = (self.world_size // self.shards, self.shards), ("replicas", "shards")
        first = int(shape[0] == 1)  # a dimension of one rank would cost a collective
        mesh = init_device_mesh(self.root_device.type, shape[first:], mesh_dim_names=names[first:])
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state dict of the module, whose sharded tensors are `DTensor`s, the same for tied weights."""
        assert self.model is not None
        state, names = get_model_state_dict(self.model), dict[int, str]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            state[name] = state[names.setdefault(id(parameter), name)]
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state dict of an optimizer by the names of its parameters; its sharded tensors are `DTensor`s."""
        assert self.model is not None
        return get_optimizer_state_dict(self.model, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizers, each rank its shards of them, and returns the checkpoint for the rest of it."""
        path = Path(checkpoint_path)
        assert self.model is not None
        checkpoint: dict[str, Any] = load_checkpoint(path)
        loaded, whole = checkpoint, path.is_file()  # of a model that was not sharded
        if not whole:
            own = {
                "state_dict": self.lightning_module_state_dict(),
                "optimizer_states": [self.optimizer_state(optimizer) for optimizer in self.optimizers],
            }
            loaded = load_shards(path, {key: checkpoint[key] for key in own if key in checkpoint}, own)
        # A parameter that has had no gradient has no state in an optimizer. Strictly, that would be an error.
        options = StateDictOptions(full_state_dict=whole, strict=False)
        set_model_state_dict(self.model, loaded["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, loaded.get("optimizer_states", ()), strict=False):
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint
