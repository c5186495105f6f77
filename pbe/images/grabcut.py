"""Masks from boxes, by OpenCV's GrabCut (Rother, Kolmogorov and Blake 2004)."""

from __future__ import annotations

import numpy as np

from pbe.images.windows import Box, mask_bounding_box

try:
    import cv2
except ImportError as error:
    raise ImportError("drawing masks needs OpenCV, the extra masks: pip install -e .[masks]") from error

ROUNDS = 5  # of fitting the two mixtures of colours and segmenting by them
HOLE = 0.02  # of the object's area: smaller holes are noise
FILL = (0.3, 0.95)  # share of its box that an object takes; less is a piece of it, more is the whole scene
REACH = 0.85  # least share of the box's width and height that an object takes, since the box was drawn around it


def segment(picture: np.ndarray, box: Box) -> np.ndarray:
    """bool (H, W): the largest piece that differs in colour from what surrounds the box, its small holes filled.

    picture: uint8 (H, W, 3). Empty where nothing differs.
    """
    labels: np.ndarray = np.full(picture.shape[:2], cv2.GC_BGD, np.uint8)
    labels[box.slices] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)  # of the mixtures' first clusters
    cv2.grabCut(picture, labels, (0, 0, 0, 0), np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = labels == cv2.GC_PR_FGD
    if not found.any():
        return found
    numbers, areas = _pieces(found)
    found = numbers == 1 + areas[1:].argmax()
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
