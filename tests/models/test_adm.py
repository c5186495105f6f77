"""Guided diffusion: the network against the original's outputs, its files, and its sampler against other references."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from golden_file import FOLDER, noise, parameter

import pbe
from pbe.baselines.latent_blending import background, blended_ddim
from pbe.baselines.learned_variance import learned_variance_ddpm, respaced
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import open_recognised, recognise
from pbe.checkpoints.merging import merge
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.seeding import draw
from pbe.checkpoints.surgery import config_of, describe, entry_of, network
from pbe.checkpoints.writing import save_checkpoint
from pbe.models.adm import ADM, ADMConfig
from pbe.sampling import NoiseSchedule, ddim, ddpm, leading, make_generators, randn

MANIFESTS = Path(__file__).parents[3] / "shared" / "reference" / "manifests"
GOLDEN = json.loads((FOLDER / "adm_small.json").read_text())
# the sizes of `512x512_diffusion.pt`
ADM_512 = ADMConfig(channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_levels=(4, 5, 6), num_classes=1000, resolution=512)
SMALL = ADMConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(1, 2),
    head_channels=16,
    num_classes=10,
    resolution=32,
)


def golden_state():
    return {name: parameter(name, shape, GOLDEN["seed"]) for name, shape in GOLDEN["parameters"].items()}


@pytest.fixture(scope="module")
def small():
    model = ADM(SMALL)
    model.load_state_dict(golden_state())
    return model.eval().requires_grad_(False)


# --- the network ------------------------------------------------------------------------------------------------------


def test_outputs_are_the_original_s(small):
    x, t, y = noise("x", 2, 3, 32, 32, seed=GOLDEN["seed"]), torch.tensor([20, 700]), torch.tensor([3, 0])
    with np.load(FOLDER / "adm_small.npz") as arrays:
        expected = torch.from_numpy(arrays["out"])
    # float32 rounding through 20 layers: 2e-6 of values up to 3
    assert torch.allclose(small(x, t, y), expected, rtol=0, atol=1e-5)


def test_gradients_reach_the_picture(small):
    """What guidance needs; against a finite difference in float64 along a random direction."""
    model = ADM(SMALL).double()
    model.load_state_dict(golden_state())
    x, direction = (noise(name, 1, 3, 32, 32).double() for name in ("x", "direction"))

    def value(x):
        return model(x, torch.tensor([300]), torch.tensor([1])).square().sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        h = 1e-5
        difference = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), difference, rtol=1e-6)  # the central difference's own error


def test_takes_sides_that_are_multiples(small):
    assert SMALL.multiple == 4
    assert small(noise("x", 1, 3, 12, 20), torch.tensor([5]), torch.tensor([1])).shape == (1, 6, 12, 20)
    with pytest.raises(ValueError, match=r"multiples of 4, not 30x12 \(width x height\)"):
        small(noise("x", 1, 3, 12, 30), torch.tensor([5]), torch.tensor([1]))


def test_classes_are_given_where_they_are_learnt(small):
    x, t = noise("x", 1, 3, 8, 8), torch.tensor([5])
    assert not torch.allclose(small(x, t, torch.tensor([1])), small(x, t, torch.tensor([2])), atol=1e-3)
    with pytest.raises(ValueError, match="no classes y for a network with num_classes=10"):
        small(x, t)
    unconditional = ADM(ADMConfig(model_channels=32, channel_mult=(1,), attention_levels=(), head_channels=32))
    with pytest.raises(ValueError, match="classes y for a network with num_classes=None"):
        unconditional(x, t, torch.tensor([1]))


@pytest.mark.parametrize(
    ("change", "message"), [({"attention_levels": (3,)}, "must index"), ({"head_channels": 24}, "head_channels=24")]
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ADMConfig(**{"model_channels": 32, "channel_mult": (1, 2, 2), "attention_levels": (2,), **change})


@pytest.mark.slow
def test_half_precision_and_compiling(small):
    args = noise("x", 1, 3, 16, 16), torch.tensor([700]), torch.tensor([3])
    expected = small(*args)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), expected, atol=1e-5)
    halved = ADM(SMALL).bfloat16()
    halved.load_state_dict(golden_state())
    result = halved(args[0].bfloat16(), *args[1:])
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() / expected.norm() < 0.06  # a few of bfloat16's roundings of 2^-8


# --- files ------------------------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """A tensor of which only the description is known."""

    shape: torch.Size
    dtype: torch.dtype


@pytest.mark.parametrize(
    ("manifest", "config", "millions"),
    [("256x256_diffusion_uncond", ADMConfig(), 552.8), ("512x512_diffusion", ADM_512, 559.0)],
)
def test_original_files_are_recognised_and_fit(manifest, config, millions):
    """Every key and shape of the released files, and the sizes told from them alone."""
    path = MANIFESTS / f"openai-{manifest}.pt.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    entries = json.loads(path.read_text())
    model = build_on_meta(ADM, config)
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == {n: s for n, (s, _) in entries.items()}
    tensors = {n: Described(torch.Size(shape), getattr(torch, dtype)) for n, (shape, dtype) in entries.items()}
    source = recognise(Checkpoint(path, "manifest", tensors, {}))
    assert source.layout.name == "guided diffusion (ADM), OpenAI's layout"
    assert config_of(source) == config
    facts = describe(source)
    assert not facts["not loaded"]
    assert facts["parameters"]["ADM"] == facts["parameters"]["total"] == pytest.approx(millions * 1e6, rel=1e-4)


def test_a_file_of_the_original_layout_loads(tmp_path, small):
    """A plain state dict; its heads are not the released models', so our own entry beside it says what they are."""
    torch.save({**golden_state(), "pbe": pbe_entry(SMALL)}, tmp_path / "adm.pt")
    model = pbe.load_model(tmp_path / "adm.pt", device="cpu")
    assert isinstance(model, ADM)
    assert model.config == SMALL
    args = noise("x", 1, 3, 8, 8), torch.tensor([9]), torch.tensor([4])
    assert torch.equal(model(*args), small(*args))

    # what shapes cannot tell falls back to the released models': heads of 64, 8 x 8 at the lowest level
    config = ADMConfig(model_channels=64, channel_mult=(0.5, 1), num_res_blocks=1, attention_levels=(1,), resolution=16)
    torch.save(ADM(config).state_dict(), tmp_path / "plain.pt")
    assert pbe.load_model(tmp_path / "plain.pt", device="cpu").config == config


