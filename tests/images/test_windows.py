"""Windows: their choice, the way into model pixels, the seam and the way back."""

import numpy as np
import pytest
import torch

from pbe.images.windows import (
    Box,
    choose_window,
    composite,
    connected_regions,
    extract_repaint,
    feather_weights,
    mask_bounding_box,
    model_size,
    resample,
    white_level,
)


def rectangle(size, x0, y0, x1, y1):
    repaint = np.zeros(size, dtype=bool)
    repaint[y0:y1, x0:x1] = True
    return repaint


def coverage(repaint, window):
    return np.count_nonzero(repaint[window.slices]) / window.area


def holds(window, box):
    return window.x0 <= box.x0 and window.y0 <= box.y0 and box.x1 <= window.x1 and box.y1 <= window.y1


def inside(window, size):
    return 0 <= window.x0 < window.x1 <= size[1] and 0 <= window.y0 < window.y1 <= size[0]


def test_bounding_box():
    assert mask_bounding_box(rectangle((30, 40), 5, 6, 9, 8)) == Box(5, 6, 9, 8)
    with pytest.raises(ValueError, match="empty"):
        mask_bounding_box(np.zeros((4, 4), dtype=bool))


# --- choosing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, box",
    [
        ((3000, 4000), (1800, 1200, 2300, 1700)),  # in the middle of a large photo
        ((200, 300), (100, 60, 160, 120)),
        ((4000, 3000), (1000, 3000, 1600, 3400)),  # portrait
        ((600, 800), (0, 200, 90, 300)),  # at each border
        ((600, 800), (700, 200, 800, 300)),
        ((600, 800), (300, 0, 400, 100)),
        ((600, 800), (300, 500, 400, 600)),
        ((600, 800), (0, 0, 100, 90)),  # in each corner
        ((600, 800), (700, 0, 800, 90)),
        ((600, 800), (0, 510, 100, 600)),
        ((600, 800), (700, 510, 800, 600)),
    ],
)
def test_window_is_a_square_with_context(size, box):
    repaint = rectangle(size, *box)
    window = choose_window(repaint)
    assert inside(window, size)
    assert holds(window, Box(*box))
    assert window.width == window.height
    assert 0.05 <= coverage(repaint, window) <= 0.5
    assert model_size(window) == (512, 512)


def test_window_of_a_free_square_mask_is_four_times_its_area_and_centred():
    assert choose_window(rectangle((3000, 4000), 1000, 1000, 1200, 1200)) == Box(900, 900, 1300, 1300)


def test_margin_is_kept_where_the_photo_allows_it():
    # A full-height bar would be tight at a quarter of the area; 200 / (1 - 2 * 0.1) = 250.
    window = choose_window(rectangle((1000, 1000), 400, 400, 600, 470), margin=0.1)
    assert window.width == 250
    assert (window.x0, window.x1) == (375, 625)


def test_one_pixel_window_is_an_eighth_of_the_resolution():
    repaint = rectangle((3000, 4000), 3999, 0, 4000, 1)
    assert choose_window(repaint) == Box(3936, 0, 4000, 64)
    assert choose_window(repaint, resolution=256) == Box(3968, 0, 4000, 32)
    assert choose_window(rectangle((20, 30), 3, 3, 4, 4)) == Box(0, 0, 20, 20)  # the photo is smaller than that


@pytest.mark.parametrize("portrait", [False, True])
def test_mask_longer_than_the_short_side_gets_a_rectangle(portrait):
    repaint = rectangle((400, 2000), 700, 150, 1500, 250)
    size, window = (400, 2000), Box(600, 0, 1600, 400)  # 800 px and a tenth of the window free on each side
    if portrait:
        repaint, size, window = repaint.T, size[::-1], Box(0, 600, 400, 1600)
    assert choose_window(repaint) == window
    assert inside(window, size)
    assert model_size(window) == ((1280, 512) if portrait else (512, 1280))


def test_mask_that_fills_the_square_gets_a_rectangle_with_context():
    repaint = rectangle((480, 1600), 500, 0, 960, 480)
    window = choose_window(repaint)
    assert window.height == 480
    assert holds(window, Box(500, 0, 960, 480))
    assert 0.49 < coverage(repaint, window) <= 0.5


def test_two_far_regions_share_one_window():
    repaint = rectangle((600, 900), 20, 30, 60, 70) | rectangle((600, 900), 500, 400, 540, 440)
    window = choose_window(repaint)
    assert inside(window, repaint.shape)
    assert np.count_nonzero(repaint[window.slices]) == np.count_nonzero(repaint)


