"""Several regions of a photo, each with its own exemplar: what each is, what it sees, and what goes together."""

import re

import numpy as np
import pytest
from PIL import Image

import pbe
from pbe.editing.regions import Region, regions_by_colour

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::pbe.images.pillow.PictureWarning"),
]
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (120, 400, 3), np.uint8)
DOG, CAT = (Image.fromarray(RANDOM.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(2))
LEFT, MIDDLE, RIGHT = (20, 40, 60, 80), (50, 50, 90, 90), (300, 30, 350, 70)
SETTINGS = {"steps": 2, "sampler": "ddim"}


def inside(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(IMAGE.shape[:2], bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def crop(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    return pixels[box[1] : box[3], box[0] : box[2]].astype(int)


def test_each_is_what_it_is_alone_and_far_ones_are_one_batch(model, batches):
    regions = [Region(LEFT, DOG), Region(RIGHT, [CAT, DOG], exemplar_weights=(3, 1), seed=5)]
    results = pbe.edit_regions(model, IMAGE, regions, num_images=2, batch_size=4, **SETTINGS)
    assert batches == [4]
    alone = pbe.edit(model, IMAGE, LEFT, DOG, num_images=2, **SETTINGS)
    other = pbe.edit(model, IMAGE, RIGHT, [CAT, DOG], exemplar_weights=(3, 1), num_images=2, seed=5, **SETTINGS)
    for result, left, right in zip(results, alone, other, strict=True):
        assert np.array_equal(result[~inside(LEFT, RIGHT)], IMAGE[~inside(LEFT, RIGHT)])
        assert abs(crop(result, LEFT) - crop(left, LEFT)).max() <= 1
        assert abs(crop(result, RIGHT) - crop(right, RIGHT)).max() <= 1
    assert (crop(results[0], LEFT) != crop(results[1], LEFT)).mean() > 0.5


def test_batch_size_is_of_windows(model, batches):
    pbe.edit_regions(model, IMAGE, [Region(LEFT, DOG), Region(RIGHT, CAT)], num_images=3, batch_size=2, **SETTINGS)
    assert batches == [2, 1, 2, 1]


def test_in_order_where_one_sees_another_and_the_later_on_top(model, batches):
    regions = [Region(LEFT, DOG), Region(RIGHT, DOG), Region(MIDDLE, CAT)]
    (result,) = pbe.edit_regions(model, IMAGE, regions, **SETTINGS)
    assert batches == [2, 1]
    (step,) = pbe.edit(model, IMAGE, LEFT, DOG, **SETTINGS)
    (expected,) = pbe.edit(model, step, MIDDLE, CAT, **SETTINGS)
    seen = inside(LEFT, MIDDLE)
    assert abs(result[seen].astype(int) - expected[seen]).max() <= 1
    (unseen,) = pbe.edit(model, IMAGE, MIDDLE, CAT, **SETTINGS)
    assert not np.array_equal(crop(unseen, MIDDLE), crop(expected, MIDDLE))


def test_without_composite_a_whole_window_is_changed(model, batches):
    near = (90, 40, 110, 60)  # in the window of LEFT, of which it sees the window alone
    regions = [Region(LEFT, DOG), Region(near, CAT)]
    pbe.edit_regions(model, IMAGE, regions, composite=False, window="full", **SETTINGS)
    assert batches == [1, 1]


def test_settings_and_negatives_of_their_own(model, batches):
    regions = [Region(LEFT, DOG, guidance=2, negative=CAT), Region(RIGHT, DOG, strength=0.5)]
    (result,) = pbe.edit_regions(model, IMAGE, regions, **SETTINGS)
    assert batches == [1, 1]
    (left,) = pbe.edit(model, IMAGE, LEFT, DOG, guidance=2, negative=CAT, **SETTINGS)
    (both,) = pbe.edit(model, left, RIGHT, DOG, strength=0.5, **SETTINGS)
    assert np.array_equal(result, both)


def test_kinds_masks_and_calls(model):
    steps = []
    mask = Image.fromarray(inside(LEFT, RIGHT))
    regions = [Region(mask, DOG), Region(MIDDLE, CAT)]
    options = {"split_mask": True, "grow": 2, "placement": "bottom", **SETTINGS}
    (result,) = pbe.edit_regions(model, Image.fromarray(IMAGE), regions, callback=steps.append, **options)
    assert isinstance(result, Image.Image)
    assert len(steps) == 3 * 2
    assert all(len(step.z_0) == 1 for step in steps)


def test_what_a_callback_raises_ends_all(model):
    def stop(_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        pbe.edit_regions(model, IMAGE, [Region(LEFT, DOG), Region(RIGHT, CAT)], callback=stop, **SETTINGS)


@pytest.mark.parametrize(
    "regions, options, message",
    [
        ([], {}, "regions is empty"),
        ([Region(LEFT, DOG), Region((0, 0, 500, 9), DOG)], {}, "region 2: mask: .* reaches outside"),
        ([Region(LEFT, DOG), Region(None, DOG)], {}, "region 2: it has no mask"),
        ([Region(LEFT, [])], {}, "region 1: exemplar is an empty list"),
        ([Region(LEFT, DOG, guidance=-1)], {}, "region 1: guidance must be .* got -1"),
        ([Region(LEFT, DOG, negative_mask=LEFT)], {}, "region 1: negative_mask"),
        ([Region(LEFT, DOG), Region(RIGHT, DOG)], {"window": (0, 0, 120, 120)}, "region 2: window"),
        ([Region(LEFT, DOG)], {"extend": "left,9"}, "extend is for one mask"),
        ([Region(LEFT, DOG)], {"num_images": 0}, "num_images .* got 0"),
    ],
)
def test_refusals_name_the_region(model, regions, options, message):
    with pytest.raises(ValueError, match=message):
        pbe.edit_regions(model, IMAGE, regions, **SETTINGS, **options)


# --- colours ----------------------------------------------------------------------------------------------


def test_regions_by_colour_and_by_index(tmp_path):
    colours = np.zeros((120, 400, 3), np.uint8)
    colours[inside(LEFT)], colours[inside(RIGHT)] = (255, 0, 0), (0, 0, 255)
    picture = Image.fromarray(colours)
    picture.save(tmp_path / "mask.jpg", quality=80)
    picture.quantize(4).save(tmp_path / "mask.png")
    values = np.asarray(Image.open(tmp_path / "mask.png"))
    red, blue = (int(values[box[1] + 5, box[0] + 5]) for box in (LEFT, RIGHT))
    for mask, keys in (
        (colours, ("ff0000", "#0000FF")),
        (tmp_path / "mask.png", ("ff0000", "0000ff")),
        (tmp_path / "mask.png", (red, str(blue))),
        (values.astype(np.int64), (red, blue)),
        (tmp_path / "mask.jpg", ("f80808", "0000ff")),
    ):
        dog, cat = regions_by_colour(mask, dict(zip(keys, (DOG, [CAT, DOG]), strict=True)))
        assert (dog.exemplar, cat.exemplar) == (DOG, [CAT, DOG])
        wrong = (dog.mask != inside(LEFT)).sum() + (cat.mask != inside(RIGHT)).sum()
        assert wrong <= (400 if str(mask).endswith(".jpg") else 0)


@pytest.mark.parametrize(
    "keys, message",
    [
        (("00ff00",), "no pixel of colour 00ff00; it has most of 000000, ff0000"),
        (("green",), "colours must be like ff0000, .* got \\['green'\\]"),
        ((1, "ff0000"), "colours must be like ff0000"),
        ((1,), "a mask of one channel"),
    ],
)
def test_colours_that_are_none_or_nowhere(keys, message):
    colours = np.zeros((120, 400, 3), np.uint8)
    colours[inside(LEFT)] = (255, 0, 0)
    with pytest.raises(ValueError, match=message):
        regions_by_colour(colours, dict.fromkeys(keys, DOG))
    with pytest.raises(ValueError, match=re.escape("no pixel of colour 7; it has most of 0, 1")):
        regions_by_colour(inside(LEFT).astype(np.uint8), {7: DOG})
