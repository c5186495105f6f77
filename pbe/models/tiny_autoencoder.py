"""TAESD: an autoencoder of plain convolutions, distilled from a latent diffusion's (Ollin Boer Bohan, TAESD, 2023).

It takes and gives the same scaled latents at about a tenth of the work, nearly the same pictures. The networks are
sequences, whose numbered layers are the keys of `taesd_encoder.pth` and `taesd_decoder.pth`: ReLUs, resamplings and
the clamp have numbers and no parameters.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.vae import pad_to_multiple


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of `TinyEncoder` and `TinyDecoder`; the defaults are TAESD's.

    A network has `num_blocks` blocks at each of the lower resolutions, and one at the picture's own.
    """

    channels: int = 64
    latent_channels: int = 4
    num_resamplings: int = 3
    num_blocks: int = 3

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along a side."""
        return 2**self.num_resamplings


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """Holds latents softly within -3 and 3."""

    def forward(self, z: Tensor) -> Tensor:
        return (z / 3).tanh() * 3


class Block(nn.Module):
    """Three convolutions around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = [conv3x3(channels, channels) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(True), convolutions[1], nn.ReLU(True), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x, inplace=True)


class TinyEncoder(nn.Sequential):
    """Pictures (B, 3, H, W) in [-1, 1] to scaled latents (B, z, ceil(H / f), ceil(W / f))."""

    def __init__(self, config: TinyConfig):
        C = config.channels
        layers: list[nn.Module] = [conv3x3(3, C), Block(C)]
        for _ in range(config.num_resamplings):
            layers += [conv3x3(C, C, stride=2, bias=False), *(Block(C) for _ in range(config.num_blocks))]
        super().__init__(*layers, conv3x3(C, config.latent_channels))
        self.config = config

    def forward(self, image: Tensor) -> Tensor:
        # TAESD's own pictures are in [0, 1]
        return super().forward((pad_to_multiple(image, self.config.downsampling) + 1) / 2)


class TinyDecoder(nn.Sequential):
    """Scaled latents (B, z, h, w) to pictures (B, 3, f h, f w), about [-1, 1] and not clamped."""

    def __init__(self, config: TinyConfig):
        C = config.channels
        layers: list[nn.Module] = [Clamp(), conv3x3(config.latent_channels, C), nn.ReLU(True)]
        for _ in range(config.num_resamplings):
            blocks = [Block(C) for _ in range(config.num_blocks)]
            layers += [*blocks, nn.Upsample(scale_factor=2), conv3x3(C, C, bias=False)]
        super().__init__(*layers, Block(C), conv3x3(C, 3))
        self.config = config

    def forward(self, z_0: Tensor) -> Tensor:
        return super().forward(z_0) * 2 - 1


class TinyAutoencoder(nn.Module):
    """Both networks, as diffusers' `AutoencoderTiny` has them in one folder."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)
