"""How a training step's networks run in less time and memory: by variants that are swapped in for their modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pbe.models.blocks import ResBlock
from pbe.models.clip import CLIPVisionTower
from pbe.models.paint_by_example import PaintByExample
from pbe.models.unet import Downsample, SpatialTransformer, TransformerBlock, UNet, Upsample
from pbe.models.vae import AutoencoderKL


class Variant(nn.Module):
    """Takes the place of `original` and computes in another way, with its parts and parameters under the same names.

    A subclass also inherits from the original's class.
    """

    def __init__(self, original: nn.Module):
        vars(self).update(vars(original))


def swap(
    root: nn.Module, variants: Mapping[type[nn.Module], type[Variant]], among: Collection[nn.Module] | None = None
) -> None:
    """Replaces the modules in `root` of these types, or only those `among` a choice, by their variants."""
    for name, module in list(root.named_modules()):
        if type(module) in variants and (among is None or module in among):
            root.set_submodule(name, variants[type(module)](module))


class Recomputed(Variant):
    """A block whose inputs alone are kept for the backward pass, where it runs again (arXiv 1604.06174)."""

    def forward(self, *inputs: Any) -> Tensor:
        # nothing in a block is random
        return checkpoint(super().forward, *inputs, use_reentrant=False, preserve_rng_state=False)


class RecomputedResBlock(Recomputed, ResBlock):
    """A residual block, recomputed."""


class RecomputedTransformer(Recomputed, SpatialTransformer):
    """A transformer, recomputed."""


def checkpoint_blocks(unet: UNet, which: bool | int) -> None:
    """Has all blocks (True) recomputed in the backward pass, or those of this many levels of highest resolution.

    The first three levels take about the same time, and each keeps about half as much as the one above. Raises
    `ValueError` where the network has fewer levels.
    """
    levels = blocks_by_level(unet)
    num_levels = len(levels) if which is True else which
    if num_levels > len(levels):
        raise ValueError(f"training.gradient_checkpointing={num_levels}, but the UNet has {len(levels)} levels")
    chosen = {block for level in levels[:num_levels] for block in level}
    swap(unet, {ResBlock: RecomputedResBlock, SpatialTransformer: RecomputedTransformer}, chosen)


def blocks_by_level(unet: UNet) -> list[list[nn.Module]]:
    """The residual and transformer blocks at each resolution, the highest first; the middle's are of the last."""
    levels: list[list[nn.Module]] = [[] for _ in unet.config.channel_mult]
    level = 0
    for layers in (list(block.children()) for block in unet.input_blocks):
        level += isinstance(layers[0], Downsample)
        levels[level] += layers
    levels[level] += unet.middle_block
    for layers in (list(block.children()) for block in unet.output_blocks):
        levels[level] += layers
        level -= isinstance(layers[-1], Upsample)
    return [[layer for layer in layers if isinstance(layer, (ResBlock, SpatialTransformer))] for layers in levels]


class SingleTokenBlock(Variant, TransformerBlock):
    """A transformer block for contexts of one token (B, 1, context_dim), of which cross-attention is a linear map.

    The softmax over one score is 1, so that query, key and `norm2` change nothing and get no gradient: equal up to the
    order of sums.
    """

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2.to_out(self.attn2.to_v(context))  # (B, 1, C), the same for all positions
        return x + self.ff(self.norm3(x))


def skip_queries(unet: UNet) -> None:
    """Makes transformer blocks `SingleTokenBlock`s."""
    swap(unet, {TransformerBlock: SingleTokenBlock})


class GroupNormAsGiven(Variant, nn.GroupNorm):
    """Returns the precision that it is given.

    Under autocast CUDA's norms return float32: values of twice the size, which the backward pass keeps. The statistics
    are float32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNormAsGiven(Variant, nn.LayerNorm):
    """As `GroupNormAsGiven`."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def keep_norms_half(unet: UNet) -> None:
    """Has all norms return the precision that they are given."""
    swap(unet, {nn.GroupNorm: GroupNormAsGiven, nn.LayerNorm: LayerNormAsGiven})


class FrozenVAE(Variant, AutoencoderKL):
    """An autoencoder that does not train, computed in its parameters' precision."""

    def moments(self, image: Tensor) -> Tensor:
        return in_precision_of(self.quant_conv.weight, super().moments, image)

    def decode(self, z_0: Tensor) -> Tensor:
        return in_precision_of(self.quant_conv.weight, super().decode, z_0)


class FrozenTower(Variant, CLIPVisionTower):
    """CLIP's tokens where they do not train, computed in their parameters' precision."""

    def early_tokens(self, image: Tensor) -> Tensor:
        return in_precision_of(self.pre_layrnorm.weight, super().early_tokens, image)

    def last_layer(self, tokens: Tensor) -> Tensor:
        return in_precision_of(self.pre_layrnorm.weight, super().last_layer, tokens)


def in_precision_of(parameter: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The float32 result of a frozen network in a parameter's precision, whatever autocast would choose."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return function(x.to(parameter.dtype)).float()


def cast_frozen(model: PaintByExample, dtype: torch.dtype, layers: bool) -> dict[str, Tensor]:
    """Casts what does not train to `dtype`, in place; returns the values that it had, on the CPU, by name.

    The autoencoder, and CLIP's tokens unless they train, are computed in `dtype` throughout, and give float32.
    `layers`: the weights of all other linear and convolution layers that do not train too, as those beneath adapters:
    the model then runs under autocast to `dtype` alone.
    """
    vision = model.cond_stage_model.vision
    tower = nn.ModuleList([vision.embeddings, vision.pre_layrnorm, vision.encoder])
    cast: set[Tensor] = {*model.vae.parameters()}
    swap(model, {AutoencoderKL: FrozenVAE})
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        cast |= {*tower.parameters()}
        swap(model, {CLIPVisionTower: FrozenTower})
    if layers:
        linear = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        cast |= {p for module in linear for p in (module.weight, module.bias) if p is not None and not p.requires_grad}
    before = {}
    for name, parameter in model.named_parameters():
        if parameter in cast:
            before[name] = parameter.data.cpu()
            parameter.data = parameter.data.to(dtype)
    return before