def test_rewritten_files_hold_the_same(tmp_path):
    torch.save({**golden_state(), "pbe": pbe_entry(SMALL)}, tmp_path / "adm.pt")
    source = open_recognised(tmp_path / "adm.pt")
    save_checkpoint(network(source), tmp_path / "slim.ckpt", entry_of(source))
    again = open_recognised(tmp_path / "slim.ckpt")
    assert config_of(again) == SMALL
    mean = merge([source, again], [0.25, 0.75])
    assert torch.allclose(mean["out.2.weight"], golden_state()["out.2.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("output_blocks.3.1.qkv.bias"), r"lacks 1: output_blocks\.3\.1\.qkv\.bias"),
        (
            lambda s: s.update({"input_blocks.1.0.extra": torch.zeros(1)}),
            r"has no place for 1: input_blocks\.1\.0\.ext",
        ),
        (lambda s: s.update({"classifier.weight": torch.zeros(1)}), r"1 names that this layout does not have: classif"),
        (
            lambda s: s.update({"label_emb.weight": torch.zeros(10, 64)}),
            r"wrong shape in 1: label_emb\.weight \(10, 64",
        ),
        (
            # a block that only adds the embedding is another network
            lambda s: s.update({"middle_block.0.emb_layers.1.weight": torch.zeros(64, 128)}),
            r"wrong shape in 1: middle_block\.0\.emb_layers\.1\.weight \(64, 128\) for \(128, 128\)",
        ),
    ],
)
def test_loading_is_strict(tmp_path, change, message):
    state = golden_state()
    change(state)
    torch.save({**state, "pbe": pbe_entry(SMALL)}, tmp_path / "adm.pt")
    with pytest.raises(CheckpointError, match=message):
        pbe.load_model(tmp_path / "adm.pt", device="cpu")


# --- the sampler ------------------------------------------------------------------------------------------------------

SCHEDULE = NoiseSchedule.linear()


def network_like(x_t, t):
    """A smooth stand-in with six channels: noise, and interpolations of the variance inside [-1, 1]."""
    t = t.view(-1, 1, 1, 1).to(x_t.dtype) / 1000
    return torch.cat([torch.sin(1.3 * x_t + t) * 0.5 + 0.3 * x_t * t, torch.tanh(x_t - t)], dim=1)


def with_variance(v):
    """The stand-in's noise with the interpolation v everywhere."""
    return lambda x_t, t: torch.cat([network_like(x_t, t)[:, :3], torch.full_like(x_t, v)], dim=1)


