"""The window of a photo that the model sees: where it lies, and what is cut out of the photo there."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pbe.editing.settings import EditSettings
from pbe.images import windows
from pbe.images.reading import Picture
from pbe.images.windows import Box


def place_window(
    repaint: np.ndarray, window: Literal["auto", "full"] | tuple[int, int, int, int], margin: float, resolution: int
) -> Box:
    """The window of the photo to edit; raises `ValueError` for one outside the photo or not around the mask."""
    height, width = repaint.shape
    if isinstance(window, str):
        whole = Box(0, 0, width, height)
        return whole if window == "full" else windows.choose_window(repaint, resolution, margin=margin)
    box, inner = Box(*map(int, window)), windows.mask_bounding_box(repaint)
    across = 0 <= box.x0 <= inner.x0 and inner.x1 <= box.x1 <= width
    down = 0 <= box.y0 <= inner.y0 and inner.y1 <= box.y1 <= height
    if not (across and down):
        raise ValueError(
            f"window {tuple(box)} must hold the mask {tuple(inner)} and lie inside the photo of {width}x{height}"
        )
    return box


def feather_width(box: Box, resolution: int) -> int:
    """The seam's width in photo pixels where none is asked for."""
    return max(1, round(min(box.width, box.height) * max(1 / 64, 2 / resolution)))


def seam_weights(repaint: np.ndarray, box: Box, settings: EditSettings, resolution: int) -> np.ndarray:
    """How much of the edit shows, (H, W) in [0, 1]: in the mask, or in all of the window if it is not composited."""
    if settings.composite:
        width = feather_width(box, resolution) if settings.feather is None else settings.feather
        return windows.feather_weights(repaint, width)
    weights = np.zeros(repaint.shape, dtype=np.float32)
    weights[box.slices] = 1
    return weights


def crop_window(photos: list[Picture], repaint: np.ndarray, box: Box, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One window of each photo at `size` (height, width): pixels (B, 3, H, W) in [-1, 1], or (1, 3, H, W) if the photos
    are all the same, and the mask (1, 1, H, W), 1 = keep."""
    different = photos if any(photo is not photos[0] for photo in photos) else photos[:1]
    pixels = torch.cat([windows.resample(photo.rgb(box), size) for photo in different])
    return pixels, 1 - windows.extract_repaint(repaint, box, size)
