"""The patch discriminator of VQGAN (Esser et al. 2021, arXiv 2012.09841), after pix2pix (arXiv 1611.07004)."""

import itertools
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of `PatchDiscriminator`; the defaults are those of VQGAN.

    Each of the `num_layers` layers halves the picture and doubles the channels, up to eight times the first ones'.
    """

    channels: int = 64
    num_layers: int = 3


class PatchDiscriminator(nn.Sequential):
    """Pictures (B, 3, H, W) in [-1, 1] to a logit for each of their overlapping patches (B, 1, h, w): high for photos.

    Its norms see one picture at a time, so that a logit does not depend on the others of the batch.
    """

    def __init__(self, config: DiscriminatorConfig):
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < config.num_layers else 1
            layers += [nn.Conv2d(a, b, 4, stride, padding=1, bias=False), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
