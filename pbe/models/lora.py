"""Low-rank adapters on the UNet's attention projections (Hu et al. 2021, LoRA, arXiv 2106.09685).

An adapted layer computes W x + (alpha / rank) B A x. It keeps its own weight under the original key and adds
`lora_down` (A) and `lora_up` (B), so that a model with adapters still holds the original checkpoint's keys. A file of
adapters holds those tensors alone, a few megabytes (`pbe.checkpoints.adapters`, which reads others' files too).
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With a context of one token, the cross-attention's (attn2) query and key get no gradient: only value and output learn.
TARGETS = [r".*\.attn1\.to_(q|k|v)", r".*\.attn1\.to_out\.0", r".*\.attn2\.to_v", r".*\.attn2\.to_out\.0"]


@dataclass
class LoRAConfig:
    """How a model is adapted: by matrices of `rank`, scaled by alpha / rank, in the linear layers whose names match one
    of `targets` (regular expressions)."""

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(TARGETS))

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora.rank must be a whole number of at least 1, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be a positive number, got {self.alpha!r}")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"lora.targets: {target!r} is not a regular expression: {error}") from None


class LoRALinear(nn.Linear):
    """A linear layer and its low-rank adapter, which starts as nothing: `lora_up` is zero."""

    enabled = True  # see `adapters_off`

    def __init__(self, layer: nn.Linear, config: LoRAConfig, generator: torch.Generator):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = config.alpha / config.rank
        down = torch.randn(config.rank, layer.in_features, generator=generator) / layer.in_features**0.5
        self.lora_down = nn.Parameter(down.to(layer.weight))
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_down), self.lora_up) if self.enabled else y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same: W + (alpha / rank) B A, summed in float32."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        update = self.scale * (self.lora_up.float() @ self.lora_down.float())
        layer.weight = nn.Parameter((self.weight.float() + update).to(self.weight.dtype))
        layer.bias = self.bias
        return layer


def check_plain(model: nn.Module) -> None:
    """Raises `ValueError` for a model that has adapters already."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them, or load the model again")


def add_lora(model: nn.Module, config: LoRAConfig, generator: torch.Generator) -> list[nn.Parameter]:
    """Gives the layers that `config` targets an adapter each; returns the adapters' parameters, the ones to train.

    Raises `ValueError` if no linear layer's name matches, or the model has adapters already.
    """
    check_plain(model)
    return adapt(model, target_layers(model, config), config, generator)


def target_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """The linear layers that `config` targets, by name; raises `ValueError` if there are none."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(re.fullmatch(target, name) for target in config.targets)
    }
    if not layers:
        raise ValueError(f"no linear layer's name matches lora.targets {config.targets}")
    return layers


def adapt(
    model: nn.Module, layers: Mapping[str, nn.Linear], config: LoRAConfig, generator: torch.Generator
) -> list[nn.Parameter]:
    """Gives these layers, by name, an adapter each, as `add_lora` does."""
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, config, generator))
    return [parameter for name, parameter in model.named_parameters() if is_adapter(name)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora`."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merge_lora(model: nn.Module) -> None:
    """Makes the adapters part of the weights they adapt; the model is then as plain as before `add_lora`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return name.endswith((".lora_down", ".lora_up"))
