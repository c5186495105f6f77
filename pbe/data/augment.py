"""Augmentation of the exemplar, so that it cannot simply be pasted back (arXiv 2211.13227, section 3.2).

Each step takes a picture (3, S, S) of floats and gives one of the same shape; what lies outside is mirrored at the
centres of the border pixels. `Recoloring` is not the paper's: it changes the object in photo and exemplar alike.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import draw_bernoulli, draw_integers, draw_uniform
from pbe.data.recipe_config import RecipeConfig
from pbe.images.windows import Box

EXEMPLAR_SIDE = 224  # of the exemplars that the recipe's numbers in pixels are given for


def augment_exemplar(exemplar: Tensor, recipe: RecipeConfig, generator: torch.Generator) -> Tensor:
    """Applies the recipe's flip, rotation, blur and warp to an exemplar (C, S, S), each with its probability."""
    px = exemplar.shape[-1] / EXEMPLAR_SIDE
    if draw_bernoulli(recipe.flip, generator):
        exemplar = T.horizontal_flip(exemplar)
    if draw_bernoulli(recipe.rotation, generator):
        exemplar = rotate(exemplar, draw_uniform(-recipe.rotation_degrees, recipe.rotation_degrees, generator))
    if draw_bernoulli(recipe.blur, generator):
        smallest, largest = (1 + 2 * round((kernel - 1) / 2 * px) for kernel in recipe.blur_kernels)
        (step,) = draw_integers([(largest - smallest) // 2], generator)  # all odd kernels between them are as likely
        exemplar = box_blur(exemplar, smallest + 2 * step)
    if draw_bernoulli(recipe.warp, generator):
        exemplar = affine_warp(exemplar, draw_warp(recipe.warp_shift / EXEMPLAR_SIDE, generator))
    return exemplar


def rotate(exemplar: Tensor, degrees: float) -> Tensor:
    """Turned counter-clockwise about the centre, bilinearly."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine_warp(exemplar, np.array([(c, -s, 0), (s, c, 0)]))


def box_blur(exemplar: Tensor, kernel: int) -> Tensor:
    """The mean over kernel x kernel pixels; `kernel` is odd, 1 changes nothing."""
    radius, size = kernel // 2, exemplar.shape[-1]
    padded = F.pad(exemplar, [radius] * 4, mode="reflect")
    across = functools.reduce(torch.add, (padded[..., i : i + size] for i in range(kernel)))
    return functools.reduce(torch.add, (across[..., i : i + size, :] for i in range(kernel))) / kernel**2


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


# --- of the object, in photo and exemplar alike ---------------------------------------------------------------

FADE = 0.35  # share of half the box, at its edge, over which a change of colours fades out
SATURATION = (0.5, 1.5)
TINT = 0.35  # the least that a tint leaves of a channel
LARGEST_GAMMA = 2.0


@dataclass(frozen=True)
class Recoloring:
    """Other colours for an object: rgb' = (M rgb)^gamma, where M turns hues about the axis of the grays and tints.

    What surrounds an object in its own photo tells much of its colours (similar objects, the light, matching things),
    so that a small model can do without the exemplar. Once the colours are changed in both, it cannot.
    """

    matrix: Tensor  # (3, 3)
    gamma: float

    def __call__(self, picture: Tensor, box: Box, region: Box) -> Tensor:
        """A picture (3, h, w) in [0, 1] of a photo's `region` with the object in `box` recoloured."""
        colours = torch.einsum("ij,jhw->ihw", self.matrix, picture).clamp(0, 1) ** self.gamma
        return torch.lerp(picture, colours, inside_weights(box, region, (picture.shape[-2], picture.shape[-1])))


def draw_recoloring(generator: torch.Generator) -> Recoloring:
    """Draws any hue, a saturation factor of 1/2 to 3/2, a tint, which colours white too, and a gamma of 1/2 to 2."""
    angle = draw_uniform(-math.pi, math.pi, generator)
    saturation = draw_uniform(*SATURATION, generator)
    tint = TINT + (1 - TINT) * torch.rand(3, generator=generator)
    gamma = LARGEST_GAMMA ** draw_uniform(-1, 1, generator)
    return Recoloring((tint / tint.max())[:, None] * turned_hues(angle, saturation), gamma)


def turned_hues(angle: float, saturation: float) -> Tensor:
    """(3, 3): rgb turned by an angle about the axis u of the grays and, across that axis, scaled.

    Rodrigues: u u' + saturation (cos(angle) (1 - u u') + sin(angle) [u]x).
    """
    gray = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return gray + saturation * (math.cos(angle) * (torch.eye(3) - gray) + math.sin(angle) * cross)


def inside_weights(box: Box, region: Box, size: tuple[int, int]) -> Tensor:
    """(h, w): how much a pixel of a photo's `region`, seen at `size`, belongs to `box`: 1 in its middle, 0 outside.

    A rounded shape, since an object seldom fills the corners of its box.
    """
    height, width = size
    x = region.x0 + (torch.arange(width) + 0.5) / width * region.width
    y = region.y0 + (torch.arange(height) + 0.5) / height * region.height
    u = (x - (box.x0 + box.x1) / 2) / (box.width / 2)
    v = (y - (box.y0 + box.y1) / 2) / (box.height / 2)
    radius = (u**4 + v[:, None] ** 4) ** 0.25
    t = ((1 - radius) / FADE).clamp(0, 1)
    return t * t * (3 - 2 * t)  # smooth at both ends