def timesteps_of(grid):
    return [step.t for step in grid]


def test_respacing_keeps_both_ends():
    assert timesteps_of(respaced(SCHEDULE, 5)) == [999, 749, 500, 250, 0]  # strides of 249.75, rounded
    assert timesteps_of(respaced(SCHEDULE, 1)) == [999]
    assert timesteps_of(respaced(SCHEDULE, 1000)) == list(range(999, -1, -1))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"got {steps}"):
            respaced(SCHEDULE, steps)


@pytest.mark.parametrize("steps", [2, 7, 25])
def test_steps_are_diffusers(steps):
    """DDPMScheduler with the learned range, fed the same noise; float32 on both sides: 1e-5 of the largest value."""
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="learned_range", clip_sample=False
    )
    # its own product in float32 is off by a thousandth of the 4e-5 at t = 999
    scheduler.alphas_cumprod, scheduler.one = SCHEDULE.alpha_bar, torch.ones((), dtype=torch.float64)
    grid = respaced(SCHEDULE, steps)
    scheduler.set_timesteps(timesteps=timesteps_of(grid))
    expected, generator = randn((3, 8, 8), make_generators(3, 1)), torch.Generator().manual_seed(4)
    ours = learned_variance_ddpm(network_like, expected, grid, generators=[torch.Generator().manual_seed(4)])
    for t in timesteps_of(grid):
        output = network_like(expected, torch.tensor([t]))
        expected = scheduler.step(output, t, expected, generator=generator).prev_sample
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_least_variance_is_ddpm_s():
    """v = -1 is beta~, DDPM's own choice: over all timesteps both samplers are one."""
    schedule = NoiseSchedule.linear(40, 1e-3, 0.3)
    x_T = randn((3, 4, 4), make_generators(0, 2))
    expected = ddpm(
        lambda x, t: network_like(x, t)[:, :3], x_T, leading(schedule, 40), generators=make_generators(5, 2)
    )
    ours = learned_variance_ddpm(with_variance(-1.0), x_T, respaced(schedule, 40), generators=make_generators(5, 2))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_guided_step_is_the_formula():
    """One step with a quadratic loss, re-derived in float64: mean - Sigma gradient + sqrt(Sigma) noise."""
    target, v, timesteps = 0.3, 0.4, [600, 500]
    x_t = randn((3, 4, 4), make_generators(1, 1))
    found = []

    def loss(x_0, x, alpha_bar_t):
        assert alpha_bar_t == SCHEDULE.alpha_bar[timesteps[len(found)]].item()
        return (x_0 - target).square().sum() + 2 * x.sum()

    def constant(x, t):  # x_0 = (x_t - sqrt(1 - alpha_bar) / 2) / sqrt(alpha_bar)
        return torch.cat([torch.full_like(x, 0.5), torch.full_like(x, v)], dim=1)

    learned_variance_ddpm(
        constant,
        x_t,
        SCHEDULE.grid(timesteps),
        generators=[torch.Generator().manual_seed(9)],
        loss=loss,
        callback=found.append,
    )
    a_t, a_prev = SCHEDULE.alpha_bar[timesteps].tolist()
    x, z = (value.double() for value in (x_t, torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(9))))
    x_0 = (x - 0.5 * math.sqrt(1 - a_t)) / math.sqrt(a_t)
    gradient = 2 * (x_0 - target) / math.sqrt(a_t) + 2
    beta = 1 - a_t / a_prev
    beta_tilde = beta * (1 - a_prev) / (1 - a_t)
    sigma2 = beta**0.7 * beta_tilde**0.3  # (v + 1) / 2 = 0.7
    mean = (math.sqrt(a_prev) * beta * x_0 + math.sqrt(a_t / a_prev) * (1 - a_prev) * x) / (1 - a_t)
    expected = mean - sigma2 * gradient + math.sqrt(sigma2) * z
    assert torch.allclose(found[0].x_t.double(), expected, atol=1e-5)
    assert torch.allclose(found[0].z_0.double(), x_0, atol=1e-5)

    # The last step has no noise; its mean is the estimate itself, and beta stands in for beta~, which is 0.
    x_0 = (found[0].x_t.double() - 0.5 * math.sqrt(1 - a_prev)) / math.sqrt(a_prev)
    gradient = 2 * (x_0 - target) / math.sqrt(a_prev) + 2
    assert torch.allclose(found[1].x_t.double(), x_0 - (1 - a_prev) * gradient, rtol=1e-4, atol=1e-4)
    assert len(found) == 2


