"""Samplers against closed forms, against diffusers, and against their contract."""

from itertools import product
from math import log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from marks import rest_slow

from pbe.sampling import (
    SAMPLERS,
    SPACINGS,
    NoiseSchedule,
    ddim,
    ddpm,
    dpm_solver,
    euler,
    euler_ancestral,
    get_sampler,
    karras,
    lcm,
    leading,
    make_generators,
    plms,
    randn,
    sampler,
    tcd,
    trailing,
    unipc,
)
from pbe.sampling.consistency import boundary_scalings
from pbe.sampling.multistep import ADAMS_BASHFORTH

SCHEDULE = NoiseSchedule.scaled_linear()


def grid(steps, schedule=SCHEDULE):
    return leading(schedule, steps)


def timesteps_of(steps, schedule=SCHEDULE):
    return [step.t for step in leading(schedule, steps)]


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def nonlinear_eps(x_t, t):
    """A bounded, elementwise stand-in for a network that depends on the state and on the time."""
    t = t.view(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype) / 1000
    return torch.sin(1.3 * x_t + t) * (0.5 + 0.5 * t) + 0.3 * x_t * t


class Gaussian:
    """Data x_0 ~ N(mu, s^2), for which the best eps and the probability-flow ODE's solution are closed forms."""

    def __init__(self, schedule, mu=0.7, s=0.5):
        self.schedule, self.mu, self.s = schedule, mu, s

    def moments(self, t):
        """Mean and variance of x_t."""
        alpha_bar_t = self.schedule.alpha_bar[t].item()
        return sqrt(alpha_bar_t) * self.mu, alpha_bar_t * self.s**2 + 1 - alpha_bar_t

    def eps(self, x_t, t):
        # -sqrt(1 - alpha_bar_t) times the score of N(mean, variance)
        t = t[0].item()
        mean, variance = self.moments(t)
        return sqrt(1 - self.schedule.alpha_bar[t].item()) * (x_t - mean) / variance

    def trajectory(self, t, c):
        """The ODE's solution that is c standard deviations from the mean, at every t."""
        mean, variance = self.moments(t)
        return mean + sqrt(variance) * c


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("plms", 2), ("dpm_solver", 2)])
def test_deterministic_samplers_converge_with_their_order(name, order):
    # Stable Diffusion's betas made 1000 times finer. The first beta jumps to where the first 50 or so of the 1000
    # coarse ones lead: sigma grows as sqrt(t) from t = 0, over which no method with even steps in t keeps its order.
    step_counts, errors = errors_on_gaussian_data(name)
    slope = -np.polyfit(np.log(step_counts), np.log(errors), 1)[0]
    # over the first doubling PLMS is still a sixth short of its order
    assert slope == pytest.approx(order, abs=0.15), errors
    assert errors[-1] < 0.02 / step_counts[-1] ** (order - 1)


def test_unipc_converges_at_least_as_its_order_and_corrects_dpm_solver():
    step_counts, errors = errors_on_gaussian_data("unipc")
    slope = -np.polyfit(np.log(step_counts), np.log(errors), 1)[0]
    assert slope > 1.85, errors
    _, uncorrected = errors_on_gaussian_data("dpm_solver")
    assert all(a < b / 2 for a, b in zip(errors, uncorrected, strict=True))


def errors_on_gaussian_data(name, step_counts=(80, 160, 320, 640, 1280)):
    T = 1_000_000
    betas = torch.linspace(sqrt(0.00085), sqrt(0.012), T, dtype=torch.float64) ** 2 * 1000 / T
    betas[0] = 0.05
    data = Gaussian(NoiseSchedule.from_betas(betas))
    c = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    errors = []
    for steps in step_counts:
        x_T = data.trajectory(grid(steps, data.schedule)[0].t, c)
        x_0 = SAMPLERS[name](data.eps, x_T, grid(steps, data.schedule))
        errors.append((x_0 - data.trajectory(0, c)).abs().max().item())
    return step_counts, errors


