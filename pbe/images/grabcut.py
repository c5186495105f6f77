"""Masks from boxes and points, by OpenCV's GrabCut (Rother, Kolmogorov and Blake 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image

from pbe.images.reading import MaskLike, Picture, PictureLike, read_mask, read_picture
from pbe.images.windows import Box, mask_bounding_box
from pbe.io.json_text import shown

try:
    import cv2
except ImportError as error:
    raise ImportError("segmentation needs OpenCV, the extra masks: pip install -e .[masks]") from error

ROUNDS = 5  # of fitting the two mixtures of colours and segmenting by them
SIDE = 256  # long side at which an object is selected; GrabCut takes seconds for a whole photo
BOXES = (2, 0.6, 0.3)  # shares of the picture's sides; the first is all of it
SEED = 0.02  # radius of what is surely of the object, as a share of the short side
NEARLY_MOST = 0.8
NEARLY_ALL = 0.95  # of the picture
HOLE = 0.02  # of the object's area: smaller holes are noise
FILL = (0.3, 0.95)  # share of its box that an object takes; less is a piece of it, more is the whole scene
BORDER = 0.04  # share of a picture's sides that is surely around the one object that it shows
AROUND = 0.05  # what a box found around an object is grown by, as a share of its sides
REACH = 0.85  # least share of the box's width and height that an object takes, since the box was drawn around it


def segment(picture: np.ndarray, box: Box, seed: tuple[int, int, int] | None = None) -> np.ndarray:
    """bool (H, W): the largest piece that differs in colour from what surrounds the box, its small holes filled.

    picture: uint8 (H, W, 3). Empty where nothing differs.
    seed: a disc (x, y, radius) of the object, whose piece is taken instead.
    """
    labels: np.ndarray = np.full(picture.shape[:2], cv2.GC_BGD, np.uint8)
    labels[box.slices] = cv2.GC_PR_FGD
    if seed:
        cv2.circle(labels, seed[:2], seed[2], cv2.GC_FGD, cv2.FILLED)
    cv2.setRNGSeed(0)  # of the mixtures' first clusters
    cv2.grabCut(picture, labels, (0, 0, 0, 0), np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = (labels == cv2.GC_PR_FGD) | (labels == cv2.GC_FGD)
    if not found.any():
        return found
    numbers, areas = _pieces(found)
    found = numbers == (numbers[seed[1], seed[0]] if seed else 1 + areas[1:].argmax())
    numbers, areas = _pieces(~found)
    small = areas < HOLE * found.sum()
    small[0] = False  # number 0 is the object itself
    found[box.slices] |= small[numbers[box.slices]]  # a narrow strip around the box is not a hole
    return found


def _pieces(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each pixel's connected piece (H, W), from 1, 0 = none, and the areas by number (N + 1,)."""
    _, numbers, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return numbers, stats[:, cv2.CC_STAT_AREA]


def is_whole(mask: np.ndarray, box: Box) -> bool:
    """Whether a mask (H, W) fills its box as an object does, and reaches the box's sides."""
    if not FILL[0] <= mask[box.slices].mean() <= FILL[1]:
        return False
    found = mask_bounding_box(mask)
    return found.width >= REACH * box.width and found.height >= REACH * box.height


def select_object(
    image: PictureLike | Picture,
    *,
    point: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    name: str = "image",
) -> np.ndarray:
    """The mask, bool (H, W), of the object at a point (x, y) or in a rough box (x0, y0, x1, y1) around it, in pixels.

    Its colours tell it from what surrounds it, in a copy of at most 256 pixels a side. A box is the surer way.
    ValueError where nothing is found, and for what does not lie in the image, which messages call `name`.
    """
    if (point is None) == (box is None):
        raise ValueError("give a point (x, y) or a box (x0, y0, x1, y1) to select an object, one of them")
    picture = read_picture(image, name)
    height, width = picture.size
    small = picture.to_rgb8().resize(
        [max(round(side * min(1, SIDE / max(height, width))), 3) for side in (width, height)], Image.Resampling.BOX
    )
    pixels, scale = np.asarray(small), np.array([small.width / width, small.height / height])
    if point is not None:
        x, y = np.array(point, dtype=np.float64)
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"the point {shown(point)} is not in the {name} of {width}x{height} pixels")
        found = at_point(pixels, int(x * scale[0]), int(y * scale[1]))
    else:
        drawn = mask_bounding_box(read_mask(cast("MaskLike", box), picture.size, f"box in the {name}"))
        found = segment(pixels, inner_box(pixels, *(np.array(drawn) * np.tile(scale, 2))))
    if not 0 < found.mean() < NEARLY_ALL:
        advice = "click elsewhere on it, or draw a box around it"
        raise ValueError(f"no object is found in the {name} at {shown(box or point)}: {advice}")
    large = Image.fromarray(found).convert("L").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(large) >= 128


def whole_object(picture: np.ndarray) -> np.ndarray | None:
    """The mask, bool (H, W), of the one object that a picture uint8 (H, W, 3) shows; None where none is found whole.

    What differs from the picture's border is segmented again in a box around it, which, as `is_whole` asks, it fills.
    """
    height, width = picture.shape[:2]
    dx, dy = BORDER * width, BORDER * height
    found = segment(picture, inner_box(picture, dx, dy, width - dx, height - dy))
    if not found.any():
        return None
    x0, y0, x1, y1 = mask_bounding_box(found)
    dx, dy = AROUND * (x1 - x0), AROUND * (y1 - y0)
    box = inner_box(picture, x0 - dx, y0 - dy, x1 + dx, y1 + dy)
    found = segment(picture, box)
    return found if is_whole(found, box) else None


def at_point(picture: np.ndarray, x: int, y: int) -> np.ndarray:
    """The object at a point, bool (H, W), empty where there is none: of what boxes of several sizes around it find, the
    largest with nearly the most contrast along its outline. In a box within the object only the seed is left."""
    height, width = picture.shape[:2]
    radius = max(2, round(SEED * min(height, width)))
    chosen, most = np.zeros((height, width), bool), 0.0
    for share in BOXES:
        w, h = share * width / 2, share * height / 2
        found = segment(picture, inner_box(picture, x - w, y - h, x + w, y + h), (x, y, radius))
        contrast = outline_contrast(picture, found) if found.sum() > 4 * np.pi * radius**2 else 0.0
        if contrast * NEARLY_MOST > most:
            chosen, most = found, contrast
    return chosen


def inner_box(picture: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> Box:
    """A box of whole pixels that leaves some of the picture (H, W, 3) around it."""
    height, width = picture.shape[:2]
    left, top = min(max(int(x0), 1), width - 2), min(max(int(y0), 1), height - 2)
    return Box(left, top, min(max(round(x1), left + 1), width - 1), min(max(round(y1), top + 1), height - 1))


def outline_contrast(picture: np.ndarray, mask: np.ndarray) -> float:
    """The mean gradient of the colours, in CIELAB, along a mask's outline."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(np.float32)
    steps = np.hypot(cv2.Sobel(lab, cv2.CV_32F, 1, 0), cv2.Sobel(lab, cv2.CV_32F, 0, 1))
    outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return float(np.linalg.norm(steps, axis=2)[outline > 0].mean())
