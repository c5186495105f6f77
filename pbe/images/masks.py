"""Shaping masks, bool (H, W) arrays, True = repaint. Where a mask reaches the photo's border, it does not end there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from pbe.images.pillow import open_image
from pbe.images.reading import PictureLike, read_picture
from pbe.images.windows import Box, label_regions, mask_bounding_box, runs_of

MAX_STEPS = 10**8  # of growing: some 20 seconds
COLOUR_REACH = 32  # of 255: files with losses change colours

Sides: TypeAlias = Sequence[tuple[Literal["left", "right", "top", "bottom"], int]]


def shape_mask(
    repaint: np.ndarray,
    *,
    invert: bool = False,
    extend: Sides | None = None,
    fill_holes: bool = False,
    smooth: int = 0,
    grow: int = 0,
) -> np.ndarray:
    """The mask as an edit takes it: inverted; joined with what `extend` adds to the photo, whose size the result then
    has; its holes filled; smoothed; grown, or shrunk. Always in this order, and what is added stays in it whole.

    ValueError where nothing is left to repaint, or nothing to keep.
    """
    given = {"invert": invert, "extend": extend, "fill_holes": fill_holes, "smooth": smooth, "grow": grow}
    repaint, added = ~repaint if invert else repaint, strips(repaint.shape, extend or ())
    repaint = np.pad(repaint, padding(extend or ())) | added
    if fill_holes:
        repaint = without_holes(repaint)
    if smooth:
        repaint = smoothed(repaint, smooth)
    if grow:
        repaint = dilate(repaint, grow) if grow > 0 else ~dilate(~repaint, -grow)
    repaint |= added
    if repaint.all() or not repaint.any():
        changes = ", ".join(f"{name}={value!r}" for name, value in given.items() if value)
        state = "covers the whole image" if repaint.any() else "is empty"
        raise ValueError(f"with {changes or 'its pixels as they are'} the mask {state}; white = repaint")
    return repaint


def masks_by_colour(source: PictureLike, colours: Sequence[str | int]) -> list[np.ndarray]:
    """For each colour, "ff0000", or value of an index picture, 0 to 255, where a mask picture has it: bool (H, W).

    Colours need not be exact, since files are not: a pixel has the nearest of those within 32 of 255 a channel.
    Index pictures are those of a palette, and integers (H, W). ValueError where a colour is none, or nowhere.
    """
    texts = [str(colour).lower().removeprefix("#") for colour in colours]
    if all(re.fullmatch(r"\d{1,3}", text) for text in texts):
        values, wanted, reach = read_indices(source), np.array([[int(text)] for text in texts]), 0
    elif all(re.fullmatch(r"[0-9a-f]{6}", text) for text in texts):
        values, reach = np.asarray(read_picture(source, "mask").to_rgb8()), COLOUR_REACH
        wanted = np.array([list(bytes.fromhex(text)) for text in texts])
    else:
        raise ValueError(f"colours must be like ff0000, or all be values of an index picture, 0 to 255, got {colours}")
    far = np.stack([np.abs(values.astype(np.int16) - one.astype(np.int16)).max(axis=2) for one in wanted])
    nearest, found = far.argmin(axis=0), far.min(axis=0) <= reach
    masks = [found & (nearest == i) for i in range(len(wanted))]
    for colour, mask in zip(colours, masks, strict=True):
        if not mask.any():
            pairs = sorted(Image.fromarray(values.squeeze().astype(np.uint8)).getcolors(2**24) or (), reverse=True)
            most = ", ".join(bytes(one).hex() if isinstance(one, tuple) else str(one) for _, one in pairs[:5])
            raise ValueError(f"the mask has no pixel of colour {colour}; it has most of {most}")
    return masks


def read_indices(source: PictureLike) -> np.ndarray:
    """The values of an index picture: integers (H, W, 1)."""
    if isinstance(source, str | Path):
        with open_image(Path(source), f"mask {source}") as image:
            values = np.asarray(image)
    else:
        values = np.asarray(source)
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise ValueError("colours given as numbers need a mask of one channel, of a palette or gray: write ff0000")
    return values[..., None].clip(0, 256).astype(np.int16)


def padding(sides: Sides) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many pixels are added above and below, left and right: as `np.pad` takes them."""
    added: dict[str, int] = dict(sides)
    return (added.get("top", 0), added.get("bottom", 0)), (added.get("left", 0), added.get("right", 0))


def strips(size: tuple[int, int], sides: Sides) -> np.ndarray:
    """What is added to a photo of `size` (height, width): bool, of the new size."""
    return np.pad(np.zeros(size, bool), padding(sides), constant_values=True)


def without_holes(repaint: np.ndarray) -> np.ndarray:
    """The mask with all that no path leads out of to the photo's border, by steps across or down."""
    labels, count = label_regions(~repaint, diagonal=False)
    is_open = np.zeros(count + 1, bool)  # by label; the last is the mask's own, -1
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        is_open[border] = True
    is_open[-1] = False
    return ~is_open[labels]


def smoothed(repaint: np.ndarray, width: int) -> np.ndarray:
    """The mask blurred by a Gaussian of sigma = width / 2 pixels and cut at a half: straight edges stay, bars thinner
    than 0.7 widths and discs of less than 1.2 go, as do gaps and holes."""
    picture = Image.fromarray(repaint.astype(np.uint8) * 255)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(width / 2))) >= 128


def dilate(repaint: np.ndarray, radius: int) -> np.ndarray:
    """The pixels whose centres lie within `radius` of the centre of one of the mask's, exactly.

    A run of pixels in one row grows to a run in each row that its discs reach: the work goes by runs, not by pixels.
    ValueError for more of it than is worth waiting for, which only noise makes.
    """
    height, width = repaint.shape
    row, start, stop = runs_of(repaint)
    steps = np.zeros((height, width + 1), np.int32)  # of the number of runs, from each pixel to the next
    far = min(radius, height)
    if len(row) * far > MAX_STEPS:
        raise ValueError(f"the mask has too many dots and lines to grow or shrink by {radius}: smooth it (smooth=3)")
    for dy in range(-far, far + 1):
        reach, first, last = isqrt(radius**2 - dy**2), *np.searchsorted(row, (-dy, height - dy))  # rows are in order
        y = row[first:last] + dy
        np.add.at(steps, (y, np.maximum(start[first:last] - reach, 0)), 1)
        np.add.at(steps, (y, np.minimum(stop[first:last] + reach, width)), -1)
    return np.cumsum(steps[:, :-1], axis=1, dtype=np.int32) > 0


def shrink_to(repaint: np.ndarray, size: tuple[int, int], placement: Literal["centre", "bottom"]) -> np.ndarray:
    """What of the mask lies in the largest box of the aspect of `size` (height, width) that its own box holds, in the
    centre of that or at its bottom. ValueError where that is nothing."""
    box, (height, width) = mask_bounding_box(repaint), size
    scale = min(box.height / height, box.width / width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    x0 = box.x0 + (box.width - w) // 2
    y0 = box.y1 - h if placement == "bottom" else box.y0 + (box.height - h) // 2
    inner, placed = Box(x0, y0, x0 + w, y0 + h).slices, np.zeros_like(repaint)
    placed[inner] = repaint[inner]
    if not placed.any():
        raise ValueError(f"placement={placement!r} leaves nothing of the mask: its {placement} is not in it")
    return placed