def test_plms_s_higher_weights_integrate_polynomials():
    # k weights predict a polynomial of degree k - 1 exactly over the next step, from its values at 0, -1, -2, …
    for k, weights in ADAMS_BASHFORTH.items():
        assert len(weights) == k
        for degree in range(k):
            mean = sum(w * (-float(i)) ** degree for i, w in enumerate(weights))
            assert mean == pytest.approx(1 / (degree + 1), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_ddpm_draws_from_the_closed_form_posterior(steps):
    # With eps consistent with one x_0, every step draws from q(x_prev | x_t, x_0), derived here by another way: the
    # product of the Gaussians q(x_prev | x_0) and q(x_t | x_prev).
    x_0 = torch.tensor([[0.4, -1.2, 2.0], [0.0, 1.0, -0.3]], dtype=torch.float64)
    x_T = torch.tensor([[1.0, 0.2, -0.5], [2.0, -1.0, 0.1]], dtype=torch.float64)

    def eps(x_t, t):
        alpha_bar_t = SCHEDULE.alpha_bar[t[0]].item()
        return (x_t - sqrt(alpha_bar_t) * x_0) / sqrt(1 - alpha_bar_t)

    infos = []
    result = ddpm(eps, x_T, grid(steps), generators=make_generators(3, 2), callback=infos.append)

    timesteps, noise, x_t = timesteps_of(steps), make_generators(3, 2), x_T
    for info, t, t_prev in zip(infos[:-1], timesteps[:-1], timesteps[1:], strict=True):
        alpha_bar_t, alpha_bar_prev = SCHEDULE.alpha_bar[t].item(), SCHEDULE.alpha_bar[t_prev].item()
        alpha = alpha_bar_t / alpha_bar_prev
        precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
        mean = (sqrt(alpha_bar_prev) * x_0 / (1 - alpha_bar_prev) + sqrt(alpha) * x_t / (1 - alpha)) / precision
        expected = mean + precision**-0.5 * randn((3,), noise, dtype=torch.float64)
        # 1 - alpha is a difference of neighbours, of which a few digits are lost
        torch.testing.assert_close(info.x_t, expected, rtol=1e-9, atol=1e-9)
        x_t = info.x_t
    # the last step returns its estimate of x_0
    torch.testing.assert_close(result, x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(infos[-1].z_0, x_0, rtol=1e-9, atol=1e-9)


def test_ddim_at_eta_1_is_ddpm_but_for_the_last_step():
    # DDIM, section 4.1; the last step arrives at alpha_bar[0] in the one and at 1 in the other
    x_T = randn((4, 8, 8), make_generators(0, 2), dtype=torch.float64)
    ours, other = [], []
    ddim(nonlinear_eps, x_T, grid(20), eta=1.0, generators=make_generators(1, 2), callback=ours.append)
    ddpm(nonlinear_eps, x_T, grid(20), generators=make_generators(1, 2), callback=other.append)
    for a, b in zip(ours[:-1], other[:-1], strict=True):
        torch.testing.assert_close(a.x_t, b.x_t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[-1].z_0, other[-1].x_t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5})])
def test_stochastic_samplers_reproduce_the_data_s_mean_and_variance(name, options):
    data = Gaussian(SCHEDULE)
    n = 8 * 2500
    x_T = data.trajectory(999, randn((2500,), make_generators(10, 8), dtype=torch.float64))
    x_0 = SAMPLERS[name](data.eps, x_T, grid(1000), generators=make_generators(20, 8), **options)
    # five standard errors; and the variance falls short by a few parts in the number of steps, since a step's noise
    # is the posterior's for a known x_0: 2 % here
    assert x_0.mean().item() == pytest.approx(data.mu, abs=5 * data.s / sqrt(n))
    assert x_0.var().item() == pytest.approx(data.s**2, rel=5 * sqrt(2 / n) + 0.02)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_each_ddim_step_adds_the_variance_that_keeps_the_marginal(eta):
    # x_prev given x_0 must be N(sqrt(alpha_bar_prev) x_0, 1 - alpha_bar_prev) when x_t follows q(x_t | x_0): DDIM,
    # lemma 1. With x_0 = 0 the state is linear in the noise, so the variance can be counted without sampling.
    (t, alpha_bar_t, alpha_bar_prev), *_ = grid(20)
    infos = []

    def eps(x_t, t):
        return x_t / sqrt(1 - SCHEDULE.alpha_bar[t[0]].item())

    x_T = torch.zeros(1, 6, dtype=torch.float64)
    ddim(eps, x_T, grid(20), eta=eta, generators=make_generators(4, 1), callback=infos.append)
    sigma_t = infos[0].x_t / randn((6,), make_generators(4, 1), dtype=torch.float64)
    ddim(eps, torch.ones_like(x_T), grid(20), eta=eta, generators=make_generators(4, 1), callback=infos.append)
    kept = infos[20].x_t - infos[0].x_t  # of a unit x_t
    total = kept**2 * (1 - alpha_bar_t) + sigma_t**2
    torch.testing.assert_close(total, torch.full_like(total, 1 - alpha_bar_prev), rtol=1e-10, atol=0)
    assert t == infos[0].t


