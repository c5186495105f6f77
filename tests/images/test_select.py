"""Objects at a point or in a rough box."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")

import pbe
from pbe.batch.job import Job, read_inputs


def scene(height: int = 240, width: int = 320, centre: tuple[int, int] = (180, 120), radius: int = 60):
    """A picture of a red disc before green, both uneven, and the disc's mask (H, W)."""
    rng = np.random.default_rng(0)
    y, x = np.indices((height, width))
    disc = np.hypot(x - centre[0], y - centre[1]) <= radius
    picture = np.where(disc[..., None], (190, 40, 30), (40, 150, 60)) + rng.integers(-25, 26, (height, width, 3))
    return picture.astype(np.uint8), disc


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "where", [{"point": (180, 120)}, {"point": (140, 100)}, {"box": (110, 50, 250, 190)}, {"box": (100, 20, 320, 240)}]
)
def test_a_point_or_a_box_finds_the_object(where):
    picture, disc = scene()
    mask = pbe.select_object(picture, **where)
    assert mask.shape == disc.shape
    assert mask.dtype == bool
    assert iou(mask, disc) > 0.95
    assert np.array_equal(mask, pbe.select_object(Image.fromarray(picture), **where))


@pytest.mark.parametrize("centre, radius", [((60, 60), 25), ((300, 120), 50)])
def test_small_objects_and_those_at_the_border(centre, radius):
    picture, disc = scene(centre=centre, radius=radius)
    assert iou(pbe.select_object(picture, point=centre), disc) > 0.9


def test_large_photos_are_reduced():
    picture, disc = scene()
    large = np.asarray(Image.fromarray(picture).resize((1280, 960)))
    mask = pbe.select_object(large, point=(720, 480))
    assert iou(mask, np.asarray(Image.fromarray(disc).resize((1280, 960)))) > 0.95


@pytest.mark.parametrize(
    "where, message",
    [
        ({}, "give a point"),
        ({"point": (1, 1), "box": (1, 1, 9, 9)}, "give a point"),
        ({"point": (320, 10)}, r"the point \(320, 10\) is not in the image of 320x240"),
        ({"box": (10, 10, 400, 50)}, "reaches outside"),
    ],
)
def test_refusals(where, message):
    with pytest.raises(ValueError, match=message):
        pbe.select_object(scene()[0], **where)


@pytest.mark.slow
@pytest.mark.parametrize("where", [{"point": (160, 120)}, {"box": (100, 60, 220, 180)}])
def test_nothing_found_says_what_to_do(where):
    with pytest.raises(ValueError, match=r"no object is found in the image at .*: click elsewhere .* box"):
        pbe.select_object(np.full((240, 320, 3), 90, np.uint8), **where)


@pytest.mark.parametrize("size", [(3, 3), (1, 8), (300, 2)])
def test_tiny_pictures_are_no_crash(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    with pytest.raises(ValueError, match="no object is found"):
        pbe.select_object(picture, point=(0, 0))


@pytest.mark.slow
def test_rows_select_in_photo_and_exemplar(tmp_path):
    picture, disc = scene()
    Image.fromarray(picture).save(tmp_path / "photo.png")
    row = {"image": "photo.png", "exemplar": "photo.png", "out": "out.png", "select": "180,120"}
    job = Job.from_row({**row, "exemplar_select": [110, 50, 250, 190]}, tmp_path)
    inputs = read_inputs(job)
    assert iou(inputs.canvas.repaint, disc) > 0.95
    assert abs(np.subtract(inputs.exemplars[0].size, 121)).max() <= 4
    assert job.to_row().items() >= {"select": (180, 120), "exemplar_select": (110, 50, 250, 190)}.items()
    two = read_inputs(Job.from_row({**row, "select_2": "110,50,250,190", "exemplar_2": "photo.png"}, tmp_path))
    assert all(iou(region, disc) > 0.95 for region in two.canvas.regions)
    for changes in ({"select": "1,2,3"}, {"mask": "photo.png"}, {"exemplar": "a.png;b.png", "exemplar_select": "1,2"}):
        with pytest.raises(ValueError, match="select"):
            Job.from_row({**row, **changes}, tmp_path)
