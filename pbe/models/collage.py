"""The exemplar shown where it is to be painted, as AnyDoor does (Chen et al. 2023, arXiv 2307.09481, section 3.2).

Paint by Example tells the UNet of the exemplar in its context alone, and leaves the hole in the masked image gray. A
model of which `PaintByExampleConfig.collage` is true is shown the exemplar in that hole too: in training where its
object is, in an edit as large as fits, a little stretched. Form and detail need not pass through the context; what is
left to learn is to fit them in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.models.clip import CLIP_MEAN, CLIP_STD

STRETCH = 4 / 3


def collages(exemplars: Tensor, aspects: Sequence[float], masks: Tensor) -> Tensor:
    """The holes of masked images, (B, 3, H, W) in [-1, 1], with each exemplar as large as fits: see `collage`.

    Args:
        exemplars: (B, 3, S, S) as CLIP takes them, squeezed into squares.
        aspects: height over width of their B pictures.
        masks: (B, 1, H, W), 1 = keep; with nothing to repaint a hole is gray.
    """
    mean, std = (exemplars.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pictures = (exemplars * std + mean) * 2 - 1
    holes = torch.zeros_like(masks, dtype=exemplars.dtype).repeat(1, 3, 1, 1)
    for hole, picture, aspect, mask in zip(holes, pictures, aspects, masks, strict=True):
        if (mask == 0).any():
            hole.copy_(collage(picture, fitted_box(aspect, mask), mask))
    return holes


def fitted_box(aspect: float, mask: Tensor) -> tuple[int, int, int, int]:
    """Where an exemplar of this height over width is largest in the middle of the box around what a mask (1, H, W),
    1 = keep, leaves to repaint, which is something: (x0, y0, x1, y1), the latter two exclusive. To fill the box it may
    be stretched, by up to STRETCH."""
    rows, columns = ((mask[0] == 0).any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    aspect = min(max(height / width, aspect / STRETCH), aspect * STRETCH)
    w = min(width, height / aspect)
    h, w = min(max(round(w * aspect), 1), height), max(round(w), 1)
    y, x = rows[0] + (height - h) // 2, columns[0] + (width - w) // 2
    return x, y, x + w, y + h


def collage(exemplar: Tensor, box: tuple[int, int, int, int], mask: Tensor) -> Tensor:
    """The hole of a masked image, (3, H, W) in [-1, 1]: an exemplar in a box, gray (0) around it and where the photo is
    kept.

    Args:
        exemplar: (3, S, S) in [-1, 1], squeezed into a square.
        box: (x0, y0, x1, y1), the latter two exclusive; parts of it may lie outside of the image.
        mask: (1, H, W), 1 = keep.
    """
    x0, y0, x1, y1 = box
    shown = F.interpolate(exemplar[None].float(), (y1 - y0, x1 - x0), mode="bilinear", antialias=True)[0]
    hole = exemplar.new_zeros(3, *mask.shape[-2:])
    inside = hole[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    top, left = max(-y0, 0), max(-x0, 0)
    inside.copy_(shown[:, top : top + inside.shape[1], left : left + inside.shape[2]])
    return hole * (mask == 0)
