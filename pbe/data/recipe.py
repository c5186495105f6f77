"""From a record to an example: the recipe of Paint by Example (arXiv 2211.13227, section 3; the released code).

What is drawn at random is drawn first, from the photo's size alone (`draw_plan`); then the pixels are read
(`read_pixels`), another photo's object is put in or the object is recoloured if that is wanted, the exemplar is
augmented and all is put into the networks' ranges (`finish`).

Numbers in pixels are those of the paper, whose photos have a long side of about 1024 and whose exemplars are 224
wide. Others are treated alike: a number in photo pixels is multiplied by (the photo's long side) / 1024, one in
exemplar pixels by (the exemplar's side) / 224.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.augment import Recoloring, augment, draw_recoloring
from pbe.data.crop import (
    Photo,
    UnusablePicture,
    coverage_window,
    in_window,
    paper_window,
    place,
    to_pixels,
    usable,
)
from pbe.data.example import Example, draw_integers, happens
from pbe.data.masks import bezier_outline, box_outline, grow_box
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import MaskSource, Record, Source, in_area
from pbe.data.transplant import Donor, draw_donor, paste, placed, read_donor
from pbe.images.reading import fill_polygon, read_exemplar
from pbe.images.windows import Box, extract_repaint
from pbe.models.clip import CLIP_MEAN, CLIP_STD

PHOTO_SIDE, EXEMPLAR_SIDE = 1024, 224  # of the photos and exemplars that numbers in pixels are given for


class Plan(NamedTuple):
    """Where everything is, in pixels of the upright photo."""

    box: Box  # the object
    grown: Box  # what a box mask repaints; the window holds it
    reference: Box  # what the exemplar is cut from; in pixels of the donor's photo if there is one
    window: Box  # what becomes the example
    place: Box  # where the window goes in the example, in the example's pixels
    outline: np.ndarray | None  # (N, 2) polygon to repaint; None: the object's own mask
    object: int  # which of the record's boxes
    donor: Donor | None = None  # whose object is in the box


class Pixels(NamedTuple):
    """What was read and drawn, before augmentation: uint8 (3, h, w) pictures."""

    image: Tensor  # what the edit should give
    source: Tensor  # the photo to edit; the same tensor unless the record has a target
    repaint: Tensor  # bool (1, h, w)
    reference: Tensor  # (3, S, S)


class Stages(NamedTuple):
    """An example and how it came about."""

    record: Record
    plan: Plan
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
        config = as_it_is(config)
    donor = None
    # Not drawn for at all where it is off, so that the paper's examples stay the same; so in `finish`.
    if config.needs_donors and shows_itself(record) and happens(config.transplant, generator):
        donor = draw_donor(donors, generator)
    with Photo(record.image) as photo:
        plan = draw_plan(record, photo.size, config, generator, donor)
        pixels = read_pixels(record, plan, photo, config)
    return Stages(record, plan, pixels, finish(record, plan, pixels, config, generator, seed))


def as_it_is(config: RecipeConfig) -> RecipeConfig:
    """The recipe for a fixed edit: its sizes and resampling, and no limit or change of what is given."""
    return replace(config, augment=False, min_area=0.0, max_area=1.0, grow=0.0, object_mask=1.0, object_mask_margin=0.0)


def shows_itself(record: Record) -> bool:
    """Whether the record's photo is both what the edit should give and what the exemplar is cut from."""
    return record.reference is None and record.target is None


def draw_plan(
    record: Record,
    size: tuple[int, int],
    config: RecipeConfig,
    generator: torch.Generator,
    donor: Donor | None = None,
) -> Plan:
    """Draws the object, or the place of the donor's, its mask and its window for a photo of `size` (height, width)."""
    number = choose_box(record, config, generator)
    box = to_pixels(record.boxes[number], size)
    if donor is not None:
        box = placed(donor, box, size)
    grown = grow_box(box, size, config.grow, generator)
    px = max(size) / PHOTO_SIDE

    object_mask = float(record.repaint_masks) if config.object_mask is None else config.object_mask
    if donor is None and record.masks is not None and happens(object_mask, generator):
        outline = None
    elif config.augment and happens(config.arbitrary_mask, generator):
        outline = bezier_outline(box, grown, config.jitter * px, generator)
    else:
        outline = box_outline(grown)

    if record.fixed:
        window = None
    elif config.coverage is None:
        window = paper_window(grown, size, config.shrink, config.fit == "letterbox", generator)
    else:
        window = coverage_window(grown, size, tuple(config.coverage), generator)
    if window is None:
        window = Box(0, 0, size[1], size[0])
    if donor is None:
        reference = box.grown(round(config.reference_margin * px), size)
    else:
        margin = config.reference_margin * max(donor.size) / PHOTO_SIDE
        reference = donor.box.grown(round(margin), donor.size)
    return Plan(box, grown, reference, window, place(window, config.resolution, config.fit), outline, number, donor)


def choose_box(record: Record, config: RecipeConfig, generator: torch.Generator) -> int:
    """The number of one of the boxes with an area within bounds, each as likely; UnusablePicture if there is none."""
    fitting = np.flatnonzero(in_area(record.boxes, (config.min_area, config.max_area)))
    if not fitting.size:
        raise UnusablePicture(
            "no box", f"{record.image} has no box of {config.min_area:.0%} to {config.max_area:.0%} of its area"
        )
    (choice,) = draw_integers([fitting.size - 1], generator)
    return int(fitting[choice])


