"""Pillow's images: opened with errors that say what is wrong, and brought into a form that can be kept."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# How each mode of Pillow is read. The modes that map to themselves are given back as they are.
_PIL_MODES = {mode: mode for mode in ("L", "LA", "RGB", "RGBA", "F")}
_PIL_MODES |= dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N", "I"), "I;16")
_PIL_MODES |= {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}
_PIL_MODES |= dict.fromkeys(("YCbCr", "HSV", "CMYK"), "RGB")
# Tags that describe how a TIFF file stores its pixels; Pillow lists them among the EXIF tags.
_TIFF_STORAGE_TAGS = {*range(254, 260), 262, 263, 264, 265, 266, 273, *range(277, 282), 284, 290, 291, 317, 320}
_TIFF_STORAGE_TAGS |= {*range(322, 326), 330, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 522)}
_TIFF_STORAGE_TAGS |= {529, 530, 532, 700, 33723, 34377, 34675}
# What Pillow's decoders raise on damaged files.
_ERRORS = (OSError, SyntaxError, EOFError, ValueError, TypeError, RuntimeError, IndexError, OverflowError)
UNREADABLE = (*_ERRORS, struct.error, zlib.error)


class PictureWarning(UserWarning):
    """A picture can be used, but not all of what it holds."""


def open_image(file: BinaryIO, label: str) -> Image.Image:
    """Pillow's image of a file; ValueError, which calls it `label`, where there is none."""
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{label} is not a picture that Pillow reads; use PNG, JPEG, TIFF or WebP (HEIC must be converted)"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{label} is too large ({error}); raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from error
    except UNREADABLE as error:
        raise ValueError(f"{label} is damaged: {error}") from error


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Whether the file of an image that is not loaded yet holds 16 bits per colour channel."""
    if image.mode not in ("LA", "RGB", "RGBA", "CMYK"):
        return False
    for tile in getattr(image, "tile", ()):
        raw_mode, *rest = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        # ";16B", ";16L" and ";16N" are 16 bits per channel, but ";16" alone is 16 bits per pixel.
        if isinstance(raw_mode, str) and raw_mode.endswith((";16B", ";16L", ";16N")):
            return True
        if image.format == "PPM" and rest and isinstance(rest[0], int) and rest[0] > 255:
            return True
    return False


def upright_image(image: Image.Image, label: str, ends_at_8_bits: bool) -> Image.Image:
    """A copy of an image, loaded and upright, in the mode in which it is given back, with `exif` (orientation 1),
    `icc_profile` and `dpi` in its `info`.

    Warns of what is lost; of 16-bit colour unless the caller keeps 8 bits anyway. ValueError for a damaged image.
    """
    if 0 in image.size:
        raise ValueError(f"{label} has no pixels: it is {image.width}x{image.height}")
    if not ends_at_8_bits and _has_16_bit_colour(image):
        _warn(f"{label} holds 16 bits per colour channel, but Pillow reads 8; to keep 16, give a numpy uint16 array")
    try:
        # The further images of a phone's MPO are previews and depth maps, those of a PSD its layers.
        frames = 1 if image.format in ("MPO", "PSD") else getattr(image, "n_frames", 1)
        if frames > 1:
            _warn(f"{label} has {frames} frames; only number {image.tell() + 1} is used")
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"{label} is damaged: {error}") from error
    if image.mode not in _PIL_MODES:
        raise ValueError(f"{label} has Pillow's mode {image.mode!r}; convert it to RGB, RGBA, L or LA")

    info: dict[Any, Any] = {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    if image.mode == "CMYK":
        info.pop("icc_profile", None)
        _warn(f"{label} is CMYK: read as RGB without its profile, which describes inks")
    exif = _clean_exif(image, label)
    upright = image.copy() if exif is None else ImageOps.exif_transpose(image)
    mode = _PIL_MODES[image.mode]
    if "transparency" in image.info and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if mode == "I;16":
        pixels = np.asarray(upright)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{label} has gray values {pixels.min()} to {pixels.max()}; 16 bits hold 0 to 65535")
        upright = Image.fromarray(pixels.astype(np.uint16))
    elif upright.mode != mode:
        upright = upright.convert(mode)
    if exif:
        info["exif"] = exif
    upright.info = info
    return upright


def _warn(message: str) -> None:
    warnings.warn(message, PictureWarning, stacklevel=5)  # the caller of read_picture


def _clean_exif(image: Image.Image, label: str) -> bytes | None:
    """The EXIF block for an edited upright copy: orientation 1, without the thumbnail of the old pixels; b"" if there
    is none, None if it is damaged."""
    exif = Image.Exif()
    try:
        exif.load(image.getexif().tobytes())
    except UNREADABLE:
        _warn(f"{label} has a damaged EXIF block: it is left out, and an orientation in it is not applied")
        return None
    for tag in _TIFF_STORAGE_TAGS & set(exif):
        del exif[tag]
    if ExifTags.Base.Orientation in exif:
        exif[ExifTags.Base.Orientation] = 1
    return exif.tobytes() if len(exif) else b""
