"""Picture files as other programs, and hostile people, write them: what they show is used, the rest is left out."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from fuzz import exif_blocks as blocks
from PIL import Image, ImageCms

from pbe.batch.provenance import read_provenance
from pbe.data.crop import Photo
from pbe.data.records import upright_size
from pbe.images.pillow import PictureWarning, open_image
from pbe.images.reading import read_exemplar, read_mask, read_picture
from pbe.images.saving import read_info, save_picture
from pbe.images.windows import Box

UPRIGHT = np.asarray(blocks.picture().transpose(Image.Transpose.ROTATE_270))
TURN = blocks.exif_block([])
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def itxt(key, text):
    return blocks.chunk(b"iTXt", key + b"\0\0\0\0\0" + text)


def ztxt(key, text):
    return blocks.chunk(b"zTXt", key + b"\0\0" + zlib.compress(text))


def with_xmp(image_format):
    buffer = io.BytesIO()
    if image_format == "WEBP":
        blocks.picture().save(buffer, "WEBP", xmp=XMP, lossless=True)
        return buffer.getvalue()
    blocks.picture().save(buffer, "JPEG", quality=100, subsampling=0)
    data = b"http://ns.adobe.com/xap/1.0/\0" + XMP
    return buffer.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + buffer.getvalue()[2:]


def tiff_with_orientation():
    buffer = io.BytesIO()
    blocks.picture().save(buffer, "TIFF", tiffinfo={blocks.ORIENTATION: 6})
    return buffer.getvalue()


TURNED_FILES = {
    "eXIf": blocks.png_of(TURN),
    "eXIf behind the pixels": blocks.png(blocks.chunk(b"eXIf", TURN), late=True),
    "ImageMagick's profile": blocks.png(ztxt(b"Raw profile type exif", blocks.profile_text(TURN))),
    "ImageMagick's profile as APP1": blocks.png(ztxt(b"Raw profile type APP1", blocks.profile_text(TURN))),
    "its profile behind the pixels": blocks.png(ztxt(b"Raw profile type exif", blocks.profile_text(TURN)), late=True),
    "XMP of a PNG": blocks.png(itxt(b"XML:com.adobe.xmp", XMP)),
    "XMP behind the pixels": blocks.png(itxt(b"XML:com.adobe.xmp", XMP), late=True),
    "XMP with single quotes": blocks.png(itxt(b"XML:com.adobe.xmp", XMP.replace(b'"', b"'"))),
    "XMP of a WebP": with_xmp("WEBP"),
    "TIFF": tiff_with_orientation(),
    "XMP of a JPEG": with_xmp("JPEG"),
    "JPEG": blocks.jpeg(TURN),
}


@pytest.mark.parametrize("where", TURNED_FILES)
def test_the_orientation_is_found_wherever_it_is(tmp_path, where):
    path = tmp_path / "a.png"
    path.write_bytes(TURNED_FILES[where])
    picture = read_picture(path)
    tolerance = 12 if "JPEG" in where else 0
    np.testing.assert_allclose(picture.pixels.astype(int), UPRIGHT, atol=tolerance)
    assert upright_size(path) == (24, 16)
    with Photo(path) as photo:
        assert photo.size == (24, 16)
        (pixels,) = photo.read([Box(0, 0, 16, 24)], [(24, 16)])
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), picture.pixels)
    save_picture(picture.with_pixels(picture.pixels), tmp_path / "b.png")
    assert upright_size(tmp_path / "b.png") == (24, 16)  # not turned again


@pytest.mark.slow
def test_every_tag_with_every_type(tmp_path):
    """The block may be dropped, but the picture is used, upright, and its result is saved."""
    path, wrong = tmp_path / "a.jpg", []
    for number, (name, block) in enumerate(blocks.blocks()):
        if number % 4 > 1:
            continue
        path.write_bytes(blocks.jpeg(block))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = read_picture(path)
            if not picture.size == upright_size(path) == (24, 16):
                wrong.append(name)
            if number % 20 < 2:
                with Photo(path) as photo:
                    photo.read([Box(0, 0, 16, 24)], [(24, 16)])
                suffix = ("png", "jpg", "tif", "webp")[number // 20 % 4]
                save_picture(picture.with_pixels(picture.pixels), tmp_path / f"b.{suffix}", {"pbe": "{}"})
                with open_image(tmp_path / f"b.{suffix}") as saved:
                    if read_info(saved).get("pbe") != "{}":
                        wrong.append(f"{name} as {suffix}")
    assert wrong == []


@pytest.mark.slow
def test_odd_tags_of_a_tiff(tmp_path):
    path, wrong = tmp_path / "a.tif", []
    for tag in (*blocks.TAGS[1:], *blocks.SUB_TAGS[:4]):
        for kind in blocks.SIZES:
            for count, value in list(blocks.values(kind))[::2]:
                path.write_bytes(blocks.tiff((tag, kind, count, value)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    picture, size = read_picture(path), upright_size(path)
                if not picture.size == size == (24, 16) or not (picture.pixels == UPRIGHT).all():
                    wrong.append((hex(tag), kind, count))
                if tag in (0x8773, 0xA005, 0x02BC):
                    for suffix in ("png", "jpg", "tif", "webp"):
                        save_picture(picture.with_pixels(picture.pixels), tmp_path / f"b.{suffix}")
    assert wrong == []


def test_a_block_that_is_dropped_is_announced(tmp_path):
    (tmp_path / "a.jpg").write_bytes(blocks.jpeg(blocks.exif_block([(0x013B, 5, 1, struct.pack("<II", 1, 2))])))
    with pytest.warns(PictureWarning, match=r"a\.jpg has a damaged EXIF block"):
        picture = read_picture(tmp_path / "a.jpg")
    assert picture.size == (24, 16)
    assert "exif" not in picture.source.info


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match=r"a\.png is not a picture; use PNG"):
        read_picture(path)
    with pytest.raises(ValueError, match="is not a picture"):
        upright_size(path)
    assert read_provenance(path) is None


@pytest.mark.parametrize("name, data", [("a.ppm", b"P6 2 1 255\n" + bytes(6)), ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n")])
def test_other_formats_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is not a picture; use PNG, JPEG, TIFF, WebP, GIF, BMP or JPEG 2000"):
        read_picture(tmp_path / name)


def test_deep_nesting_is_not_our_settings(tmp_path):
    comment = b"ASCII\0\0\0" + b"[" * 50_000
    block = blocks.exif_block([(0x9286, 7, len(comment), comment)], 0x8769)
    (tmp_path / "a.jpg").write_bytes(blocks.jpeg(block))
    assert read_provenance(tmp_path / "a.jpg") is None
    save_picture(read_picture(tmp_path / "a.jpg").source, tmp_path / "b.jpg", {"pbe": "{}"})
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png", pnginfo=png_text("pbe", "[" * 50_000))
    assert read_provenance(tmp_path / "c.png") is None


def png_text(key, text):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text(key, text, zip=True)
    return info


def test_long_texts_and_profiles_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    image, settings = blocks.picture(), {"pbe": rng.bytes(3 << 20).hex()}
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + rng.bytes(3 << 20)
    save_picture(image, tmp_path / "a.png", settings)
    picture = read_picture(tmp_path / "a.png")
    assert picture.source.info["icc_profile"] == image.info["icc_profile"]
    with open_image(tmp_path / "a.png") as saved:
        assert read_info(saved) == settings
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", pnginfo=png_text("a", "a" * (2 << 20)))
    assert read_picture(tmp_path / "b.png").size == (4, 4)


@pytest.mark.parametrize("resolution", [(0, 0), (2**32 - 1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_impossible_resolutions_are_dropped(tmp_path, resolution, suffix):
    buffer = io.BytesIO()
    blocks.picture().save(buffer, "TIFF", resolution=77, resolution_unit=2)
    data = buffer.getvalue().replace(struct.pack("<II", 77, 1), struct.pack("<II", *resolution))
    assert data != buffer.getvalue()
    (tmp_path / "a.tif").write_bytes(data)
    picture = read_picture(tmp_path / "a.tif")
    assert "dpi" not in picture.source.info
    save_picture(picture.with_pixels(picture.pixels), tmp_path / f"b.{suffix}")
    assert read_picture(tmp_path / f"b.{suffix}").size == (16, 24)


def test_16_bit_jpeg_2000_is_announced(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jp2")
    data = bytearray((tmp_path / "a.jp2").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(tmp_path / "a.jp2")
    start = data.index(b"\xff\x4f\xff\x51") + 42
    for channel in range(3):
        data[start + 3 * channel] = 15  # bits less one
    (tmp_path / "a.jp2").write_bytes(data)
    with pytest.warns(PictureWarning, match="holds 16 bits per colour channel"):
        read_picture(tmp_path / "a.jp2")


def raw_png(depth, colour_type, rows, transparent):
    width = len(rows[0]) if colour_type == 0 else len(rows[0]) // 3
    lines = b""
    for row in rows:
        bits = "".join(format(value, f"0{depth}b") for value in row)
        bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
        lines += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks.chunk(*part) for part in parts)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_gray_of_every_depth(tmp_path, depth):
    white = 2**depth - 1
    (tmp_path / "a.png").write_bytes(raw_png(depth, 0, [[0, 1, white, 1]], struct.pack(">H", 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = read_picture(tmp_path / "a.png").pixels[0].tolist()
    level = {1: 255, 2: 85, 4: 17, 8: 1, 16: 0}[depth]
    assert pixels == [[0, 255], [level, 0], [255, 0 if depth == 1 else 255], [level, 0]]
    assert [("8 bits" in str(w.message)) for w in caught] == [True] * (depth == 16)


def test_the_transparent_colour_of_16_bits(tmp_path):
    colour = (0x1234, 0x5678, 0x9ABC)
    data = raw_png(16, 2, [[*colour, 0x2000, 0, 0]], struct.pack(">3H", *colour))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.warns(PictureWarning, match="16 bits"):
        assert read_picture(tmp_path / "a.png").pixels[0, :, 3].tolist() == [0, 255]
    assert read_exemplar(tmp_path / "a.png").size == (1, 1)  # of the object alone


# --- colour profiles --------------------------------------------------------------------------------------


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_profile():
    """sRGB's profile with red and green exchanged: nothing is more clearly not sRGB."""
    data = srgb_profile()
    assert data.count(b"rXYZ") == data.count(b"gXYZ") == 1
    return data.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


