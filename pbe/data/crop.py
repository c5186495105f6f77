"""Windows of photos: which part becomes an example, and reading that part without decoding more than it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import draw_integers, draw_uniform
from pbe.data.records import UnusablePicture
from pbe.images.pillow import UNREADABLE, open_image, turn_upright, upright_size
from pbe.images.reading import read_picture
from pbe.images.windows import Box

SQUARE = (8, 8)
BUCKETS = (SQUARE, (7, 9), (6, 10), (6, 11))  # sides of about one area in eighths of the resolution; also turned
DRAFT_SCALES = (8, 4, 2)  # of JPEG's decoder; 1 is all of the picture
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's own conversion to 8 bits clips these to white


@contextmanager
def usable(name: str | Path) -> Iterator[None]:
    """Turns every error of reading a picture into an UnusablePicture that names it."""
    try:
        yield
    except UnusablePicture:
        raise
    except FileNotFoundError as error:
        which = "there is no such file" if isinstance(name, Path) else error
        raise UnusablePicture("missing", f"{name}: {which}") from error
    except UNREADABLE as error:
        raise UnusablePicture("unreadable", f"{name} cannot be read: {error}") from error


# --- choosing ---------------------------------------------------------------------------------------------


def paper_window(
    grown: Box, size: tuple[int, int], shrink: float, only_one: bool, generator: torch.Generator
) -> Box | None:
    """The paper's crop window around a grown box in a photo of `size` (height, width); None where no square holds it.

    A square photo is taken whole. Else it is a square of the short side, placed at random along the long one, then
    shrunk on all four sides by one random amount: 0 to int(shrink x its smallest margin around the grown box).
    Where a single place holds the box, `only_one` says whether that is taken (the original does not: None).
    """
    height, width = size
    if height == width:
        return Box(0, 0, width, height)
    short = min(size)
    start, stop, length = (grown.x0, grown.x1, width) if width > height else (grown.y0, grown.y1, height)
    first, last = max(stop - short, 0), min(start, length - short)
    if last < first or (last == first and not only_one):
        return None
    (offset,) = draw_integers([last - first], generator)
    x0, y0 = (first + offset, 0) if width > height else (0, first + offset)
    margin = min(grown.x0 - x0, grown.y0 - y0, x0 + short - grown.x1, y0 + short - grown.y1)
    (inset,) = draw_integers([int(shrink * margin)], generator)
    return Box(x0 + inset, y0 + inset, x0 + short - inset, y0 + short - inset)


def coverage_window(
    grown: Box, size: tuple[int, int], coverage: tuple[float, float], generator: torch.Generator
) -> Box | None:
    """A square of which the grown box takes a share drawn from `coverage` = (least, most), placed at random around it.

    The share is less where the box is too long for it, and more, up to `most`, where the photo has no larger square.
    None where no square holds the box, or each would be filled by more than `most`: the whole photo has more context.
    """
    height, width = size
    longest = max(grown.width, grown.height)
    if longest > min(size) or grown.area > coverage[1] * min(size) ** 2:
        return None
    side = round(math.sqrt(grown.area / draw_uniform(*coverage, generator)))
    side = min(max(side, longest), min(size))
    first_x, last_x = max(grown.x1 - side, 0), min(grown.x0, width - side)
    first_y, last_y = max(grown.y1 - side, 0), min(grown.y0, height - side)
    right, down = draw_integers([last_x - first_x, last_y - first_y], generator)
    return Box(first_x + right, first_y + down, first_x + right + side, first_y + down + side)


def nearest_bucket(size: tuple[int, int]) -> tuple[int, int]:
    """The bucket (height, width), in eighths of the resolution, nearest to a photo's aspect ratio."""
    height, width = size
    ratio = math.log(width / height)
    short, long = min(BUCKETS, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - abs(ratio)))
    return (short, long) if ratio > 0 else (long, short)


