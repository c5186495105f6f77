"""Poisson blending: what the model's picture gets wrong around the mask is subtracted inside it too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.images.windows import mask_bounding_box


def poisson_blend(edited: Tensor, image: Tensor, keep: Tensor) -> Tensor:
    """The edited window (B, 3, H, W) in [-1, 1], float32, with the image's colours around the mask and light to match.

    The autoencoder and the model do not give back exactly what they were shown: where the mask (1, 1, H, W), 1 = keep,
    keeps the `image` (B or 1, 3, H, W) their error is known, and it is taken to continue smoothly under the mask. This
    is Poisson image editing (Pérez et al. 2003, equation 4) with the edit as source. The edit stays as it is two pixels
    and more beside the mask, and everywhere if no pixel is kept.
    """
    known = keep > 0.5
    if known.all() or not known.any():
        return edited.float()
    blended = edited.float().clone()
    height, width = known.shape[-2:]
    rows, columns = mask_bounding_box(~known[0, 0].cpu().numpy()).grown(1, (height, width)).slices
    error = image.to(blended)[..., rows, columns] - blended[..., rows, columns]
    blended[..., rows, columns] += interpolate_harmonically(error, known[..., rows, columns].to(blended.device))
    return blended


def interpolate_harmonically(values: Tensor, known: Tensor, sweeps: int = 4) -> Tensor:
    """Values (B, C, H, W) where they are known, (1, 1, H, W) bool, and between them nearly harmonic: each the mean of
    its neighbours.

    Cascadic multigrid (Bornemann and Deuflhard 1996): Jacobi's sweeps begin at the solution for half the size, which
    has twice as many.
    """
    if known.all():
        return values
    weight = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    half = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=0.25)
    coarse = interpolate_harmonically(half, weight > 0, 2 * sweeps)
    x = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(sweeps):
        p = F.pad(torch.where(known, values, x), (1, 1, 1, 1), mode="replicate")
        x = (p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]) / 4
    return torch.where(known, values, x)
