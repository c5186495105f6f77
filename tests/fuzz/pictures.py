"""Fuzzing of picture files: each is read, turned and saved again, or is an error of one line.

    python -m tests.fuzz.pictures --seconds 600

Sound files of every format are changed at random: bytes and spans, EXIF blocks by tag, type and count, texts and
profiles of PNGs. All that reads a picture agrees on its size.
"""

import io
import struct
import sys
import zlib
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image, ImageCms

from pbe.batch.provenance import read_provenance
from pbe.data.crop import Photo
from pbe.data.records import UnusablePicture, upright_size
from pbe.images.reading import read_exemplar, read_picture
from pbe.images.saving import read_info, save_picture
from pbe.images.windows import Box
from tests.fuzz import exif_blocks as blocks
from tests.fuzz.running import changed, main

FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "jp2": "JPEG2000"}
PIECES = [b"\xff" * 4, bytes(8), b"\x7f\xff\xff\xff", b"II*\0", b"Exif\0\0", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"IDAT"]


@cache
def seeds() -> list[bytes]:
    """Sound files of every format and several modes, with EXIF, profile and resolution."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[blocks.ORIENTATION], exif[0x010E] = blocks.TURNED, '{"pbe": "{}"}'
    files = []
    for name in FORMATS.values():
        for mode in ("RGB", "L", "RGBA", "P", "I;16", "CMYK", "1"):
            options = {"exif": exif, "icc_profile": profile, "dpi": (72, 72)} if name not in ("GIF", "BMP") else {}
            buffer = io.BytesIO()
            try:
                blocks.picture().convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, name, **options)
            except (OSError, ValueError):  # a mode that the format does not hold
                continue
            files.append(buffer.getvalue())
    return files


@st.composite
def exif(draw: st.DrawFn) -> bytes:
    """A block of a few entries of any tag and type, in the first directory or another."""
    tags = st.sampled_from([*blocks.TAGS, *blocks.SUB_TAGS, *blocks.GPS_TAGS, blocks.ORIENTATION])
    entries = []
    for _ in range(draw(st.integers(1, 4))):
        value = draw(st.binary(max_size=24))
        entries.append((draw(tags), draw(st.sampled_from(list(blocks.SIZES))), draw(st.integers(0, 30)), value))
    pointer = draw(st.sampled_from([None, None, 0x8769, 0x8825, 0xA005]))
    block = blocks.exif_block(entries, pointer)
    return changed(draw, block, PIECES) if draw(st.integers(0, 3)) == 0 else block


@st.composite
def files(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 7))
    if kind < 3:
        return changed(draw, draw(st.sampled_from(seeds())), PIECES)
    block = draw(exif())
    if kind == 3:
        return blocks.jpeg(block)
    if kind == 4:
        return blocks.webp(block)
    if kind == 5:
        entry = (draw(st.sampled_from(blocks.TAGS)), draw(st.sampled_from(list(blocks.SIZES))), draw(st.integers(0, 9)))
        return blocks.tiff((*entry, draw(st.binary(max_size=30))))
    text = draw(st.sampled_from([b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp", b"pbe"]))
    content = draw(st.sampled_from([blocks.profile_text(block), b"[" * 5000, b'{"a":' * 999, draw(st.binary())]))
    chunk = draw(
        st.sampled_from(
            [
                blocks.chunk(b"eXIf", block),
                blocks.chunk(b"tEXt", text + b"\0" + content),
                blocks.chunk(b"zTXt", text + b"\0\0" + zlib.compress(content)),
                blocks.chunk(b"iCCP", b"a\0\0" + zlib.compress(content)),
                blocks.chunk(b"pHYs", struct.pack(">IIB", 2**32 - 1, 0, 1)),
            ]
        )
    )
    return blocks.png(chunk, late=draw(st.booleans()))


def check(data: object, folder: Path) -> None:
    """Raises AssertionError where readers disagree, and whatever else they should not raise."""
    assert isinstance(data, bytes)
    path = folder / "fuzzed.png"
    path.write_bytes(data)
    read_provenance(path)
    try:
        picture = read_picture(path)
    except ValueError:
        picture = None
    try:
        size = upright_size(path)
    except (ValueError, OSError):
        size = None
    try:
        with Photo(path) as photo:
            height, width = photo.size
            photo.read([Box(0, 0, width, height)], [(16, 16)])
    except UnusablePicture:
        assert picture is None
    if picture is not None:
        assert size == picture.size == (height, width)
        read_exemplar_or_none(path)
        suffix = ("png", "jpg", "tif", "webp")[len(data) % 4]
        if suffix == "webp" and max(size) > 16_383:  # what the format holds
            suffix = "png"
        result = picture.with_pixels(picture.pixels)
        assert isinstance(result, Image.Image)
        if suffix == "jpg" or (suffix == "webp" and result.mode == "I;16"):
            result, info = result.convert("RGB"), result.info
            result.info = info
        if not (suffix == "webp" and result.mode == "F"):
            save_picture(result, folder / f"saved.{suffix}", {"pbe": "{}"})
            assert read_picture(folder / f"saved.{suffix}").size == size
            with Image.open(folder / f"saved.{suffix}") as saved:
                read_info(saved)


def read_exemplar_or_none(path: Path) -> None:
    try:
        read_exemplar(path)
    except ValueError as error:
        if "is empty" not in str(error):  # its alpha
            raise


if __name__ == "__main__":
    sys.exit(main(__doc__, files(), check))