def test_samples_depend_on_their_own_seed():
    x_T = randn((3, 4, 4), make_generators(0, 2))
    both = learned_variance_ddpm(network_like, x_T, respaced(SCHEDULE, 5), generators=make_generators(7, 2))
    second = learned_variance_ddpm(network_like, x_T[1:], respaced(SCHEDULE, 5), generators=make_generators(8, 1))
    assert torch.allclose(both[1:], second, atol=1e-6)
    with pytest.raises(ValueError, match="learned_variance_ddpm draws noise"):
        learned_variance_ddpm(network_like, x_T, SCHEDULE.grid([3]), generators=make_generators(7, 1))


# --- blending ---------------------------------------------------------------------------------------------------------


def test_the_background_is_noised_to_the_sample_s_level():
    x_0, keep = torch.full((1, 1, 200, 200), 0.5), torch.zeros(1, 1, 200, 200)
    keep[..., :100] = 1
    blended = background(x_0, keep, make_generators(0, 1))(torch.full_like(x_0, 9.0), 0.36)
    assert (blended[..., 100:] == 9).all()
    # mean sqrt(.36) x_0, deviation sqrt(.64), of 20,000 pixels: four standard errors
    assert blended[..., :100].mean().item() == pytest.approx(0.3, abs=4 * 0.8 / math.sqrt(20_000))
    assert blended[..., :100].std().item() == pytest.approx(0.8, abs=4 * 0.8 / math.sqrt(40_000))


@pytest.mark.parametrize("sampler", ["learned variance", "ddim"])
def test_what_is_kept_arrives_unchanged(sampler):
    x_0, keep = noise("picture", 1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    keep[..., :5] = 1
    generators = make_generators(2, 1)
    x_T, blend = randn((3, 8, 8), generators), background(x_0, keep, generators)
    if sampler == "ddim":
        result = blended_ddim(lambda x, t: network_like(x, t)[:, :3], x_T, leading(SCHEDULE, 6), blend)
    else:
        result = learned_variance_ddpm(network_like, x_T, respaced(SCHEDULE, 6), generators=generators, blend=blend)
    assert torch.equal(result[..., :5], x_0[..., :5])
    assert (result[..., 5:] - x_0[..., 5:]).abs().min() > 1e-4


def test_blended_ddim_without_background_is_ddim_up_to_its_last_step():
    def eps(x, t):
        return network_like(x, t)[:, :3]

    def record(x_t, alpha_bar_t):
        ours.append(x_t)
        return x_t

    x_T, ours, expected = randn((3, 4, 4), make_generators(0, 1)), [], []
    blended_ddim(eps, x_T, leading(SCHEDULE, 10), record)
    ddim(eps, x_T, leading(SCHEDULE, 10), callback=expected.append)
    assert ours.pop(0) is x_T
    for x_t, info in zip(ours[:-1], expected[:-1], strict=True):
        assert torch.equal(x_t, info.x_t)
    assert torch.allclose(ours[-1], expected[-1].z_0, atol=1e-6)  # at alpha_bar = 1 the sample is the estimate


# --- the released sizes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [ADMConfig(), ADM_512], ids=["256", "512"])
def test_full_size_takes_a_step(tmp_path, config):
    """A seeded checkpoint in OpenAI's layout (2.2 GB): a step at the network's resolution, and a guided one at 256.

    With gradients the 512 network would need about 10 GB for its 512 x 512, and 3.4 GB for 256 x 256: it is
    convolutional but for the attention, which takes any size.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in build_on_meta(ADM, config).state_dict().items()}
    torch.save({name: draw(name, shape, generator) for name, shape in shapes.items()}, tmp_path / "adm.pt")
    model = pbe.load_model(tmp_path / "adm.pt", device="cpu", dtype="bfloat16").requires_grad_(False)
    assert model.config == config

    def step(side, loss=None):
        def prediction(x_t, t):
            return model(x_t.bfloat16(), t, None if config.num_classes is None else torch.tensor([7]))

        x_t, generators = randn((3, side, side), make_generators(0, 1)), make_generators(1, 1)
        result = learned_variance_ddpm(prediction, x_t, SCHEDULE.grid([500]), generators=generators, loss=loss)
        assert result.shape == (1, 3, side, side)
        assert result.isfinite().all()
        return result

    free = step(256)
    guided = step(256, lambda x_0, x_t, alpha_bar_t: x_0.square().sum())
    assert not torch.allclose(free, guided)
    if config.resolution > 256:
        step(config.resolution)
