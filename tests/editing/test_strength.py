"""Editing from the photo's own latents, from other noise than the seeds', and away from negative exemplars."""

import warnings

import numpy as np
import pytest
import torch
from marks import rest_slow
from PIL import Image

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.editing.condition import Told, window_condition
from pbe.editing.edit import sample_latents
from pbe.editing.settings import EditSettings, settings_for
from pbe.images.pillow import PictureWarning
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
@pytest.mark.parametrize(("strength", "taken"), rest_slow([(0.5, 3), (0.05, 1), (0.999, 5), (1.0, 5)], fast=2))
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
    condition = window_condition(prepared, pixels, keep, Told(torch.zeros(1, 1, 64), None, None), 2)
    z_photo = prepared.vae.encode(pixels).mean
    steps = []

    def first(step):
        steps.append(step)
        raise StopIteration

    with pytest.raises(StopIteration):
        sample_latents(prepared, condition, settings, range(7, 7 + len(condition.z_masked)), first, z_photo)
    grid = SPACINGS["leading"](NoiseSchedule.scaled_linear(), 10)
    assert steps[0].t == grid[6].t == 301
    # DDIM's estimate is z_0 = (x_t - sigma eps) / alpha: with its own next state x_t and eps follow
    alpha_bar_t, alpha_bar_prev = grid[6].alpha_bar_t, grid[6].alpha_bar_prev
    eps = (steps[0].x_t - alpha_bar_prev**0.5 * steps[0].z_0) / (1 - alpha_bar_prev) ** 0.5
    x_t = alpha_bar_t**0.5 * steps[0].z_0 + (1 - alpha_bar_t) ** 0.5 * eps
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    expected = alpha_bar_t**0.5 * z_photo + (1 - alpha_bar_t) ** 0.5 * noise
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_less_strength_stays_nearer_to_the_photo(model):
    z_photo = model.vae.encode(torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1).mean
    options = {"window": "full", "steps": 20, "guidance": 1, "output": "latents"}
    far = [(edit(model, IMAGE, BOX, strength=s, **options)[0] - z_photo).norm().item() for s in (0.05, 0.5, 1)]
    assert far[0] < 0.2 * far[2]
    assert far[0] < far[1] < far[2]


def test_strength_1_is_the_edit_without_it(model):
    plain, whole = (edit(model, IMAGE, BOX, **more)[0] for more in ({}, {"strength": 1}))
    assert np.array_equal(plain, whole)
    nearly = edit(model, IMAGE, BOX, strength=0.999)[0]  # as many steps, but the photo shows through the noise
    assert not np.array_equal(plain, nearly)


@pytest.mark.slow
def test_strength_works_with_what_changes_the_steps(model):
    prepared = prepare_for_inference(model)
    mask = rectangle(64, 64, (4, 4, 20, 20)) | rectangle(64, 64, (40, 40, 60, 60))
    shown, seen = [], []
    options = {"sampler": "ddim", "steps": 8, "strength": 0.5}
    more = {"guidance_interval": (0, 300), "reuse": 2, "split_mask": True}
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


@pytest.mark.slow
def test_a_result_of_strength_depends_on_its_seed_alone(model):
    four = edit(model, IMAGE, BOX, seed=10, num_images=3, batch_size=2, strength=0.5, split_mask=True)
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


# --- noise in, latents out --------------------------------------------------------------------------------------------


def seeds_noise(first, count, shape=(4, 16, 16)):
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(first + i)) for i in range(count)])


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}, {"strength": 0.5, "sampler": "ddim", "eta": 1}])
def test_the_seeds_own_noise_gives_their_results(model, options):
    plain = edit(model, IMAGE, BOX, seed=5, num_images=3, batch_size=2, **options)
    given = edit(model, IMAGE, BOX, seed=5, num_images=3, batch_size=2, latents=seeds_noise(5, 3), **options)
    assert all(np.array_equal(a, b) for a, b in zip(plain, given, strict=True))
    other = edit(model, IMAGE, BOX, seed=5, latents=seeds_noise(6, 1), **options)
    assert not np.array_equal(other[0], plain[0])


def test_one_noise_is_that_of_all_results(model):
    noise = seeds_noise(5, 1).double()
    results = edit(model, IMAGE, BOX, num_images=3, batch_size=2, latents=noise)
    assert all(np.abs(result.astype(int) - results[0]).max() <= 1 for result in results[1:])


