"""Low-rank adapters of the UNet's layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

An adapted layer computes (W + s B A) x, with s = alpha / rank, or alpha / sqrt(rank) (rslora, Kalajdzievski 2023, arXiv
2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353) makes the rows of that weight as long as a magnitude that it
learns. The layer keeps its own weight under the original key and adds `lora_down` (A), `lora_up` (B) and with DoRA
`lora_magnitude`, so that a model with adapters still holds the original checkpoint's keys. A file of adapters holds
those tensors alone, a few megabytes (`pbe.checkpoints.adapters`, which reads others' files too).
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.adapters import Update
from pbe.models.detail import is_detail
from pbe.models.paint_by_example import PaintByExample

UNET = "model.diffusion_model."
QUERIES = (".attn2.to_q", ".attn2.to_k")  # of attention over the context
Targets = Literal["attention", "all-linear", "all"]


@dataclass
class LoRAConfig:
    """How a model is adapted: by matrices of `rank`, scaled by alpha / rank."""

    rank: int = 16
    alpha: float = 16.0
    targets: Targets = "attention"
    """The UNet's layers: attention's projections; with them all other linear layers and 1x1 convolutions; or all."""
    dora: bool = False
    """Learn the length of each row of a weight too."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora.rank must be a whole number of at least 1, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be a positive number, got {self.alpha!r}")
        if self.targets not in get_args(Targets):
            raise ValueError(f"lora.targets must be {', '.join(get_args(Targets))}, got {self.targets!r}")
        for name in ("dora", "rslora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"lora.{name} must be true or false, got {getattr(self, name)!r}")


class LoRALayer(nn.Module):
    """A linear layer or convolution and its low-rank adapter, which starts as nothing: `lora_up` is zero.

    A convolution's `lora_down` (rank, in, kh, kw) has its stride and padding, `lora_up` (out, rank, 1, 1) follows.
    `lora_magnitude` (out,) is None without DoRA.
    """

    plain: type[nn.Linear | nn.Conv2d]  # the class of the layer without an adapter
    enabled = True  # see `adapters_off`
    weight: Tensor
    bias: Any
    lora_magnitude: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: LoRAConfig, generator: torch.Generator):
        vars(self).update(vars(layer), _parameters=dict(layer._parameters))  # a layer as it was, with its settings
        weight, self.config = layer.weight, config
        down = torch.randn(config.rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        self.lora_down = nn.Parameter(down.to(weight))
        self.lora_up = nn.Parameter(weight.new_zeros(len(weight), config.rank, *[1] * (weight.ndim - 2)))
        self.register_parameter("lora_magnitude", None)
        self.scale = self.update().scale
        if config.dora:
            self.lora_magnitude = nn.Parameter(self.norms().to(weight))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        y = y + self.scale * self.low_rank(x)
        if self.lora_magnitude is None:
            return y
        # m / n V x = V x + (m / n - 1) V x with V = W + s B A and its rows' norms n: at first W x to the bit
        by_output = (-1, *[1] * (self.weight.ndim - 2))
        growth = (self.lora_magnitude / self.norms() - 1).to(y.dtype).view(by_output)
        return y + growth * (y if self.bias is None else y - self.bias.to(y.dtype).view(by_output))

    @abstractmethod
    def low_rank(self, x: Tensor) -> Tensor:
        """B A x."""

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Of the rows of W + s B A (out,), float32; a constant in the backward pass (arXiv 2402.09353, 4.3)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = self.lora_up.float().flatten(1) @ self.lora_down.float().flatten(1)
            norms = torch.linalg.vector_norm(self.weight.float().flatten(1) + self.scale * delta, dim=1)
        return norms.clamp_min(torch.finfo(torch.float32).eps)

    def update(self) -> Update:
        """What the adapter changes of the weight."""
        m = self.lora_magnitude
        magnitude = None if m is None else m.view(-1, *[1] * (self.weight.ndim - 1))
        factors = {"lora_down": self.lora_down, "lora_up": self.lora_up}
        return Update(factors, self.config.alpha, self.config.rslora, magnitude)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain layer that computes the same, whose weight is summed in float32."""
        weight = self.weight.float() + self.update().difference(self.weight)
        parameters = {"weight": nn.Parameter(weight.to(self.weight.dtype)), "bias": self.bias}
        layer = self.plain.__new__(self.plain)
        own = ("config", "scale", "enabled")
        vars(layer).update({name: x for name, x in vars(self).items() if name not in own}, _parameters=parameters)
        return layer


class LoRALinear(LoRALayer, nn.Linear):
    plain = nn.Linear

    def low_rank(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_down), self.lora_up)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    plain = nn.Conv2d

    def low_rank(self, x: Tensor) -> Tensor:
        return F.conv2d(self._conv_forward(x, self.lora_down, None), self.lora_up)


def check_plain(model: nn.Module) -> None:
    """Raises `ValueError` for a model that has adapters already."""
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them, or load the model again")


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The UNet's layers that adapters can change, by name."""
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear | nn.Conv2d)}
    return {name: layer for name, layer in layers.items() if name.startswith(UNET) and not is_detail(f"{name}.weight")}


def has_effect(model: nn.Module, name: str) -> bool:
    """Whether what a layer of the UNet holds can matter: queries and keys of attention over one token do not, since
    the softmax of one score is 1; they have no gradient."""
    one_token = isinstance(model, PaintByExample) and model.config.exemplar.tokens == "class"
    return not (one_token and name.endswith(QUERIES))


def target_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that training adapts, by name: of `targets`, those that have an effect in this model."""

    def is_target(name: str, layer: nn.Linear | nn.Conv2d) -> bool:
        if targets == "attention":
            return ".attn1." in name or ".attn2." in name
        return targets == "all" or isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)

    return {name: x for name, x in layers_of(model).items() if is_target(name, x) and has_effect(model, name)}


def add_lora(model: nn.Module, config: LoRAConfig, generator: torch.Generator) -> list[nn.Parameter]:
    """Gives the layers that `config` targets an adapter each; returns the adapters' parameters, the ones to train.

    Raises `ValueError` if the model has adapters already.
    """
    check_plain(model)
    for name, layer in target_layers(model, config.targets).items():
        kind = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        model.set_submodule(name, kind(layer, config, generator))
    return [parameter for name, parameter in model.named_parameters() if is_adapter(name)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora`."""
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
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
        if isinstance(module, LoRALayer):
            model.set_submodule(name, module.merged())


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return name.endswith((".lora_down", ".lora_up", ".lora_magnitude"))
