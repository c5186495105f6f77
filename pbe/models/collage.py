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
    rows, columns = (repaint.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return hole
    box_height, box_width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    width = min(box_width, box_height / aspect)
    h, w = min(max(round(width * aspect), 1), box_height), max(round(width), 1)
    y, x = rows[0] + (box_height - h) // 2, columns[0] + (box_width - w) // 2
    fitted = F.interpolate(exemplar[None].float(), (h, w), mode="bilinear", antialias=True)[0]
    hole[:, y : y + h, x : x + w] = fitted.to(hole)
    return hole * repaint
