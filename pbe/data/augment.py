"""Augmentation of the exemplar, so that it cannot simply be pasted back (arXiv 2211.13227, section 3.2).

Each step takes a picture (3, S, S) of floats and gives one of the same shape; what lies outside is mirrored at the
centres of the border pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import draw_integers, draw_uniform, happens


def augment(
    exemplar: Tensor,
    generator: torch.Generator,
    *,
    flip: float,
    rotation: float,
    rotation_degrees: float,
    blur: float,
    blur_kernels: tuple[int, int],
    warp: float,
    warp_shift: float,
) -> Tensor:
    """Each step in its turn, with its probability.

    Args:
        exemplar: (3, S, S).
        flip, rotation, blur, warp: probabilities of a horizontal flip, a rotation, a box blur, an affine warp.
        rotation_degrees: the largest angle, to either side.
        blur_kernels: the smallest and largest side of the box in pixels of this exemplar, odd; all odd sides between
            them are as likely.
        warp_shift: how far each of the warp's corner points may move in x and y, as a share of S.
    """
    if happens(flip, generator):
        exemplar = T.horizontal_flip(exemplar)
    if happens(rotation, generator):
        exemplar = rotate(exemplar, draw_uniform(-rotation_degrees, rotation_degrees, generator))
    if happens(blur, generator):
        smallest, largest = blur_kernels
        (step,) = draw_integers([(largest - smallest) // 2], generator)
        exemplar = box_blur(exemplar, smallest + 2 * step)
    if happens(warp, generator):
        exemplar = affine_warp(exemplar, draw_warp(warp_shift, generator))
    return exemplar


def rotate(exemplar: Tensor, degrees: float) -> Tensor:
    """Turned counter-clockwise about the centre, bilinearly."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine_warp(exemplar, np.array([(c, -s, 0), (s, c, 0)]))


def box_blur(exemplar: Tensor, kernel: int) -> Tensor:
    """The mean over kernel x kernel pixels; `kernel` is odd, 1 changes nothing."""
    radius, size = kernel // 2, exemplar.shape[-1]
    padded = F.pad(exemplar, [radius] * 4, mode="reflect")
    across = sum(padded[..., i : i + size] for i in range(kernel))
    return sum(across[..., i : i + size, :] for i in range(kernel)) / kernel**2


def draw_warp(shift: float, generator: torch.Generator) -> np.ndarray:
    """A random affine warp (2, 3) from pixels of the result to those of the exemplar, for `affine_warp`.

    Three corners of a centred square of two thirds of the exemplar's side move by up to `shift` of the side in x and
    y each. (The small displacements that albumentations adds in its ElasticTransform, with sigma 50 and alpha 1, are
    a hundredth of a pixel.)
    """
    corners = np.array([(2 / 3, 2 / 3), (2 / 3, -2 / 3), (-2 / 3, -2 / 3)])  # of a side that spans -1 to 1
    moves = torch.rand(3, 2, generator=generator, dtype=torch.float64).numpy() * 2 - 1
    moved = corners + 2 * shift * moves
    # M (x', y', 1) = (x, y); the pseudo-inverse also answers where the moved corners fall on one line.
    return (np.linalg.pinv(np.column_stack([moved, np.ones(3)])) @ corners).T


def affine_warp(exemplar: Tensor, matrix: np.ndarray) -> Tensor:
    """Resampled bilinearly: the result's pixel at (x, y) is the exemplar at matrix (x, y, 1), where both sides span
    -1 to 1 between the centres of the outermost pixels."""
    theta = torch.from_numpy(matrix).to(exemplar.dtype)[None]
    grid = F.affine_grid(theta, [1, *exemplar.shape], align_corners=True)
    return F.grid_sample(exemplar[None], grid, padding_mode="reflection", align_corners=True)[0]
