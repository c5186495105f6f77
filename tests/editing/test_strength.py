"""Editing from the photo's own latents, and from other noise than the seeds'."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.editing.edit import photo_latents, sample_latents, window_condition
from pbe.editing.settings import EditSettings, settings_for
from pbe.sampling import SAMPLERS, SPACINGS, NoiseSchedule

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (64, 64, 3), np.uint8)
EXEMPLAR = Image.fromarray(RANDOM.integers(0, 256, (30, 40, 3), np.uint8))
BOX = (16, 16, 48, 48)


def rectangle(width, height, box):
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def edit(model, image, mask, steps=4, **options):
    return pbe.edit(model, image, mask, EXEMPLAR, steps=steps, **options)


@pytest.mark.filterwarnings("ignore:sampler=.* is for distilled models")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("strength", "taken"), [(0.5, 3), (0.05, 1), (0.999, 5), (1.0, 5)])
def test_every_sampler_takes_the_last_steps_of_its_grid(model, sampler, strength, taken):
    settings = settings_for({"sampler": sampler, "steps": 5})
    grid, steps = SPACINGS[settings.spacing](NoiseSchedule.scaled_linear(), 5), []
    (result,) = edit(model, IMAGE, BOX, sampler=sampler, steps=5, strength=strength, callback=steps.append)
    assert [(step.index, step.steps, step.t) for step in steps] == [
        (i, taken, step.t) for i, step in enumerate(grid[5 - taken :])
    ]
    mask = rectangle(64, 64, BOX)
    assert np.array_equal(result[~mask], IMAGE[~mask])
    assert (result[mask] != IMAGE[mask]).any()


@torch.no_grad()
def test_it_starts_from_the_photo_s_posterior_mean(model):
    """Where the network predicts no noise, what comes out is the start divided by its alpha."""
    prepared, settings = prepare_for_inference(model), EditSettings(sampler="ddim", steps=10, strength=0.4, guidance=1)
    pixels, keep = torch.rand(1, 3, 64, 64) * 2 - 1, 1 - torch.from_numpy(rectangle(64, 64, BOX)).float()[None, None]
    condition = window_condition(prepared, pixels, keep, torch.zeros(1, 1, 64), 2)
    z_photo = photo_latents(prepared, pixels)
    assert torch.equal(z_photo, prepared.vae.encode(pixels).mean)
    steps = []

    def first(step):
        steps.append(step)
        raise StopIteration

    with pytest.raises(StopIteration):
        sample_latents(prepared, condition, settings, 7, first, z_photo)
    grid = SPACINGS["leading"](NoiseSchedule.scaled_linear(), 10)
    assert steps[0].t == grid[6].t == 301
    # DDIM's estimate is z_0 = (x_t - sigma eps) / alpha: with its own next state x_t and eps follow
    alpha_bar_t, alpha_bar_prev = grid[6].alpha_bar_t, grid[6].alpha_bar_prev
    eps = (steps[0].x_t - alpha_bar_prev**0.5 * steps[0].z_0) / (1 - alpha_bar_prev) ** 0.5
    x_t = alpha_bar_t**0.5 * steps[0].z_0 + (1 - alpha_bar_t) ** 0.5 * eps
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    expected = alpha_bar_t**0.5 * z_photo + (1 - alpha_bar_t) ** 0.5 * noise
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)


def test_less_strength_stays_nearer_to_the_photo(model):
    mask, image = rectangle(64, 64, BOX), np.full((64, 64, 3), (200, 40, 90), np.uint8)
    far = [
        np.abs(edit(model, image, BOX, steps=20, strength=s, guidance=1)[0][mask].astype(int) - image[mask]).mean()
        for s in (0.05, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_strength_1_is_the_edit_without_it(model):
    plain, whole = (edit(model, IMAGE, BOX, **more)[0] for more in ({}, {"strength": 1}))
    assert np.array_equal(plain, whole)
    nearly = edit(model, IMAGE, BOX, strength=0.999)[0]  # as many steps, but the photo shows through the noise
    assert not np.array_equal(plain, nearly)


def test_strength_works_with_what_changes_the_steps(model):
    prepared = prepare_for_inference(model)
    mask = rectangle(64, 64, (4, 4, 20, 20)) | rectangle(64, 64, (40, 40, 60, 60))
    shown, seen = [], []
    options = {"sampler": "ddim", "steps": 8, "strength": 0.5}
    more = {"guidance_interval": (0, 300), "reuse": 2, "regions": "each"}
    (result,) = edit(
        prepared,
        IMAGE,
        mask,
        **options,
        **more,
        callback=seen.append,
        preview=lambda *x: shown.append(x),
        preview_every=2,
    )
    assert [step.t for step in seen] == [376, 251, 126, 1] * 2
    assert len(shown) == 4
    assert np.array_equal(result[~mask], IMAGE[~mask])
    for one in more:
        (other,) = edit(prepared, IMAGE, mask, **options, **{k: v for k, v in more.items() if k != one})
        assert not np.array_equal(other, result), one


def test_a_result_of_strength_depends_on_its_seed_alone(model):
    four = edit(model, IMAGE, BOX, seed=10, num_images=3, batch_size=2, strength=0.5, regions="each")
    for i in range(3):
        (alone,) = edit(model, IMAGE, BOX, seed=10 + i, strength=0.5)
        assert np.abs(alone.astype(int) - four[i].astype(int)).max() <= 1
    assert not np.array_equal(four[0], four[1])


def test_few_steps_of_strength_need_no_warning(model, student):
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(model, IMAGE, BOX, steps=2, strength=0.5, callback=steps.append)
        pbe.edit(student, IMAGE, BOX, EXEMPLAR, strength=0.5, callback=steps.append)
    assert [step.t for step in steps] == [1, 499]
