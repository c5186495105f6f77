"""What an edit shows while it is painted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.checkpoints.seeding import seeded_state
from pbe.editing import preview as previews
from pbe.models.paint_by_example import PaintByExample
from pbe.models.tiny_autoencoder import TinyConfig, TinyDecoder
from pbe.models.vae import AutoencoderKL, Posterior
from pbe.sampling import StepInfo

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
MASK = (20, 20, 40, 50)
SETTINGS = {"steps": 4, "window": "full", "guidance": 1}


@pytest.fixture(scope="module")
def model():
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


@pytest.fixture
def with_decoder(model):
    """The model with a tiny decoder whose weights are random."""
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyConfig(channels=8, num_resamplings=2, num_blocks=1)).eval()
    config, model.config, model.tiny_decoder = model.config, replace(TINY, tiny_decoder=decoder.config), decoder
    yield model
    model.config, model.tiny_decoder = config, None


def edit(model, **options):
    return pbe.edit(model, IMAGE, MASK, IMAGE, **{**SETTINGS, **options})


def test_previews_come_for_each_result_and_change_nothing(model):
    seen, steps = [], []
    results = edit(
        model,
        num_images=3,
        batch_size=2,
        callback=lambda step: steps.append(step.index),
        preview=lambda pictures, step: seen.append((step.index, [(p.mode, p.size) for p in pictures])),
        preview_every=2,
    )
    # a pixel for each latent cell of the window
    assert seen == [(i, [("RGB", (16, 21))] * n) for n in (2, 1) for i in (0, 2)]
    assert steps == [0, 1, 2, 3] * 2
    assert all((a == b).all() for a, b in zip(results, edit(model, num_images=3, batch_size=2), strict=True))


def test_the_tiny_decoder_shows_the_model_s_picture(with_decoder):
    seen = []
    draft = {"decoder": "tiny", "composite": False, "preview": lambda pictures, _: seen.extend(pictures)}
    (result,) = edit(with_decoder, preview_every=3, **draft)
    assert [picture.size for picture in seen] == [(64, 84)] * 2
    # the last step's estimate is what was painted, but for the sampler's last step, which ends short of alpha_bar = 1
    small = np.asarray(seen[1].resize((48, 64)), dtype=float)
    assert np.corrcoef(small.ravel(), result.ravel())[0, 1] > 0.9


def test_large_pictures_are_averaged(with_decoder):
    assert [p.size for p in previews.pictures(with_decoder, torch.zeros(2, 4, 65, 40))] == [(80, 130)] * 2


def test_what_a_preview_raises_ends_the_edit(model):
    def stop(pictures: list[Image.Image], step: StepInfo) -> None:
        raise KeyError(step.index)

    with pytest.raises(KeyError, match="0"):
        edit(model, preview=stop)


@pytest.mark.parametrize("every", [0, 1.5])
def test_previews_every_whole_number_of_steps(model, every):
    with pytest.raises(ValueError, match=f"preview_every must be a whole number from 1 to 10000, got {every}"):
        edit(model, preview=print, preview_every=every)


def test_the_linear_map_is_the_least_squares_one_and_found_once(model, monkeypatch):
    """It takes back what an encoder does to colours that is affine."""
    weight, bias = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.0, -0.2, 1.0])
    calls = []

    def encode(vae: AutoencoderKL, image: torch.Tensor) -> Posterior:
        calls.append(image)
        mean = F.conv2d(F.avg_pool2d(image, vae.config.downsampling), weight[:, :, None, None], bias)
        return Posterior(mean, torch.zeros_like(mean))

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    prepared = prepare_for_inference(model)
    found = previews.latents_to_rgb(prepared)
    colours = torch.rand(5, 3) * 2 - 1
    latents = colours @ weight.T + bias
    torch.testing.assert_close(latents @ found[:-1] + found[-1], colours, atol=1e-4, rtol=0)
    calls.clear()
    for _ in range(2):
        edit(prepared, preview=lambda pictures, step: None)
    assert len(calls) == 3  # of two photos, and of the tiles once
