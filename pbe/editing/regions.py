"""Several masks of one photo, each with an exemplar of its own, in one edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pbe.acceleration.offloading import on_device
from pbe.editing.canvas import Canvas, read_canvas
from pbe.editing.condition import Told, placed_size, read_told
from pbe.editing.edit import Painted, check_edit, choose_settings, edit_region, make_ready, paint_region, with_settings
from pbe.editing.preview import Preview
from pbe.editing.settings import EditKeywords, EditSettings
from pbe.editing.together import Steps, run_together
from pbe.editing.window import place_window
from pbe.images.masks import masks_by_colour
from pbe.images.reading import MaskLike, Picture, PictureLike, read_picture
from pbe.images.windows import Box
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import Callback

if TYPE_CHECKING:
    from typing_extensions import Unpack

OWN_SETTINGS = ("guidance", "strength", "seed")


@dataclass(frozen=True)
class Region:
    """Where to repaint and with what, as `pbe.edit` takes them. A setting that is None is that of the whole edit."""

    mask: MaskLike
    exemplar: PictureLike | Sequence[PictureLike]
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None = None
    exemplar_weights: Sequence[float] | None = None
    negative: PictureLike | Sequence[PictureLike] | None = None
    negative_mask: MaskLike | Sequence[MaskLike | None] | None = None
    negative_weights: Sequence[float] | None = None
    guidance: float | None = None
    strength: float | None = None
    seed: int | None = None

    def settings(self, common: EditSettings) -> EditSettings:
        """Those of the whole edit, with its own."""
        own = {name: getattr(self, name) for name in OWN_SETTINGS}
        return replace(common, **{name: value for name, value in own.items() if value is not None})

    @property
    def told(self) -> tuple[Any, ...]:
        """Its exemplars and negative exemplars, as `read_told` takes them."""
        return tuple(getattr(self, field.name) for field in fields(self)[1:7])


def regions_by_colour(
    mask: PictureLike, exemplars: Mapping[str | int, PictureLike | Sequence[PictureLike]]
) -> list[Region]:
    """A region for each of the colours of one picture, with the exemplar of that colour.

    Colours are "ff0000", red, to within 32 of 255 a channel; whole numbers are the values of an index picture. What is
    of no such colour is kept. ValueError as `masks_by_colour`.
    """
    masks = masks_by_colour(mask, list(exemplars))
    return [Region(*each) for each in zip(masks, exemplars.values(), strict=True)]


class Area(NamedTuple):
    """A part of a photo that is painted in one window."""

    region: int
    settings: EditSettings
    repaint: np.ndarray  # bool (H, W)
    box: Box


@torch.no_grad()
def edit_regions(
    model: PaintByExample,
    image: PictureLike | Picture,
    regions: Sequence[Region],
    *,
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
    preview: Preview | None = None,
    preview_every: int = 5,
    **keywords: Unpack[EditKeywords],
) -> list[PictureLike]:
    """The photo with each region repainted as its own exemplar's object, `num_images` times; see `pbe.edit`.

    The regions are painted in order: where masks overlap, the later one lies on top, and what an earlier one changed in
    a later one's window is seen there. Those that see nothing of each other go through the network as one batch, if
    guidance, strength and the size that the model works at are the same; each is what `edit` makes of it alone, to
    rounding.

    Args:
        regions: at least one; all have the same seeds, but for those with a `seed` of their own.
        batch_size: how many windows are sampled at once: results times regions.
        callback: called for each region, as is `preview`.

    Raises:
        FileNotFoundError, ValueError: as `pbe.edit`, naming the region (1, 2, …).
    """
    settings = choose_settings(model, keywords, num_images, batch_size, preview_every)
    picture = read_picture(image)
    areas = []
    for i, canvas in enumerate(read_canvases(picture, regions, settings)):
        with naming(i):
            own = regions[i].settings(settings)
            if own != settings:
                check_edit(model, own, num_images=num_images)
            for repaint in canvas.regions:
                box = place_window(repaint, own.window, own.margin, own.resolution or model.config.resolution)
                areas.append(Area(i, own, repaint, box))
    model, callback = make_ready(model, callback, preview, preview_every)
    told: list[Told] = []
    with on_device(model.cond_stage_model, model.device):
        for i, region in enumerate(regions):
            with naming(i):
                told.append(read_told(model, region.settings(settings), *region.told))

    def begin(area: Area) -> Steps[list[Painted]]:
        return paint_region(model, results, area.repaint, told[area.region], area.settings, batch_size, callback)

    results = [picture] * num_images
    while areas:
        now = areas[: count_independent(areas[: max(batch_size // num_images, 1)])]
        painted = run_together([begin(area) for area in now])
        for area, batches in zip(now, painted, strict=True):
            results = edit_region(model, results, area.repaint, batches, area.settings)
        areas = areas[len(now) :]
    return [result.with_pixels(result.pixels) for result in results]


edit_regions.__signature__ = with_settings(edit_regions)  # type: ignore[attr-defined]


def read_canvases(picture: Picture, regions: Sequence[Region], settings: EditSettings) -> list[Canvas]:
    """Where each region is painted; ValueError as `edit_regions`."""
    if not regions:
        raise ValueError("regions is empty; at least one Region(mask, exemplar) is needed")
    if settings.extend:
        raise ValueError("extend is for one mask: extend the photo by an edit of its own, then edit its regions")
    canvases = []
    for i, region in enumerate(regions):
        with naming(i):
            if region.mask is None:
                raise ValueError("it has no mask: give a picture, a box or a polygon for its exemplar")
            size = placed_size(region.exemplar, region.exemplar_mask, settings)
            canvases.append(read_canvas(picture, region.mask, settings, size))
    return canvases


@contextmanager
def naming(i: int) -> Iterator[None]:
    """Has a ValueError say which region it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"region {i + 1}: {error}") from error


def count_independent(areas: Sequence[Area]) -> int:
    """How many of the areas, from the first, have in their windows nothing that one of them before changes."""
    changed = np.zeros_like(areas[0].repaint)
    for number, area in enumerate(areas):
        if changed[area.box.slices].any():
            return number
        changed[area.box.slices] |= area.repaint[area.box.slices] | (not area.settings.composite)
    return len(areas)