def test_latents_come_out_in_place_of_pictures(model):
    steps = []
    latents = edit(model, IMAGE, BOX, num_images=3, batch_size=2, output="latents", callback=steps.append)
    assert [(z_0.shape, z_0.dtype, z_0.device.type) for z_0 in latents] == [((1, 4, 16, 16), torch.float32, "cpu")] * 3
    assert torch.equal(torch.cat(latents[:2]), steps[3].x_t)
    # decoded, they are the pictures
    (window,) = edit(model, IMAGE, BOX, window="full", composite=False, output="pictures")
    (z_0,) = edit(model, IMAGE, BOX, window="full", composite=False, output="latents")
    with torch.no_grad():
        decoded = (prepare_for_inference(model).vae.decode(z_0).clamp(-1, 1) + 1) / 2
    assert np.abs(decoded[0].permute(1, 2, 0).numpy() * 255 - window).max() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"latents must be .* \(1 or 1, 4, h, w\), got \(2, 4, 16, 16\)"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            r"\(num_images or 1, 4, 16, 16\) for this window, got \(1, 4, 8, 8\)",
        ),
        ({"latents": torch.zeros(4, 16, 16)}, r"finite floats of shape \(1 or 1, 4, h, w\), got \(4, 16, 16\)"),
        ({"latents": torch.full((1, 4, 16, 16), float("nan"))}, "latents must be finite floats"),
        ({"latents": torch.zeros(1, 4, 16, 16, dtype=torch.long)}, "finite floats .* torch.int64"),
        ({"latents": np.zeros((1, 4, 16, 16))}, "latents must be .* got ndarray"),
        ({"output": "picture"}, "output must be 'pictures' or 'latents', got 'picture'"),
    ],
)
def test_wrong_noise_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        edit(model, IMAGE, BOX, **options)


def test_latents_are_of_one_window(model):
    mask = rectangle(64, 64, (4, 4, 20, 20)) | rectangle(64, 64, (40, 40, 60, 60))
    with pytest.raises(ValueError, match="output='latents' is of one window, and split_mask has 2 here"):
        edit(model, IMAGE, mask, split_mask=True, output="latents")


# --- negative exemplars -----------------------------------------------------------------------------------------------

OTHER = Image.fromarray(RANDOM.integers(0, 256, (30, 40, 3), np.uint8))


def test_a_negative_stands_in_the_place_of_the_learned_vector(model):
    (plain,) = edit(model, IMAGE, BOX)
    (away,) = edit(model, IMAGE, BOX, negative=OTHER)
    assert not np.array_equal(plain, away)
    # at guidance 0 it alone is painted
    (alone,) = edit(model, IMAGE, BOX, negative=OTHER, guidance=0)
    (as_exemplar,) = pbe.edit(model, IMAGE, BOX, OTHER, steps=4, guidance=1)
    assert np.array_equal(alone, as_exemplar)
    # where it is the exemplar, guidance has nothing to lead away from
    (same,) = edit(model, IMAGE, BOX, negative=EXEMPLAR, guidance=7)
    (unguided,) = edit(model, IMAGE, BOX, guidance=1)
    assert np.abs(same.astype(int) - unguided).max() <= 1


@pytest.mark.slow
def test_negatives_have_masks_and_weights(model):
    shown = rectangle(40, 30, (5, 5, 25, 20))
    changed = Image.fromarray(np.where(shown[..., None], np.asarray(OTHER), 255 - np.asarray(OTHER)))
    a, b = (edit(model, IMAGE, BOX, negative=one, negative_mask=shown)[0] for one in (OTHER, changed))
    assert np.array_equal(a, b)
    first = edit(model, IMAGE, BOX, negative=[OTHER, EXEMPLAR], negative_weights=[1, 0])[0]
    assert np.abs(first.astype(int) - edit(model, IMAGE, BOX, negative=OTHER)[0]).max() <= 1
    prepared = prepare_for_inference(model)
    reused = edit(prepared, IMAGE, BOX, negative=OTHER, guidance_interval=(0, 600), reuse=2)[0]
    assert not np.array_equal(reused, edit(prepared, IMAGE, BOX, guidance_interval=(0, 600), reuse=2)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative": []}, "negative is an empty list"),
        ({"negative": [OTHER], "negative_weights": [1, 2]}, "negative_weights has 2 values for 1 negatives"),
        ({"negative": OTHER, "negative_weights": [0]}, "negative_weights must not all be 0"),
        ({"negative": [OTHER, OTHER], "negative_mask": [None]}, "negative_mask has 1 values for 2 negatives"),
        ({"negative": OTHER, "negative_mask": np.ones((9, 9), bool)}, "negative's mask is 9x9"),
        ({"negative_weights": [1]}, "negative_mask and negative_weights are those of negative, which is not given"),
    ],
)
def test_wrong_negatives_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        edit(model, IMAGE, BOX, **options)


def test_a_negative_without_guidance_warns(model, student):
    with pytest.warns(PictureWarning, match="negative does nothing at guidance=1: it acts from above 1"):
        (idle,) = edit(model, IMAGE, BOX, negative=OTHER, guidance=1)
    assert np.array_equal(idle, edit(model, IMAGE, BOX, guidance=1)[0])
    with pytest.warns(PictureWarning, match="does nothing at guidance=1, for which the model was distilled"):
        pbe.edit(student, IMAGE, BOX, EXEMPLAR, negative=OTHER)
