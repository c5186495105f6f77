"""Poisson blending: what the model's picture gets wrong around the mask is subtracted inside it too."""

from __future__ import annotations

from torch import Tensor

from pbe.images.windows import mask_bounding_box
from pbe.models.collage import interpolate_harmonically


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
