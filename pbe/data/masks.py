"""The region to repaint: grown boxes and arbitrary shapes around a box (arXiv 2211.13227, section 3.2).

Boxes are whole photo pixels; outlines are polygons (N, 2) of (x, y) in photo pixels, and may be fractional.
"""

from __future__ import annotations

import numpy as np
import torch

from pbe.data.example import draw_integers
from pbe.images.windows import Box

BEZIER_T = np.arange(1, 19)[:, None] * 0.05  # where the curves are sampled: .05, .10, ..., .90


def grow_box(box: Box, size: tuple[int, int], grow: float, generator: torch.Generator) -> Box:
    """Each side pushed out by a random whole number of pixels, 0 to int(grow x its free space) in a photo of `size`
    (height, width)."""
    height, width = size
    free = (box.x0, box.y0, width - box.x1, height - box.y1)
    left, up, right, down = draw_integers([int(grow * space) for space in free], generator)
    return Box(box.x0 - left, box.y0 - up, box.x1 + right, box.y1 + down)


def box_outline(box: Box) -> np.ndarray:
    """The four corners of a box, clockwise from the top left: (4, 2)."""
    return np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)], dtype=np.float64)


def bezier_outline(box: Box, grown: Box, jitter: float, generator: torch.Generator) -> np.ndarray:
    """An arbitrary shape around a box: (72, 2), not closed.

    Four quadratic Bezier curves lead from corner to corner of the box, B(t) = (1 - t)^2 P0 + 2 (1 - t) t P1 + t^2 P2.
    The middle control point P1 lies on the side of the grown box, above the middle of the box's side. Each point is
    then moved by one of 11 steps from -jitter to +jitter in x and in y: whole pixels for the paper's jitter of 5.
    """
    corners = box_outline(box)[:, None]  # (4, 1, 2), P0
    x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    middles = np.array([(x, grown.y0), (grown.x1, y), (x, grown.y1), (grown.x0, y)])[:, None]
    t = BEZIER_T
    curves = (1 - t) ** 2 * corners + 2 * (1 - t) * t * middles + t**2 * np.roll(corners, -1, axis=0)  # (4, 18, 2)
    steps = torch.randint(-5, 6, curves.shape, generator=generator).numpy()
    return (curves + steps * (jitter / 5)).reshape(-1, 2)
