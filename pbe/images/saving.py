"""Saving pictures with the settings that made them, in PNG, JPEG, TIFF and WebP files."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image, PngImagePlugin

from pbe.images.pillow import PictureWarning
from pbe.io.atomic import replacing
from pbe.io.json_text import parse_json


class Format(NamedTuple):
    """What a file format can hold, and how it is written."""

    modes: tuple[str, ...]
    options: dict[str, Any]
    max_side: float = math.inf
    max_exif: float = math.inf  # bytes


FORMATS = {
    "PNG": Format(("L", "LA", "RGB", "RGBA", "I;16"), {}),
    "JPEG": Format(("L", "RGB"), {"quality": 95, "subsampling": 0}, 65500, max_exif=65533),  # what one marker holds
    # uncompressed: Pillow's compressed writer fails on EXIF sub-directories
    "TIFF": Format(("L", "LA", "RGB", "RGBA", "I;16", "F"), {}),
    # exact: keeps the colours under transparent pixels
    "WEBP": Format(("L", "LA", "RGB", "RGBA"), {"lossless": True, "exact": True}, 16383),
}
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}


def save_picture(image: Image.Image, path: str | Path, info: dict[str, str] | None = None) -> None:
    """Save an image with its EXIF, ICC profile and resolution (`image.info`); missing folders are made.

    PNG, TIFF and WebP are lossless; JPEG (quality 95, full colour resolution) is not, and holds no alpha. `info`
    goes into PNG text chunks, and as JSON into the EXIF block of the other formats: into the user comment, or the
    image description where the image has a comment of its own. The file appears whole or not at all, and replaces
    one of the same name.

    Warns (PictureWarning) where the EXIF block has no room for `info`, which is then left out. ValueError for a
    folder, for a suffix, a mode or a size of image that cannot be saved, and for EXIF too long for JPEG.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file name")
    name = SUFFIXES.get(path.suffix.lower())
    if name is None:
        wanted = repr(path.suffix) if path.suffix else "a file without a suffix (a folder's name ends in /)"
        raise ValueError(f"{path}: cannot save as {wanted}; choose one of {', '.join(SUFFIXES)}")
    modes, options, max_side, max_exif = FORMATS[name]
    if image.mode not in modes:
        able = [other for other, format in FORMATS.items() if image.mode in format.modes]
        advice = f"save as {' or '.join(able)}" if able else "convert it to RGB"
        raise ValueError(f"{path}: {name} cannot hold an image of mode {image.mode!r}; {advice}")
    side = max(image.size)
    if side > max_side:
        raise ValueError(f"{path}: {name} cannot hold a side of {side} pixels, only {max_side}; save as PNG or TIFF")

    options = options | {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    if info:
        _remove_info(exif, info)
    block = _exif_bytes(exif)
    if len(block) > max_exif:
        raise ValueError(
            f"{path}: the image's EXIF block has {len(block)} bytes, {name} holds {max_exif}; save as PNG, TIFF or WEBP"
        )
    if info and name == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in info.items():
            options["pnginfo"].add_text(key, value)
    elif info:
        if _add_info(exif, info) and len(_exif_bytes(exif)) <= max_exif:
            block = _exif_bytes(exif)
        else:
            warnings.warn(
                f"{path} is saved without its settings: the image's own EXIF block has no room for them",
                PictureWarning,
                stacklevel=2,
            )
    if block:
        options["exif"] = block

    with replacing(path, overwrite=True) as part:
        image.save(part, format=name, **options)


def read_info(image: Image.Image) -> dict[str, str]:
    """The `info` that `save_picture` stored in the file of an open image, among other texts; empty if there is none."""
    if image.format == "PNG":
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    found: dict[str, str] = {}
    for directory, tag in _info_places(image.getexif()):
        found |= _parse_info(directory.get(tag, ""))
    return found


def _exif_bytes(exif: Image.Exif) -> bytes:
    return exif.tobytes() if len(exif) or exif.get_ifd(ExifTags.IFD.Exif) else b""


def _info_places(exif: Image.Exif) -> tuple[tuple[MutableMapping, int], ...]:
    return (exif.get_ifd(ExifTags.IFD.Exif), ExifTags.Base.UserComment), (exif, ExifTags.Base.ImageDescription)


def _add_info(exif: Image.Exif, info: dict[str, str]) -> bool:
    """Puts `info` into the first free place; False if there is none."""
    text = json.dumps(info)
    for directory, tag in _info_places(exif):
        if not _text_of(directory.get(tag, "")):
            directory[tag] = b"ASCII\0\0\0" + text.encode() if tag == ExifTags.Base.UserComment else text
            return True
    return False


def _remove_info(exif: Image.Exif, info: dict[str, str]) -> None:
    """Removes the info of an earlier edit, which is out of date: what has the same keys."""
    for directory, tag in _info_places(exif):
        if _parse_info(directory.get(tag, "")).keys() == info.keys():
            del directory[tag]


def _parse_info(value: bytes | str) -> dict[str, str]:
    try:
        info = parse_json(_text_of(value))
    except ValueError:
        return {}  # the image's own comment
    return info if isinstance(info, dict) else {}


def _text_of(value: bytes | str) -> str:
    """An EXIF text without the name of its character set and the blanks with which cameras fill it."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return re.sub(r"^(ASCII|UNICODE|JIS)?\0+", "", text).strip("\0 ")
