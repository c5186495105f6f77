"""The exemplar shown where it is to be painted, as AnyDoor does (Chen et al. 2023, arXiv 2307.09481, section 3.2).

Paint by Example tells the UNet of the exemplar in its context alone, and leaves the hole in the masked image gray. A
model of which `PaintByExampleConfig.collage` is true is shown the exemplar in that hole too, at the size and place in
which it fits: form and detail need not pass through the context, and what is left to learn is to fit them in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.images.windows import mask_bounding_box
from pbe.models.clip import CLIP_MEAN, CLIP_STD


def collages(exemplars: Tensor, aspects: Sequence[float], masks: Tensor) -> Tensor:
    """The holes of masked images, (B, 3, H, W) in [-1, 1]: `collage` of each. `exemplars` (B, 3, S, S) as CLIP takes
    them; `aspects` of B; `masks` (B, 1, H, W)."""
    mean, std = (exemplars.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pictures = (exemplars * std + mean) * 2 - 1
    return torch.stack([collage(*one) for one in zip(pictures, aspects, masks, strict=True)])


def collage(exemplar: Tensor, aspect: float, mask: Tensor) -> Tensor:
    """The hole of a masked image, (3, H, W) in [-1, 1]: an exemplar in the middle of the box around what is repainted,
    as large as fits there; gray (0) around it, and where the photo is kept.

    Args:
        exemplar: (3, S, S) in [-1, 1], squeezed into a square.
        aspect: height over width of its picture.
        mask: (1, H, W), 1 = keep; with nothing to repaint all is gray.
    """
    hole = exemplar.new_zeros(3, *mask.shape[-2:])
    repaint = mask[0] == 0
    if not repaint.any():
        return hole
    box = mask_bounding_box(repaint.cpu().numpy())
    width = min(box.width, box.height / aspect)
    size = [min(max(round(side), 1), most) for side, most in ((width * aspect, box.height), (width, box.width))]
    y, x = box.y0 + (box.height - size[0]) // 2, box.x0 + (box.width - size[1]) // 2
    fitted = F.interpolate(exemplar[None].float(), size, mode="bilinear", antialias=True)[0]
    hole[:, y : y + size[0], x : x + size[1]] = fitted.to(hole)
    return hole * repaint
