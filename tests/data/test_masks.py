"""Masks to train on: how far boxes grow, what shapes surround them."""

import numpy as np
import pytest

from pbe.data.example import make_generator
from pbe.data.masks import bezier_outline, box_outline, grow_box
from pbe.images.reading import fill_polygon
from pbe.images.windows import Box

SIZE, BOX = (800, 1000), Box(100, 200, 400, 600)  # free: 100 left, 200 above, 600 right, 200 below


def test_boxes_grow_uniformly_up_to_the_share_of_their_free_space():
    g = make_generator(1)
    grown = np.array([grow_box(BOX, SIZE, 0.4, g) for _ in range(4000)])
    out = np.array([1, 1, -1, -1]) * (np.array(BOX) - grown)  # left, up, right, down
    most = np.array([40, 80, 240, 80])
    assert (out.min(axis=0) == 0).all()
    assert (out.max(axis=0) == most).all()
    # 4 standard errors of the mean of 4000 uniform draws, each of standard deviation most / sqrt(12).
    np.testing.assert_allclose(out.mean(axis=0), most / 2, atol=4 * 240 / 12**0.5 / 4000**0.5)
    assert abs(np.corrcoef(out.T) - np.eye(4)).max() < 0.08  # 5 / sqrt(4000)


def test_a_box_that_fills_the_photo_stays():
    assert grow_box(Box(0, 0, 1000, 800), SIZE, 0.4, make_generator(1)) == Box(0, 0, 1000, 800)


def test_bezier_curves_pass_half_way_to_the_grown_box():
    grown = Box(60, 120, 640, 680)
    points = bezier_outline(BOX, grown, 0, make_generator(1)).reshape(4, 18, 2)
    top, right, bottom, left = points[:, 9]  # t = .5, where B = (P0 + 2 P1 + P2) / 4
    assert top.tolist() == pytest.approx([250, (200 + 120) / 2])
    assert right.tolist() == pytest.approx([(400 + 640) / 2, 400])
    assert bottom.tolist() == pytest.approx([250, (600 + 680) / 2])
    assert left.tolist() == pytest.approx([(100 + 60) / 2, 400])
    # The first points, at t = .05, are a little way along the side from its corner.
    assert points[0, 0].tolist() == pytest.approx([115, 200 - 2 * 0.95 * 0.05 * 80])


def test_jitter_is_whole_steps_to_both_sides():
    plain = bezier_outline(BOX, BOX, 0, make_generator(1))
    moved = np.stack([bezier_outline(BOX, BOX, 5, make_generator(i)) - plain for i in range(100)])
    values, counts = np.unique(np.rint(moved * 1e6) / 1e6, return_counts=True)
    assert values.tolist() == list(range(-5, 6))
    expected = moved.size / 11  # each of 11 steps; 5 standard deviations of a count
    assert abs(counts - expected).max() < 5 * expected**0.5
    smaller = bezier_outline(BOX, BOX, 1, make_generator(0)) - plain
    np.testing.assert_allclose(smaller * 5, moved[0], atol=1e-9)


@pytest.mark.slow
def test_bezier_area():
    # A quadratic curve over a chord L with its control point at height h adds L h / 3. Corners are cut: the polygon
    # goes straight from t = .9 of one side to t = .05 of the next, which takes .1 x .05 / 2 of the box at each.
    g, ratios = make_generator(2), []
    for _ in range(200):
        grown = grow_box(BOX, SIZE, 0.4, g)
        bulge = np.abs(np.array(grown) - np.array(BOX))  # left, up, right, down
        area = BOX.area + (BOX.width * (bulge[1] + bulge[3]) + BOX.height * (bulge[0] + bulge[2])) / 3
        ratios.append(fill_polygon(bezier_outline(BOX, grown, 5, g), SIZE).sum() / area)
    # Curved corners lose up to another 2 %.
    assert 0.96 < np.mean(ratios) < 0.995
    assert 0.93 < min(ratios)
    assert max(ratios) < 1.01


@pytest.mark.parametrize("seed", range(5))
def test_fill_is_even_odd_at_the_pixels_centres(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-10, 50, (12, 2))  # crosses itself and the border
    filled = fill_polygon(points, (30, 40))

    def is_inside(x, y):  # a ray to the left crosses the outline an odd number of times
        edges = zip(points, np.roll(points, -1, axis=0), strict=True)
        crossed = [
            (ya <= y) != (yb <= y) and xa + (y - ya) * (xb - xa) / (yb - ya) <= x for (xa, ya), (xb, yb) in edges
        ]
        return sum(crossed) % 2

    expected = [[is_inside(x + 0.5, y + 0.5) for x in range(40)] for y in range(30)]
    np.testing.assert_array_equal(filled, np.array(expected, dtype=bool))
    assert 0 < filled.sum() < filled.size


def test_fill_of_a_box_is_its_pixels():
    filled = fill_polygon(box_outline(Box(3, 4, 9, 7)), (10, 12))
    expected = np.zeros((10, 12), dtype=bool)
    expected[4:7, 3:9] = True
    np.testing.assert_array_equal(filled, expected)
    # A fractional edge takes the pixels whose centres it passes.
    columns = fill_polygon(np.array([(2.4, 0), (4.6, 0), (4.6, 9), (2.4, 9)]), (9, 9)).any(axis=0)
    assert np.flatnonzero(columns).tolist() == [2, 3, 4]
