"""The noise schedule, the seeded noise and guidance."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.sampling import NoiseSchedule, get_spacing, guided_eps, karras, leading, make_generators, randn, trailing
from pbe.sampling.samplers import clean_end

GOLDEN = Path(__file__).parents[3] / "shared/reference/golden/small.npz"


def timesteps_of(grid):
    return [step.t for step in grid]


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_scaled_linear_follows_its_definition():
    schedule = NoiseSchedule.scaled_linear()
    alpha_bar, product = [], 1.0
    for t in range(1000):
        sqrt_beta = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999
        product *= 1 - sqrt_beta**2
        alpha_bar.append(product)
    assert schedule.alpha_bar.dtype == torch.float64
    # a product of 1000 float64 factors
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), alpha_bar, rtol=1e-12)


def test_scaled_linear_is_the_original_table():
    if not GOLDEN.exists():
        pytest.skip("the golden file is not beside the checkout")
    golden = np.load(GOLDEN)
    schedule = NoiseSchedule.scaled_linear()
    # the original computes in float64 and stores float32
    np.testing.assert_array_equal(schedule.alpha_bar.float().numpy(), golden["alphas_cumprod"])
    assert sorted(timesteps_of(leading(schedule, 10))) == sorted(golden["plms_timesteps"].tolist())
    assert sorted(timesteps_of(leading(schedule, 10))) == sorted(golden["ddim_timesteps"].tolist())


def test_the_first_timesteps_are_those_of_the_whole_schedule():
    whole = NoiseSchedule.scaled_linear()
    part = whole.first(650)
    assert torch.equal(part.alpha_bar, whole.alpha_bar[:650])
    assert timesteps_of(trailing(part, 5)) == [649, 519, 389, 259, 129]
    assert torch.equal(whole.first(1000).alpha_bar, whole.alpha_bar)
    for num_timesteps in (0, 1001):
        with pytest.raises(ValueError, match=f"num_timesteps must be from 1 to 1000, got {num_timesteps}"):
            whole.first(num_timesteps)


def test_linear_is_ddpm_s_table():
    betas = np.linspace(1e-4, 0.02, 1000)
    expected = np.exp(np.log1p(-betas).cumsum())
    np.testing.assert_allclose(NoiseSchedule.linear().alpha_bar.numpy(), expected, rtol=1e-12)


def test_from_betas_takes_any_dtype():
    schedule = NoiseSchedule.from_betas(torch.tensor([0.5, 0.25], dtype=torch.float32))
    assert schedule.alpha_bar.tolist() == [0.5, 0.375]


@pytest.mark.parametrize(
    "alpha_bar",
    [
        torch.tensor([0.9, 0.5]),  # float32
        torch.tensor([[0.9, 0.5]], dtype=torch.float64),
        torch.tensor([], dtype=torch.float64),
        torch.tensor([1.0, 0.5], dtype=torch.float64),  # infinite signal-to-noise ratio
        torch.tensor([0.9, 0.0], dtype=torch.float64),  # none: eps says nothing about x_0
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([0.9, float("nan")], dtype=torch.float64),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(alpha_bar):
    with pytest.raises(ValueError, match="alpha_bar must"):
        NoiseSchedule(alpha_bar)


def test_no_timesteps_is_refused():
    with pytest.raises(ValueError, match="num_timesteps must be at least 1, got 0"):
        NoiseSchedule.linear(0)


def test_timesteps_are_the_original_ones():
    schedule = NoiseSchedule.scaled_linear()
    assert timesteps_of(leading(schedule, 50)) == list(range(981, 0, -20))
    assert timesteps_of(leading(schedule, 1)) == [1]
    assert timesteps_of(leading(schedule, 3)) == [667, 334, 1]
    assert timesteps_of(leading(schedule, 999)) == list(range(999, 0, -1))
    assert timesteps_of(leading(schedule, 1000)) == list(range(999, -1, -1))


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_every_number_of_steps_gives_that_many_inside_the_table(num_timesteps):
    schedule = NoiseSchedule.linear(num_timesteps, beta_end=0.01)
    for steps in range(1, num_timesteps + 1):
        timesteps = timesteps_of(leading(schedule, steps))
        assert len(timesteps) == steps
        assert 0 <= timesteps[-1]
        assert timesteps[0] < num_timesteps
        assert all(later < earlier for earlier, later in pairwise(timesteps))


@pytest.mark.parametrize("steps", [0, -1, 1001, 10.0])
def test_a_bad_number_of_steps_is_named(steps):
    with pytest.raises(ValueError, match=rf"steps must be an integer from 1 to 1000, got {steps}"):
        timesteps_of(leading(NoiseSchedule.scaled_linear(), steps))


def test_grid_chains_and_ends_at_the_first_entry():
    schedule = NoiseSchedule.scaled_linear()
    grid = leading(schedule, 30)
    assert [t for t, _, _ in grid] == timesteps_of(leading(schedule, 30))
    assert [a for _, a, _ in grid] == [schedule.alpha_bar[t].item() for t in timesteps_of(leading(schedule, 30))]
    assert [prev for _, _, prev in grid[:-1]] == [a for _, a, _ in grid[1:]]
    assert grid[-1][2] == schedule.alpha_bar[0].item()
    assert clean_end(grid)[:-1] == grid[:-1]
    assert clean_end(grid)[-1] == (grid[-1].t, grid[-1].alpha_bar_t, 1.0)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [1, 2], [1000, 3], [3, -1]])
def test_timesteps_must_fall_inside_the_table(timesteps):
    with pytest.raises(ValueError, match=f"from 999 to 0, got {re.escape(str(timesteps))}"):
        NoiseSchedule.scaled_linear().grid(timesteps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_noise_mixes_each_sample_at_its_own_timestep(dtype):
    schedule = NoiseSchedule.scaled_linear()
    g = torch.Generator().manual_seed(0)
    z_0, noise = (torch.randn(3, 4, 5, 6, generator=g).to(dtype) for _ in range(2))
    t = torch.tensor([0, 37, 999])
    z_t = schedule.add_noise(z_0, noise, t)
    assert z_t.dtype == dtype
    # coefficients are float32, then z_0's dtype
    tolerance = 1e-6 if dtype != torch.bfloat16 else 4 * torch.finfo(dtype).eps
    for i in range(3):
        alpha_bar_t = schedule.alpha_bar[t[i]]
        expected = alpha_bar_t.sqrt() * z_0[i].double() + (1 - alpha_bar_t).sqrt() * noise[i].double()
        torch.testing.assert_close(z_t[i].double(), expected, rtol=tolerance, atol=tolerance)


def test_add_noise_names_a_wrong_shape():
    schedule, z_0 = NoiseSchedule.scaled_linear(), torch.zeros(3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"t must have shape \(3,\).*got \(1,\)"):
        schedule.add_noise(z_0, z_0, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"noise must be shaped as z_0 \(3, 4, 8, 8\), got \(4, 8, 8\)"):
        schedule.add_noise(z_0, z_0[0], torch.zeros(3, dtype=torch.long))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_the_sample_s_seed_alone():
    batch = randn((4, 8, 8), make_generators(321, 4))
    for i in range(4):
        assert torch.equal(batch[i], randn((4, 8, 8), make_generators(321 + i, 1))[0])
    assert not torch.equal(batch[0], batch[1])


def test_noise_is_drawn_in_float32_and_cast():
    noise = randn((4, 8, 8), make_generators(5, 2))
    assert torch.equal(randn((4, 8, 8), make_generators(5, 2), dtype=torch.bfloat16), noise.bfloat16())
    assert torch.equal(randn((4, 8, 8), make_generators(5, 2), dtype=torch.float64), noise.double())


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    randn((4, 8, 8), make_generators(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_generators_is_refused():
    with pytest.raises(ValueError, match=r"n must be at least 1.*got 0"):
        make_generators(0, 0)


# --- guidance ---------------------------------------------------------------------------------------------------------


@dataclass
class Condition:
    z_masked: torch.Tensor
    mask: torch.Tensor
    context: torch.Tensor


class Model:
    """A stand-in whose prediction depends on every input, sample by sample, and which remembers its calls."""

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.null_context = torch.randn(1, 1, 768, generator=g)
        self.weight = torch.randn(4, 9, generator=g)
        self.calls = []

    def unet(self, unet_in, t, context):
        self.calls.append((unet_in, t, context))
        out = torch.einsum("oc,bchw->bohw", self.weight.to(unet_in), unet_in)
        return out + t.view(-1, 1, 1, 1).to(out.dtype) / 1000 + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def make_condition(batch=2, tokens=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return Condition(
        z_masked=torch.randn(batch, 4, 8, 6, generator=g).to(dtype),
        mask=(torch.rand(batch, 1, 8, 6, generator=g) > 0.5).to(dtype),
        context=torch.randn(batch, tokens, 768, generator=g).to(dtype),
    )


X_T = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(3))
T = torch.tensor([901, 37])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("guidance", [0.5, 5.0, 7])
def test_guidance_extrapolates_from_the_unconditional_prediction_in_one_call(guidance, tokens):
    model, condition = Model(), make_condition(tokens=tokens)
    unet_in = torch.cat([X_T, condition.z_masked, condition.mask], dim=1)
    eps_u = model.unet(unet_in, T, model.null_context.repeat(2, tokens, 1))
    eps_c = model.unet(unet_in, T, condition.context)
    model.calls.clear()

    eps = guided_eps(model, condition, guidance)(X_T, T)
    # float32 sums of nine terms, magnified by guidance
    torch.testing.assert_close(eps, eps_u + guidance * (eps_c - eps_u), rtol=1e-4, atol=1e-4)
    assert len(model.calls) == 1
    assert torch.equal(model.calls[0][0], torch.cat([unet_in, unet_in]))
    assert model.calls[0][1].tolist() == [901, 37, 901, 37]
    assert torch.equal(model.calls[0][2][2:], condition.context)


@pytest.mark.parametrize("guidance", [0, 1, 0.0, 1.0])
def test_at_guidance_0_and_1_only_one_half_is_computed(guidance):
    model, condition = Model(), make_condition(tokens=5)
    eps = guided_eps(model, condition, guidance)(X_T, T)
    assert len(model.calls) == 1
    unet_in, t, context = model.calls[0]
    assert unet_in.shape == (2, 9, 8, 6)
    assert torch.equal(t, T)
    expected = condition.context if guidance == 1 else model.null_context.repeat(2, 5, 1)
    assert torch.equal(context, expected)
    # the stand-in's mean over an expanded context may be summed in another order
    torch.testing.assert_close(eps, model.unet(unet_in, T, expected), rtol=1e-5, atol=1e-5)


def test_the_network_runs_in_the_condition_s_dtype_and_guidance_in_x_t_s():
    model, condition = Model(), make_condition(dtype=torch.bfloat16)
    eps = guided_eps(model, condition, 5.0)(X_T, T)
    assert eps.dtype == torch.float32
    unet_in, _, context = model.calls[0]
    assert unet_in.dtype == context.dtype == torch.bfloat16
    prediction = model.unet(*model.calls[0])
    assert prediction.dtype == torch.bfloat16
    eps_u, eps_c = prediction.float().chunk(2)
    assert torch.equal(eps, eps_u + 5.0 * (eps_c - eps_u))


@pytest.mark.parametrize("guidance", [-0.1, float("nan"), float("inf")])
def test_a_bad_guidance_is_named(guidance):
    with pytest.raises(ValueError, match=f"guidance must be finite and at least 0, got {guidance}"):
        guided_eps(Model(), make_condition(), guidance)


@pytest.mark.parametrize("guidance", [0, 1, 5.0])
def test_each_sample_needs_a_context(guidance):
    """Or else the two halves of a single one would be taken for the contexts of two samples."""
    condition = make_condition()
    condition.context = condition.context[:1]
    with pytest.raises(ValueError, match=r"one context per sample \(2\), got 1; context\.expand"):
        guided_eps(Model(), condition, guidance)
    with pytest.raises(ValueError, match=r"one context per sample \(2\), got 1"):
        guided_eps(Model(), condition, guidance, interval=(100, 900))
    condition.context = condition.context.expand(2, -1, -1)
    assert guided_eps(Model(), condition, guidance)(X_T, T).shape == X_T.shape


def test_latents_of_another_shape_are_named():
    eps = guided_eps(Model(), make_condition(batch=3), 5.0)
    with pytest.raises(ValueError, match=r"z_masked \(3, 4, 8, 6\), got \(2, 4, 8, 6\)"):
        eps(X_T, T)


def test_trailing_timesteps():
    """They end a stride above 0 and always start at the noisiest timestep, from which pure noise is drawn."""
    schedule = NoiseSchedule.scaled_linear()
    assert timesteps_of(trailing(schedule, 10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert timesteps_of(trailing(schedule, 3)) == [999, 666, 332]
    assert timesteps_of(trailing(schedule, 1000)) == list(range(999, -1, -1))
    for steps in range(1, 1001):
        timesteps = timesteps_of(trailing(schedule, steps))
        assert timesteps[0] == 999
        assert len(timesteps) == steps
        assert all(a > b >= 0 for a, b in pairwise(timesteps))


@pytest.mark.parametrize("steps", [5, 7, 20, 50, 250, 999])
def test_trailing_timesteps_are_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDIMScheduler(timestep_spacing="trailing")
    other.set_timesteps(steps)
    ours = timesteps_of(trailing(NoiseSchedule.scaled_linear(), steps))
    assert ours == other.timesteps.tolist()


@pytest.mark.parametrize("steps", range(1, 51))
def test_lcm_timesteps_are_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.LCMScheduler()
    other.set_timesteps(steps)
    assert timesteps_of(get_spacing("lcm")(NoiseSchedule.scaled_linear(), steps)) == other.timesteps.tolist()


def test_lcm_timesteps_are_fifty():
    schedule = NoiseSchedule.scaled_linear()
    assert timesteps_of(get_spacing("lcm")(schedule, 4)) == [999, 759, 499, 259]
    with pytest.raises(ValueError, match="'lcm' has 50 timesteps, got steps=51"):
        get_spacing("lcm")(schedule, 51)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
def test_karras_levels_are_even_in_their_seventh_root_and_end_clean(steps):
    schedule = NoiseSchedule.scaled_linear()
    grid = karras(schedule, steps)
    sigma = np.array([(1 / alpha_bar_t - 1) ** 0.5 for _, alpha_bar_t, _ in grid])
    table = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt().numpy()
    np.testing.assert_allclose(sigma ** (1 / 7), np.linspace(table[-1] ** (1 / 7), table[0] ** (1 / 7), steps))
    # rounding 1 / alpha_bar - 1 near alpha_bar = 1 leaves 12 digits of sigma
    assert [prev for _, _, prev in grid] == [*(a for _, a, _ in grid[1:]), 1.0]
    assert grid[0].t == 999
    for t, alpha_bar_t, _ in grid:  # the network is asked at the nearest of its timesteps
        distance = np.abs(np.log(table) - np.log((1 / alpha_bar_t - 1) ** 0.5))
        assert distance[t] == pytest.approx(distance.min(), rel=0.05)


def test_unknown_spacing():
    with pytest.raises(ValueError, match=r"'middle'.*leading, trailing, karras, lcm"):
        get_spacing("middle")


# --- the guidance interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "samples"),
    [((-1, 999), [4, 4, 4]), ((37, 500), [2, 4, 2]), ((36, 901), [4, 4, 4]), ((500, 500), [2, 2, 2])],
)
@pytest.mark.parametrize("guidance", [0, 3.0])
def test_outside_its_interval_guidance_computes_the_conditional_half_alone(interval, samples, guidance):
    """(t_low, t_high]: the lower end lies outside, the upper inside. With both halves two samples are four."""
    model, condition = Model(), make_condition()
    everywhere, nowhere = (guided_eps(model, condition, g) for g in (guidance, 1))
    timesteps = [901, 500, 37]
    for grid in (None, NoiseSchedule.scaled_linear().grid(timesteps)):
        eps = guided_eps(model, condition, guidance, grid, interval)
        for t, count in zip(timesteps, samples, strict=True):
            t = torch.tensor([t, t])
            expected = (everywhere if count == 4 else nowhere)(X_T, t)
            model.calls.clear()
            assert torch.equal(eps(X_T, t), expected)
            assert [len(call[0]) for call in model.calls] == [2 if guidance == 0 else count]


def test_a_wrong_interval_and_samples_on_both_sides_are_named():
    with pytest.raises(ValueError, match=r"t_low <= t_high, got \(500, 499\)"):
        guided_eps(Model(), make_condition(), 5.0, interval=(500, 499))
    eps = guided_eps(Model(), make_condition(), 5.0, interval=(100, 900))
    with pytest.raises(ValueError, match=r"one side of the interval \(100, 901\) for all samples, got \[901, 37\]"):
        guided_eps(Model(), make_condition(), 5.0, interval=(100, 901))(X_T, T)
    assert eps(X_T, T).shape == X_T.shape  # both outside
