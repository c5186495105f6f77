"""Pictures, masks and exemplars: every kind that comes in, what goes out, and the words for what is wrong."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from pbe.images.pillow import PictureWarning
from pbe.images.reading import exemplar_tensor, over_white, read_exemplar, read_mask, read_picture, shown_tensor
from pbe.images.saving import read_info, save_picture
from pbe.models.clip import CLIP_MEAN, CLIP_STD

HIRES = Path(__file__).parents[3] / "shared" / "data" / "hires"
ORIENTATION, MAKER, TAKEN = ExifTags.Base.Orientation, ExifTags.Base.Make, ExifTags.Base.DateTimeOriginal
COMMENT, DESCRIPTION = ExifTags.Base.UserComment, ExifTags.Base.ImageDescription
PROFILE = b"a colour profile, which Pillow carries without looking inside"


def noise(shape, dtype="uint8", seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def exif_bytes(orientation=1):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[MAKER] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[TAKEN] = "2020:02:03 04:05:06"
    return exif.tobytes()


def write_png16(path, pixels):
    """A 16-bit PNG from uint16 (H, W, C), which Pillow itself cannot write for colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_pil_modes_that_are_kept(mode, channels):
    image = Image.fromarray(noise((6, 9, 4))).convert(mode)
    picture = read_picture(image)
    assert picture.pixels.shape == (6, 9, channels)
    assert picture.size == (6, 9)
    result = picture.with_pixels(255 - picture.pixels)
    assert result.mode == mode
    assert (np.asarray(result) == 255 - np.asarray(image)).all()


@pytest.mark.parametrize(
    "mode, kept", [("1", "L"), ("P", "RGB"), ("PA", "RGBA"), ("YCbCr", "RGB"), ("HSV", "RGB"), ("RGBa", "RGBA")]
)
def test_pil_modes_that_are_converted(mode, kept):
    base = Image.fromarray(noise((6, 9, 4)))
    image = base.convert(mode) if mode != "PA" else base.convert("P").convert("PA")
    picture = read_picture(image)
    assert picture.with_pixels(picture.pixels).mode == kept
    assert (picture.pixels == np.asarray(image.convert(kept)).reshape(picture.pixels.shape)).all()


def test_palette_with_a_transparent_colour_becomes_rgba(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode=None)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=1)
    pixels = read_picture(tmp_path / "p.png").pixels
    assert pixels.tolist() == [[[255, 0, 0, 255], [0, 0, 255, 0]], [[0, 0, 255, 0], [255, 0, 0, 255]]]


def test_cmyk_is_read_as_rgb_without_its_profile(tmp_path):
    Image.fromarray(noise((6, 9, 3))).convert("CMYK").save(tmp_path / "c.jpg", icc_profile=PROFILE)
    with pytest.warns(PictureWarning, match=r"c\.jpg is CMYK"):
        picture = read_picture(tmp_path / "c.jpg")
    assert picture.source.mode == "RGB"
    assert "icc_profile" not in picture.source.info


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="photo has Pillow's mode 'LAB'; convert it to RGB"):
        read_picture(Image.new("LAB", (4, 4)), "photo")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_gray_round_trip(tmp_path, suffix, orientation):
    values = noise((5, 7), "uint16")
    Image.fromarray(values).save(tmp_path / f"in.{suffix}", exif=exif_bytes(orientation))
    picture = read_picture(tmp_path / f"in.{suffix}")
    expected = values if orientation == 1 else np.rot90(values, -1)
    assert picture.pixels.dtype == np.uint16
    assert picture.size == expected.shape
    assert (picture.pixels[..., 0] == expected).all()
    save_picture(picture.with_pixels(picture.pixels), tmp_path / f"out.{suffix}")
    with Image.open(tmp_path / f"out.{suffix}") as saved:
        assert (np.asarray(saved) == expected).all()