# --- diffusers --------------------------------------------------------------------------------------------------------


def assert_steps_equal(infos, states):
    # diffusers' tables and coefficients are float32, and 1000 steps add up their rounding in states of up to 30
    assert len(infos) == len(states)
    for info, state in zip(infos, states, strict=True):
        torch.testing.assert_close(info.x_t, state, rtol=2e-4, atol=2e-4, msg=lambda m, i=info: f"t = {i.t}: {m}")


def start(steps):
    return randn((4, 8, 8), make_generators(steps, 2), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 30, 50, 999, 1000])
def test_dpm_solver_is_diffusers_step_by_step(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD_BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
    )
    # its own "leading" grid divides T by S + 1 rather than by S, so it is given ours
    scheduler.set_timesteps(timesteps=timesteps_of(steps))
    infos, states, x_t = [], [], start(steps)
    dpm_solver(nonlinear_eps, x_t, grid(steps), callback=infos.append)
    for t in scheduler.timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30, 50, 999])
def test_ddim_is_diffusers_step_by_step(steps, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        **SD_BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps_of(steps)
    infos, states, x_t = [], [], start(steps)
    ddim(nonlinear_eps, x_t, grid(steps), eta=eta, generators=make_generators(1, 2), callback=infos.append)
    generators = make_generators(1, 2)
    for t in scheduler.timesteps:
        noise = randn((4, 8, 8), generators, dtype=torch.float64)
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t, eta=eta, variance_noise=noise).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 10, 30, 50, 999])
def test_plms_is_diffusers_step_by_step(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.PNDMScheduler(
        **SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    infos, states, x_t = [], [], start(steps)
    plms(nonlinear_eps, x_t, grid(steps), callback=infos.append)
    for t in scheduler.timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t).prev_sample
        states.append(x_t)
    # diffusers makes the improved Euler step out of two of its own
    assert_steps_equal(infos, states[1:])


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 50])
def test_dpm_solver_with_karras_sigmas_is_diffusers_step_by_step(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_BETAS, algorithm_type="dpmsolver++", use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    assert_karras_steps_equal(dpm_solver, scheduler, steps)


def assert_karras_steps_equal(ours, scheduler, steps):
    """diffusers, too, asks the network at whole timesteps, and steps between the levels as they are."""
    assert scheduler.timesteps.tolist() == [step.t for step in karras(SCHEDULE, steps)]
    infos, states, x_t = [], [], start(steps)
    ours(nonlinear_eps, x_t, karras(SCHEDULE, steps), callback=infos.append)
    for t in scheduler.timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 50])
