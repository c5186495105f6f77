"""Samplers of distilled models: a few long steps, with noise between them.

A consistency model's estimate of z_0 is good from any timestep in one step; adding noise again and estimating again
makes it better. Their timesteps are those of the spacing `lcm`.
"""

from __future__ import annotations

from math import floor, sqrt

from torch import Tensor

from pbe.sampling.samplers import Draw, Eps, States, ddim_step, evaluate, predict_z_0, sampler
from pbe.sampling.schedule import Grid, ScheduleGrid

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10


def boundary_scalings(t: int) -> tuple[float, float]:
    """c_skip and c_out, 1 and 0 at t = 0, of the consistency function f(x_t, t) = c_skip x_t + c_out z_0.

    c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s / sqrt(s^2 + sigma_data^2), with s = 10 t
    """
    s = TIMESTEP_SCALING * t
    return SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s / sqrt(s**2 + SIGMA_DATA**2)


@sampler(noise="always")
def lcm(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """Latent consistency models' multistep sampling, algorithm 3 (Luo et al., arXiv 2310.04378).

    x_prev = sqrt(alpha_bar_prev) f + sqrt(1 - alpha_bar_prev) noise, and f alone after the last step
    """
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        c_skip, c_out = boundary_scalings(t)
        f = c_skip * x_t + c_out * predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        x_t = f if index == len(grid) - 1 else sqrt(alpha_bar_prev) * f + sqrt(1 - alpha_bar_prev) * draw()
        yield x_t, f


@sampler(noise="eta")
def tcd(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """Trajectory consistency distillation's strategic stochastic sampling, algorithm 4 (Zheng et al.,
    arXiv 2402.19159), whose gamma is eta: 0 is DDIM, 1 as much noise as lcm's; the authors take 0.3.

    Each step goes down to timestep s = (1 - gamma) t_prev, and by noise up to t_prev:
    x_prev = sqrt(alpha_bar_prev / alpha_bar_s) x_s + sqrt(1 - alpha_bar_prev / alpha_bar_s) noise
    """
    if not isinstance(grid, ScheduleGrid):
        raise ValueError(f"tcd needs the grid that a spacing made, with its schedule, got a {type(grid).__name__}")
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        ends = eta == 0 or index == len(grid) - 1
        s = 0 if ends else floor((1 - eta) * grid[index + 1].t)
        alpha_bar_s = alpha_bar_prev if ends else grid.schedule.alpha_bar[s].item()
        eps_t = evaluate(eps, x_t, t)
        x_t, z_0 = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_s)
        if not ends:
            kept = min(alpha_bar_prev / alpha_bar_s, 1.0)  # above 1 only by rounding
            x_t = sqrt(kept) * x_t + sqrt(1 - kept) * draw()
        yield x_t, z_0
