"""What the UNets share: the timestep's embedding, the residual block, and the way down and up again.

Attribute names are the keys of the CompVis and guided-diffusion checkpoints: the numbered children of a residual
block's `in_layers`, `emb_layers` and `out_layers` are those of the sequences in the originals, a norm, SiLU, dropout, a
convolution.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=nn.Module)


def of_kind(modules: Iterable[nn.Module], kind: type[Kind]) -> list[Kind]:
    """Those of the modules that are of a kind, in their order."""
    return [module for module in modules if isinstance(module, kind)]


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines then sines of the timesteps t (B,) at `dim / 2` geometric frequencies; float32 (B, dim)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a skip, told the timestep by an embedding between them.

    The embedding is added, or with `scale_shift` it scales and shifts the second norm's output (Dhariwal and Nichol
    2021, arXiv 2105.05233, adaptive group normalisation). `resample` halves or doubles both paths before the first
    convolution.
    """

    takes = ("emb",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_channels = out_channels * (2 if scale_shift else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, self.emb_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the originals' dropout, 0 here: it keeps the convolution's number
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.body(x, self.emb_layers(emb))

    def body(self, x: Tensor, emb: Tensor) -> Tensor:
        """The block, given what `emb_layers` makes of the embedding: the same for all positions."""
        if self.resample is None:
            h = self.in_layers(x)
        else:
            norm, act, conv = self.in_layers
            h = conv(resized(act(norm(x)), self.resample))
            x = resized(x, self.resample)
        emb = emb[:, :, None, None]
        if self.scale_shift:
            norm, act, dropout, conv = self.out_layers
            scale, shift = emb.chunk(2, dim=1)
            h = conv(dropout(act(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


def resized(x: Tensor, how: Literal["down", "up"]) -> Tensor:
    """x (B, C, h, w) at half its size, averaged, or twice its size, repeated."""
    return F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


# (B, T, context_dim) to attend to; or what a network prepared for inference made of it for each block
Context = Tensor | Sequence[Tensor]


class Signals(NamedTuple):
    """What the layers of a UNet may take beside the feature map."""

    emb: Tensor  # (B, …) of the timesteps
    context: Context | None
    size: Sequence[int]  # (h, w) to upsample to


class Layers(nn.ModuleList):
    """One entry of a UNet's blocks: layers in a row, each given the `Signals` that its class names in `takes`."""

    def forward(self, x: Tensor, signals: Signals) -> Tensor:
        for layer in self:
            x = layer(x, *[getattr(signals, name) for name in getattr(layer, "takes", ())])
        return x


class UShaped(nn.Module):
    """A network that goes down to lower resolutions and up again, where the features of the way down are joined on."""

    input_blocks: nn.ModuleList  # of Layers
    middle_block: Layers
    output_blocks: nn.ModuleList  # of Layers
    out: nn.Sequential

    def walk(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        """The network's output, given what its layers take of timesteps and context."""
        skips = self.descend(self.input_blocks, x, emb, context)
        x = self.middle_block(skips[-1], Signals(emb, context, skips[-1].shape[-2:]))
        return self.out(self.ascend(self.output_blocks, x, skips, emb, context))

    def descend(self, blocks: Iterable[nn.Module], x: Tensor, emb: Tensor, context: Context | None) -> list[Tensor]:
        """What each of these first input blocks gives: the features that the way up joins on."""
        skips = []
        for layers in blocks:
            x = layers(x, Signals(emb, context, x.shape[-2:]))
            skips.append(x)
        return skips

    def ascend(
        self, blocks: Iterable[nn.Module], x: Tensor, skips: list[Tensor], emb: Tensor, context: Context | None
    ) -> Tensor:
        """What these output blocks make of x and the last of `skips`, which they take out of the list."""
        for layers in blocks:
            x = torch.cat([x, copies(skips.pop(), x.shape[0])], dim=1)
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = layers(x, Signals(emb, context, size))
        return x


def copies(x: Tensor, count: int) -> Tensor:
    """x (B, …) repeated until there are `count` samples; x itself if there are already.

    A network prepared for inference has a sample for each context only from the first block that takes it.
    """
    return x if x.shape[0] == count else torch.cat([x] * (count // x.shape[0]))
