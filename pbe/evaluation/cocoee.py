"""How the released scripts prepare pictures for the networks that judge: whole or a region, at their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from pbe.images.reading import read_picture
from pbe.images.windows import Box
from pbe.models.clip import CLIP_MEAN, CLIP_STD

CLIP_SIZE = 224
REAL_SIZE = 512  # to which the released script brings real photos before they are compared


def read_rgb(path: Path, name: str = "picture") -> Image.Image:
    """A picture file as 8-bit RGB, upright; raises as `read_picture`."""
    return read_picture(path, name).to_rgb8()


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1] of an RGB image."""
    return TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)


def normalise(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """(3, H, W) in [0, 1] less the mean and by the deviation of each channel."""
    return TF.normalize(pixels, list(mean), list(std))


def squared(image: Image.Image) -> Image.Image:
    """224 x 224 by Pillow's bicubic filter, whatever the aspect: all of a region is seen."""
    return image.resize((CLIP_SIZE, CLIP_SIZE), Image.Resampling.BICUBIC)


def centre(image: Image.Image, size: int, shorter: int | None = None, bicubic: bool = True) -> Image.Image:
    """The image with its shorter side resized to `shorter` (default: `size`), cropped to size x size in the middle."""
    filter_ = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    return TF.center_crop(TF.resize(image, [shorter or size], filter_), [size, size])


def real_photo(image: Image.Image) -> Image.Image:
    """A photo of the real set as the released script prepares it: torchvision's Resize(512), then CenterCrop(512)."""
    return centre(image, REAL_SIZE, bicubic=False)


# --- what the CLIP score compares, as released ------------------------------------------------------------------


def released_box(mask: Path) -> Box:
    """The box of a mask picture's 255 pixels without its last row and column.

    ValueError where nothing is left of it.
    """
    white = np.asarray(read_rgb(mask, "mask").convert("L")) == 255
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    if len(rows) < 2 or len(columns) < 2:
        raise ValueError(f"mask {mask} has no region of white (255) that is 2 pixels or more across")
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))


def released_region(result: Image.Image, box: Box) -> Tensor:
    """A result's box for CLIP: (3, 224, 224), resized bilinearly without antialiasing after it was normalised."""
    rows, columns = box.slices
    pixels = normalise(to_tensor(result))[None, :, rows, columns]
    return F.interpolate(pixels, size=(CLIP_SIZE, CLIP_SIZE), mode="bilinear", align_corners=False)[0]


def released_exemplar(exemplar: Image.Image) -> Tensor:
    """A exemplar for CLIP: (3, 224, 224), resized by Pillow's bicubic filter whatever its aspect."""
    return normalise(to_tensor(squared(exemplar)))