def test_unipc_is_diffusers_step_by_step(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        **SD_BETAS, solver_order=2, solver_type="bh2", timestep_spacing="trailing", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [step.t for step in trailing(SCHEDULE, steps)]
    infos, states, x_t = [], [], start(steps)
    unipc(nonlinear_eps, x_t, trailing(SCHEDULE, steps), callback=infos.append)
    for t in scheduler.timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_unipc_with_karras_sigmas_is_diffusers_step_by_step(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(**SD_BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    assert_karras_steps_equal(unipc, scheduler, steps)


def seeded_noise(monkeypatch, module):
    """Has a scheduler of diffusers draw what our samplers draw from the seeds 1 and 2."""
    generators = make_generators(1, 2)
    draw = lambda shape, **_: randn(shape[1:], generators, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)


@pytest.mark.parametrize(
    ("name", "spacing", "steps"),
    [
        *product(("euler", "euler_ancestral"), ("leading", "trailing"), (1, 2, 50)),
        *product(("euler",), ("karras",), (2, 10, 50)),  # diffusers makes another single step, and no ancestral one
    ],
)
def test_euler_is_diffusers_step_by_step(name, spacing, steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    if name == "euler_ancestral":
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS, timestep_spacing=spacing, steps_offset=1)
        seeded_noise(monkeypatch, "scheduling_euler_ancestral_discrete")
    elif spacing == "karras":
        scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True)
    else:
        scheduler = diffusers.EulerDiscreteScheduler(
            **SD_BETAS, timestep_spacing=spacing, steps_offset=1, final_sigmas_type="sigma_min"
        )
    ours = SPACINGS[spacing](SCHEDULE, steps)
    scheduler.set_timesteps(steps)
    # of Karras's levels diffusers asks this scheduler's network at fractions of timesteps
    assert scheduler.timesteps.round().tolist() == [step.t for step in ours]
    infos, states, x_T = [], [], start(steps)
    SAMPLERS[name](nonlinear_eps, x_T, ours, generators=make_generators(1, 2), callback=infos.append)
    scale = (scheduler.sigmas.double() ** 2 + 1).sqrt()  # diffusers' states are x_t / sqrt(alpha_bar_t)
    state = x_T * scale[0]
    for i, t in enumerate(scheduler.timesteps):
        eps_t = nonlinear_eps(scheduler.scale_model_input(state, t).double(), t.round().expand(2))
        state = scheduler.step(eps_t, t, state).prev_sample
        states.append(state.double() / scale[i + 1])
    assert_steps_equal(infos, states)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
def test_lcm_is_diffusers_step_by_step(steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(**SD_BETAS)
    scheduler.set_timesteps(steps)
    seeded_noise(monkeypatch, "scheduling_lcm")
    assert_distilled_steps_equal(lcm, scheduler, steps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
def test_tcd_is_diffusers_step_by_step(steps, eta, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.TCDScheduler(**SD_BETAS)
    scheduler.set_timesteps(steps)
    seeded_noise(monkeypatch, "scheduling_tcd")
    assert_distilled_steps_equal(tcd, scheduler, steps, eta=eta)


def assert_distilled_steps_equal(ours, scheduler, steps, **options):
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar  # in float32 its rounding grows over 50 such long steps
    grid = SPACINGS["lcm"](SCHEDULE, steps)
    assert scheduler.timesteps.tolist() == [step.t for step in grid]
    infos, states, x_t = [], [], start(steps)
    ours(nonlinear_eps, x_t, grid, generators=make_generators(1, 2), callback=infos.append, **options)
    for t in scheduler.timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t, **options).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)


def test_the_consistency_function_is_the_identity_at_0():
    assert boundary_scalings(0) == (1, 0)
    x_0 = torch.full((1, 3), 0.7)
    assert torch.equal(lcm(nonlinear_eps, x_0, SCHEDULE.grid([0]), generators=make_generators(0, 1)), x_0)


def test_euler_is_ddim_and_euler_ancestral_is_ddpm():
    """Two names for one method: Euler's steps in sigma, and its noise, are DDIM's at eta 0 and DDPM's."""
    x_T = start(20)
    assert torch.equal(euler(nonlinear_eps, x_T, grid(20)), ddim(nonlinear_eps, x_T, grid(20)))
    a, b = (f(nonlinear_eps, x_T, grid(20), generators=make_generators(1, 2)) for f in (euler_ancestral, ddpm))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_tcd_at_eta_0_is_ddim_and_needs_the_schedule_for_more():
    lcm_grid = SPACINGS["lcm"](SCHEDULE, 4)
    assert torch.equal(tcd(nonlinear_eps, start(4), lcm_grid), ddim(nonlinear_eps, start(4), lcm_grid))
    with pytest.raises(ValueError, match=r"a spacing made, with its schedule, got a list"):
        tcd(nonlinear_eps, start(4), lcm_grid[1:], eta=0.3, generators=make_generators(0, 2))


@pytest.mark.parametrize("spacing", [leading, trailing])
def test_plms_with_one_step_is_ddim(spacing):
    """On a Gaussian of deviation 0.1, whose eps is known; a second evaluation at the same timestep led far astray."""
    schedule = NoiseSchedule.scaled_linear()
    one_step = spacing(schedule, 1)

    def eps(x_t, t):
        alpha_bar = schedule.alpha_bar[t[0]].item()
        return x_t * (1 - alpha_bar) ** 0.5 / (alpha_bar * 0.01 + 1 - alpha_bar)

    x_T = randn((4, 8, 8), make_generators(0, 2))
    assert torch.equal(plms(eps, x_T, one_step), ddim(eps, x_T, one_step))
    if spacing is trailing:
        assert plms(eps, x_T, one_step).std() < 0.2


# --- the contract -----------------------------------------------------------------------------------------------------


def test_get_sampler_lists_the_choices():
    names = ["ddim", "plms", "ddpm", "dpm_solver", "unipc", "euler", "euler_ancestral", "lcm", "tcd"]
    assert list(SAMPLERS) == names
    assert all(get_sampler(name) is sampler for name, sampler in SAMPLERS.items())
    with pytest.raises(ValueError, match=f"unknown sampler 'heun', choose one of {', '.join(names)}"):
        get_sampler("heun")


@pytest.mark.parametrize("steps", rest_slow([1, 2, 3, 4, 5, 7, 9, 14, 50, 501, 15, 27, 30, 333, 500, 999, 1000], 10))
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_steps_takes_exactly_that_many(name, steps):
    infos, evaluated = [], []

    def eps(x_t, t):
        assert t.shape == (2,)
        assert t.dtype == torch.long
        evaluated.append(t[0].item())
        return nonlinear_eps(x_t, t)

    x_T = randn((3,), make_generators(0, 2))
    z_0 = SAMPLERS[name](eps, x_T, grid(steps), generators=make_generators(1, 2), callback=infos.append)
    timesteps = timesteps_of(steps)
    assert [info.index for info in infos] == list(range(steps))
    assert {info.steps for info in infos} == {steps}
    assert [info.t for info in infos] == timesteps
    if name == "plms" and steps > 1:  # the improved Euler step looks ahead
        timesteps.insert(1, timesteps[1])
    assert evaluated == timesteps
    assert torch.isfinite(z_0).all()
    assert torch.equal(infos[-1].x_t, z_0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 1001])
def test_a_bad_number_of_steps_is_refused_before_any_evaluation(name, steps):
    def eps(x_t, t):
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=f"steps must be .* got {steps}"):
        SAMPLERS[name](eps, torch.zeros(1, 4, 8, 8), grid(steps), generators=make_generators(0, 1))


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in SAMPLERS), ("ddim", {"eta": 0.5}), ("tcd", {"eta": 0.3})]
)
def test_a_sample_is_the_same_alone_and_in_a_batch(name, options):
    def sample(seed, n):
        generators = make_generators(seed, n)
        x_T = randn((4, 8, 8), generators)
        return SAMPLERS[name](nonlinear_eps, x_T, grid(12), generators=generators, **options)

    batch = sample(321, 4)
    for i in range(4):
        assert torch.equal(sample(321 + i, 1)[0], batch[i])
    assert not torch.equal(batch[0], batch[1])