def test_random_windows():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(1, 400, 2))
        (x0, x1), (y0, y1) = (sorted(rng.integers(0, n, 2)) for n in (size[1], size[0]))
        repaint = rectangle(size, x0, y0, x1 + 1, y1 + 1)
        if rng.random() < 0.5:
            repaint &= rng.random(size) < 0.5
        if not repaint.any():
            continue
        window, box = choose_window(repaint, resolution=64), mask_bounding_box(repaint)
        area, short, longest = np.count_nonzero(repaint), min(size), max(box.width, box.height)
        case = f"size {size}, box {box}, window {window}"
        assert inside(window, size), case
        assert holds(window, box), case
        # Squares that can be had: containing the box, inside the photo, at least 64 / 8 pixels.
        smallest, largest = max(longest, 8), short
        if smallest <= largest and area <= 0.5 * largest**2:
            assert window.width == window.height, case
            if area >= 0.05 * smallest**2:
                assert 0.05 <= coverage(repaint, window) <= 0.5, case
        else:
            assert short in (window.width, window.height), case
            assert max(window.width, window.height) >= short, case


def test_wrong_window_options():
    repaint = rectangle((100, 100), 20, 20, 30, 30)
    with pytest.raises(ValueError, match=r"coverage must be.*\(0\.5, 0\.1\)"):
        choose_window(repaint, coverage=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"margin must be.*0\.5"):
        choose_window(repaint, margin=0.5)
    with pytest.raises(ValueError, match="multiple of 8, got 500"):
        model_size(Box(0, 0, 10, 10), resolution=500)


def test_model_size_of_rectangles():
    assert model_size(Box(0, 0, 4000, 3000)) == (512, 680)  # 682.7 to the nearest multiple of 8
    assert model_size(Box(0, 0, 3000, 4000), 256) == (344, 256)
    height, width = model_size(Box(0, 0, 10000, 500))
    assert height * width <= 4 * 512**2
    assert height % 8 == width % 8 == 0
    assert width / height == pytest.approx(20, rel=0.05)  # rounding to 8 at a height of 224 is 3.6 %


# --- regions ----------------------------------------------------------------------------------------------


def test_regions_are_found_in_order_and_add_up():
    a, b = rectangle((80, 90), 50, 5, 60, 20), rectangle((80, 90), 3, 40, 30, 80)
    regions = connected_regions(a | b)
    assert len(regions) == 2
    assert (regions[0] == a).all()
    assert (regions[1] == b).all()


def test_strokes_close_together_are_one_region():
    def two_bars(gap):
        return rectangle((60, 60), 5, 5, 20, 50) | rectangle((60, 60), 20 + gap, 5, 50, 50)

    (region,) = connected_regions(two_bars(8))
    assert (region == two_bars(8)).all()  # the gap itself is not repainted
    assert len(connected_regions(two_bars(9))) == 2
    assert len(connected_regions(two_bars(1), gap=0)) == 2


@pytest.mark.parametrize("density", [0.05, 0.3, 0.45, 0.9])
def test_regions_agree_with_a_flood_fill(density):
    measure = pytest.importorskip("skimage.measure")
    repaint = np.random.default_rng(1).random((9, 31)) < density
    labels, count = measure.label(repaint, connectivity=2, return_num=True)
    regions = connected_regions(repaint, gap=0)
    assert len(regions) == count
    for region in regions:
        assert (region == (labels == labels[region][0])).all()


def test_spiral_is_one_region():
    spiral = np.zeros((41, 41), dtype=bool)
    for k in range(0, 20, 2):
        spiral[k, k : 41 - k] = spiral[k : 41 - k, 40 - k] = spiral[40 - k, k : 41 - k] = True
        spiral[k + 2 : 41 - k, k] = True
        spiral[k + 2, k : k + 3] = True
    (region,) = connected_regions(spiral, gap=0)
    assert (region == spiral).all()


def test_speckles_are_too_many_regions():
    repaint = np.zeros((400, 400), dtype=bool)
    repaint[::20, ::20] = True
    with pytest.raises(ValueError, match="400 separate regions"):
        connected_regions(repaint)


# --- into the model ---------------------------------------------------------------------------------------


def test_resample_keeps_pixels_at_equal_size_and_range_at_others():
    picture = torch.rand(1, 3, 60, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # Bicubic weights at whole pixels are 0 and 1 up to rounding.
    torch.testing.assert_close(resample(picture, (60, 80)), picture, atol=1e-6, rtol=0)
    for size in ((16, 16), (128, 128)):
        resampled = resample(picture.sign(), size)
        assert resampled.shape == (1, 3, *size)
        assert resampled.abs().max() <= 1


def test_resample_antialiases():
    lines = torch.full((1, 3, 64, 64), -1.0)
    lines[..., ::8] = 1  # mean -0.75, and between the places where a sampler without antialiasing looks
    middle = resample(lines, (8, 8))[..., 2:-2, 2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, -0.75), atol=0.1, rtol=0)  # the filter is no box