def read_pixels(record: Record, plan: Plan, photo: Photo, config: RecipeConfig) -> Pixels:
    """Reads and resamples what the plan names; the letterbox is not yet around it."""
    size = (plan.place.height, plan.place.width)
    reference_size = (config.exemplar_size,) * 2
    options = {"antialias": config.antialias, "draft": config.draft}
    if plan.donor is not None:
        (source,) = photo.read([plan.window], [size], **options)
        where = in_window(plan.box, plan.window, size)
        sizes = ((where.height, where.width), reference_size)
        cut_out, reference = read_donor(plan.donor, plan.reference, sizes, **options)
        source = paste(cut_out, source, where)
    elif record.reference is None:
        source, reference = photo.read([plan.window, plan.reference], [size, reference_size], **options)
    else:
        (source,) = photo.read([plan.window], [size], **options)
        reference = read_reference(record.reference, config)
    image = source
    if record.target is not None:
        with Photo(record.target) as target:
            if target.size != photo.size:
                (height, width), (photo_height, photo_width) = target.size, photo.size
                raise UnusablePicture(
                    "unreadable",
                    f"target {record.target} is {width}x{height}, its photo {photo_width}x{photo_height}; "
                    "they must be of one size",
                )
            (image,) = target.read([plan.window], [size], **options)
    if plan.outline is None:
        repaint = draw_object(record.masks[plan.object], record.image, plan, photo.size, config)
    else:
        repaint = draw_outline(plan.outline, plan)
    return Pixels(image, source, repaint, reference)


def read_reference(path: Path, config: RecipeConfig) -> Tensor:
    """A picture of its own as the exemplar, squashed to uint8 (3, S, S); an alpha channel is its object's mask."""
    with usable(path):
        picture = read_exemplar(path)
    return T.resize(T.pil_to_tensor(picture), [config.exemplar_size] * 2, antialias=config.antialias)


def draw_outline(outline: np.ndarray, plan: Plan) -> Tensor:
    """The inside of an outline in photo pixels, as it falls into the window: bool (1, h, w)."""
    window, size = plan.window, (plan.place.height, plan.place.width)
    scale = np.array([size[1] / window.width, size[0] / window.height])
    return torch.from_numpy(fill_polygon((outline - (window.x0, window.y0)) * scale, size))[None]


def draw_object(mask: MaskSource, name: Path, plan: Plan, size: tuple[int, int], config: RecipeConfig) -> Tensor:
    """The object's own mask in the window, with the config's margin: bool (1, h, w)."""
    window, target = plan.window, (plan.place.height, plan.place.width)
    with usable(f"the mask of {name}"):
        drawn = mask.draw(size)
    repaint = extract_repaint(drawn, window, target)
    px = max(size) / PHOTO_SIDE * target[1] / window.width
    margin = round(config.object_mask_margin * px)
    repaint = F.max_pool2d(repaint, 2 * margin + 1, stride=1, padding=margin)[0] > 0
    if not repaint.any():
        raise UnusablePicture("no box", f"the mask of {name} is empty in the window {tuple(window)}")
    return repaint


def finish(
    record: Record, plan: Plan, pixels: Pixels, config: RecipeConfig, generator: torch.Generator, seed: int
) -> Example:
    """Recolours the object, augments the exemplar, puts the letterbox around, brings all to the networks' ranges."""
    around = plan.place
    sides = (around.x0, config.resolution - around.x1, around.y0, config.resolution - around.y1)
    its_own = shows_itself(record) and plan.donor is None
    if config.augment and config.recolor and its_own and happens(config.recolor, generator):
        pixels = recolored(pixels, plan, draw_recoloring(generator))
    image = source = letterbox(to_unit_range(pixels.image), sides, 0.0)
    if pixels.source is not pixels.image:
        source = letterbox(to_unit_range(pixels.source), sides, 0.0)
    mask = letterbox((~pixels.repaint).float(), sides, 1.0)
    exemplar = pixels.reference.contiguous().float() / 255
    if config.augment:
        exemplar = augment_exemplar(exemplar, config, generator)
    exemplar = T.normalize(exemplar, list(CLIP_MEAN), list(CLIP_STD))
    return Example(image, source, mask, exemplar, torch.tensor(seed, dtype=torch.int64), str(record.image))


def recolored(pixels: Pixels, plan: Plan, recoloring: Recoloring) -> Pixels:
    """The same with the object's colours changed in the photo, where it is to be repainted, and in the exemplar."""
    image = recoloring(pixels.image.float() / 255, plan.box, plan.window)
    reference = recoloring(pixels.reference.float() / 255, plan.box, plan.reference)
    image, reference = ((picture * 255).round().to(torch.uint8) for picture in (image, reference))
    image = torch.where(pixels.repaint, image, pixels.image)
    return Pixels(image, image, pixels.repaint, reference)


def letterbox(picture: Tensor, sides: tuple[int, int, int, int], value: float) -> Tensor:
    """A picture with bars of this value on its left, right, top and bottom, so wide in pixels."""
    return F.pad(picture, sides, value=value) if any(sides) else picture


def to_unit_range(picture: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1]."""
    return picture.contiguous().float().mul_(2 / 255).sub_(1)


def augment_exemplar(exemplar: Tensor, config: RecipeConfig, generator: torch.Generator) -> Tensor:
    """The config's changes of an exemplar (3, S, S), its numbers in pixels brought to this size."""
    px = exemplar.shape[-1] / EXEMPLAR_SIDE
    smallest, largest = (1 + 2 * round((kernel - 1) / 2 * px) for kernel in config.blur_kernels)
    return augment(
        exemplar,
        generator,
        flip=config.flip,
        rotation=config.rotation,
        rotation_degrees=config.rotation_degrees,
        blur=config.blur,
        blur_kernels=(smallest, largest),
        warp=config.warp,
        warp_shift=config.warp_shift / EXEMPLAR_SIDE,
    )
