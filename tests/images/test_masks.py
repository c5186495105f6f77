"""Shaping masks, against definitions computed pixel by pixel."""

from collections import deque

import numpy as np
import pytest

from pbe.images import masks
from pbe.images.masks import dilate, shape_mask, shrink_to, smoothed, strips, without_holes
from pbe.images.windows import label_regions, mask_bounding_box


def noise(height, width, share, seed=0):
    return np.random.default_rng(seed).random((height, width)) < share


def rectangle(width, height, box):
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def disc(size, radius, centre=None):
    y, x = np.mgrid[:size, :size] + 0.5
    cx, cy = centre or (size / 2, size / 2)
    return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("share", [0.003, 0.05, 0.6])
def test_growing_is_by_exact_discs(radius, share):
    mask = noise(23, 31, share)
    y, x = np.mgrid[:23, :31]
    ys, xs = np.nonzero(mask)
    nearest = ((y[..., None] - ys) ** 2 + (x[..., None] - xs) ** 2).min(axis=-1)
    assert np.array_equal(dilate(mask, radius), nearest <= radius**2)


def test_shrinking_leaves_the_photo_s_border_alone_and_growing_undoes_it():
    mask = rectangle(40, 30, (0, 5, 20, 30))  # in the corner at the left and below
    smaller = shape_mask(mask, grow=-3)
    assert np.array_equal(smaller, rectangle(40, 30, (0, 8, 17, 30)))
    assert np.array_equal(shape_mask(smaller, grow=3) & ~mask, np.zeros_like(mask))
    assert mask_bounding_box(shape_mask(smaller, grow=3)) == (0, 5, 20, 30)


def test_noise_is_not_grown_for_minutes(monkeypatch):
    monkeypatch.setattr(masks, "MAX_STEPS", 100)
    with pytest.raises(ValueError, match=r"too many dots and lines to grow or shrink by 9: smooth it"):
        shape_mask(noise(20, 20, 0.5), grow=-9)
    shape_mask(rectangle(20, 20, (5, 5, 9, 9)), grow=9)


def outside(mask):
    """What steps across and down reach from the border without the mask."""
    height, width = mask.shape
    border = [(y, x) for y in range(height) for x in range(width) if y in (0, height - 1) or x in (0, width - 1)]
    queue = deque(place for place in border if not mask[place])
    reached = np.zeros_like(mask)
    while queue:
        y, x = queue.popleft()
        if 0 <= y < height and 0 <= x < width and not mask[y, x] and not reached[y, x]:
            reached[y, x] = True
            queue.extend([(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)])
    return reached


@pytest.mark.parametrize("share", [0.2, 0.45, 0.6, 0.8])
def test_holes_are_what_no_path_leads_out_of(share):
    for seed in range(5):
        mask = noise(17, 23, share, seed)
        assert np.array_equal(without_holes(mask), ~outside(mask))


def test_a_thin_closed_line_is_filled():
    """Drawn aslant by a pencil of one pixel, it touches itself at corners only."""
    y, x = np.mgrid[:21, :21]
    line = np.abs(y - 10) + np.abs(x - 10) == 8
    assert np.array_equal(shape_mask(line, fill_holes=True), np.abs(y - 10) + np.abs(x - 10) <= 8)
    assert label_regions(~line)[1] == 1  # where corners count, there is one way out
    assert label_regions(~line, diagonal=False)[1] == 2


@pytest.mark.parametrize("width", [2, 5, 10, 30])
def test_smoothing_keeps_straight_edges_and_takes_off_what_is_thinner(width):
    half = rectangle(200, 150, (100, 0, 200, 150))
    assert np.array_equal(smoothed(half, width), half)
    bar = rectangle(200, 150, (0, 60, 200, 60 + int(0.6 * width)))
    assert not smoothed(bar, width).any()
    assert smoothed(rectangle(200, 150, (0, 60, 200, 60 + width)), width).any(axis=0).all()
    assert smoothed(~bar, width).all()
    assert not smoothed(disc(150, 0.5 * width), width).any()
    assert smoothed(disc(150, 0.8 * width), width).any()