def test_model_mask_covers_all_that_is_repainted():
    rng = np.random.default_rng(2)
    for _ in range(60):
        side, model = rng.integers(8, 150, 2)
        repaint = rng.random((side + 5, side + 9)) < 0.02
        repaint[7, 6] = True
        window = Box(4, 3, 4 + side, 3 + side)
        mask = extract_repaint(repaint, window, (model, model))[0, 0].numpy()
        assert set(np.unique(mask)) <= {0, 1}
        # Every model pixel that a repainted pixel's area touches is repainted, and beyond one pixel none is.
        for y, x in np.argwhere(repaint[window.slices]):
            rows = slice(y * model // side, -(-(y + 1) * model // side))
            columns = slice(x * model // side, -(-(x + 1) * model // side))
            assert mask[rows, columns].all()
        if not repaint[window.slices].all():
            grown = np.count_nonzero(repaint[window.slices]) * (model / side + 2) ** 2
            assert mask.sum() <= grown


def test_thin_line_arrives_in_the_model_mask():
    repaint = np.zeros((2000, 2000), dtype=bool)
    repaint[1001] = True
    assert extract_repaint(repaint, Box(0, 0, 2000, 2000), (512, 512))[0, 0].any(dim=0).all()


# --- the seam ---------------------------------------------------------------------------------------------


def test_feather_rises_inside_the_mask():
    repaint = rectangle((100, 120), 20, 30, 80, 90)
    weights = feather_weights(repaint, 8)
    assert weights.dtype == np.float32
    assert (weights[~repaint] == 0).all()
    assert (weights[repaint] > 0).all()
    np.testing.assert_allclose(weights[60, 18:32], [0, 0, *(np.arange(1, 9) / 8), 1, 1, 1, 1])
    assert (weights[38:82, 28:72] == 1).all()


@pytest.mark.parametrize("width", [0, 1])
def test_no_feather_is_a_hard_edge(width):
    repaint = rectangle((30, 30), 5, 5, 20, 20)
    assert (feather_weights(repaint, width) == repaint).all()


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 8, 13])
def test_thin_line_reaches_one(thickness):
    repaint = rectangle((60, 200), 10, 20, 190, 20 + thickness)
    middle = feather_weights(repaint, 16)[20 + thickness // 2, 30:170]
    assert (middle == 1).all()


def test_thin_part_beside_a_thick_one():
    repaint = rectangle((100, 200), 10, 10, 90, 90) | rectangle((100, 200), 90, 48, 190, 53)
    weights = feather_weights(repaint, 16)
    assert (weights[50, 95:185] == 1).all()
    assert weights[50, 60:95].min() > 0.4  # a shallow dent where they join
    np.testing.assert_allclose(weights[50, 10:26], np.arange(1, 17) / 16)  # the thick part keeps its full width


def test_thin_line_close_to_a_thick_part_reaches_one():
    repaint = rectangle((100, 200), 10, 10, 90, 90) | rectangle((100, 200), 91, 10, 92, 90)
    assert (feather_weights(repaint, 16)[11:89, 91] == 1).all()


def test_ragged_edge_keeps_its_feather():
    repaint = rectangle((100, 120), 20, 20, 100, 80)
    repaint[19, 30:90:7] = repaint[18, 30:90:14] = True
    weights = feather_weights(repaint, 16)
    assert weights[18:21, 30:90].max() < 0.2
    np.testing.assert_allclose(
        weights[23:36, 62], feather_weights(rectangle((100, 120), 20, 20, 100, 80), 16)[23:36, 62]
    )


def test_feather_is_round():
    y, x = np.mgrid[:201, :201] - 100
    radius = np.hypot(y, x)
    weights = feather_weights(radius <= 90, 20)
    # Octagonal depth is within 10 % of the true depth; a pixel is 1 / 20; 0.2 holds both.
    ramp = (radius > 72) & (radius < 89)
    assert np.abs(weights - (90.5 - radius) / 20)[ramp].max() < 0.2


def test_photo_border_is_no_edge():
    weights = feather_weights(rectangle((50, 60), 0, 0, 30, 50), 10)
    assert (weights[:, :20] == 1).all()
    np.testing.assert_allclose(weights[0, 19:31], [1, *(np.arange(10, 0, -1) / 10), 0])
    assert (feather_weights(np.ones((20, 20), dtype=bool), 5) == 1).all()


def test_wrong_feather():
    with pytest.raises(ValueError, match="feather width must be 0 or more pixels, got -1"):
        feather_weights(np.ones((4, 4), dtype=bool), -1)


# --- back into the photo ----------------------------------------------------------------------------------


def random_pixels(rng, shape, dtype):
    if np.dtype(dtype).kind == "u":
        return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    return rng.random(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_outside_is_bit_identical_and_deep_inside_is_the_edit(dtype, channels):
    pixels = random_pixels(np.random.default_rng(3), (90, 120, channels), dtype)
    original = pixels.copy()
    repaint = rectangle((90, 120), 0, 30, 50, 80)
    window = choose_window(repaint, resolution=64)
    edited = torch.full((1, 3, 64, 64), 0.5)  # gray 0.75
    result = composite(pixels, edited, window, feather_weights(repaint, 6))
    assert (pixels == original).all()
    assert result.dtype == pixels.dtype
    assert result[~repaint].tobytes() == original[~repaint].tobytes()
    white = white_level(pixels.dtype)
    deep = result[40:70, 0:40].astype(np.float64) / white
    colours = channels - 1 if channels in (2, 4) else channels
    # Half a step of the integer types; float32 and the resampling filter's rounding for the float types.
    tolerance = 0.5 / white + 1e-6 if pixels.dtype.kind == "u" else 1e-6
    np.testing.assert_allclose(deep[..., :colours], 0.75, atol=tolerance)
    if channels in (2, 4):
        assert (result[40:70, 0:40, -1] == white).all()
    assert (result[31, 10] != original[31, 10]).any()  # the seam is a blend


def test_blend_is_linear_in_the_weight():
    pixels = np.full((32, 32, 3), 100, dtype=np.uint8)
    weights = np.zeros((32, 32), dtype=np.float32)
    weights[8, 8:13] = [0, 0.25, 0.5, 0.75, 1]
    result = composite(pixels, torch.full((1, 3, 16, 16), 2 * 200 / 255 - 1), Box(0, 0, 32, 32), weights)
    assert result[8, 8:13, 0].tolist() == [100, 125, 150, 175, 200]


def test_sixteen_bits_are_more_than_eight():
    pixels = np.zeros((64, 64, 3), dtype=np.uint16)
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    result = composite(pixels, ramp, Box(0, 0, 64, 64), np.ones((64, 64), dtype=np.float32))
    np.testing.assert_allclose(result[0, :, 0], np.linspace(0, 65535, 64), atol=0.6)


def test_gray_photo_takes_the_luminance():
    pixels = np.zeros((8, 8, 1), dtype=np.uint8)
    green = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    result = composite(pixels, green, Box(0, 0, 8, 8), np.ones((8, 8), dtype=np.float32))
    assert (result == round(0.587 * 255)).all()


def test_hidden_colour_does_not_enter_the_seam():
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 255  # fully transparent red
    half = np.full((8, 8), 0.5, dtype=np.float32)
    result = composite(pixels, torch.full((1, 3, 8, 8), -1.0), Box(0, 0, 8, 8), half)
    assert (result[..., :3] == 0).all()  # black, not dark red
    assert (result[..., 3] == 128).all()


def test_wrong_weights():
    pixels, edited = np.zeros((20, 20, 3), dtype=np.uint8), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"weights outside the window \(0, 0, 10, 10\) must be 0"):
        composite(pixels, edited, Box(0, 0, 10, 10), np.ones((20, 20), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\(9, 9\), .* \(20, 20\)"):
        composite(pixels, edited, Box(0, 0, 10, 10), np.ones((9, 9), dtype=np.float32))


@pytest.mark.slow
def test_large_photo_from_window_to_composite():
    """A 4000 x 3000 photo: the shapes fit, nothing outside changes, and none of it takes long."""
    y, x = np.mgrid[:3000, :4000]
    repaint = (x - 3500) ** 2 + (y - 400) ** 2 < 350**2
    pixels = random_pixels(np.random.default_rng(4), (3000, 4000, 3), "uint8")
    (region,) = connected_regions(repaint)
    window = choose_window(region)
    size = model_size(window)
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    edited = resample(rgb[(..., *window.slices)], size)
    result = composite(pixels, -edited, window, feather_weights(repaint, 16))
    assert size == (512, 512)
    assert (result == pixels)[~repaint].all()
    assert (result != pixels)[repaint].mean() > 0.9


def test_a_feather_wider_than_the_mask_takes_no_longer():
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:70] = True
    weights = feather_weights(mask, 10**6)  # a loop of as many rounds would take hours
    assert (weights[mask] > 0).all()
    assert (weights[~mask] == 0).all()
    assert weights.max() == 1