def test_32_bit_gray_within_16_bits():
    assert read_picture(Image.fromarray(np.array([[0, 65535]], dtype=np.int32))).pixels.dtype == np.uint16
    with pytest.raises(ValueError, match="gray values 0 to 65536; 16 bits hold"):
        read_picture(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_png_is_announced(tmp_path, channels):
    write_png16(tmp_path / "deep.png", noise((5, 7, channels), "uint16"))
    with pytest.warns(PictureWarning, match=r"deep\.png.*16 bits.*uint16"):
        picture = read_picture(tmp_path / "deep.png")
    assert picture.pixels.dtype == np.uint8


@pytest.mark.filterwarnings("error")
def test_8_bit_files_are_read_without_warnings(tmp_path):
    for suffix in ("png", "tif", "jpg", "webp", "bmp", "gif"):
        Image.fromarray(noise((6, 9, 3))).save(tmp_path / f"a.{suffix}")
        read_picture(tmp_path / f"a.{suffix}")
        read_picture(str(tmp_path / f"a.{suffix}"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, channels, suffix):
    pixels = noise((6, 9, channels))
    stored = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    stored.save(tmp_path / f"photo.{suffix}", exif=exif_bytes(orientation))
    turned = stored.copy()
    turned.info["exif"] = exif_bytes(orientation)
    expected = np.asarray(ImageOps.exif_transpose(turned)).reshape(*((6, 9) if orientation < 5 else (9, 6)), channels)
    for source in (tmp_path / f"photo.{suffix}", turned):
        picture = read_picture(source)
        assert picture.size == expected.shape[:2]
        assert (picture.pixels == expected).all()
        result = picture.with_pixels(picture.pixels)
        assert result.getexif().get(ORIENTATION, 1) == 1
        assert (np.asarray(ImageOps.exif_transpose(result)).reshape(expected.shape) == expected).all()


@pytest.mark.parametrize("source", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("target", ["png", "jpg", "tif", "webp"])
def test_exif_and_profile_are_kept(tmp_path, source, target):
    path, out = tmp_path / f"a.{source}", tmp_path / "new" / f"b.{target}"
    Image.fromarray(noise((6, 9, 3))).save(path, exif=exif_bytes(6), icc_profile=PROFILE)
    picture = read_picture(path)
    save_picture(picture.with_pixels(picture.pixels), out)
    with Image.open(out) as saved:
        exif = saved.getexif()
        assert exif[MAKER] == "Camera"
        assert exif.get(ORIENTATION, 1) == 1
        assert exif.get_ifd(ExifTags.IFD.Exif)[TAKEN] == "2020:02:03 04:05:06"
        assert saved.info["icc_profile"] == PROFILE
        assert saved.size == (6, 9)
        if target != "jpg":
            assert (np.asarray(saved) == picture.pixels).all()


def test_exif_thumbnail_of_the_old_pixels_is_dropped(tmp_path):
    # IFD0 with one entry (orientation), then IFD1 that points at a thumbnail.
    ifd0 = struct.pack("<HHHIHHI", 1, 274, 3, 1, 1, 0, 26)
    ifd1 = struct.pack("<HHHIIHHIII", 2, 513, 4, 1, 56, 514, 4, 1, 9, 0)
    block = b"Exif\0\0II*\0\x08\0\0\0" + ifd0 + ifd1 + b"THUMBNAIL"
    Image.fromarray(noise((6, 9, 3))).save(tmp_path / "a.jpg", exif=block)
    assert b"THUMBNAIL" in (tmp_path / "a.jpg").read_bytes()
    picture = read_picture(tmp_path / "a.jpg")
    save_picture(picture.with_pixels(picture.pixels), tmp_path / "b.jpg")
    assert b"THUMBNAIL" not in (tmp_path / "b.jpg").read_bytes()


def test_callers_image_is_left_alone():
    image = Image.fromarray(noise((6, 9, 3)))
    image.info["exif"] = exif_bytes(6)
    before = dict(image.info)
    read_picture(image)
    assert image.info == before
    assert image.size == (9, 6)
    assert image.getexif()[ORIENTATION] == 6


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4)])
def test_arrays_come_back_as_they_are(dtype, shape):
    array = noise(shape, np.dtype(dtype).newbyteorder("=")).astype(dtype)
    picture = read_picture(array)
    result = picture.with_pixels(picture.pixels)
    assert (result.shape, result.dtype) == (array.shape, array.dtype)
    assert (result == array).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7), (1, 3, 5, 7), (4, 5, 7)])
