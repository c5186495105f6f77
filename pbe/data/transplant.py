"""Another photo's object in place of a photo's own: `data.recipe.transplant`, which is not the paper's.

In training the exemplar is the photo's own object, and what surrounds it tells much of it: a stalk that it is a flower,
a hanger that it is a shirt. A small model then hardly needs the exemplar, and memorises the photos if they are few. In
another photo nothing but the exemplar tells what to paint, and thousands of objects and photos make millions of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.crop import Photo, to_pixels, usable
from pbe.data.example import draw_integers, draw_uniform
from pbe.data.records import MaskSource, Source, UnusablePicture, upright_size
from pbe.images.windows import Box

PLACE_AREAS = (0.1, 0.4)  # shares of a photo


class Donor(NamedTuple):
    """An object to put into another photo."""

    image: Path
    mask: MaskSource
    size: tuple[int, int]  # (height, width) of its upright photo
    box: Box  # in pixels of that


def draw_donor(donors: Source, generator: torch.Generator) -> Donor:
    """One object of one of the records. UnusablePicture if its photo is; ValueError if it has no mask."""
    (number,) = draw_integers([len(donors) - 1], generator)
    with usable(f"{donors.name}[{number}]"):
        record = donors[number]
    with usable(record.image):
        size = upright_size(record.image)
    if record.masks is None:
        raise ValueError(f"{record.image} of {donors.name} has no mask, which objects to transplant need (data.donors)")
    (k,) = draw_integers([len(record.masks) - 1], generator)
    return Donor(record.image, record.masks[k], size, to_pixels(record.boxes[k], size))


def donor_box(donor: Donor, box: Box, size: tuple[int, int]) -> Box:
    """Where the donor's object goes in a photo of `size` (height, width), in place of what is in `box`: it has the
    area and centre of `box`, but its own aspect ratio, and lies inside the photo."""
    height, width = size
    scale = math.sqrt(box.area / donor.box.area)
    scale = min(scale, height / donor.box.height, width / donor.box.width)
    h, w = max(1, int(donor.box.height * scale)), max(1, int(donor.box.width * scale))
    x0 = min(max((box.x0 + box.x1 - w) // 2, 0), width - w)
    y0 = min(max((box.y0 + box.y1 - h) // 2, 0), height - h)
    return Box(x0, y0, x0 + w, y0 + h)


def draw_place(size: tuple[int, int], generator: torch.Generator) -> Box:
    """A place in a photo of `size` (height, width): of its shape, PLACE_AREAS of its area, anywhere inside."""
    side = math.sqrt(draw_uniform(*PLACE_AREAS, generator))
    h, w = (max(1, round(edge * side)) for edge in size)
    y0, x0 = draw_integers([size[0] - h, size[1] - w], generator)
    return Box(x0, y0, x0 + w, y0 + h)


class CutOut(NamedTuple):
    """An object at the size at which it is pasted."""

    picture: Tensor  # uint8 (3, h, w)
    alpha: Tensor  # (1, h, w) in [0, 1]: how much of each pixel the object covers


def read_donor(
    donor: Donor, exemplar_box: Box, sizes: Sequence[tuple[int, int]], *, antialias: bool, draft: bool
) -> tuple[CutOut, Tensor]:
    """The object, and the part `exemplar_box` of its photo as uint8 (3, S, S), at these two sizes (height, width).

    UnusablePicture if the photo or the mask is unreadable, or the mask has nothing in the box.
    """
    with Photo(donor.image) as photo:
        picture, crop = photo.read([donor.box, exemplar_box], sizes, antialias=antialias, draft=draft)
    with usable(f"the mask of {donor.image}"):
        mask = torch.from_numpy(donor.mask.draw(donor.size)[donor.box.slices])
    if not mask.any():
        raise UnusablePicture("no box", f"the mask of {donor.image} is empty in its box")
    # Antialiased whatever the config: a hard edge would tell the model where something was pasted.
    return CutOut(picture, T.resize(mask[None].float(), list(sizes[0]), antialias=True).clamp(0, 1)), crop


def paste(cut_out: CutOut, picture: Tensor, place: Box) -> Tensor:
    """A picture (3, h, w) with the object over it at `place`, which has the object's size."""
    rows, columns = place.slices
    result = picture.clone()
    pasted = torch.lerp(picture[..., rows, columns].float(), cut_out.picture.float(), cut_out.alpha)
    result[..., rows, columns] = pasted.round().to(torch.uint8)
    return result