def test_the_order_is_invert_extend_fill_smooth_grow():
    """Each pair of them gives something else the other way round, so that the order is seen."""
    ring = disc(60, 20) & ~disc(60, 10)
    grown = shape_mask(ring, fill_holes=True, grow=-4)
    assert np.array_equal(grown, ~dilate(~disc(60, 20), 4))  # shrunk first, the hole would have grown
    speck = rectangle(60, 60, (10, 10, 40, 40)) | rectangle(60, 60, (50, 50, 52, 52))
    assert not shape_mask(speck, smooth=6, grow=5)[45:, 45:].any()  # grown first, the speck would be too large to go
    pierced = rectangle(60, 60, (10, 10, 40, 40)) & ~rectangle(60, 60, (20, 20, 22, 22))
    assert shape_mask(pierced, fill_holes=True, smooth=4)[20:22, 20:22].all()
    inverted = shape_mask(~pierced, invert=True, fill_holes=True)
    assert np.array_equal(inverted, rectangle(60, 60, (10, 10, 40, 40)))
    extended = shape_mask(pierced, invert=True, extend=[("left", 7)])
    assert np.array_equal(extended, np.hstack([np.ones((60, 7), bool), ~pierced]))


@pytest.mark.parametrize("changes", [{"grow": -3}, {"smooth": 9}, {"fill_holes": True}, {"invert": True}, {"grow": 2}])
def test_what_is_added_to_the_photo_stays_in_the_mask(changes):
    sides = [("top", 3), ("right", 5)]
    added = strips((30, 40), sides)
    shaped = shape_mask(rectangle(40, 30, (3, 10, 20, 25)), extend=sides, **changes)
    assert shaped.shape == added.shape == (33, 45)
    assert shaped[added].all()
    assert added.sum() == 33 * 45 - 30 * 40
    assert not added[3:, :40].any()
    if changes.get("grow") == 2:  # what is added reaches into the photo then
        assert shaped[:5].all()
        assert shaped[:, 38:].all()
        assert not shaped[5:, 22:38].any()


@pytest.mark.parametrize(
    ("box", "changes", "message"),
    [
        ((5, 5, 9, 9), {"grow": -4}, "with grow=-4 the mask is empty"),
        ((5, 5, 9, 9), {"smooth": 3, "grow": 40}, "with smooth=3, grow=40 the mask covers the whole image"),
        ((5, 5, 6, 6), {"smooth": 9}, "with smooth=9 the mask is empty"),
        ((0, 0, 0, 0), {"invert": True, "extend": [("left", 3)]}, "invert=True, extend=.* covers the whole image"),
    ],
)
def test_a_mask_of_nothing_or_everything_is_one_error(box, changes, message):
    with pytest.raises(ValueError, match=message):
        shape_mask(rectangle(30, 20, box), **changes)


def test_without_changes_it_is_the_mask_itself():
    mask = noise(20, 30, 0.3)
    before = mask.copy()
    assert np.array_equal(shape_mask(mask), mask)
    shape_mask(mask, invert=True, fill_holes=True, smooth=2, grow=1, extend=[("left", 2)])
    assert np.array_equal(mask, before)


@pytest.mark.parametrize(
    ("size", "placement", "expected"),
    [
        ((10, 10), "centre", (30, 10, 50, 30)),
        ((10, 10), "bottom", (30, 10, 50, 30)),
        ((10, 40), "centre", (10, 12, 70, 27)),
        ((10, 40), "bottom", (10, 15, 70, 30)),
        ((40, 10), "bottom", (37, 10, 42, 30)),
        ((1, 1000), "bottom", (10, 29, 70, 30)),
        ((20, 60), "centre", (10, 10, 70, 30)),  # fits as it is
    ],
)
def test_a_mask_shrinks_to_the_exemplar_s_aspect(size, placement, expected):
    assert mask_bounding_box(shrink_to(rectangle(90, 50, (10, 10, 70, 30)), size, placement)) == expected


def test_a_shrunk_mask_lies_in_the_mask():
    shrunk = shrink_to(disc(60, 20), (10, 40), "bottom")
    assert not (shrunk & ~disc(60, 20)).any()
    ring = disc(60, 25) & ~disc(60, 24)
    with pytest.raises(ValueError, match="placement='centre' leaves nothing of the mask"):
        shrink_to(ring & (disc(60, 28) & ~rectangle(60, 60, (20, 0, 40, 60))), (100, 10), "centre")
