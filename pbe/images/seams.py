"""Where an edit meets the photo: what the model's picture gets wrong around the mask is taken off inside it too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.images.windows import mask_bounding_box


def meet_photo(edited: Tensor, photo: Tensor, keep: Tensor) -> Tensor:
    """The edited window (B, 3, H, W) in [-1, 1], float32, with the photo's colours around the mask and light to match.

    The autoencoder and the model do not give back exactly what they were shown: where the mask (1, 1, H, W), 1 = keep,
    keeps the `photo` (B or 1, 3, H, W) their error is known, and it is taken to go on smoothly under the mask. This is
    Poisson image editing (Pérez et al. 2003, equation 4) with the edit as source. Without any kept pixel, the edit;
    two pixels and more beside the mask, the edit too.
    """
    known = keep > 0.5
    if known.all() or not known.any():
        return edited.float()
    met = edited.float().clone()
    box = mask_bounding_box(~known[0, 0].cpu().numpy()).grown(1, known.shape[-2:])
    error = photo.to(met)[(..., *box.slices)] - met[(..., *box.slices)]
    met[(..., *box.slices)] += continue_inside(error, known[(..., *box.slices)].to(met.device))
    return met


def continue_inside(values: Tensor, known: Tensor, sweeps: int = 4) -> Tensor:
    """Values (B, C, H, W) where they are known, (1, 1, H, W) bool, and between them nearly harmonic: each the mean of
    its neighbours.

    Cascadic multigrid (Bornemann and Deuflhard 1996): Jacobi's sweeps begin at the solution for half the size, which
    had twice as many.
    """
    if known.all():
        return values
    weight = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    half = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=0.25)
    coarse = continue_inside(half, weight > 0, 2 * sweeps)
    x = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(sweeps):
        p = F.pad(torch.where(known, values, x), (1, 1, 1, 1), mode="replicate")
        x = (p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]) / 4
    return torch.where(known, values, x)