def test_tensors_come_back_as_they_are(dtype, shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tensor = (values if dtype.is_floating_point else values * 255).to(dtype)
    picture = read_picture(tensor)
    assert picture.size == (5, 7)
    result = picture.with_pixels(picture.pixels)
    assert (result.shape, result.dtype) == (tensor.shape, tensor.dtype)
    assert (result.float() == tensor.float()).all()


def test_rgb_is_in_the_networks_range():
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 2] = 255, 51  # alpha stays 0: colours are seen all the same
    rgb = read_picture(pixels).rgb()
    assert (rgb.shape, rgb.dtype) == ((1, 3, 2, 3), torch.float32)
    torch.testing.assert_close(rgb[0, :, 1, 2], torch.tensor([1, -1, -0.6]))
    gray = read_picture(np.array([[0, 65535]], dtype=np.uint16)).rgb()
    assert gray.tolist() == [[[[-1, 1]], [[-1, 1]], [[-1, 1]]]]
    assert read_picture(np.array([[0.25]])).rgb().flatten().tolist() == [-0.5] * 3


def test_with_pixels_checks_depth_and_channels():
    picture = read_picture(noise((5, 7, 3)))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8, got \(5, 7, 4\) uint8"):
        picture.with_pixels(noise((5, 7, 4)))
    with pytest.raises(ValueError, match=r"got .* uint16"):
        picture.with_pixels(noise((5, 7, 3), "uint16"))
    assert picture.with_pixels(noise((2, 2, 3))).shape == (2, 2, 3)


@pytest.mark.parametrize(
    "source, message",
    [
        (np.float32([[0, 255]]), r"photo has .* 0 to 255; .*\[0, 1\]"),
        (np.float32([[-1, 1]]), "photo has float values from -1 to 1"),
        (np.float32([[0, np.nan]]), "photo holds NaN or infinite values"),
        (np.zeros((3, 64, 64), np.uint8), r"photo has shape \(3, 64, 64\); an array must be .*\(H, W, C\)"),
        (torch.zeros(64, 64, 3), r"photo has shape \(64, 64, 3\); a tensor must be .*\(C, H, W\)"),
        (torch.zeros(2, 3, 8, 8), r"photo has shape \(2, 3, 8, 8\)"),
        (np.zeros((4, 0, 3), np.uint8), r"photo has no pixels: its shape is \(4, 0, 3\)"),
        (np.zeros((4, 4), np.int64), "photo has dtype int64; use uint8, uint16, or float"),
        (Image.new("RGB", (0, 4)), "photo has no pixels: it is 0x4"),
        (b"bytes", "photo must be a path, PIL image, numpy array or tensor, got bytes"),
    ],
)
def test_wrong_pictures(source, message):
    with pytest.raises(ValueError, match=message):
        read_picture(source, "photo")


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"photo .*none\.png: there is no such file"):
        read_picture(tmp_path / "none.png", "photo")
    with pytest.raises(ValueError, match="is not a file"):
        read_picture(tmp_path, "photo")
    for name, content in (("empty.png", b""), ("text.jpg", b"no picture"), ("a.heic", b"\0\0\0\x18ftypheic")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"photo .*{name} is not a picture; use PNG"):
            read_picture(tmp_path / name, "photo")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise((60, 90, 3))).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"photo .*cut\.{suffix} is "):
        read_picture(path, "photo")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png.*MAX_IMAGE_PIXELS"):
        read_picture(tmp_path / "bomb.png")


