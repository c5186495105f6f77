"""Files of low-rank adapters, as training with `training.lora` writes them: laid over a model that fits."""

from pathlib import Path

import torch
from torch import nn

from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint
from pbe.checkpoints.key_map import mismatches
from pbe.models.lora import TARGETS, LoRAConfig, LoRALinear, adapt, check_plain, is_adapter, target_layers


def load_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Lays the adapters of a file over a model; `weight` scales how much of them shows.

    Raises `FileNotFoundError`; `CheckpointError` where the file does not hold adapters or they do not fit the model;
    `ValueError` where the model has adapters already.
    """
    checkpoint = open_checkpoint(path)
    settings = checkpoint.entry.get("lora")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not hold adapters (its entry 'pbe' has no 'lora')")
    # The file's expressions are not run: one can backtrack for ever. Its tensors say which layers are adapted.
    targets = settings.get("targets", TARGETS)
    try:
        config = LoRAConfig(**{**settings, "targets": TARGETS})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its entry 'lora' has unknown or impossible values: {error}") from None
    check_plain(model)
    found = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}
    adapted = {name.rpartition(".")[0] for name in found if is_adapter(name)}
    if targets == TARGETS:
        adapted.update(target_layers(model, config))
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear) and name in adapted}
    expected = {}
    for name, layer in layers.items():
        expected[f"{name}.lora_down"] = (config.rank, layer.in_features)
        expected[f"{name}.lora_up"] = (layer.out_features, config.rank)
    if faults := mismatches(found, expected):
        raise CheckpointError(f"{path} does not fit the model: it {'; '.join(faults)}")
    adapt(model, layers, config, torch.Generator())
    with torch.no_grad():
        for name in expected:
            model.get_parameter(name).copy_(checkpoint.tensor(name))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.scale *= weight
