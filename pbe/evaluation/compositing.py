"""Composited results, as `pbe.edit` gives them, from raw ones: the image's pixels outside the mask, with its seam."""

from __future__ import annotations

import zlib
from pathlib import Path

from PIL import Image

from pbe.editing.window import feather_width
from pbe.evaluation.test_set import Item
from pbe.images import windows
from pbe.images.pillow import UNREADABLE, open_image
from pbe.images.reading import read_picture
from pbe.images.saving import read_info, save_picture
from pbe.images.seams import poisson_blend
from pbe.images.windows import Box


def composite_result(item: Item, raw: Path, out: Path) -> None:
    """Writes an item's composited result from its raw one, unless it was made of the very same file before."""
    crc = f"{zlib.crc32(raw.read_bytes()):08x}"
    if out.is_file() and _made_of(out) == crc:
        return
    image, painted = read_picture(item.image), read_picture(raw, "raw result")
    height, width = image.size
    window, repaint = Box(0, 0, width, height), item.repaint()
    matched = poisson_blend(painted.rgb(), image.rgb(), 1 - windows.extract_repaint(repaint, window, image.size))
    weights = windows.feather_weights(repaint, feather_width(window, min(image.size)))
    composited = image.with_pixels(windows.composite(image.pixels, matched, window, weights))
    assert isinstance(composited, Image.Image)  # as the file is
    save_picture(composited, out, {"raw_crc32": crc})


def _made_of(path: Path) -> str | None:
    try:
        with open_image(path) as image:
            return read_info(image).get("raw_crc32")
    except UNREADABLE:
        return None  # cut off, and made again
