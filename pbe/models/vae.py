"""The autoencoder of latent diffusion: pictures to latents and back (Rombach et al. 2022, arXiv 2112.10752).

Attribute names are the keys of the CompVis checkpoints: `nin_shortcut` is a residual block's 1x1 skip convolution,
`quant_conv` and `post_quant_conv` are the 1x1 convolutions between the networks and the latent space.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.blocks import of_kind


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of `AutoencoderKL`; the defaults are those of Stable Diffusion v1.

    `latent_scale` brings latents to about unit variance; only this module applies it.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    latent_scale: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.channel_mult) - 1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a skip."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as projections."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        y = self.norm(x)
        # (B, C, h, w) -> (B, 1 head, h*w, C); in another order torch would hold all scores at once
        q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).transpose(1, 2).reshape(B, C, h, w)
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Halves both sides; the padding is on the right and bottom only, as in the original."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution; a `downsample` or `upsample` joins them where the network has one."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to the posterior's moments before `quant_conv`, (B, 2 z, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.channels
        for i, width in enumerate(widths):
            level = Level(previous, width, config.num_res_blocks)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            previous = width
        self.mid = Middle(previous)
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(of_kind(self.down, Level)):
            x = level(x)
            if i < len(self.down) - 1:
                x = level.downsample(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, z, h, w) after `post_quant_conv` to pixels (B, 3, f h, f w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):  # up[i] works at 1/2^i of the picture's size, so it is run last to first
            previous = widths[min(i + 1, len(widths) - 1)]
            level = Level(previous, width, config.num_res_blocks + 1)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i, level in reversed([*enumerate(of_kind(self.up, Level))]):
            x = level(x)
            if i > 0:
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian over *scaled* latents, each (B, z, h, w)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The latent for standard normal `noise` of the mean's shape."""
        return self.mean + self.std * noise


class AutoencoderKL(nn.Module):
    """Variational autoencoder whose latents are `downsampling` times smaller than the picture."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def moments(self, image: Tensor) -> Tensor:
        """Mean and log-variance of the *unscaled* posterior, (B, 2 z, h, w), for an image (B, 3, H, W) in [-1, 1]."""
        return self.quant_conv(self.encoder(pad_to_multiple(image, self.config.downsampling)))

    def encode(self, image: Tensor) -> Posterior:
        """The posterior over scaled latents of an image (B, 3, H, W) in [-1, 1].

        Sides that `downsampling` does not divide are continued by their last row and column, so that the latent
        has ceil(H / f) x ceil(W / f) cells.
        """
        mean, log_var = self.moments(image).chunk(2, dim=1)
        std = (0.5 * log_var.clamp(-30.0, 20.0)).exp()
        return Posterior(mean * self.config.latent_scale, std * self.config.latent_scale)

    def decode(self, z_0: Tensor) -> Tensor:
        """The picture (B, 3, f h, f w), about [-1, 1] and not clamped, of scaled latents (B, z, h, w)."""
        return self.decoder(self.post_quant_conv(z_0 / self.config.latent_scale))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column of x (B, C, H, W) until `multiple` divides both sides."""
    H, W = x.shape[-2:]
    bottom, right = -H % multiple, -W % multiple
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return x
