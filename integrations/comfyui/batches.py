"""ComfyUI's batches as arrays. IMAGE is float (B, H, W, 3) in [0, 1], MASK float (B, H, W), 1 = repaint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOADER = "ComfyUI's loader gives an empty mask of 64x64 for a picture without transparency"


def together(**batches: Sequence[Any] | Tensor) -> list[tuple[Any, ...]]:
    """What each result takes of batches that have one for each, or one for all; ValueError for other numbers."""
    sizes = {name: len(batch) for name, batch in batches.items()}
    number = max(sizes.values())
    if set(sizes.values()) - {1, number}:
        found = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(f"each batch must have one, or as many as the largest of them, got {found}")
    return [tuple(batch[i if len(batch) > 1 else 0] for batch in batches.values()) for i in range(number)]


def pixels_of(picture: Tensor) -> np.ndarray:
    """A picture (H, W, C) or mask (H, W) as float32; resampling by other nodes may have gone a little beyond [0, 1]."""
    return picture.detach().float().clamp(0, 1).cpu().numpy()


def masks_of(mask: Tensor) -> Tensor:
    """A MASK as (B, H, W), whatever dimensions other nodes left out or added."""
    return mask.reshape(-1, *mask.shape[-2:])


def drawn(mask: Tensor, name: str) -> np.ndarray:
    """A mask (H, W) as float32; ValueError where nothing is drawn in it."""
    height, width = mask.shape
    if not mask.max() >= 0.5:
        raise ValueError(f"{name} is empty ({width}x{height}): draw one (Open in MaskEditor) or connect one; {LOADER}")
    return pixels_of(mask)


def batch_of(pictures: Sequence[Any]) -> Tensor:
    """Arrays of equal sizes, pictures (H, W, C) or masks (H, W), as one batch."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32, copy=False))
