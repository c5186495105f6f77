"""Pillow's images: opened with errors that say what is wrong, and brought into a form that can be kept."""

from __future__ import annotations

import errno
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

# How each mode of Pillow is read. The modes that map to themselves are given back as they are.
_PIL_MODES = {mode: mode for mode in ("L", "LA", "RGB", "RGBA", "F")}
_PIL_MODES |= dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N", "I"), "I;16")
_PIL_MODES |= {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}
_PIL_MODES |= dict.fromkeys(("YCbCr", "HSV", "CMYK"), "RGB")
# Tags that describe how a TIFF file stores its pixels; Pillow lists them among the EXIF tags.
_TIFF_STORAGE_TAGS = {*range(254, 260), 262, 263, 264, 265, 266, 273, *range(277, 282), 284, 290, 291, 317, 320}
_TIFF_STORAGE_TAGS |= {*range(322, 326), 330, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 522)}
_TIFF_STORAGE_TAGS |= {529, 530, 532, 700, 33723, 34377, 34675}
# What Pillow raises for damaged files, and for tags of other types than it expects.
_ERRORS = (OSError, SyntaxError, EOFError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError)
UNREADABLE = (*_ERRORS, AttributeError, Image.DecompressionBombError, struct.error, zlib.error)
# What is opened. Pillow reads others, of which PostScript starts a program.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000")
# The profiles and texts of a PNG, inflated: as much as Pillow allows for all of them, and not for one alone.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# How a picture is brought upright, by its orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])""")
MAX_DPI = 65535  # what JPEG holds


class PictureWarning(UserWarning):
    """A picture can be used, but not all of what it holds."""


@contextmanager
def open_image(path: Path, label: str | None = None) -> Iterator[Image.Image]:
    """Pillow's image of a file, not loaded. FileNotFoundError or ValueError that call it `label` if there is none."""
    label = label or str(path)
    if not path.exists():
        raise FileNotFoundError(f"{label}: there is no such file")
    if not path.is_file():
        raise ValueError(f"{label} is not a file")
    # Not by its path: Pillow would map uncompressed TIFFs into memory, and garbles those that are turned.
    with path.open("rb") as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{label} is not a picture; use PNG, JPEG, TIFF, WebP, GIF, BMP or JPEG 2000 (convert "
                "others, such as HEIC)"
            ) from error
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{label} is too large ({error}); raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
            ) from error
        except UNREADABLE as error:
            raise ValueError(f"{label} is damaged: {error}") from error
        with image:
            yield image


# --- orientation ------------------------------------------------------------------------------------------


def orientation(image: Image.Image) -> int:
    """How an image is to be turned, 1 to 8 as EXIF counts, wherever that is written. The image may get loaded."""
    file = getattr(image, "fp", None)
    if image.format == "PNG" and file is not None and _has_late_texts(file):
        image.load()  # Pillow reads what is behind the pixels only then
    value: Any = None
    with suppress(*UNREADABLE):
        value = _exif_of(image).get(ExifTags.Base.Orientation)
    if image.format != "TIFF":  # which Pillow itself turns, by its own understanding
        if isinstance(value, tuple | list):
            value = next(iter(value), None)
        with suppress(*UNREADABLE):
            value = int(value)
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
        if value is None and isinstance(xmp, str | bytes):
            found = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
            value = int(found[1]) if found else None
    return value if value in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image, whose pixels need not be loaded, once its orientation is applied."""
    turn = orientation(image)
    width, height = image.size
    if image.format == "TIFF":  # some releases of Pillow give the turned size, before and after loading
        with suppress(KeyError):
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
    return (width, height) if turn >= 5 else (height, width)


def turn_upright(image: Image.Image) -> Image.Image:
    """The image itself, loaded, or a copy of it with its orientation applied to the pixels."""
    turn = orientation(image)
    load(image)
    if image.format == "TIFF":  # then Pillow has turned it, and taken the orientation out
        turn = orientation(image)
    if turn == 1:
        return image
    upright = image.transpose(TURNS[turn])
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1"):
        upright.info.pop(key, None)
    return upright


def load(image: Image.Image) -> None:
    """Reads the pixels."""
    try:
        image.load()
    except UNREADABLE as error:
        # Of a TIFF, Pillow then reads the tags too. Where those alone fail, which no decoder's error looks like, the
        # pixels are there.
        if image.format != "TIFF" or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        image.load()


def _exif_of(image: Image.Image) -> Image.Exif:
    """The EXIF block of an image, also where ImageMagick has put it: a text of hexadecimal digits."""
    texts = (image.info.get(f"Raw profile type {name}") for name in ("exif", "APP1"))
    text = next((text for text in texts if isinstance(text, str)), None)
    if text is None or "exif" in image.info:
        with suppress(*UNREADABLE):  # of XMP, once the tags are there
            image.getexif()
        return image.getexif()
    exif = Image.Exif()
    data = bytes.fromhex("".join(text.split("\n")[3:]))
    if data.startswith(b"Exif"):  # in APP1, XMP may be in its place
        exif.load(data)
    return exif


def _has_late_texts(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or texts behind its pixels."""
    place = file.tell()
    file.seek(8)
    late = found = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        late |= kind == b"IDAT"
        found = late and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(length + 4, 1)
    file.seek(place)
    return found


