"""From a record to an example: the recipe of Paint by Example (arXiv 2211.13227, section 3; the released code).

All boxes and masks are drawn first, from the photo's size alone (`draw_geometry`); then the pixels are read
(`read_pixels`) and an object of another photo is pasted where that is wanted; at last the object is recoloured where
that is wanted, the exemplar is augmented, and all is brought to the networks' ranges (`finish`).

Numbers in pixels are those of the paper, whose photos have a long side of about 1024 and whose exemplars are 224
wide. They follow the picture's size: a number in photo pixels is multiplied by (the photo's long side) / 1024, one in
exemplar pixels by (the exemplar's side) / 224.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.augment import Recoloring, augment_exemplar, draw_recoloring
from pbe.data.crop import (
    SQUARE,
    Photo,
    content_box,
    coverage_window,
    in_window,
    nearest_bucket,
    paper_window,
    to_pixels,
    usable,
)
from pbe.data.example import GRAY, Example, draw_bernoulli, draw_integers
from pbe.data.masks import bezier_outline, box_outline, grow_box
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import MaskSource, Record, Source, UnusablePicture, in_area
from pbe.data.transplant import Donor, donor_box, draw_donor, draw_place, paste, read_donor
from pbe.images.reading import fill_polygon, over_white, read_exemplar, shown_tensor
from pbe.images.windows import Box, extract_repaint
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.collage import collage, fitted_box

PHOTO_SIDE = 1024  # long side of the photos that numbers in pixels are given for


class Geometry(NamedTuple):
    """Where everything is, in pixels of the upright photo."""

    box: Box  # the object
    grown: Box  # what a box mask repaints; the window holds it
    exemplar_box: Box  # what the exemplar is cut from; in pixels of the donor's photo if there is one
    window: Box  # what becomes the example
    content: Box  # where the window goes in the example, in the example's pixels
    outline: np.ndarray | None  # (N, 2) polygon to repaint; None: the object's own mask
    object: int  # which of the record's boxes
    donor: Donor | None = None  # whose object is in the box

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the content."""
        return self.content.height, self.content.width


class Pixels(NamedTuple):
    """What was read and drawn, before augmentation: uint8 (3, h, w) pictures."""

    image: Tensor  # what the edit should give
    source: Tensor  # the photo to edit; the same tensor unless the record has a target
    repaint: Tensor  # bool (1, h, w)
    exemplar_crop: Tensor  # (3, S, S), what is augmented to the exemplar
    exemplar_aspect: float  # height over width before it was squeezed into the square
    exemplar_shown: Tensor | None = None  # float (1, S, S) in [0, 1], the object in it; the rest is white


class Stages(NamedTuple):
    """An example and how it came about."""

    record: Record
    geometry: Geometry
    pixels: Pixels
    example: Example


def make_example(
    record: Record, config: RecipeConfig, generator: torch.Generator, seed: int = 0, donors: Source | None = None
) -> Stages:
    """An example of one of the record's objects, drawn at random; `seed` is handed on to the training step.

    donors: whose objects are transplanted, if the config wants that. UnusablePicture if a picture is missing or
    unreadable, or no box has an area within the config's bounds. ValueError if an object to transplant has no mask.
    """
    if record.fixed:
        config = fixed_recipe(config)
    donor = None
    # Not drawn for at all where it is off, so that the paper's examples stay the same; so in `finish`.
    if config.needs_donors and not record.is_paired and draw_bernoulli(config.transplant, generator):
        assert donors is not None  # ExampleDataset checks it
        donor = draw_donor(donors, generator)
    with Photo(record.image) as photo:
        geometry = draw_geometry(record, photo.size, config, generator, donor)
        fill_background = config.fill_background > 0 and draw_bernoulli(config.fill_background, generator)
        pixels = read_pixels(record, geometry, photo, config, fill_background)
    return Stages(record, geometry, pixels, finish(record, geometry, pixels, config, generator, seed))


def fixed_recipe(config: RecipeConfig) -> RecipeConfig:
    """The recipe for a fixed edit: its sizes and resampling, and no limit or change of what is given."""
    return replace(config, augment=False, min_area=0.0, max_area=1.0, grow=0.0, object_mask=1.0, object_mask_margin=0.0)