def content_box(window: Box, resolution: int, fit: str, bucket: tuple[int, int] = SQUARE) -> Box:
    """Where a window goes in the example, which is a square or a bucket: all of it ("squash", "buckets"), or the
    square's middle, in its own shape, so that its long side fills the square ("letterbox")."""
    if fit != "letterbox" or window.width == window.height:
        return Box(0, 0, bucket[1] * resolution // 8, bucket[0] * resolution // 8)
    scale = resolution / max(window.width, window.height)
    width, height = max(1, round(window.width * scale)), max(1, round(window.height * scale))
    x0, y0 = (resolution - width) // 2, (resolution - height) // 2
    return Box(x0, y0, x0 + width, y0 + height)


def to_pixels(box: np.ndarray, size: tuple[int, int]) -> Box:
    """A box in fractions as whole pixels of a photo of `size` (height, width); at least one pixel."""
    height, width = size
    x0, y0, x1, y1 = (round(float(v) * n) for v, n in zip(box, (width, height, width, height), strict=True))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return Box(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def in_window(box: Box, window: Box, size: tuple[int, int]) -> Box:
    """A box of a photo, inside `window`, in the pixels of that window seen at `size` (height, width); at least one."""
    inside = np.array(box) - np.array([window.x0, window.y0] * 2)
    return to_pixels(inside / np.array([window.width, window.height] * 2), size)


# --- reading ----------------------------------------------------------------------------------------------


class Photo:
    """A picture file: its size at once, its pixels where and as large as they are wanted. Use it in a `with`."""

    def __init__(self, path: Path):
        """UnusablePicture if the file is missing or not a picture."""
        self.path = path
        with usable(path), ExitStack() as opened:
            self._image = opened.enter_context(open_image(path, "it"))
            self.size = upright_size(self._image)  # (height, width)
            self._close = opened.pop_all().close

    def __enter__(self) -> Photo:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(
        self, regions: Sequence[Box], sizes: Sequence[tuple[int, int]], antialias: bool = False, draft: bool = True
    ) -> list[Tensor]:
        """Each region as uint8 (3, h, w), resampled bilinearly to its size (h, w). Call it once.

        draft: a JPEG is decoded at 1/2, 1/4 or 1/8 if each region still has at least its size. Edges of the regions
            are then rounded to whole pixels of the smaller picture, which are no larger than those of the result.

        UnusablePicture if the pixels are damaged.
        """
        image, scale = self._image, 1
        with usable(self.path):
            wanted = draft_scale(regions, sizes) if draft else 1
            drafted = image.draft(image.mode, (image.width // wanted, image.height // wanted)) if wanted > 1 else None
            if drafted is not None:  # it is a JPEG; its extent is that of the whole photo, so it may be fractional
                scale = round(max(self.size) / max(drafted[1]))
            image = turn_upright(image)
            crops = [_crop(image, scaled(region, scale, image.size[::-1])) for region in regions]
        return [T.resize(crop, list(size), antialias=antialias) for crop, size in zip(crops, sizes, strict=True)]


def draft_scale(regions: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> int:
    """The largest of 8, 4, 2 and 1 by which a photo can be divided so that each region keeps at least its size."""
    room = min(
        min(region.height / height, region.width / width)
        for region, (height, width) in zip(regions, sizes, strict=True)
    )
    return next((scale for scale in DRAFT_SCALES if scale <= room), 1)


def scaled(box: Box, scale: int, size: tuple[int, int]) -> Box:
    """A box of a photo in the pixels of the photo divided by `scale`, which has `size` (height, width)."""
    height, width = size
    x0, y0 = min(round(box.x0 / scale), width - 1), min(round(box.y0 / scale), height - 1)
    return Box(x0, y0, min(max(round(box.x1 / scale), x0 + 1), width), min(max(round(box.y1 / scale), y0 + 1), height))


def _crop(image: Image.Image, box: Box) -> Tensor:
    """The pixels of a box as uint8 (3, h, w)."""
    if image.mode in DEEP_MODES:
        rgb = read_picture(image).rgb()[0]
        rows, columns = box.slices
        return ((rgb + 1) * 127.5).round().to(torch.uint8)[:, rows, columns]
    # Crop, then convert: gray, CMYK and palettes cost their conversion for the region alone.
    return T.pil_to_tensor(image.crop(box).convert("RGB"))
