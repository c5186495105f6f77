"""Windows of photos, and reading them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pbe.data.crop import (
    Photo,
    UnusablePicture,
    content_box,
    coverage_window,
    draft_scale,
    paper_window,
    scaled,
)
from pbe.data.example import make_generator
from pbe.data.records import upright_size
from pbe.images.windows import Box

# --- choosing ---------------------------------------------------------------------------------------------


def holds(window, box):
    return window.x0 <= box.x0 and window.y0 <= box.y0 and box.x1 <= window.x1 and box.y1 <= window.y1


def test_paper_window_slides_along_the_long_side_then_shrinks():
    size, grown, g = (200, 300), Box(140, 80, 180, 120), make_generator(1)
    windows = [paper_window(grown, size, 0.6, False, g) for _ in range(4000)]
    assert all(w.width == w.height and holds(w, grown) for w in windows)
    inset = np.array([w.y0 for w in windows])
    assert (inset == [200 - w.y1 for w in windows]).all()  # the same amount on all sides
    left = np.array([w.x0 for w in windows]) - inset
    assert (left.min(), left.max()) == (0, 100)
    assert left.mean() == pytest.approx(50, abs=4 * 101 / 12**0.5 / 4000**0.5)
    margin = np.minimum.reduce([grown.x0 - left, np.full(4000, 80), left + 200 - grown.x1, np.full(4000, 80)])
    most = (0.6 * margin).astype(int)
    assert (inset <= most).all()
    share = (inset + 0.5) / (most + 1)  # uniform in (0, 1) if all amounts are as likely
    assert share.mean() == pytest.approx(0.5, abs=4 / 12**0.5 / 4000**0.5)
    assert (inset == most).any()


def test_paper_window_of_a_portrait_is_that_of_a_landscape_turned():
    for seed in range(20):
        wide = paper_window(Box(140, 80, 180, 110), (200, 300), 0.6, False, make_generator(seed))
        tall = paper_window(Box(80, 140, 110, 180), (300, 200), 0.6, False, make_generator(seed))
        assert tall == Box(wide.y0, wide.x0, wide.y1, wide.x1)


def test_paper_window_of_a_square_photo_is_all_of_it():
    assert paper_window(Box(10, 10, 20, 20), (64, 64), 0.6, False, make_generator(0)) == Box(0, 0, 64, 64)


def test_paper_window_without_room():
    g = make_generator(0)
    assert paper_window(Box(20, 10, 230, 90), (200, 300), 0.6, True, g) is None  # 210 wide
    exact = Box(20, 10, 220, 90)
    assert paper_window(exact, (200, 300), 0.6, False, g) is None  # the original's rule
    assert paper_window(exact, (200, 300), 0.6, True, g) == Box(20, 0, 220, 200)


def test_coverage_window_has_the_share_asked_for():
    grown, g = Box(400, 300, 500, 380), make_generator(2)
    windows = [coverage_window(grown, (800, 1000), (0.1, 0.5), g) for _ in range(2000)]
    assert all(w.width == w.height and holds(w, grown) and holds(Box(0, 0, 1000, 800), w) for w in windows)
    shares = np.array([grown.area / w.area for w in windows])
    assert 0.099 < shares.min() < 0.105  # sides are rounded to pixels
    assert 0.49 < shares.max() < 0.51
    assert shares.mean() == pytest.approx(0.3, abs=4 * 0.4 / 12**0.5 / 2000**0.5)
    # Placed at random: the box is as often left of the middle as right of it.
    left = np.mean([grown.x0 - w.x0 < w.x1 - grown.x1 for w in windows])
    assert left == pytest.approx(0.5, abs=0.06)


def test_coverage_window_where_the_photo_or_the_box_sets_limits():
    g = make_generator(0)
    assert coverage_window(Box(10, 10, 50, 50), (100, 200), (0.05, 0.161), g).height == 100  # the short side
    assert coverage_window(Box(10, 10, 90, 90), (100, 200), (0.1, 0.5), g) is None  # 64 % of the largest square
    assert coverage_window(Box(10, 10, 90, 12), (100, 200), (0.5, 0.5), g).width == 80  # the box's long side
    assert coverage_window(Box(10, 10, 120, 12), (100, 200), (0.1, 0.2), g) is None


def test_place():
    assert content_box(Box(0, 0, 200, 100), 64, "squash") == Box(0, 0, 64, 64)
    assert content_box(Box(0, 0, 200, 100), 64, "letterbox") == Box(0, 16, 64, 48)
    assert content_box(Box(50, 0, 150, 300), 90, "letterbox") == Box(30, 0, 60, 90)
    assert content_box(Box(50, 50, 150, 150), 64, "letterbox") == Box(0, 0, 64, 64)


def test_enlarge_stops_at_the_edges():
    assert Box(5, 50, 60, 95).grown(10, (100, 80)) == Box(0, 40, 70, 100)


# --- reading ----------------------------------------------------------------------------------------------


def triangles(height, width):
    """A picture that rises or falls by one level a pixel everywhere but at its peaks, in x (red) and y (green)."""
    x, y = np.arange(width), np.arange(height)
    across, down = (np.abs((n + 20) % 400 - 200) + 20 for n in (x, y))
    planes = np.zeros((height, width, 3), dtype=np.uint8)
    planes[..., 0], planes[..., 1], planes[..., 2] = across[None], down[:, None], 128
    return planes


def test_draft_scale():
    full = Box(0, 0, 1600, 1200)
    assert draft_scale([full], [(512, 512)]) == 2  # 1200 / 512 = 2.3
    assert draft_scale(
        [full],
        [
            (512, 512),
        ],
    ) == draft_scale([full, full], [(512, 512), (224, 224)])
    assert draft_scale([full, Box(0, 0, 300, 600)], [(512, 512), (224, 224)]) == 1  # the exemplar needs all it has
    assert draft_scale([full], [(128, 128)]) == 8
    assert draft_scale([full], [(16, 16)]) == 8
    assert draft_scale([full], [(2000, 2000)]) == 1


def test_scaled_box_has_at_least_a_pixel():
    assert scaled(Box(3, 4, 30, 44), 4, (100, 100)) == Box(1, 1, 8, 11)
    assert scaled(Box(198, 9, 200, 10), 8, (10, 25)) == Box(24, 1, 25, 2)


@pytest.mark.parametrize("size, resolution", [((1203, 1601), 512), ((1203, 1601), 256), ((1203, 1601), 100)])
def test_draft_decoding_stays_within_half_a_pixel(tmp_path, size, resolution):
    path = tmp_path / "photo.jpg"
    Image.fromarray(triangles(*size)).save(path, quality=98, subsampling=0)
    window = Box(101, 55, 1201, 1155)
    with Photo(path) as photo, Photo(path) as again:
        (full,) = photo.read([window], [(resolution,) * 2], draft=False)
        (draft,) = again.read([window], [(resolution,) * 2])
    assert draft.shape == full.shape == (3, resolution, resolution)
    difference = (draft.float() - full.float()).abs()
    # The slope is a level a photo pixel, and an edge of the window moves by up to half a draft pixel: with the scale's
    # 2, 4 or 8 photo pixels a draft pixel, 1, 2 or 4 levels. JPEG and rounding add one; at the peaks it may be more.
    levels = {512: 1, 256: 2, 100: 4}[resolution] + 1
    assert difference.mean() < levels
    assert (difference > levels + 0.5).float().mean() < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray(triangles(160, 240)).save(path, exif=exif, quality=98, subsampling=0)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    with Photo(path) as photo:
        assert photo.size == expected.shape[:2]
        (crop,) = photo.read([Box(10, 20, 90, 120)], [(100, 80)])
    np.testing.assert_array_equal(crop.permute(1, 2, 0), expected[20:120, 10:90])
    with Photo(path) as photo:  # and where the decoder scales
        (crop,) = photo.read([Box(8, 16, 88, 120)], [(52, 40)])
    half = expected[16:120, 8:88].reshape(52, 2, 40, 2, 3).mean(axis=(1, 3))
    assert np.abs(crop.permute(1, 2, 0).numpy() - half).mean() < 2  # a mirrored side may be off by half a draft pixel


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_photos_without_a_draft_are_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    stored = Image.fromarray(triangles(160, 240))
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    stored.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored))
    assert upright_size(path) == expected.shape[:2]
    with Photo(path) as photo:
        assert photo.size == expected.shape[:2]
        (crop,) = photo.read([Box(10, 20, 90, 120)], [(100, 80)])
    np.testing.assert_array_equal(crop.permute(1, 2, 0), expected[20:120, 10:90])


@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png")]
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    gray = np.where(np.arange(64)[None] < 32, 0, 255).repeat(64, axis=0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode)
    path = tmp_path / f"photo.{suffix}"
    image.save(path)
    with Photo(path) as photo:
        (crop,) = photo.read([Box(16, 0, 48, 32)], [(32, 32)])
    assert crop.dtype == torch.uint8
    assert crop.shape == (3, 32, 32)
    assert crop[:, :, 0].max() < 4  # black on the left, white on the right, but for JPEG's error
    assert crop[:, :, -1].min() > 251


def test_unusable_pictures_say_why(tmp_path):
    with pytest.raises(UnusablePicture, match=r"nowhere\.jpg") as caught:
        Photo(tmp_path / "nowhere.jpg")
    assert caught.value.reason == "missing"

    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    with pytest.raises(UnusablePicture, match=r"text\.jpg") as caught:
        Photo(text)
    assert caught.value.reason == "unreadable"

    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(triangles(200, 200)).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    with Photo(cut) as photo, pytest.raises(UnusablePicture, match=r"cut\.jpg") as caught:
        photo.read([Box(0, 0, 200, 200)], [(64, 64)])
    assert caught.value.reason == "unreadable"
