"""What an edit paints on: masks that the settings change, transparent parts, photos that grow, placed objects."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import pbe
from pbe.editing.canvas import read_canvas
from pbe.editing.settings import EditSettings
from pbe.images.masks import shape_mask
from pbe.images.pillow import PictureWarning
from pbe.images.windows import choose_window

RANDOM = np.random.default_rng(0)
EXEMPLAR = Image.fromarray(RANDOM.integers(0, 256, (30, 40, 3), np.uint8))
BOX = (20, 20, 60, 50)


def photo(width, height, channels=3, dtype=np.uint8):
    values = np.random.default_rng(1).random((height, width, channels))
    return (values * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)


def rectangle(width, height, box):
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def edit(model, image, mask, **options):
    (result,) = pbe.edit(model, image, mask, EXEMPLAR, **{"steps": 4, **options})
    return result


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"grow": 5}, {"grow": -5}, {"smooth": 8}, {"fill_holes": True}, {"invert": True}])
def test_an_edit_with_a_changed_mask_is_that_of_the_mask_so_changed(model, changes):
    image, mask = photo(80, 60), rectangle(80, 60, BOX) & ~rectangle(80, 60, (35, 30, 45, 40))
    result, expected = edit(model, image, mask, **changes), shape_mask(mask, **changes)
    assert np.array_equal(result, edit(model, image, expected))
    assert not np.array_equal(result, edit(model, image, mask))
    assert np.array_equal(result[~expected], image[~expected])


def test_a_mask_that_is_shrunk_to_nothing_is_named(model):
    with pytest.raises(ValueError, match="with grow=-40 the mask is empty; white = repaint"):
        edit(model, photo(80, 60), BOX, grow=-40)


def test_masks_of_another_size_are_resized_on_request(model):
    image, mask = photo(80, 60), rectangle(80, 60, (20, 20, 60, 40))
    half = Image.fromarray(rectangle(40, 30, (10, 10, 30, 20)))
    with pytest.raises(ValueError, match=r"mask is 40x30, but .* 80x60 .*; fit_mask resizes it"):
        edit(model, image, half)
    assert np.array_equal(edit(model, image, half, fit_mask=True), edit(model, image, mask))
    shown = Image.fromarray(rectangle(20, 15, (5, 3, 15, 12)))
    with pytest.raises(ValueError, match=r"exemplar's mask is 20x15, but .* 40x30 .*; fit_mask resizes it"):
        edit(model, image, mask, exemplar_mask=shown)
    masked = edit(model, image, mask, exemplar_mask=shown, fit_mask=True)
    assert not np.array_equal(masked, edit(model, image, mask))


def test_resizing_a_mask_is_no_reason_to_warn_of_gray():
    small = Image.fromarray(np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((3, 3), np.uint8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = read_canvas(photo(90, 70), small, EditSettings(fit_mask=True))
    assert canvas.repaint.shape == (70, 90)
    assert canvas.repaint.mean() == pytest.approx(0.25, abs=0.05)


# --- no mask ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gray", "colours", "16 bits", "floats", "tensor", "file"])
def test_the_transparent_part_is_the_mask_where_none_is_given(model, tmp_path, kind):
    channels, dtype = (2 if kind == "gray" else 4), {"16 bits": np.uint16, "floats": np.float32, "tensor": np.float32}
    pixels = photo(80, 60, channels, dtype.get(kind, np.uint8))
    white = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    hole = rectangle(80, 60, BOX)
    pixels[..., -1] = np.where(hole, 0, white)
    pixels[20, 20:60, -1] = white // 2 if white > 1 else 0.5  # an edge that is half transparent
    image = torch.from_numpy(pixels).permute(2, 0, 1) if kind == "tensor" else pixels
    if kind == "file":
        image = tmp_path / "cut.png"
        Image.fromarray(pixels).save(image)
    with pytest.warns(
        PictureWarning, match=r"transparent part of the image, 25.0% of it, is repainted .* opaque"
    ) as said:
        result = edit(model, image, None)
    assert len(said) == 1
    after = np.asarray(result.permute(1, 2, 0) if kind == "tensor" else result)
    assert after.dtype == pixels.dtype
    assert np.array_equal(after[~hole], pixels[~hole])
    assert (after[..., -1] == white).all()
    assert (after[hole] != pixels[hole]).any(axis=-1).all()


def test_the_transparent_part_can_be_grown_and_cut_into_regions(model):
    pixels = photo(120, 60, 4)
    holes = rectangle(120, 60, (10, 20, 30, 40)) | rectangle(120, 60, (80, 20, 100, 40))
    pixels[..., 3] = np.where(holes, 0, 255)
    with pytest.warns(PictureWarning, match="transparent"):
        result = edit(model, pixels, None, grow=4, split_mask=True, composite=False)
    assert (result[shape_mask(holes, grow=4), 3] == 255).all()


@pytest.mark.parametrize(("channels", "alpha"), [(1, None), (3, None), (4, 255)])
def test_no_mask_at_all(model, channels, alpha):
    image = photo(40, 30, channels)
    if alpha is not None:
        image[..., 3] = alpha
    message = "nothing to repaint: give one of mask, box, polygon and select, or extend, or an image partly transparent"
    with pytest.raises(ValueError, match=message):
        edit(model, image, None)


@pytest.mark.filterwarnings("ignore:no mask is given")
def test_nothing_to_keep(model):
    with pytest.raises(ValueError, match="with its pixels as they are the mask covers the whole image"):
        edit(model, np.zeros((30, 40, 4), np.uint8), None)


def test_a_mask_counts_more_than_the_alpha_channel(model):
    pixels = photo(80, 60, 4)
    pixels[:10, :10, 3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = edit(model, pixels, BOX)
    assert np.array_equal(result[:10, :10], pixels[:10, :10])


# --- photos that grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, np.uint8), (3, np.uint8), (4, np.uint8), (3, np.uint16), (1, np.uint16), (4, np.float32)],
)
def test_the_photo_grows_and_keeps_its_pixels_and_kind(model, channels, dtype):
    image = photo(80, 60, channels, dtype)
    result = edit(model, image, None, extend="left,20,bottom,10")
    assert type(result) is np.ndarray
    assert result.shape == (70, 100, channels)
    assert result.dtype == image.dtype
    assert np.array_equal(result[:60, 20:], image)
    strip = np.ones((70, 100), bool)
    strip[:60, 20:] = False
    edge = np.pad(image, ((0, 10), (20, 0), (0, 0)), mode="edge")
    assert (result[strip] != edge[strip]).any(axis=-1).mean() > 0.9
    if channels == 4:
        assert (result[strip, -1] == (1 if dtype == np.float32 else 255)).all()


def test_files_and_tensors_grow(model, tmp_path):
    pixels = photo(80, 60, 1, np.uint16)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "gray.png", dpi=(300, 300))
    result = edit(model, tmp_path / "gray.png", None, extend=[("top", 16)])
    assert (result.size, result.mode) == ((80, 76), "I;16")
    assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert np.array_equal(np.asarray(result)[16:], pixels)
    tensor = torch.from_numpy(photo(80, 60, 3, np.float32)).permute(2, 0, 1)[None]
    result = edit(model, tensor, None, extend=[("right", 16)])
    assert result.shape == (1, 3, 60, 96)
    assert torch.equal(result[..., :80], tensor)


def test_a_mask_is_repainted_beside_what_is_added(model):
    image, mask = photo(80, 60), rectangle(80, 60, BOX)
    result = edit(model, image, mask, extend="right,20")
    assert np.array_equal(result[:, :80][~mask], image[~mask])
    assert (result[:, :80][mask] != image[mask]).any(axis=-1).mean() > 0.9
    canvas = read_canvas(image, BOX, EditSettings(extend="right,20", split_mask=True))
    assert [int(region.sum()) for region in canvas.regions] == [20 * 60, 40 * 30]


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (200, 60), (60, 200), (64, 64)])
@pytest.mark.parametrize(
    "sides", [[("left", 10)], [("right", 60)], [("top", 40)], [("bottom", 5)], [("left", 30), ("top", 20)]]
)
def test_the_window_of_what_is_added_holds_it_with_context(size, sides):
    repaint = read_canvas(photo(*size), None, EditSettings(extend=sides)).repaint
    window = choose_window(repaint, 64)
    assert repaint[window.slices].sum() == repaint.sum()
    seen = 1 - repaint[window.slices].mean()
    assert seen >= min(0.5, 1 - repaint.mean()) - 0.02, "half of the window is photo, where the photo has that much"


@pytest.mark.parametrize("options", [{}, {"strength": 0.3, "sampler": "ddim", "steps": 10}])
def test_what_is_added_is_at_first_the_photo_s_edge_repeated(model, options):
    """With little strength the latents start from that."""
    image = photo(80, 60)
    padded = np.pad(image, ((0, 0), (20, 0), (0, 0)), mode="edge")
    expected = edit(model, padded, (0, 0, 20, 60), **options)
    assert np.array_equal(edit(model, image, None, extend="left,20", **options), expected)


# --- placing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "box"), [("fill", (10, 10, 90, 40)), ("centre", (30, 10, 70, 40)), ("bottom", (30, 10, 70, 40))]
)
def test_the_mask_shrinks_to_the_exemplar(model, placement, box):
    image = photo(100, 60)
    result = edit(model, image, (10, 10, 90, 40), placement=placement)
    changed = (result != image).any(axis=-1)
    assert not changed[~rectangle(100, 60, box)].any()
    assert changed[rectangle(100, 60, box)].mean() > 0.9


def test_the_exemplar_s_silhouette_says_its_aspect(model):
    tall = rectangle(40, 30, (10, 5, 20, 30))  # 10 wide, 25 high
    image, region = photo(100, 60), (10, 10, 90, 50)
    results = [
        edit(model, image, region, exemplar_mask=tall, placement=placement, window=(0, 0, 100, 60))
        for placement in ("centre", "bottom")
    ]
    for result in results:
        changed = (result != image).any(axis=-1)
        assert changed[rectangle(100, 60, (42, 10, 58, 50))].mean() > 0.9
        assert not changed[~rectangle(100, 60, (42, 10, 58, 50))].any()
    assert np.array_equal(*results), "as high as the region: centre and bottom are the same"


def test_each_region_is_placed_in(model):
    image = photo(160, 60)
    mask = rectangle(160, 60, (10, 10, 70, 40)) | rectangle(160, 60, (100, 5, 130, 55))
    regions = read_canvas(image, mask, EditSettings(placement="bottom", split_mask=True), (10, 10)).regions
    expected = [rectangle(160, 60, (100, 25, 130, 55)), rectangle(160, 60, (25, 10, 55, 40))]
    assert all(np.array_equal(a, b) for a, b in zip(regions, expected, strict=True))
