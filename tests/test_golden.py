"""Networks and samplers agree with the original code's stored outputs to 1e-4, relative to the largest value."""

import itertools

import golden_file
import pytest
import torch

from pbe.models.paint_by_example import latent_mask
from pbe.sampling import NoiseSchedule, ddim, guided_eps, leading, plms, samplers


@pytest.fixture(scope="module")
def model():
    return golden_file.model()


@pytest.fixture(scope="module")
def golden():
    return golden_file.outputs()


@pytest.fixture(scope="module")
def inputs():
    return golden_file.inputs()


@pytest.fixture(scope="module")
def condition(model, inputs):
    with torch.no_grad():
        return model.condition(inputs["image"], inputs["mask"], inputs["reference"])


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize(("context", "output"), [("context", "unet_out"), ("context5", "unet_out_5tokens")])
def test_unet(model, golden, inputs, context, output):
    eps = model.unet(inputs["x9"], inputs["t"], inputs[context])
    assert relative_error(eps, golden[output]) < 1e-5


@torch.no_grad()
def test_vae(model, golden, inputs):
    assert relative_error(model.vae.moments(inputs["image"]), golden["vae_moments"]) < 1e-5
    # the stored decoding is of `z` as an unscaled latent
    decoded = model.vae.decode(inputs["z"] * model.vae.config.latent_scale)
    assert relative_error(decoded, golden["vae_decode"]) < 1e-5


@torch.no_grad()
def test_exemplar_encoder(model, golden, inputs):
    assert relative_error(model.cond_stage_model.vision(inputs["reference"]), golden["clip_pooled"]) < 1e-5
    assert relative_error(model.encode_exemplar(inputs["reference"]), golden["condition"]) < 1e-5


def test_condition(condition, golden, inputs):
    assert relative_error(condition.z_masked, golden["z_masked"]) < 1e-5
    assert torch.equal(condition.mask, golden["mask_latent"])
    assert torch.equal(latent_mask(inputs["mask"], 8), golden["mask_latent"])
    assert relative_error(condition.context, golden["condition"]) < 1e-5


def test_schedule(golden):
    schedule = NoiseSchedule.scaled_linear()
    assert relative_error(schedule.alpha_bar.float(), golden["alphas_cumprod"]) < 1e-6
    timesteps = sorted(step.t for step in leading(schedule, golden_file.META["steps"]))
    assert timesteps == sorted(golden["ddim_timesteps"].tolist())
    assert timesteps == sorted(golden["plms_timesteps"].tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", ["plms", "ddim"])
def test_samplers(model, golden, inputs, condition, name, monkeypatch):
    eps = guided_eps(model, condition, guidance=golden_file.META["guidance_scale"])
    states = []
    if name == "ddim":
        draws = itertools.count(1)
        monkeypatch.setattr(
            samplers,
            "randn",
            lambda shape, *_, **__: golden_file.noise(f"step{next(draws)}", 2, *shape),
        )
        kwargs = {"eta": golden_file.META["ddim_eta"], "generators": [torch.Generator(), torch.Generator()]}
        sampler = ddim
    else:
        sampler, kwargs = plms, {}
    z_0 = sampler(
        eps,
        inputs["x_T"],
        leading(NoiseSchedule.scaled_linear(), golden_file.META["steps"]),
        callback=lambda step: states.append(step.x_t),
        **kwargs,
    )
    assert relative_error(states[0], golden[f"{name}_step1"]) < 1e-5
    assert relative_error(z_0, golden[f"{name}_sample"]) < 1e-4
    if name == "plms":
        assert relative_error(model.vae.decode(z_0), golden["image_from_plms"]) < 1e-4


def test_training_gradients(model, golden, inputs):
    """Mean squared error of the noise, conditional and unconditional, on given latents."""
    schedule = NoiseSchedule.scaled_linear()
    z_t = schedule.add_noise(inputs["x0"], inputs["train_noise"], inputs["t"])
    with torch.no_grad():
        frozen = model.condition(inputs["image"], inputs["mask"], inputs["reference"])
    names = [name.removeprefix("grad_norm:") for name in golden if name.startswith("grad_norm:")]
    parameters = [model.get_parameter(name) for name in names]

    contexts = {
        "train_loss": model.encode_exemplar(inputs["reference"]),
        "train_loss_uncond": model.null_context.expand(2, -1, -1),
    }
    losses = {}
    for output, context in contexts.items():
        eps = model.unet(torch.cat([z_t, frozen.z_masked, frozen.mask], dim=1), inputs["t"], context)
        losses[output] = (eps - inputs["train_noise"]).square().mean()
        assert relative_error(losses[output].detach(), golden[output]) < 1e-5

    gradients = torch.autograd.grad(losses["train_loss"], parameters)
    for name, gradient in zip(names, gradients, strict=True):
        assert relative_error(gradient.norm(), golden[f"grad_norm:{name}"]) < 1e-4