def test_the_deterministic_samplers_draw_nothing():
    for name in ("ddim", "plms", "dpm_solver", "unipc", "euler", "tcd"):
        (generator,) = make_generators(0, 1)
        before = generator.get_state()
        SAMPLERS[name](nonlinear_eps, torch.ones(1, 4, 8, 8), grid(5), generators=[generator])
        assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("name", "options"), [("ddpm", {}), ("euler_ancestral", {}), ("lcm", {}), ("ddim", {"eta": 0.5})]
)
@pytest.mark.parametrize("generators", [None, make_generators(0, 1)])
def test_a_stochastic_sampler_asks_for_one_generator_a_sample(name, options, generators):
    given = "none" if generators is None else 1
    with pytest.raises(ValueError, match=rf"{name}.* one generator per sample \(2\), got {given}"):
        SAMPLERS[name](nonlinear_eps, torch.zeros(2, 4), grid(5), generators=generators, **options)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match=f"eta must be .* got {eta}"):
        ddim(nonlinear_eps, torch.zeros(1, 4), grid(5), eta=eta, generators=make_generators(0, 1))


@pytest.mark.parametrize(("name", "noise"), [("plms", "never"), ("ddpm", "always"), ("lcm", "always")])
def test_eta_is_for_the_samplers_whose_noise_it_sets(name, noise):
    with pytest.raises(ValueError, match=f"eta=0.5 .* such as 'ddim' draws; '{name}' draws it {noise}"):
        SAMPLERS[name](nonlinear_eps, torch.zeros(1, 4), grid(5), eta=0.5, generators=make_generators(0, 1))


