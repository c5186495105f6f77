"""How a training step's networks run in less time and memory; what they hold under their names stays the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pbe.models.paint_by_example import PaintByExample
from pbe.models.unet import Downsample, ResBlock, SpatialTransformer, TransformerBlock, UNet, Upsample


def blocks_by_level(unet: UNet) -> list[list[nn.Module]]:
    """The residual and transformer blocks at each resolution, the highest first; the middle's are of the last."""
    levels: list[list[nn.Module]] = [[] for _ in unet.config.channel_mult]
    level = 0
    for layers in unet.input_blocks:
        level += isinstance(layers[0], Downsample)
        levels[level] += layers
    levels[level] += unet.middle_block
    for layers in unet.output_blocks:
        levels[level] += layers
        level -= isinstance(layers[-1], Upsample)
    return [[layer for layer in layers if isinstance(layer, (ResBlock, SpatialTransformer))] for layers in levels]


def checkpoint_blocks(unet: UNet, which: bool | int) -> None:
    """Makes each block keep its inputs alone for the backward pass, and run again there (Chen et al. 2016, arXiv
    1604.06174): all blocks (True), or those of so many levels of highest resolution.

    The first three levels take about the same time, and each keeps about half as much as the one above. Raises
    `ValueError` where the network has fewer levels.
    """
    levels = blocks_by_level(unet)
    num_levels = len(levels) if which is True else which
    if num_levels > len(levels):
        raise ValueError(f"training.gradient_checkpointing={num_levels}, but the UNet has {len(levels)} levels")
    for block in (block for level in levels[:num_levels] for block in level):
        # nothing in a block is random
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def skip_queries(unet: UNet) -> None:
    """Makes cross-attention the linear map of the context that it is while the context has a single token.

    The softmax over one score is 1, so that query, key and `norm2` change nothing and get no gradient: equal up to the
    order of sums. Blocks in which one of them trains, as adapters can, stay as they are.
    """
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            unread = (block.norm2, block.attn2.to_q, block.attn2.to_k)
            if not any(parameter.requires_grad for module in unread for parameter in module.parameters()):
                block.forward = partial(forward_single_token, block)


def forward_single_token(block: TransformerBlock, x: Tensor, context: Tensor) -> Tensor:
    """The block over x (B, N, C), for a context (B, 1, context_dim)."""
    x = x + block.attn1(block.norm1(x))
    x = x + block.attn2.to_out(block.attn2.to_v(context))  # (B, 1, C), the same for all positions
    return x + block.ff(block.norm3(x))


def keep_norms_half(unet: UNet) -> None:
    """Makes norms return the precision that they are given.

    Under autocast CUDA's return float32: values of twice the size, which the backward pass keeps. The statistics are
    float32 either way.
    """
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.forward = partial(norm_as_given, module)


def norm_as_given(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm` of x, in the precision of x."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def halve_frozen(model: PaintByExample, dtype: torch.dtype, layers: bool) -> dict[str, Tensor]:
    """Casts what does not train to `dtype`, in place; returns the values that it had, on the CPU, by name.

    The autoencoder, and CLIP's tokens unless they train, are computed in `dtype` throughout, and give float32.
    `layers`: the weights of all other linear and convolution layers that do not train too, as those beneath adapters:
    the model then runs under autocast to `dtype` alone.
    """
    vae, vision = model.vae, model.cond_stage_model.vision
    tower = (vision.embeddings, vision.pre_layrnorm, vision.encoder)
    halved = list(vae.parameters())
    vae.moments, vae.decode = partial(computed_in, dtype, vae.moments), partial(computed_in, dtype, vae.decode)
    in_tower = [parameter for module in tower for parameter in module.parameters()]
    if not any(parameter.requires_grad for parameter in in_tower):
        halved += in_tower
        vision.tokens = partial(computed_in, dtype, vision.tokens)
    if layers:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                halved += [p for p in (module.weight, module.bias) if p is not None and not p.requires_grad]
    chosen = {id(parameter) for parameter in halved}
    before = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen:
            before[name] = parameter.data.cpu()
            parameter.data = parameter.data.to(dtype)
    return before


def computed_in(dtype: torch.dtype, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The float32 result of a frozen network in `dtype`, whatever autocast would choose."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return function(x.to(dtype)).float()
