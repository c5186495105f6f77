"""Layers that compute what the networks' own do, in fewer operations, and how they take their place."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.unet import Attention

# The number of bfloat16 scores that fit the cores' second-level caches (1 MiB each) while they are normalised and
# multiplied; fewer leave the products too narrow.
TILE_SCORES = 2**20
# Below this, all of a head's scores are few and the loop over the heads costs more than it saves.
MIN_TILED_TOKENS = 128

Layer = TypeVar("Layer", bound=nn.Module)


def swap(network: nn.Module, kind: type[Layer], form: Callable[[Layer], nn.Module]) -> None:
    """Puts form(layer) in the place of each layer of a kind, one by one: what nobody else holds is freed as it goes."""
    for name, child in network.named_children():
        if isinstance(child, kind):
            setattr(network, name, form(child))
        else:
            swap(child, kind, form)


class PhaseUpsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution, as four 2x2 convolutions: one per output phase.

    Along one axis the upsampled neighbours of an even output position 2i are the inputs i-1, i, i and those of an odd
    one i, i, i+1, so that with kernel (k0, k1, k2)

        y[2i]   = k0 x[i-1] + (k1 + k2) x[i]
        y[2i+1] = (k0 + k1) x[i] + k2 x[i+1]

    and zero padding meets the same positions: equal at the border too, with 4/9 of the products. Sizes that are not
    doubled, because the next level is odd, take the ordinary way.
    """

    takes = ("size",)

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.phases = nn.ModuleList(phase_convolutions(conv))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', *size), by default twice the size."""
        H, W = x.shape[-2:]
        h, w = size or (2 * H, 2 * W)
        if (h, w) != (2 * H, 2 * W):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :h, :w])
        x = F.pad(x, (1, 1, 1, 1))
        windows = [x[..., a : a + H + 1, b : b + W + 1] for a in (0, 1) for b in (0, 1)]
        return interlaced([conv(window) for conv, window in zip(self.phases, windows, strict=True)])


def phase_convolutions(conv: nn.Conv2d) -> list[nn.Conv2d]:
    """The four 2x2 convolutions, each for output rows a, a + 2, … and columns b, b + 2, …, with a, b = 00, 01, 10, 11.

    Their kernels are summed in float32 at least.
    """
    kernel = conv.weight.detach()
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    rows = [pair_sums(kernel, 2, a) for a in (0, 1)]
    return [convolution(pair_sums(kernel, 3, b).to(conv.weight), conv.bias) for kernel in rows for b in (0, 1)]


def pair_sums(kernel: Tensor, dim: int, phase: int) -> Tensor:
    """(k0, k1 + k2) for phase 0, (k0 + k1, k2) for phase 1."""
    k0, k1, k2 = kernel.split(1, dim)
    return torch.cat([k0, k1 + k2] if phase == 0 else [k0 + k1, k2], dim)


def convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution without padding that holds these very tensors."""
    out_channels, in_channels, height, width = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, (height, width), bias=bias is not None, device="meta")
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), bias
    return conv


def interlaced(phases: list[Tensor]) -> Tensor:
    """(B, C, 2 H, 2 W) of its four phases (B, C, H, W), in their memory format."""
    B, C, H, W = phases[0].shape
    last = phases[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(B, C, 2 * H, 2 * W, dtype=phases[0].dtype, device=phases[0].device, memory_format=layout)
    y[..., 0::2, 0::2], y[..., 0::2, 1::2], y[..., 1::2, 0::2], y[..., 1::2, 1::2] = phases
    return y


class FusedSelfAttention(nn.Module):
    """Self-attention of x (B, N, C) whose query, key and value come from one matrix product."""

    def __init__(self, attention: Attention, tile: bool):
        super().__init__()
        self.num_heads, self.tile = attention.num_heads, tile
        projections = (attention.to_q, attention.to_k, attention.to_v)
        weight = torch.cat([layer.weight.detach() for layer in projections])  # (3 C, C)
        self.to_qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.to_qkv.weight = nn.Parameter(weight, requires_grad=False)
        self.to_out = attention.to_out

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 C) -> 3 of (B, heads, N, C / heads)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1))
        if self.tile and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] >= MIN_TILED_TOKENS:
            y = tiled_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q over k and v, each (B, heads, N, d), head by head in blocks of queries.

    On a CPU in bfloat16 these products are faster than torch's fused kernel, whose own run at float32's speed. The
    scores are rounded to bfloat16 before the softmax: the error is twice the fused kernel's where scores are near 1,
    and grows with them.
    """
    B, heads, N, d = q.shape
    # The output is computed transposed, v' scores': the other way its columns are as few as d, which no kernel is for.
    y, v = q.new_empty(B, heads, d, N), v.transpose(2, 3).contiguous()
    block = max(64, TILE_SCORES // N)
    unused = q.new_empty(1)
    for one in range(B):
        for head in range(heads):
            keys, values = k[one, head].T, v[one, head]
            for start in range(0, N, block):
                rows = slice(start, start + block)
                # alpha scales the float32 sums, before they are rounded
                scores = torch.addmm(unused, q[one, head, rows], keys, beta=0, alpha=d**-0.5)
                y[one, head, :, rows] = values @ scores.softmax(dim=-1).T
    return y.transpose(2, 3)