def test_a_grid_without_steps_is_refused():
    with pytest.raises(ValueError, match="no steps"):
        ddim(nonlinear_eps, torch.zeros(1, 4), [])


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_grid_may_start_below_the_top(name):
    """The one-step methods go on from any of their states as if they had come from it."""
    x_T, infos = randn((4, 8, 8), make_generators(0, 2)), []
    generators = make_generators(1, 2)
    z_0 = SAMPLERS[name](nonlinear_eps, x_T, grid(10), generators=generators, callback=infos.append)
    generators = make_generators(1, 2)
    if name == "ddpm":
        randn((4, 8, 8), generators), randn((4, 8, 8), generators)  # those of the first two steps
    assert torch.equal(SAMPLERS[name](nonlinear_eps, infos[1].x_t, grid(10)[2:], generators=generators), z_0)


def test_a_sampler_of_one_s_own():
    @sampler(noise="always")
    def halve(eps, x_t, grid, draw, eta):
        """Half of it and noise."""
        for _ in grid:
            x_t = x_t / 2 + draw()
            yield x_t, x_t

    noise, infos = make_generators(0, 2), []
    expected = (torch.ones(2, 3) / 2 + randn((3,), noise)) / 2 + randn((3,), noise)
    x_0 = halve(nonlinear_eps, torch.ones(2, 3), grid(2), generators=make_generators(0, 2), callback=infos.append)
    assert torch.equal(x_0, expected)
    assert [(info.index, info.steps, info.t) for info in infos] == [(0, 2, 501), (1, 2, 1)]
    assert (halve.__name__, halve.__doc__) == ("halve", "Half of it and noise.")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_state_keeps_x_T_s_dtype_whatever_eps_returns(name, dtype):
    def eps(x_t, t):
        assert x_t.dtype == dtype
        return nonlinear_eps(x_t, t).float()

    infos = []
    x_T = randn((4, 8, 8), make_generators(0, 2), dtype=dtype)
    SAMPLERS[name](eps, x_T, grid(6), generators=make_generators(1, 2), callback=infos.append)
    assert {info.x_t.dtype for info in infos} == {info.z_0.dtype for info in infos} == {dtype}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_reads_a_value_back_from_the_device(name):
    # a tensor on meta has no values: whatever would wait for a device fails on it
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    z_0 = SAMPLERS[name](nonlinear_eps, x_T, grid(6), generators=make_generators(0, 2))
    assert z_0.shape == x_T.shape
    assert z_0.device.type == "meta"


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_leaves_x_T_gradients_and_the_global_generator_alone(name):
    x_T = randn((4, 8, 8), make_generators(0, 2))
    copy, weight, before = x_T.clone(), torch.ones((), requires_grad=True), torch.get_rng_state()
    z_0 = SAMPLERS[name](lambda x_t, t: weight * nonlinear_eps(x_t, t), x_T, grid(5), generators=make_generators(1, 2))
    assert torch.equal(x_T, copy)
    assert not z_0.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_sees_the_estimate_and_can_stop(name):
    class Enough(Exception):
        pass

    seen = []

    def callback(info):
        seen.append(info)
        if info.index == 2:
            raise Enough

    data = torch.tensor([[0.5, -2.0]])

    def eps(x_t, t):
        alpha_bar_t = SCHEDULE.alpha_bar[t[0]].item()
        return (x_t - sqrt(alpha_bar_t) * data) / sqrt(1 - alpha_bar_t)

    with pytest.raises(Enough):
        SAMPLERS[name](eps, torch.ones(1, 2), grid(10), generators=make_generators(0, 1), callback=callback)
    assert [info.index for info in seen] == [0, 1, 2]
    for info in seen:  # eps knows the data, so every estimate is the data; float32 over sqrt(alpha_bar) of about 0.1
        torch.testing.assert_close(info.z_0, data, rtol=1e-4, atol=1e-4)


