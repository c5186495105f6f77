"""The window of an image that is edited: its choice, the way into model pixels and the way back.

Boolean masks are called `repaint`: True where the image is to be repainted. Sizes are (height, width).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's mode L
TARGET_COVERAGE = 0.25  # share of a window that its mask takes where the image allows it
MAX_REGIONS = 100


class Box(NamedTuple):
    """A box of whole pixels; the right and bottom edges are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index an array with."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def grown(self, by: int, size: tuple[int, int]) -> Box:
        """The box with a margin on each side, less at the edges of an image of `size` (height, width)."""
        height, width = size
        return Box(max(self.x0 - by, 0), max(self.y0 - by, 0), min(self.x1 + by, width), min(self.y1 + by, height))


def mask_bounding_box(repaint: np.ndarray) -> Box:
    """The smallest box around the True pixels of a bool (H, W) mask; ValueError if there are none."""
    rows, columns = np.flatnonzero(repaint.any(axis=1)), np.flatnonzero(repaint.any(axis=0))
    if not rows.size:
        raise ValueError("the mask is empty: it has no pixel to repaint")
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


# --- choosing ---------------------------------------------------------------------------------------------


def choose_window(
    repaint: np.ndarray,
    resolution: int = 512,
    coverage: tuple[float, float] = (0.05, 0.5),
    margin: float = 0.1,
) -> Box:
    """The part of the image to edit: a square that holds the whole mask, with context around it.

    `repaint` is bool (H, W). The mask takes about a quarter of the window, and a share within `coverage`
    wherever the image's and the mask's shapes allow it; `margin` (share of the side, each side) is kept free
    around the mask's box as far as the lower coverage allows. The window lies inside the image, and its side
    is at least resolution / 8 (below that the image has nothing left to enlarge) and at most the image's
    short side. Where that square cannot hold the mask, or would be filled by more than the upper coverage,
    the window is a rectangle that spans the short side.

    ValueError for an empty mask and for coverage or margin out of range.
    """
    low, high = coverage
    if not 0 < low < high <= 1:
        raise ValueError(f"coverage must be (low, high) with 0 < low < high <= 1, got {coverage}")
    if not 0 <= margin < 0.5:
        raise ValueError(f"margin must be at least 0 and below 0.5, got {margin}")
    height, width = repaint.shape
    box, area, short = mask_bounding_box(repaint), int(np.count_nonzero(repaint)), min(repaint.shape)
    longest = max(box.width, box.height)

    if longest <= short and area <= high * short**2:
        side = max(math.sqrt(area / min(max(TARGET_COVERAGE, low), high)), longest / (1 - 2 * margin))
        side = math.ceil(min(side, math.floor(math.sqrt(area / low))))
        side = min(max(side, longest, math.ceil(resolution / 8)), short)
        window_height = window_width = side
    else:
        length = box.width if width >= height else box.height  # of the mask along the image's long side
        side = max(length / (1 - 2 * margin), area / (high * short))
        side = math.ceil(min(side, math.floor(area / (low * short))))
        side = min(max(side, length, short), max(height, width))
        window_height, window_width = (short, side) if width >= height else (side, short)

    x0 = min(max((box.x0 + box.x1 - window_width) // 2, 0), width - window_width)
    y0 = min(max((box.y0 + box.y1 - window_height) // 2, 0), height - window_height)
    return Box(x0, y0, x0 + window_width, y0 + window_height)


def model_size(window: Box, resolution: int = 512, multiple: int = 8) -> tuple[int, int]:
    """(height, width) at which the networks see the window.

    A square is resolution x resolution. A rectangle has `resolution` on its short side and keeps its aspect to
    the nearest `multiple`; above an area of 4 resolution^2 both sides shrink to that area.
    ValueError if `resolution` is not a positive multiple of `multiple`.
    """
    if resolution <= 0 or resolution % multiple:
        raise ValueError(f"resolution must be a positive multiple of {multiple}, got {resolution}")
    scale = resolution / min(window.height, window.width)
    height, width = window.height * scale, window.width * scale
    shrink = min(1.0, math.sqrt(4 * resolution**2 / (height * width)))
    # Rounding down where the cap binds keeps the area under it.
    to_multiple = round if shrink == 1 else math.floor
    return (
        max(multiple, multiple * to_multiple(height * shrink / multiple)),
        max(multiple, multiple * to_multiple(width * shrink / multiple)),
    )


def connected_regions(repaint: np.ndarray, gap: int = 8) -> list[np.ndarray]:
    """The separate regions of a bool (H, W) mask as bool (H, W) masks, from top to bottom; together they are the mask.

    Parts within about `gap` pixels of each other count as one region: one object painted in several strokes.
    ValueError for an empty mask and for more than 100 regions.
    """
    box = mask_bounding_box(repaint).grown(gap, repaint.shape)
    joined = repaint[box.slices]
    for _ in range((gap + 1) // 2):
        joined = _dilate(joined, square=True)
    labels, count = label_regions(joined)
    labels[~repaint[box.slices]] = -1
    if count > MAX_REGIONS:
        raise ValueError(
            f"the mask has {count} separate regions, but at most {MAX_REGIONS} can be edited one by one; "
            "remove its speckles, or edit it as one"
        )
    regions = []
    for label in range(count):
        region = np.zeros_like(repaint)
        region[box.slices] = labels == label
        regions.append(region)
    return regions


def runs_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of True in a bool (H, W) mask's rows, in reading order: row, start and exclusive stop, (N,) each."""
    padded = np.pad(mask, ((0, 0), (1, 1)))
    row, start = np.nonzero(padded[:, 1:] & ~padded[:, :-1])
    return row, start, np.nonzero(~padded[:, 1:] & padded[:, :-1])[1]


def label_regions(joined: np.ndarray, diagonal: bool = True) -> tuple[np.ndarray, int]:
    """Number the connected regions 0, 1, ... in reading order: int (H, W) labels, -1 outside; and their count.

    Runs of pixels in a row are the nodes of a graph; runs that touch in the next row, if only at a corner where
    `diagonal` says that this counts, are its edges.
    """
    height, width = joined.shape
    row, start, stop = runs_of(joined)
    stride, overlap = width + 1, 0 if diagonal else 1
    first = np.searchsorted(row * stride + stop, (row + 1) * stride + start + overlap, side="left")
    last = np.searchsorted(row * stride + start, (row + 1) * stride + stop - overlap, side="right")
    touching = last - first
    upper = np.repeat(np.arange(row.size), touching)
    lower = np.arange(upper.size) + np.repeat(first - (np.cumsum(touching) - touching), touching)

    root = np.arange(row.size)
    while (root[upper] != root[lower]).any():
        smallest = np.minimum(root[upper], root[lower])
        np.minimum.at(root, root[upper], smallest)
        np.minimum.at(root, root[lower], smallest)
        while (root != root[root]).any():
            root = root[root]

    roots, number = np.unique(root, return_inverse=True)
    # Steps of +(n + 1) at each start and -(n + 1) at each stop, summed along the row, paint every run at once.
    steps = np.zeros((height, width + 1), dtype=np.int32)
    steps[row, start] += (number + 1).astype(np.int32)
    steps[row, stop] -= (number + 1).astype(np.int32)
    return np.cumsum(steps[:, :-1], axis=1, dtype=np.int32) - 1, roots.size


# --- into the model and back ------------------------------------------------------------------------------


def extract_repaint(repaint: np.ndarray, window: Box, size: tuple[int, int]) -> torch.Tensor:
    """The window of a bool (H, W) mask at `size` (h, w): float32 (1, 1, h, w), 1 = repaint, 0 = keep.

    A model pixel is 1 if it touches any pixel to repaint, so that all that `composite` takes from the result was
    painted by the model, and no line or dot is too thin to be seen. The mask grows by less than a model pixel,
    or an image pixel where the window is enlarged.
    """
    _check_inside(window, repaint.shape)
    crop = torch.from_numpy(repaint[window.slices].astype(np.float32))[None, None]  # (1, 1, H, W)
    return F.adaptive_max_pool2d(crop, size)  # bin i spans floor(i H / h) .. ceil((i + 1) H / h): all that it touches


def feather_weights(repaint: np.ndarray, width: int) -> np.ndarray:
    """How much of the edit shows: float32 (H, W) in [0, 1], from a bool (H, W) mask.

    Exactly 0 outside the mask; inside it rises from 1 / width in the outermost pixel to 1 at `width` pixels deep.
    Thinner parts rise over a shorter distance, so that their middle reaches 1, and where they join a thick part the
    distance grows by one pixel per pixel. The image's own border is not an edge: a mask that reaches it stays 1 there.
    A width of 0 or 1 gives a hard edge. ValueError for a negative width and for an empty mask.
    """
    if width < 0:
        raise ValueError(f"the feather width must be 0 or more pixels, got {width}")
    width = max(width, 1)
    box = mask_bounding_box(repaint).grown(1, repaint.shape)
    inside = repaint[box.slices]
    radii = {max(width >> level, 1) for level in range(width.bit_length())}  # width, width / 2, ..., 1

    # Crosses and squares in turn make octagons, near enough to discs. Beyond the array nothing is background.
    depth = np.zeros(inside.shape, dtype=np.float32)  # 1 in the outermost pixel, `width` at most
    thickness = np.ones(inside.shape, dtype=np.int32)  # radius of the largest disc in the mask over this pixel
    core = inside
    for radius in range(1, width + 1):
        if not core.any():
            break
        depth += core
        if radius in radii:
            discs = core
            for step in range(radius - 1, 0, -1):
                discs = _dilate(discs, square=step % 2 == 0)
            for step in range(2):  # a ragged edge of 2 pixels is not a thin part
                discs = _dilate(discs, square=step % 2 == 0) & inside
            thickness[discs] = radius
        core = ~_dilate(~core, square=radius % 2 == 0)

    rise = np.full(inside.shape, width, dtype=np.float32)  # min over the mask's pixels q of thickness(q) + distance
    near = np.zeros_like(inside)
    for radius in range(1, width):
        if np.array_equal(near, inside):  # as it stays: any width beyond takes no longer
            rise -= width - radius
            break
        near = (_dilate(near, square=radius % 2 == 0) | (thickness == radius)) & inside
        rise -= near

    weights = np.zeros(repaint.shape, dtype=np.float32)
    weights[box.slices] = np.minimum(depth / rise, 1)
    return weights


def composite(pixels: np.ndarray, edited: torch.Tensor, window: Box, weights: np.ndarray) -> np.ndarray:
    """The image with its window repainted: a new array of the shape and dtype of `pixels`.

    `pixels` (H, W, C) is uint8, uint16 or float in [0, 1], with C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGBA.
    `edited` (1, 3, h, w) in [-1, 1] is resampled to the window; gray images take its luminance. `weights` (H, W)
    in [0, 1] say how much of it shows; where they are 0 the image is kept bit for bit. The edit is opaque.
    ValueError if weights and image differ in size, or weights outside the window are not 0.
    """
    if weights.shape != pixels.shape[:2]:
        raise ValueError(f"weights are {weights.shape}, the image is {pixels.shape[:2]} (height, width)")
    _check_inside(window, weights.shape)
    inner = weights[window.slices]
    if np.count_nonzero(inner) != np.count_nonzero(weights):
        raise ValueError(f"weights outside the window {tuple(window)} must be 0: the edit ends there")

    touched = inner > 0
    precision = np.promote_types(pixels.dtype, np.float32)
    resampled = resample(edited.detach().float().cpu(), (window.height, window.width))[0].permute(1, 2, 0).numpy()
    new = (resampled[touched].astype(precision) + 1) / 2  # (N, 3)
    old = pixels[window.slices][touched].astype(precision) / white_level(pixels.dtype)  # (N, C)
    w = inner[touched].astype(precision)[:, None]
    channels = pixels.shape[2]
    if channels < 3:
        new = new @ np.array(LUMINANCE, dtype=precision)[:, None]
    if channels in (2, 4):
        # "Over" in straight alpha, so that colours hidden under transparent pixels do not enter the seam.
        colour, alpha = old[:, :-1], old[:, -1:]
        new_alpha = alpha * (1 - w) + w
        blend = np.concatenate([(colour * alpha * (1 - w) + new * w) / new_alpha, new_alpha], axis=1)
    else:
        blend = old * (1 - w) + new * w

    if pixels.dtype.kind == "u":
        blend = np.rint(blend * white_level(pixels.dtype)).clip(0, white_level(pixels.dtype))
    result = pixels.copy()
    result[window.slices][touched] = blend.astype(pixels.dtype)
    return result


def white_level(dtype: np.dtype) -> int:
    """The value of white: the largest of an unsigned integer type, 1 of a float type."""
    return int(np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else 1


def resample(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A (B, 3, H, W) picture in [-1, 1] at another size (h, w), by antialiased bicubic interpolation."""
    return F.interpolate(picture, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _dilate(mask: np.ndarray, square: bool) -> np.ndarray:
    """Grow by one pixel: by the 3 x 3 square, or by the cross in it."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    across = tall if square else mask
    grown = tall.copy()
    grown[:, 1:] |= across[:, :-1]
    grown[:, :-1] |= across[:, 1:]
    return grown


def _check_inside(window: Box, size: tuple[int, int]) -> None:
    height, width = size
    if not (0 <= window.x0 < window.x1 <= width and 0 <= window.y0 < window.y1 <= height):
        raise ValueError(f"window {tuple(window)} must lie inside the image of {width}x{height} (width x height)")