def test_one_frame_of_an_animation(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    with pytest.warns(PictureWarning, match=r"a\.gif has 2 frames; only number 1 is used"):
        picture = read_picture(tmp_path / "a.gif")
    assert (picture.pixels[..., :3] == (255, 0, 0)).all()
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(1)  # the caller's choice
        with pytest.warns(PictureWarning, match="only number 2 is used"):
            picture = read_picture(image)
    assert (picture.pixels[..., :3] == (0, 0, 255)).all()


def test_damaged_exif_does_not_stop_a_photo():
    image = Image.fromarray(noise((6, 9, 3)))
    image.info["exif"] = b"Exif\0\0nonsense"
    with pytest.warns(PictureWarning, match="damaged EXIF"):
        picture = read_picture(image)
    assert (picture.pixels == np.asarray(image)).all()
    assert "exif" not in picture.source.info


# --- masks ------------------------------------------------------------------------------------------------


SPOT = np.zeros((6, 9), dtype=bool)
SPOT[2:4, 3:7] = True
WHITE_SPOT = SPOT.astype(np.uint8) * 255


@pytest.mark.parametrize(
    "source",
    [
        SPOT,
        SPOT[..., None],
        WHITE_SPOT,
        WHITE_SPOT.astype(np.uint16) * 257,
        SPOT.astype(np.float32),
        torch.from_numpy(SPOT),
        torch.from_numpy(SPOT)[None, None],
        torch.from_numpy(SPOT).float()[None],
        Image.fromarray(WHITE_SPOT),
        Image.fromarray(WHITE_SPOT).convert("1"),
        Image.fromarray(WHITE_SPOT).convert("P"),
        Image.fromarray(WHITE_SPOT).convert("RGBA"),  # all opaque: luminance counts
        Image.merge("LA", (Image.new("L", (9, 6), 0), Image.fromarray(WHITE_SPOT))),  # one colour: alpha counts
        (3, 2, 7, 4),
        [2.6, 2.4, 6.6, 3.6],  # to the pixels whose centres lie inside
        [(3, 2), (7, 2), (7, 4), (3, 4)],
        [(3, 4), (3, 2), (7, 2), (7, 4)],
    ],
)
def test_masks_of_every_kind(source):
    repaint = read_mask(source, (6, 9))
    assert repaint.dtype == bool
    assert (repaint == SPOT).all()


def test_mask_files_are_turned_like_photos(tmp_path):
    Image.fromarray(WHITE_SPOT).save(tmp_path / "m.png", exif=exif_bytes(6))
    assert (read_mask(tmp_path / "m.png", (9, 6)) == np.rot90(SPOT, -1)).all()
    with pytest.raises(ValueError, match=r"^mask .*m.png is 6x9, but .* 9x6 .*turned: EXIF"):
        read_mask(tmp_path / "m.png", (6, 9))


def test_mask_is_cut_at_half():
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[0, :4] = 0, 127, 128, 255
    assert np.argwhere(read_mask(mask, (10, 10))).tolist() == [[0, 2], [0, 3]]


def test_hidden_white_is_not_repainted():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[0] = (255, 255, 255, 255)
    pixels[1] = (255, 255, 255, 0)
    assert (np.flatnonzero(read_mask(pixels, (4, 4)).all(axis=1)) == [0]).all()


def test_triangle_covers_half_its_box():
    repaint = read_mask([(0, 0), (100, 0), (0, 100)], (120, 120))
    x, y = np.meshgrid(np.arange(120) + 0.5, np.arange(120) + 0.5)
    assert (repaint[x + y < 100]).all()
    assert not (repaint[x + y > 100]).any()


def test_polygon_agrees_with_an_independent_one():
    measure = pytest.importorskip("skimage.measure")
    points = np.random.default_rng(5).random((9, 2)) * (90, 60)
    repaint = read_mask(points.tolist(), (60, 90))
    centres = np.stack(np.meshgrid(np.arange(60) + 0.5, np.arange(90) + 0.5, indexing="ij"), -1).reshape(-1, 2)
    assert (repaint.ravel() == measure.points_in_poly(centres, points[:, ::-1])).all()


def test_gray_mask_is_announced():
    with pytest.warns(PictureWarning, match=r"100% of mask.*50 %"):
        read_mask(np.linspace(0.2, 0.8, 100).reshape(10, 10), (10, 10))


@pytest.mark.filterwarnings("error")
def test_smooth_edges_are_not_announced():
    y, x = np.mgrid[:100, :100]
    read_mask(np.clip(30.5 - np.hypot(x - 50, y - 50), 0, 1), (100, 100))


@pytest.mark.parametrize(
    "source, message",
    [
        (np.ones((5, 9), bool), r"mask is 9x5, but the picture it belongs to is 9x6 \(width x height\)"),
        (np.zeros((6, 9), bool), "mask is empty .*white = repaint"),
        (Image.new("RGBA", (9, 6), (0, 0, 0, 255)), "mask is empty"),
        (SPOT.astype(np.uint8), r"mask is empty \(its lightest value is 0\.39% of white\).*must be bool or float"),
        (np.ones((6, 9), bool), "mask covers .* 9x6.*inverted"),
        ((0, 0, 9, 6), "mask covers"),
        ((3, 2, 10, 4), r"mask: \(3, 2, 10, 4\) .* outside .* 9x6"),
        ((-1, 2, 4, 4), "outside .* 9x6"),
        ((3, 2, float("nan"), 4), "has no area"),
        ((7, 2, 3, 4), r"box \(7, 2, 3, 4\) has no area.*x0 < x1"),
        ((0.1, 0.2, 0.5, 0.5), r"\(0.1, 0.2, 0.5, 0.5\) .* pixels, .* 9x6"),
        ((3.1, 2.1, 3.3, 2.3), "mask is empty .*no pixel's centre"),
        ([(1, 1), (20, 1), (1, 5)], "outside .* 9x6"),
        ([(1, 1), (2, 2)], "a polygon of 3 or more"),
        ((1, 2, 3), r"must be a picture, a box .* got \(1, 2, 3\)"),
        ([(1, 2), (3,)], "must be a picture, a box"),
        (None, "must be a picture, a box .* got None"),
        (SPOT.astype(np.int64), "mask has dtype int64.*a mask may be bool"),
    ],
)
def test_wrong_masks(source, message):
    with pytest.raises(ValueError, match=message):
        read_mask(source, (6, 9))


# --- exemplars --------------------------------------------------------------------------------------------


def test_exemplar_without_mask_is_the_whole_picture():
    pixels = noise((6, 9, 3))
    exemplar = read_exemplar(pixels)
    assert exemplar.mode == "RGB"
    assert (np.asarray(exemplar) == pixels).all()


@pytest.mark.parametrize("alpha", [False, True])
def test_exemplar_is_its_object_which_is_seen_on_white(alpha):
    pixels = noise((6, 9, 3))
    shown = SPOT.copy()
    shown[2, 3] = False
    if alpha:
        exemplar = read_exemplar(np.dstack([pixels, shown.astype(np.uint8) * 255]))
    else:
        exemplar = read_exemplar(pixels, mask=shown)
    expected = np.dstack([pixels, shown.astype(np.uint8) * 255])[2:4, 3:7]
    assert (np.asarray(exemplar) == expected).all()
    assert (np.asarray(read_exemplar(exemplar)) == expected).all()
    on_white = expected[..., :3].copy()
    on_white[0, 0] = 255
    assert (np.asarray(over_white(exemplar)) == on_white).all()
    assert torch.equal(exemplar_tensor(exemplar, 28), exemplar_tensor(Image.fromarray(on_white), 28))
    parts = shown_tensor(exemplar, 28)[0, 0]  # of an object in 2 x 4 pixels
    assert parts[:7, :4].max() < 0.1
    assert parts[20:].min() > 0.9
    assert shown_tensor(Image.fromarray(on_white), 28).min() == 1


def test_exemplar_takes_boxes_and_full_masks():
    pixels = noise((6, 9, 3))
    assert (np.asarray(read_exemplar(pixels, mask=(3, 2, 7, 4))) == pixels[2:4, 3:7]).all()
    assert (np.asarray(read_exemplar(pixels, mask=np.ones((6, 9), bool))) == pixels).all()


def test_exemplar_of_other_depths_and_gray():
    exemplar = read_exemplar(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(exemplar).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.filterwarnings("error")
def test_exemplar_of_16_bit_colour_needs_no_warning(tmp_path):
    write_png16(tmp_path / "deep.png", noise((5, 7, 3), "uint16"))
    assert read_exemplar(tmp_path / "deep.png").size == (7, 5)


def test_wrong_exemplars():
    with pytest.raises(ValueError, match="exemplar is empty: its alpha shows no object"):
        read_exemplar(np.zeros((4, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="exemplar is empty: its mask shows no object"):
        read_exemplar(noise((4, 4, 3)), mask=np.zeros((4, 4), dtype=bool))
    with pytest.raises(ValueError, match="exemplar's mask is 5x4, but the picture it belongs to is 4x4"):
        read_exemplar(noise((4, 4, 3)), mask=np.ones((4, 5), dtype=bool))
    with pytest.raises(ValueError, match="must be an RGB or RGBA image, got mode 'L'"):
        exemplar_tensor(Image.new("L", (4, 4)))


def test_exemplar_tensor_agrees_with_clips_own_preprocessing():
    transformers = pytest.importorskip("transformers")
    image = Image.fromarray(noise((50, 80, 3)))
    processor = transformers.CLIPImageProcessor(
        do_center_crop=False, size={"height": 224, "width": 224}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    tensor = exemplar_tensor(image)
    assert tensor.shape == (1, 3, 224, 224)
    expected = torch.from_numpy(np.array(processor(image, return_tensors="np")["pixel_values"]))
    # It resamples in another library: single pixels are two 8-bit levels (1 / 255 / 0.26 each) away, most are equal.
    torch.testing.assert_close(tensor, expected, atol=0.031, rtol=0)
    assert (tensor - expected).abs().mean() < 0.005


def test_exemplar_tensor_is_normalised():
    assert exemplar_tensor(Image.new("RGB", (5, 3)), size=32).shape == (1, 3, 32, 32)
    white = exemplar_tensor(Image.new("RGB", (5, 3), "white"))[0, :, 0, 0]
    torch.testing.assert_close(white, (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


# --- saving -----------------------------------------------------------------------------------------------


def test_settings_in_png_text(tmp_path):
    save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"seed": "321", "reference": "grün 猫.png"})
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.text == {"seed": "321", "reference": "grün 猫.png"}


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
def test_settings_in_the_user_comment(tmp_path, suffix):
    image = Image.new("RGB", (4, 4))
    image.info["exif"] = exif_bytes()
    save_picture(image, tmp_path / f"a.{suffix}", {"seed": "321"})
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        details = saved.getexif().get_ifd(ExifTags.IFD.Exif)
        assert details[ExifTags.Base.UserComment] == b'ASCII\0\0\0{"seed": "321"}'
        assert details[TAKEN] == "2020:02:03 04:05:06"


def with_texts(comment=None, description=None):
    """A picture whose EXIF block holds a user comment and an image description."""
    exif = Image.Exif()
    exif[MAKER] = "Camera"
    if description is not None:
        exif[DESCRIPTION] = description
    if comment is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] = comment
    image = Image.new("RGB", (4, 4))
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
@pytest.mark.parametrize(
    "comment", [b"ASCII\0\0\0my cat", b"UNICODE\0m\0y\0", b"no character set", b'ASCII\0\0\0{"a": 1}']
)
def test_own_comment_of_a_photo_is_kept(tmp_path, suffix, comment):
    save_picture(with_texts(comment, "  "), tmp_path / f"a.{suffix}", {"seed": "321"})
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        exif = saved.getexif()
        assert exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] == comment
        assert exif[DESCRIPTION] == '{"seed": "321"}'
        assert read_info(saved)["seed"] == "321"


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
@pytest.mark.parametrize("blank", [b"", b"\0" * 8, b"ASCII\0\0\0" + b" " * 20, b"ASCII\0\0\0" + b"\0" * 20])
def test_comment_that_a_camera_left_blank_is_free(tmp_path, suffix, blank):
    save_picture(with_texts(blank, "my cat"), tmp_path / f"a.{suffix}", {"seed": "321"})
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        assert saved.getexif()[DESCRIPTION] == "my cat"
        assert saved.getexif().get_ifd(ExifTags.IFD.Exif)[COMMENT] == b'ASCII\0\0\0{"seed": "321"}'


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
def test_settings_without_a_free_place_are_left_out(tmp_path, suffix):
    with pytest.warns(PictureWarning, match=rf"a\.{suffix} is saved without its settings"):
        save_picture(with_texts(b"ASCII\0\0\0my cat", "a cat"), tmp_path / f"a.{suffix}", {"seed": "321"})
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        assert saved.getexif()[DESCRIPTION] == "a cat"
        assert saved.getexif().get_ifd(ExifTags.IFD.Exif)[COMMENT] == b"ASCII\0\0\0my cat"
        assert read_info(saved) == {}


@pytest.mark.parametrize("comment", [None, b"ASCII\0\0\0my cat"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.filterwarnings("error")
def test_settings_of_an_earlier_edit_are_replaced(tmp_path, comment, suffix):
    save_picture(with_texts(comment), tmp_path / "first.jpg", {"seed": "1"})
    first = read_picture(tmp_path / "first.jpg")
    save_picture(first.source, tmp_path / f"second.{suffix}", {"seed": "2"})
    with Image.open(tmp_path / f"second.{suffix}") as saved:
        assert read_info(saved) == {"seed": "2"}
    assert b'"1"' not in (tmp_path / f"second.{suffix}").read_bytes()


def test_exif_that_is_too_long_for_jpeg(tmp_path):
    image = Image.new("RGB", (4, 4))
    exif = Image.Exif()
    exif[MAKER] = "x" * 65400
    image.info["exif"] = exif.tobytes()
    with pytest.warns(PictureWarning, match="without its settings"):
        save_picture(image, tmp_path / "a.jpg", {"seed": "3" * 100})
    save_picture(image, tmp_path / "a.webp", {"seed": "3" * 100})
    with Image.open(tmp_path / "a.jpg") as jpeg, Image.open(tmp_path / "a.webp") as webp:
        assert jpeg.getexif()[MAKER] == webp.getexif()[MAKER] == "x" * 65400
        assert (read_info(jpeg), read_info(webp)) == ({}, {"seed": "3" * 100})
    exif[MAKER] = "x" * 65536
    image.info["exif"] = exif.tobytes()
    with pytest.raises(ValueError, match=r"b\.jpg: .* EXIF block has 65\d+ bytes, JPEG holds 65533"):
        save_picture(image, tmp_path / "b.jpg")
    assert not (tmp_path / "b.jpg").exists()


def test_folder_is_not_replaced_by_a_picture(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png" / "kept.txt").touch()
    with pytest.raises(ValueError, match=r"a\.png is a folder"):
        save_picture(Image.new("L", (4, 4)), tmp_path / "a.png")
    assert (tmp_path / "a.png" / "kept.txt").exists()


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_lossless_formats(tmp_path, suffix, mode):
    image = Image.fromarray(noise((40, 50, 4))).convert(mode)
    save_picture(image, tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        assert (np.asarray(saved) == np.asarray(image)).all()


def test_jpeg_keeps_full_colour_resolution(tmp_path):
    save_picture(Image.fromarray(noise((40, 50, 3))), tmp_path / "a.JPG")
    with Image.open(tmp_path / "a.JPG") as saved:
        assert saved.format == "JPEG"
        assert {component[1:3] for component in saved.layer} == {(1, 1)}  # no chroma subsampling


def test_wrong_saves(tmp_path):
    with pytest.raises(ValueError, match=r"cannot save as '\.gif'; choose one of \.png, \.jpg"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="JPEG cannot hold an image of mode 'RGBA'; save as PNG or TIFF or WEBP"):
        save_picture(Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="PNG cannot hold an image of mode 'F'; save as TIFF"):
        save_picture(Image.new("F", (4, 4)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_picture(Image.new("L", (4, 4), 7), path)
    before = path.read_bytes()

    def full_disk(self, target, **options):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_picture(Image.new("L", (4, 4), 9), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not HIRES.is_dir(), reason="needs the shared photos")
def test_real_photo():
    path = min(HIRES.glob("*.jpg"))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    picture = read_picture(path)
    result = picture.with_pixels(picture.pixels)
    assert (np.asarray(result) == np.asarray(expected)).all()
    assert result.info.get("icc_profile") == expected.info.get("icc_profile")
