"""EXIF blocks with every type in every tag, and picture files that hold them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION, TURNED = 0x0112, 6
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 99: 1}  # by type
TAGS = (
    0x00FE, 0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x013C, 0x0201, 0x0202, 0x0213,
    0x02BC, 0x4746, 0x8298, 0x83BB, 0x8649, 0x8769, 0x8773, 0x8825, 0x9286, 0x927C, 0x9C9B, 0x9C9C, 0xA005, 0xC4A5,
    0xC612, 0xFDE8,
)  # fmt: skip
SUB_TAGS = (0x829A, 0x8827, 0x9000, 0x9003, 0x9204, 0x927C, 0x9286, 0xA005, 0xA300, 0xA40B, 0xA420, 0xA432)
GPS_TAGS = (0, 1, 2, 4, 5, 6, 7, 29)


def directory(entries, start, following=b""):
    """An IFD (little-endian) at `start`: (tag, type, count, value) with `following` behind it."""
    entries = sorted(entries)
    data_start = start + 2 + 12 * len(entries) + 4
    head, data = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in entries:
        head += struct.pack("<HHI", tag, kind, count)
        if len(value) <= 4:
            head += value.ljust(4, b"\0")
        else:
            head += struct.pack("<I", data_start + len(data))
            data += value + b"\0" * (len(value) % 2)
    return head + struct.pack("<I", 0) + data + following


def exif_block(entries, pointer=None):
    """A TIFF header with an orientation; entries in the first IFD, or in the one that `pointer` points to."""
    turn = (ORIENTATION, 3, 1, struct.pack("<H", TURNED))
    if pointer is None:
        return b"II*\0" + struct.pack("<I", 8) + directory([turn, *entries], 8)
    start = 8 + 2 + 24 + 4
    first = directory([turn, (pointer, 4, 1, struct.pack("<I", start))], 8)
    return b"II*\0" + struct.pack("<I", 8) + first + directory(entries, start)


def values(kind):
    """(count, bytes) worth a try for a type."""
    size = SIZES[kind]
    yield 1, b"\0" * size
    yield 1, b"\xff" * size
    yield 3, (b"A" * (size * 3))
    yield 0, b""


def blocks():
    """(name, block) of every tag with every type."""
    for pointer, tags in ((None, TAGS), (0x8769, SUB_TAGS), (0x8825, GPS_TAGS)):
        for tag in tags:
            for kind in SIZES:
                for number, (count, value) in enumerate(values(kind)):
                    name = f"{pointer or 0:x}-{tag:x}-{kind}-{number}"
                    yield name, exif_block([(tag, kind, count, value)], pointer)


def picture():
    """24 x 16 pixels whose corners differ."""
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 16))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def jpeg(block):
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=b"Exif\0\0" + block)
    return buffer.getvalue()


def webp(block):
    buffer = io.BytesIO()
    picture().save(buffer, "WEBP", exif=block)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, late=False):
    """A PNG with chunks of its own, before the pixels or after them."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    data = buffer.getvalue()
    at = data.index(b"IEND") - 4 if late else 33
    return data[:at] + b"".join(chunks) + data[at:]


def png_of(block):
    return png(chunk(b"eXIf", block))


def profile_text(block):
    """ImageMagick's text with a block in hexadecimal digits."""
    return b"\nexif\n%8d\n" % (len(block) + 6) + (b"Exif\0\0" + block).hex().encode() + b"\n"


def tiff(*entries):
    """A TIFF, to be turned, with tags of its own."""
    pixels = picture().tobytes()
    storage = {256: 24, 257: 16, 259: 1, 262: 2, 274: TURNED, 277: 3, 278: 16}
    tags = [(tag, 3, 1, struct.pack("<H", value)) for tag, value in storage.items()]
    tags += [(258, 3, 3, struct.pack("<3H", 8, 8, 8)), (279, 4, 1, struct.pack("<I", len(pixels)))]
    tags += [(273, 4, 1, struct.pack("<I", 8)), *entries]
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory(tags, 8 + len(pixels))
