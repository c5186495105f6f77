"""Crops as vectors to compare: colours, pixels, latents of the autoencoder.

An embedding takes crops (N, 3, S, S) in [0, 1] and gives (N, D) unit vectors, so that their products are cosines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.models.vae import AutoencoderKL

Embedding = Callable[[Tensor], Tensor]

BINS = 6  # a colour channel
MIDDLE = 0.8  # of a crop's side: its corners are background more often than object


def resized(crops: Tensor, height: int, width: int | None = None) -> Tensor:
    """Crops (N, 3, H, W) at another size, a square by default."""
    return F.interpolate(crops, (height, width or height), mode="bilinear", antialias=True, align_corners=False)


def colour_histogram(crops: Tensor) -> Tensor:
    """The joint histogram of red, green and blue in the crops' middle ellipse, as square roots: products of two are
    Bhattacharyya coefficients, from 0 to 1. A colour between bins counts in both."""
    crops = resized(crops, 32)
    at = (torch.arange(32) + 0.5) / 16 - 1
    inside = at[:, None] ** 2 + at**2 <= MIDDLE**2
    pixels = crops[..., inside].clamp(0, 1) * (BINS - 1)  # (N, 3, P)
    weights = (1 - (pixels[..., None] - torch.arange(BINS)).abs()).clamp(min=0)  # (N, 3, P, BINS)
    red, green, blue = weights.unbind(dim=1)
    histogram = torch.einsum("npi,npj,npk->nijk", red, green, blue).flatten(1) / inside.sum()
    return histogram.sqrt()


def pixels(crops: Tensor, side: int = 32) -> Tensor:
    """The crops' own pixels at `side`, scaled so that a Euclidean distance of two is the root mean square difference.
    (No unit vectors: to measure distances, not cosines.)"""
    small = resized(crops, side).flatten(1)
    return small / small.shape[1] ** 0.5


class VAEEmbedding:
    """An autoencoder's latents of the crops, 8 x 8, place by place, less their mean over some training crops."""

    def __init__(self, vae: AutoencoderKL, crops: Tensor):
        self.vae = vae
        self.mean = self._latents(crops).mean(dim=0)

    def __call__(self, crops: Tensor) -> Tensor:
        return F.normalize(self._latents(crops) - self.mean, dim=1)

    @torch.no_grad()
    def _latents(self, crops: Tensor) -> Tensor:
        parameter = next(self.vae.parameters())
        side = 8 * self.vae.config.downsampling
        parts = (resized(part, side).to(parameter) * 2 - 1 for part in crops.split(128))
        return torch.cat([self.vae.encode(part).mean.float().flatten(1).cpu() for part in parts])