def draw_geometry(
    record: Record,
    size: tuple[int, int],
    config: RecipeConfig,
    generator: torch.Generator,
    donor: Donor | None = None,
) -> Geometry:
    """Draws the object, or where the donor's goes, its mask and its window for a photo of `size` (height, width)."""
    number = choose_box(record, config, generator)
    box = to_pixels(record.boxes[number], size)
    px = max(size) / PHOTO_SIDE
    if donor is None:
        exemplar_box = box.grown(round(config.exemplar_margin * px), size)
    else:
        if config.transplant_anywhere and draw_bernoulli(config.transplant_anywhere, generator):
            box = draw_place(size, generator)
        box = donor_box(donor, box, size)
        margin = config.exemplar_margin * max(donor.size) / PHOTO_SIDE
        exemplar_box = donor.box.grown(round(margin), donor.size)
    grown = grow_box(box, size, config.grow, generator)

    object_mask = float(record.repaint_masks) if config.object_mask is None else config.object_mask
    if donor is None and record.masks is not None and draw_bernoulli(object_mask, generator):
        outline = None
    elif config.augment and draw_bernoulli(config.arbitrary_mask, generator):
        outline = bezier_outline(box, grown, config.jitter * px, generator)
    else:
        outline = box_outline(grown)

    bucket = (record.bucket or nearest_bucket(size)) if config.fit == "buckets" else SQUARE
    # Stretched by these whole numbers, a window of the bucket's aspect ratio is a square.
    x, y = (side // math.gcd(*bucket) for side in bucket)
    stretched = Box(grown.x0 * x, grown.y0 * y, grown.x1 * x, grown.y1 * y), (size[0] * y, size[1] * x)
    if record.fixed:
        window = None
    elif config.coverage is None:
        window = paper_window(*stretched, config.shrink, config.fit != "squash", generator)
    else:
        window = coverage_window(*stretched, config.coverage, generator)
    window = window or Box(0, 0, size[1] * x, size[0] * y)
    window = Box(window.x0 // x, window.y0 // y, -(-window.x1 // x), -(-window.y1 // y))
    content = content_box(window, config.resolution, config.fit, bucket)
    return Geometry(box, grown, exemplar_box, window, content, outline, number, donor)


def choose_box(record: Record, config: RecipeConfig, generator: torch.Generator) -> int:
    """The number of one of the boxes with an area within bounds, each as likely; UnusablePicture if there is none."""
    fitting = np.flatnonzero(in_area(record.boxes, (config.min_area, config.max_area)))
    if not fitting.size:
        raise UnusablePicture(
            "no box", f"{record.image} has no box of {config.min_area:.0%} to {config.max_area:.0%} of its area"
        )
    (choice,) = draw_integers([fitting.size - 1], generator)
    return int(fitting[choice])


def read_pixels(
    record: Record, geometry: Geometry, photo: Photo, config: RecipeConfig, fill_background: bool = False
) -> Pixels:
    """Reads and resamples the window and the exemplar; the letterbox is not yet around it."""
    size, exemplar_size = geometry.size, (config.exemplar_size,) * 2
    shown = draw_shown(record, geometry, photo.size, config) if fill_background else None
    aspect = geometry.exemplar_box.height / geometry.exemplar_box.width
    options = {"antialias": config.antialias, "draft": config.draft}
    if geometry.donor is not None:
        (host,) = photo.read([geometry.window], [size], **options)
        where = in_window(geometry.box, geometry.window, size)
        sizes = ((where.height, where.width), exemplar_size)
        cut_out, crop = read_donor(geometry.donor, geometry.exemplar_box, sizes, **options)
        source = paste(cut_out, host, where)
    elif record.exemplar is None:
        regions = [geometry.window, geometry.exemplar_box]
        source, crop = photo.read(regions, [size, exemplar_size], **options)
    else:
        (source,) = photo.read([geometry.window], [size], **options)
        with usable(record.exemplar):
            picture = read_exemplar(record.exemplar)  # an alpha channel is its object's mask
        aspect = picture.height / picture.width
        crop = T.resize(T.pil_to_tensor(over_white(picture)), list(exemplar_size), antialias=config.antialias)
        shown = shown_tensor(picture, config.exemplar_size)[0]
    image = source
    if record.target is not None:
        with Photo(record.target) as target:
            if target.size != photo.size:
                (height, width), (photo_height, photo_width) = target.size, photo.size
                raise UnusablePicture(
                    "unreadable",
                    f"target {record.target} is {width}x{height}, its photo {photo_width}x{photo_height}; "
                    "they must have one size",
                )
            (image,) = target.read([geometry.window], [size], **options)
    if geometry.outline is not None:
        repaint = draw_outline(geometry.outline, geometry)
    else:
        assert record.masks is not None  # draw_geometry chose one of them
        repaint = draw_object(record.masks[geometry.object], record.image, geometry, photo.size, config)
    return Pixels(image, source, repaint, crop, aspect, shown)


def draw_shown(record: Record, geometry: Geometry, size: tuple[int, int], config: RecipeConfig) -> Tensor | None:
    """Where the object is in its exemplar: (1, S, S) in [0, 1]; None where no mask says so."""
    mask, name = (record.masks or [None] * len(record.boxes))[geometry.object], record.image
    if geometry.donor is not None:
        mask, name, size = geometry.donor.mask, geometry.donor.image, geometry.donor.size
    if mask is None or record.exemplar is not None:
        return None
    with usable(f"the mask of {name}"):
        shown = torch.from_numpy(mask.draw(size)[geometry.exemplar_box.slices])
    if not shown.any():
        raise UnusablePicture("no box", f"the mask of {name} is empty in its box")
    return T.resize(shown[None].float(), [config.exemplar_size] * 2, antialias=True).clamp(0, 1)


def draw_outline(outline: np.ndarray, geometry: Geometry) -> Tensor:
    """The inside of an outline in photo pixels, as it falls into the window: bool (1, h, w)."""
    window, size = geometry.window, geometry.size
    scale = np.array([size[1] / window.width, size[0] / window.height])
    return torch.from_numpy(fill_polygon((outline - (window.x0, window.y0)) * scale, size))[None]


def draw_object(
    mask: MaskSource, name: Path, geometry: Geometry, photo_size: tuple[int, int], config: RecipeConfig
) -> Tensor:
    """The object's own mask in the window, with the config's margin: bool (1, h, w)."""
    window, size = geometry.window, geometry.size
    with usable(f"the mask of {name}"):
        drawn = mask.draw(photo_size)
    repaint = extract_repaint(drawn, window, size)
    px = max(photo_size) / PHOTO_SIDE * size[1] / window.width
    margin = round(config.object_mask_margin * px)
    repaint = F.max_pool2d(repaint, 2 * margin + 1, stride=1, padding=margin)[0] > 0
    if not repaint.any():
        raise UnusablePicture("no box", f"the mask of {name} is empty in the window {tuple(window)}")
    return repaint


def finish(
    record: Record, geometry: Geometry, pixels: Pixels, config: RecipeConfig, generator: torch.Generator, seed: int
) -> Example:
    """Recolours the object, augments the exemplar, puts the letterbox around, brings all to the networks' ranges."""
    content = geometry.content
    sides = (0, 0, 0, 0)
    if config.fit == "letterbox":
        sides = (content.x0, config.resolution - content.x1, content.y0, config.resolution - content.y1)
    may_recolor = config.augment and config.recolor and not record.is_paired and geometry.donor is None
    if may_recolor and draw_bernoulli(config.recolor, generator):
        pixels = recolored(pixels, geometry, draw_recoloring(generator))
    image = source = letterbox(to_unit_range(pixels.image), sides, 0.0)
    if pixels.source is not pixels.image:
        source = letterbox(to_unit_range(pixels.source), sides, 0.0)
    mask = letterbox((~pixels.repaint).float(), sides, 1.0)
    exemplar = pixels.exemplar_crop.contiguous().float() / 255
    given, shown = record.exemplar is not None, pixels.exemplar_shown
    if shown is not None and not given:
        exemplar = 1 + (exemplar - 1) * shown  # over white
    if config.collage:  # where the object is changes as the exemplar does
        exemplar = torch.cat([exemplar, torch.ones_like(exemplar[:1]) if shown is None else shown])
    if config.augment:
        exemplar = augment_exemplar(exemplar, config, generator)
    exemplar, shown = exemplar[:3], exemplar[3:]
    hole = GRAY
    if config.collage:  # of a given exemplar nothing says where it should go
        place = fitted_box(pixels.exemplar_aspect, mask) if given else shown_at(geometry)
        hole = collage(source, mask, exemplar * 2 - 1, place, shown)
    exemplar = T.normalize(exemplar, list(CLIP_MEAN), list(CLIP_STD))
    noisy = torch.tensor(record.noisy)
    return Example(image, source, mask, exemplar, torch.tensor(seed), str(record.image), noisy, hole)


def shown_at(geometry: Geometry) -> tuple[int, int, int, int]:
    """Where a collage shows the exemplar, (x0, y0, x1, y1) in the example's pixels: with its object where the object
    is, so that what is to be learned is how to fit it in."""
    box, shown, window, content = geometry.box, geometry.exemplar_box, geometry.window, geometry.content
    own = box if geometry.donor is None else geometry.donor.box  # in pixels of the exemplar's photo
    scales = [box.width / own.width, box.height / own.height] * 2
    edges = [side + (shown[i] - own[i]) * scales[i] for i, side in enumerate(box)]  # in the photo's
    x0, x1 = (content.x0 + (x - window.x0) * content.width / window.width for x in edges[::2])
    y0, y1 = (content.y0 + (y - window.y0) * content.height / window.height for y in edges[1::2])
    return round(x0), round(y0), max(round(x1), round(x0) + 1), max(round(y1), round(y0) + 1)


def recolored(pixels: Pixels, geometry: Geometry, recoloring: Recoloring) -> Pixels:
    """The same with the object's colours changed in the photo, where it is to be repainted, and in the exemplar."""
    image = recoloring(pixels.image.float() / 255, geometry.box, geometry.window)
    crop = recoloring(pixels.exemplar_crop.float() / 255, geometry.box, geometry.exemplar_box)
    image, crop = ((picture * 255).round().to(torch.uint8) for picture in (image, crop))
    image = torch.where(pixels.repaint, image, pixels.image)
    return pixels._replace(image=image, source=image, exemplar_crop=crop)


def letterbox(picture: Tensor, sides: tuple[int, int, int, int], value: float) -> Tensor:
    """A picture with bars of this value; `sides` are their widths on its left, right, top and bottom in pixels."""
    return F.pad(picture, sides, value=value) if any(sides) else picture


def to_unit_range(picture: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1]."""
    return picture.contiguous().float().mul_(2 / 255).sub_(1)