def test_dpm_solver_lowers_its_order_only_for_few_steps():
    # the last step of a run below 15 steps depends on the last estimate alone
    def last_step(steps):
        infos = []
        dpm_solver(nonlinear_eps, torch.ones(1, 3, dtype=torch.float64), grid(steps), callback=infos.append)
        _, alpha_bar_t, alpha_bar_prev = grid(steps)[-1]
        h = 0.5 * log(alpha_bar_prev / (1 - alpha_bar_prev)) - 0.5 * log(alpha_bar_t / (1 - alpha_bar_t))
        x_t, z_0 = infos[-2].x_t, infos[-1].z_0
        first_order = sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) * x_t
        first_order = first_order + sqrt(alpha_bar_prev) * (1 - np.exp(-h)) * z_0
        return (infos[-1].x_t - first_order).abs().max().item()

    assert last_step(14) < 1e-12
    assert last_step(15) > 1e-6


# --- starting in the middle, from noised data (SDEdit) ----------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_start_has_the_noise_of_its_first_step(spacing):
    """Data N(mu, s^2) and noise give the mean and the variance that the first step's level has, on average."""
    grid = SPACINGS[spacing](SCHEDULE, 20).last(9)
    data, n = Gaussian(SCHEDULE), 40_000
    z_0 = data.mu + data.s * randn((n,), make_generators(1, 1), dtype=torch.float64)
    noise = randn((n,), make_generators(2, 1), dtype=torch.float64)
    x_t = grid.start_from(z_0, noise)
    alpha_bar_t = grid[0].alpha_bar_t
    variance = alpha_bar_t * data.s**2 + 1 - alpha_bar_t
    assert x_t.mean().item() == pytest.approx(sqrt(alpha_bar_t) * data.mu, abs=5 * sqrt(variance / n))
    assert x_t.var().item() == pytest.approx(variance, rel=5 * sqrt(2 / n))


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("dpm_solver", {})])
def test_from_noised_data_the_samplers_lead_back_to_the_data(name, options):
    grid, data, n = leading(SCHEDULE, 1000).last(500), Gaussian(SCHEDULE), 20_000
    z_0 = data.mu + data.s * randn((n,), make_generators(1, 1), dtype=torch.float64)
    x_t = grid.start_from(z_0, randn((n,), make_generators(2, 1), dtype=torch.float64))
    x_0 = SAMPLERS[name](data.eps, x_t, grid, generators=make_generators(3, 1), **options)
    assert x_0.mean().item() == pytest.approx(data.mu, abs=5 * data.s / sqrt(n))
    assert x_0.var().item() == pytest.approx(data.s**2, rel=5 * sqrt(2 / n) + 0.02)


def test_the_last_steps_are_those_of_the_grid():
    whole = karras(SCHEDULE, 12)
    assert whole.last(5) == whole[7:]
    assert whole.last(5).schedule is SCHEDULE
    assert whole.last(12) == whole
    for steps in (0, 13, -1):
        with pytest.raises(ValueError, match=f"of 12 steps from 1 to 12 can be taken, got {steps}"):
            whole.last(steps)


@pytest.mark.parametrize("strength", [0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_it_is_diffusers_image_to_image_step_by_step(name, strength):
    """Its `get_timesteps` and `add_noise`; it rounds the number of steps down where ours goes up."""
    diffusers = pytest.importorskip("diffusers")
    steps, taken = 30, round(strength * 30)
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
        )
        scheduler.set_timesteps(steps)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**SD_BETAS, solver_order=2, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(timesteps=timesteps_of(steps))
    pipeline = SimpleNamespace(scheduler=scheduler)
    get_timesteps = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps
    timesteps, count = get_timesteps(pipeline, steps, strength, "cpu")
    grid = leading(SCHEDULE, steps).last(taken)
    assert count == taken
    assert [step.t for step in grid] == timesteps.tolist()

    z_0, noise = 0.5 * start(1), start(2)
    infos, states, x_t = [], [], grid.start_from(z_0, noise)
    theirs = scheduler.add_noise(z_0, noise, timesteps[:1].repeat(2))
    torch.testing.assert_close(x_t, theirs, rtol=1e-5, atol=1e-5)
    {"ddim": ddim, "dpm_solver": dpm_solver}[name](nonlinear_eps, x_t, grid, callback=infos.append)
    for t in timesteps:
        x_t = scheduler.step(nonlinear_eps(x_t, t.expand(2)), t, x_t).prev_sample
        states.append(x_t)
    assert_steps_equal(infos, states)
