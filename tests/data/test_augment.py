"""The exemplar's augmentation: what each change does, how often and how far; and the object's other colours."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pbe.data.augment as module
from pbe.data.augment import (
    affine_warp,
    augment_exemplar,
    box_blur,
    draw_recoloring,
    draw_warp,
    inside_weights,
    rotate,
    turned_hues,
)
from pbe.data.example import make_generator
from pbe.data.recipe_config import RecipeConfig
from pbe.images.windows import Box

OFF = {"flip": 0.0, "rotation": 0.0, "blur": 0.0, "warp": 0.0}


def picture(size=9, seed=0):
    return torch.rand(3, size, size, generator=make_generator(seed))


def augment(exemplar, generator, **probabilities):
    """All changes off but those given; blurs of 3 to 7 pixels of this exemplar."""
    kernels = [1 + 2 * round(radius * 224 / exemplar.shape[-1]) for radius in (1, 3)]
    return augment_exemplar(exemplar, RecipeConfig(**{**OFF, **probabilities}, blur_kernels=kernels), generator)


def test_all_switched_off_changes_nothing():
    torch.testing.assert_close(augment(picture(), make_generator(0)), picture(), rtol=0, atol=0)


@pytest.mark.parametrize("name, probability", [("flip", 0.5), ("rotation", 0.5), ("blur", 0.3), ("warp", 0.3)])
def test_each_change_has_its_probability(name, probability):
    g, x, n = make_generator(3), picture(), 2000
    changed = sum(not torch.equal(augment(x, g, **{name: probability}), x) for _ in range(n))
    # 4 standard deviations of a binomial count
    assert abs(changed - n * probability) < 4 * (n * probability * (1 - probability)) ** 0.5


def test_flip_is_horizontal():
    x = picture()
    torch.testing.assert_close(augment(x, make_generator(0), flip=1.0), x.flip(-1))


def test_rotation_is_counter_clockwise():
    torch.testing.assert_close(rotate(picture(), 90), picture().rot90(1, (1, 2)), rtol=0, atol=1e-5)


def test_rotation_agrees_with_skimage():
    transform = pytest.importorskip("skimage.transform")
    x = picture(32)
    expected = transform.rotate(x.permute(1, 2, 0).numpy(), 17, mode="reflect", order=1)
    # float32 coordinates against float64, times the largest step between neighbours
    np.testing.assert_allclose(rotate(x, 17).permute(1, 2, 0), expected, atol=1e-4)


def test_angles_and_kernels_are_uniform(monkeypatch):
    angles, kernels = [], []
    monkeypatch.setattr(module, "rotate", lambda x, degrees: angles.append(degrees) or x)
    monkeypatch.setattr(module, "box_blur", lambda x, kernel: kernels.append(kernel) or x)
    g = make_generator(4)
    for _ in range(3000):
        augment(picture(3), g, rotation=1.0, blur=1.0)
    assert -20 <= min(angles) < -19.8
    assert 19.8 < max(angles) <= 20
    assert abs(np.mean(angles)) < 4 * 40 / 12**0.5 / 3000**0.5
    assert np.std(angles) == pytest.approx(40 / 12**0.5, rel=0.05)
    values, counts = np.unique(kernels, return_counts=True)
    assert values.tolist() == [3, 5, 7]
    assert abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_blur_is_a_mean_with_mirrored_borders(kernel):
    x = picture(16)
    expected = F.avg_pool2d(F.pad(x, [kernel // 2] * 4, mode="reflect"), kernel, stride=1)
    torch.testing.assert_close(box_blur(x, kernel), expected)


def test_warp_moves_three_corners_by_up_to_its_shift():
    corners = np.array([(2 / 3, 2 / 3), (2 / 3, -2 / 3), (-2 / 3, -2 / 3)])
    g, shift, moves = make_generator(5), 50 / 224, []
    for _ in range(2000):
        to_result = np.linalg.inv(np.vstack([draw_warp(shift, g), (0, 0, 1)]))
        moved = np.column_stack([corners, np.ones(3)]) @ to_result.T
        moves.append(moved[:, :2] - corners)
    pixels = np.array(moves) / 2 * 224  # the side spans 2
    assert 49.5 < abs(pixels).max() <= 50 + 1e-6
    np.testing.assert_allclose(pixels.mean(axis=0), 0, atol=4 * 50 / 3**0.5 / 2000**0.5)
    np.testing.assert_allclose(pixels.std(axis=0), 50 / 3**0.5, rtol=0.06)


def test_warp_without_a_shift_is_the_identity():
    torch.testing.assert_close(affine_warp(picture(), draw_warp(0, make_generator(0))), picture(), rtol=0, atol=1e-5)


def test_warp_mirrors_at_the_centres_of_border_pixels():
    x = torch.arange(5.0).expand(1, 5, 5)
    by_two_pixels = np.array([(1, 0, 2 * 2 / 4), (0, 1, 0)])  # 4 steps between the outermost centres span 2
    torch.testing.assert_close(affine_warp(x, by_two_pixels)[0, 0], torch.tensor([2.0, 3, 4, 3, 2]))


def test_numbers_in_pixels_follow_the_exemplars_size(monkeypatch):
    kernels, shifts = [], []
    monkeypatch.setattr(module, "box_blur", lambda x, kernel: kernels.append(kernel) or x)
    monkeypatch.setattr(module, "draw_warp", lambda shift, g: shifts.append(shift) or np.eye(2, 3))
    g, recipe = make_generator(0), RecipeConfig(blur=1.0, warp=1.0)
    for size, smallest, largest in ((224, 3, 7), (112, 1, 5), (448, 5, 13), (28, 1, 1)):
        kernels.clear()
        for _ in range(50):
            augment_exemplar(picture(size), recipe, g)
        assert set(kernels) == set(range(smallest, largest + 1, 2))  # of 1 + 2 round((k - 1) / 2 x share)
    assert set(shifts) == {50 / 224}  # a share of the side


# --- other colours ----------------------------------------------------------------------------------------


def test_hues_turn_about_the_grays():
    third = turned_hues(2 * math.pi / 3, 1.0)  # red becomes green, green blue and blue red
    torch.testing.assert_close(third, torch.eye(3).roll(1, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned_hues(0.0, 1.0), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned_hues(1.0, 0.0), torch.full((3, 3), 1 / 3), rtol=0, atol=1e-6)
    gray = torch.full((3,), 0.4)
    torch.testing.assert_close(turned_hues(1.234, 1.4) @ gray, gray)
    one, other = turned_hues(0.4, 1.0), turned_hues(0.7, 1.0)
    torch.testing.assert_close(one @ other, turned_hues(1.1, 1.0), rtol=0, atol=1e-6)


def test_a_box_has_weights_in_its_inside_alone():
    box, region = Box(20, 10, 60, 90), Box(0, 0, 100, 100)
    weights = inside_weights(box, region, (100, 100))
    inside = torch.zeros(100, 100, dtype=torch.bool)
    inside[10:90, 20:60] = True
    assert (weights[~inside] == 0).all()
    assert weights[50, 40] == 1
    assert weights[11, 21] == 0  # a corner of the box
    assert (weights[50, 21:40].diff() >= 0).all()
    assert weights.diff(dim=0).abs().max() < 0.25  # no edge
    # the same places seen in another crop
    torch.testing.assert_close(inside_weights(box, Box(10, 5, 70, 95), (90, 60)), weights[5:95, 10:70])
    torch.testing.assert_close(
        inside_weights(box, region, (50, 50)), weights.unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)), rtol=0, atol=0.02
    )


def test_recoloring_changes_white_gray_and_colours():
    g, box = make_generator(6), Box(0, 0, 8, 8)
    for colour in ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.9, 0.2, 0.1)):
        x = torch.tensor(colour)[:, None, None].expand(3, 8, 8)
        results = torch.stack([draw_recoloring(g)(x, box, box) for _ in range(200)])
        assert 0 <= results.min() <= results.max() <= 1
        torch.testing.assert_close(results[:, :, 0, 0], x[None, :, 0, 0].expand(200, 3))  # the corner stays
        assert (results[:, :, 4, 4].std(dim=0) > 0.1).all()
