"""The exemplar shown where it is to be painted, as AnyDoor does (Chen et al. 2023, arXiv 2307.09481, section 3.2).

Paint by Example tells the UNet of the exemplar in its context alone, and leaves the hole in the masked image gray. A
model of which `PaintByExampleConfig.collage` is true is shown the exemplar in that hole too: in training where its
object is, in an edit as large as fits, a little stretched. What it leaves of the hole goes on from what surrounds it.
Form and detail need not pass through the context; what is left to learn is to fit them in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.models.clip import CLIP_MEAN, CLIP_STD

STRETCH = 4 / 3
FADE = 0.03  # of the square root of the area in which the exemplar is shown


def collages(
    images: Tensor, masks: Tensor, exemplars: Tensor, aspects: Sequence[float], shown: Tensor | None = None
) -> Tensor:
    """The holes of masked images, (B, 3, H, W) in [-1, 1], with each exemplar as large as fits: see `collage`.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        masks: (B, 1, H, W), 1 = keep; with nothing to repaint a hole is empty.
        exemplars: (B, 3, S, S) as CLIP takes them, squeezed into squares.
        aspects: height over width of their B pictures.
        shown: (B, 1, S, S) in [0, 1], their objects; None: all of them.
    """
    mean, std = (exemplars.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pictures = (exemplars * std + mean) * 2 - 1
    shown = torch.ones_like(exemplars[:, :1]) if shown is None else shown
    holes = torch.zeros_like(images)
    for hole, image, mask, picture, aspect, seen in zip(holes, images, masks, pictures, aspects, shown, strict=True):
        if (mask == 0).any():
            hole.copy_(collage(image, mask, picture, fitted_box(aspect, mask), seen))
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


def collage(image: Tensor, mask: Tensor, exemplar: Tensor, box: tuple[int, int, int, int], shown: Tensor) -> Tensor:
    """The hole of a masked image, (3, H, W) in [-1, 1], 0 where the image is kept: an exemplar's object in a box, which
    fades along the box's and the hole's edges into a smooth continuation of what surrounds the hole.

    Args:
        image: (3, H, W) in [-1, 1]; what is not kept of it is not seen.
        mask: (1, H, W), 1 = keep.
        exemplar: (3, S, S) in [-1, 1], squeezed into a square, white around its object.
        box: (x0, y0, x1, y1), the latter two exclusive; parts of it may lie outside of the image.
        shown: (1, S, S) in [0, 1], where the object is.
    """
    x0, y0, x1, y1 = box
    layers = torch.cat([exemplar - (1 - shown), shown])[None].float()  # colours times their opacity: white is 1
    layers = F.interpolate(layers, (y1 - y0, x1 - x0), mode="bilinear", antialias=True)[0]
    laid, region = layers.new_zeros(4, *mask.shape[-2:]), torch.zeros_like(mask, dtype=torch.float32)
    inside = (..., slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0)))
    top, left = max(-y0, 0), max(-x0, 0)
    height, width = region[inside].shape[-2:]
    laid[inside] = layers[:, top : top + height, left : left + width]
    region[inside] = (mask == 0)[inside].float()
    laid *= inner(region, round(FADE * region.sum().item() ** 0.5))
    around = interpolate_harmonically((image * mask)[None].float(), mask[None] > 0)[0]
    return (laid[:3] + (1 - laid[3:]) * around).to(image) * (mask == 0)


def inner(region: Tensor, width: int) -> Tensor:
    """A weight (1, H, W) that rises from 0 at the edge of a region (1, H, W), 1 = in it, to 1 at `width` pixels inside.
    The picture's edge is none."""
    share = F.avg_pool2d(region[None], 2 * width + 1, stride=1, padding=width, count_include_pad=False)[0]
    return (2 * share - 1).clamp(0, 1) * region


def interpolate_harmonically(values: Tensor, known: Tensor, sweeps: int = 4) -> Tensor:
    """Values (B, C, H, W) where they are known, (1, 1, H, W) bool, and between them nearly harmonic: each the mean of
    its neighbours. With nothing known they are 0.

    Cascadic multigrid (Bornemann and Deuflhard 1996): Jacobi's sweeps begin at the solution for half the size, which
    has twice as many.
    """
    if known.all():
        return values
    if not known.any():
        return torch.zeros_like(values)
    weight = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    half = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=0.25)
    coarse = interpolate_harmonically(half, weight > 0, 2 * sweeps)
    x = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(sweeps):
        p = F.pad(torch.where(known, values, x), (1, 1, 1, 1), mode="replicate")
        x = (p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]) / 4
    return torch.where(known, values, x)