@pytest.mark.filterwarnings("error")
def test_the_exemplars_colours_are_brought_to_srgb(tmp_path):
    image = Image.new("RGB", (6, 5), (200, 30, 90))
    image.save(tmp_path / "a.png", icc_profile=wide_profile())
    assert np.abs(np.array(read_exemplar(tmp_path / "a.png").getpixel((0, 0))) - (30, 200, 90)).max() <= 2
    assert read_picture(tmp_path / "a.png").pixels[0, 0].tolist() == [200, 30, 90]  # the photo keeps its own
    noise = blocks.picture()
    noise.save(tmp_path / "b.png", icc_profile=srgb_profile())
    assert (np.asarray(read_exemplar(tmp_path / "b.png")) == np.asarray(noise)).all()  # bit for bit
    alpha = Image.new("L", (6, 5))
    alpha.paste(255, (1, 1, 3, 4))
    image.putalpha(alpha)
    image.save(tmp_path / "c.png", icc_profile=wide_profile())
    exemplar = read_exemplar(tmp_path / "c.png")
    assert exemplar.size == (2, 3)
    assert exemplar.getpixel((0, 0))[1] > 190


@pytest.mark.parametrize("profile", [b"broken", srgb_profile()[:200], srgb_profile().replace(b"RGB ", b"CMYK")])
def test_a_broken_profile_is_announced_and_left(tmp_path, profile):
    noise = blocks.picture()
    noise.save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(PictureWarning, match=r"a\.png has a colour profile that cannot be applied"):
        exemplar = read_exemplar(tmp_path / "a.png")
    assert (np.asarray(exemplar) == np.asarray(noise)).all()


def test_nested_masks_are_shown_short():
    mask = [1.0]
    for _ in range(900):
        mask = [mask]
    with pytest.raises(ValueError, match=r"polygon of 3 or more .* got \[+\.\.\."):
        read_mask(mask, (4, 4))