# --- modes ------------------------------------------------------------------------------------------------


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Whether the file of an image that is not loaded yet holds 16 bits per colour channel."""
    if image.mode not in ("LA", "RGB", "RGBA", "CMYK"):
        return False
    file = getattr(image, "fp", None)
    if image.format == "JPEG2000" and file is not None:
        return _jpeg_2000_bits(file) > 8
    # ";16B", ";16L" and ";16N" are 16 bits per channel, but ";16" alone is 16 bits per pixel.
    return _raw_mode(image).endswith((";16B", ";16L", ";16N"))


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of an image that is not loaded yet are stored."""
    for tile in getattr(image, "tile", ()):
        raw_mode = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        if isinstance(raw_mode, str):
            return raw_mode
    return ""


def _jpeg_2000_bits(file: BinaryIO) -> int:
    """The bits of the first channel, from the codestream's header; 0 where it is not near the file's start."""
    place = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(place)
    start = head.find(b"\xff\x4f\xff\x51")
    return (head[start + 42] & 127) + 1 if 0 <= start < len(head) - 42 else 0


def _scale_transparency(image: Image.Image, raw_mode: str) -> None:
    """Brings the transparent colour of a PNG, which it stores in its own depth, to the depth of the pixels."""
    colour = image.info.get("transparency")
    scale = {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode)
    if scale and isinstance(colour, int):
        image.info["transparency"] = min(colour * scale, 255)
    elif raw_mode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def upright_image(image: Image.Image, label: str, ends_at_8_bits: bool) -> Image.Image:
    """A copy of an image, loaded and upright, in the mode in which it is given back, with `exif` (orientation 1),
    `icc_profile` and `dpi` in its `info`.

    Warns of what is lost; of 16-bit colour unless the caller keeps 8 bits anyway. ValueError for a damaged image.
    """
    if 0 in image.size:
        raise ValueError(f"{label} has no pixels: it is {image.width}x{image.height}")
    raw_mode = _raw_mode(image)
    if not ends_at_8_bits and _has_16_bit_colour(image):
        _warn(f"{label} holds 16 bits per colour channel, but Pillow reads 8; to keep 16, give a numpy uint16 array")
    try:
        # The further images of a phone's MPO are previews and depth maps.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            _warn(f"{label} has {frames} frames; only number {image.tell() + 1} is used")
        load(image)
    except UNREADABLE as error:
        raise ValueError(f"{label} is damaged: {error}") from error
    if image.mode not in _PIL_MODES:
        raise ValueError(f"{label} has Pillow's mode {image.mode!r}; convert it to RGB, RGBA, L or LA")

    info: dict[Any, Any] = {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    if "dpi" in info and not _is_resolution(info["dpi"]):
        del info["dpi"]
    if not isinstance(info.get("icc_profile", b""), bytes):
        del info["icc_profile"]
    if image.mode == "CMYK":
        info.pop("icc_profile", None)
        _warn(f"{label} is CMYK: read as RGB without its profile, which describes inks")
    exif = _clean_exif(image, label)
    upright = turn_upright(image)
    if upright is image:
        upright = image.copy()
    _scale_transparency(upright, raw_mode)
    mode = _PIL_MODES[image.mode]
    transparent = upright.info.get("transparency")
    if transparent is not None and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if mode == "I;16":
        pixels = np.asarray(upright)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{label} has gray values {pixels.min()} to {pixels.max()}; 16 bits hold 0 to 65535")
        upright = Image.fromarray(pixels.astype(np.uint16))
        if isinstance(transparent, int):  # which Pillow has no mode of 16 bits for
            if not ends_at_8_bits:
                _warn(f"{label} holds 16-bit gray with a transparent value: it is read as 8 bits with alpha")
            gray, alpha = np.rint(pixels / 257), np.where(pixels == transparent, 0, 255)
            upright = Image.fromarray(np.stack([gray, alpha], axis=-1).astype(np.uint8))
    elif upright.mode != mode:
        upright = upright.convert(mode)
    if exif:
        info["exif"] = exif
    upright.info = info
    return upright


def _warn(message: str) -> None:
    warnings.warn(message, PictureWarning, stacklevel=5)  # the caller of read_picture


def _is_resolution(dpi: Any) -> bool:
    """Whether a resolution can be kept: TIFF may say 0/0, or numbers that no other format holds."""
    with suppress(*UNREADABLE):
        return len(dpi) == 2 and all(0 < float(value) <= MAX_DPI for value in dpi)
    return False


def _clean_exif(image: Image.Image, label: str) -> bytes:
    """The EXIF block for an edited upright copy: orientation 1, without the thumbnail of the old pixels; b"" if there
    is none, or one that Pillow cannot write again."""
    exif = Image.Exif()
    try:
        Image.Exif().load(image.info.get("exif", b""))  # fails where Pillow has given up before
        exif.load(_exif_of(image).tobytes())
        for tag in _TIFF_STORAGE_TAGS & set(exif):
            del exif[tag]
        if ExifTags.Base.Orientation in exif:
            exif[ExifTags.Base.Orientation] = 1
        if not len(exif):
            return b""
        block = exif.tobytes()
        Image.new("L", (1, 1)).save(io.BytesIO(), "TIFF", exif=block)  # whose writer is the strictest
    except UNREADABLE:
        _warn(f"{label} has a damaged EXIF block, or values of unexpected types in it: only its orientation is used")
        return b""
    return block
