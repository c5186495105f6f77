"""Files of low-rank adapters, as training with `training.lora` writes them: laid over a model that fits."""

from pathlib import Path

import torch
from torch import nn

from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint
from pbe.checkpoints.key_map import mismatches
from pbe.models.lora import LoRAConfig, LoRALinear, add_lora, is_adapter, merge_lora


def load_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Lays the adapters of a file over a model; `weight` scales how much of them shows.

    Raises `FileNotFoundError`; `CheckpointError` where the file does not hold adapters or they do not fit the model;
    `ValueError` where the model has adapters already.
    """
    checkpoint = open_checkpoint(path)
    settings = checkpoint.entry.get("lora")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not hold adapters (its entry 'pbe' has no 'lora')")
    try:
        config = LoRAConfig(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its entry 'lora' has unknown or impossible values: {error}") from None
    add_lora(model, config, torch.Generator())
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    found = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}
    if faults := mismatches(found, expected):
        merge_lora(model)  # adapters that are still nothing: the model is as it was
        raise CheckpointError(f"{path} does not fit the model: it {'; '.join(faults)}")
    with torch.no_grad():
        for name in expected:
            model.get_parameter(name).copy_(checkpoint.tensor(name))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.scale *= weight
