"""What an edit paints on: the photo, as large as it is to be, and where it is repainted."""

from __future__ import annotations

import warnings
from typing import NamedTuple, cast

import numpy as np

from pbe.editing.settings import EditSettings
from pbe.images.masks import Sides, padding, shape_mask, shrink_to, strips
from pbe.images.pillow import PictureWarning
from pbe.images.reading import MaskLike, Picture, PictureLike, read_mask, read_picture
from pbe.images.windows import connected_regions, white_level

HAS_ALPHA = (2, 4)  # numbers of channels
SEEN_THROUGH = 0.998  # of an alpha channel: below 255 of 255
NO_MASK = "nothing to repaint: give one of mask, box, polygon and select, or extend, or an image partly transparent"


class Canvas(NamedTuple):
    """A photo and what is repainted in it."""

    picture: Picture  # with what `extend` adds
    regions: list[np.ndarray]  # bool (H, W), True = repaint; each is edited in a window of its own
    opaque: np.ndarray | None = None  # bool (H, W): where a result is not transparent, whatever the photo is

    @property
    def repaint(self) -> np.ndarray:
        """All regions together."""
        return self.regions[0] if len(self.regions) == 1 else np.logical_or.reduce(self.regions)

    def finish(self, result: Picture) -> PictureLike:
        """A result as the kind of object that the photo was."""
        pixels = result.pixels
        if self.opaque is not None and pixels.shape[2] in HAS_ALPHA:
            pixels = pixels.copy()
            pixels[self.opaque, -1] = white_level(pixels.dtype)
        return result.with_pixels(pixels)


def read_canvas(
    image: PictureLike | Picture,
    mask: MaskLike | None,
    settings: EditSettings,
    exemplar_size: tuple[int, int] | None = None,
    name: str = "mask",
) -> Canvas:
    """Reads a photo and its mask, which messages call `name`, as the settings say.

    Without a mask what `extend` adds is repainted; without that too, the transparent part of the photo, with a
    PictureWarning. A placement other than "fill" needs the `exemplar_size` (height, width).
    FileNotFoundError and ValueError as `read_picture`, `read_mask` and `shape_mask`, and for no mask at all.
    """
    picture, sides = read_picture(image), cast("Sides | None", settings.extend)
    if mask is not None:
        repaint = read_mask(mask, picture.size, name, settings.fit_mask)
    else:
        repaint = np.zeros(picture.size, bool) if sides else transparent_part(picture)
    names = ("invert", "fill_holes", "smooth", "grow")
    repaint = shape_mask(repaint, extend=sides, **{name: getattr(settings, name) for name in names})
    added = strips(picture.size, sides) if sides else None
    if sides:
        pixels = np.pad(picture.pixels, (*padding(sides), (0, 0)), mode="edge")
        picture = Picture(pixels, picture.with_pixels(pixels))
    regions = connected_regions(repaint) if settings.split_mask else [repaint]
    if settings.placement != "fill":
        assert exemplar_size is not None
        regions = [shrink_to(region, exemplar_size, settings.placement) for region in regions]
    canvas = Canvas(picture, regions, added)
    return canvas._replace(opaque=canvas.repaint) if mask is None and not sides else canvas


def transparent_part(picture: Picture) -> np.ndarray:
    """Where a picture is not opaque: bool (H, W); ValueError where it is so nowhere."""
    channels, alpha = picture.pixels.shape[2], picture.pixels[..., -1]
    hole = alpha < SEEN_THROUGH * white_level(alpha.dtype)
    if channels not in HAS_ALPHA or not hole.any():
        raise ValueError(NO_MASK)
    warnings.warn(
        f"no mask is given: the transparent part of the image, {hole.mean():.1%} of it, is repainted and made opaque",
        PictureWarning,
        stacklevel=4,
    )
    return hole
