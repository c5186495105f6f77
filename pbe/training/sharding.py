"""Parameters, gradients and moments divided over processes: FSDP2, torch's `fully_shard`, under Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pbe.models.blocks import ResBlock
from pbe.models.unet import SpatialTransformer, UNet

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """All processes share in the parameters that a module's `configure_model` divides, and each sees other pictures.

    Its checkpoints are whole, and those of a run with whole parameters: either goes on from the other's.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    @property
    def lightning_restore_optimizer(self) -> bool:
        """That Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # not Lightning's, which loads parameters before the module has given them its own names
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        # what the module put there of its own it has already
        state = {name: x for name, x in checkpoint["state_dict"].items() if not isinstance(x, DTensor)}
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state in the first process, by the parameters' numbers as an optimiser saves it; else nothing."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = dict(get_optimizer_state_dict(self.model, inner, options=WHOLE))
        names = [name for group in state.get("param_groups", []) for name in group["params"]]
        return renamed(state, {name: i for i, name in enumerate(names)}) if names else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            state = renamed(saved, dict(enumerate(ordered)))
            set_optimizer_state_dict(self.model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimiser's state with other names of its parameters."""
    groups = [{**group, "params": [names[x] for x in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[x]: entry for x, entry in state["state"].items()}, "param_groups": groups}


def shard(module: nn.Module, unet: UNet, mesh: DeviceMesh, entries: tuple[str, ...]) -> None:
    """Divides over a mesh the UNet, block by block, and what else trains in `module`; frozen networks stay whole.

    Each parameter is whole while its block computes; what trains beside the UNet, while one of the methods `entries`
    runs, which alone may compute with it.
    """
    inside = set(unet.parameters())
    for block in unet.modules():
        if isinstance(block, (ResBlock, SpatialTransformer)):
            fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)
    whole = {p for p in module.parameters() if not p.requires_grad and p not in inside}
    fully_shard(module, mesh=mesh, ignored_params=whole)
    for entry in entries:
        register_fsdp_forward_method(module, entry)
