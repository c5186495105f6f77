"""Multistep samplers: each step goes on from the predictions of the steps before, too."""

from __future__ import annotations

from math import expm1, inf, log, sqrt

import torch
from torch import Tensor

from pbe.sampling.samplers import Draw, Eps, States, ddim_step, evaluate, predict_z_0, sampler
from pbe.sampling.schedule import Grid

# Adams-Bashforth weights by the number of predictions at hand, newest first
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@sampler(noise="never")
def plms(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """PLMS, equation 12 (Liu et al., arXiv 2202.09778): DDIM steps along a mean of the last four predictions.

    The first step, without a past, is a pseudo improved Euler step, as in latent diffusion: one evaluation more than
    there are steps. A single step has no second timestep to look ahead to: it is DDIM's.
    """
    history: list[Tensor] = []  # newest first
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        eps_t = evaluate(eps, x_t, t)
        history = [eps_t, *history[:3]]
        if index == 0 and len(grid) > 1:
            # eps' = (eps(x_t, t) + eps(x_prev, t_prev)) / 2
            x_prev, _ = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
            eps_t = (eps_t + evaluate(eps, x_prev, grid[1].t)) / 2
        elif index > 0:
            weights = ADAMS_BASHFORTH[len(history)]
            eps_t = sum((w * e for w, e in zip(weights, history, strict=True)), torch.zeros_like(x_t))
        x_t, z_0 = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
        yield x_t, z_0


# ----------------------------------------------------------------------------------------------------------------------
# Exponential integrators: exact but for how z_0 changes over a step


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), the time in which the solvers step; infinite for a clean sample."""
    return 0.5 * log(alpha_bar / (1 - alpha_bar)) if alpha_bar < 1 else inf


def exponential_step(x_t: Tensor, D: Tensor, alpha_bar_t: float, alpha_bar_prev: float) -> Tensor:
    """The step along which z_0 is D on average: x_prev = sigma_prev / sigma_t x_t - alpha_prev (exp(-h) - 1) D."""
    h = half_log_snr(alpha_bar_prev) - half_log_snr(alpha_bar_t)
    to_x_t = sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
    return to_x_t * x_t - sqrt(alpha_bar_prev) * expm1(-h) * D


@sampler(noise="never")
def dpm_solver(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """DPM-Solver++(2M), algorithm 2 (Lu et al., arXiv 2211.01095): a second-order multistep method on z_0.

    The first step is of first order, and the last one too where extrapolating over it is unstable: below 15 steps,
    where it is long, and to a clean sample, where it is infinite.
    """
    last: tuple[Tensor, float] | None = None  # z_0 and lambda of the step before
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        lambda_t = half_log_snr(alpha_bar_t)
        D = z_0
        if last is not None and not (index == len(grid) - 1 and (len(grid) < 15 or alpha_bar_prev == 1)):
            D = extrapolated(z_0, lambda_t, *last, half_log_snr(alpha_bar_prev))
        x_t = exponential_step(x_t, D, alpha_bar_t, alpha_bar_prev)
        last = z_0, lambda_t
        yield x_t, z_0


def extrapolated(z_0: Tensor, lambda_t: float, z_0_last: Tensor, lambda_last: float, lambda_prev: float) -> Tensor:
    """D = (1 + 1 / 2r) z_0 - 1 / 2r z_0_last, with r = h_last / h."""
    h, h_last = lambda_prev - lambda_t, lambda_t - lambda_last
    return z_0 + h / (2 * h_last) * (z_0 - z_0_last)


@sampler(noise="never")
def unipc(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """UniPC-2 with B_2(h), algorithms 5 to 8 (Zhao et al., arXiv 2302.04867): DPM-Solver++(2M), each of whose steps is
    taken again once the prediction at its end is known, which needs no evaluation more.

    The first and the last step are of first order.
    """
    past: list[tuple[Tensor, float]] = []  # z_0 and lambda of the last two steps, newest first
    x_last = x_t
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        lambda_t = half_log_snr(alpha_bar_t)
        if past:
            x_t = exponential_step(x_last, corrected(z_0, lambda_t, past), grid[index - 1].alpha_bar_t, alpha_bar_t)
        D = z_0
        if 0 < index < len(grid) - 1:
            D = extrapolated(z_0, lambda_t, *past[0], half_log_snr(alpha_bar_prev))
        x_last, past = x_t, [(z_0, lambda_t), *past[:1]]
        x_t = exponential_step(x_t, D, alpha_bar_t, alpha_bar_prev)
        yield x_t, z_0


def corrected(z_0: Tensor, lambda_t: float, past: list[tuple[Tensor, float]]) -> Tensor:
    """UniC's D over the step from past[0] to the prediction z_0 at lambda_t, of second order where past has two.

    D = z_0_last + rho_1 (z_0_older - z_0_last) / r + rho_2 (z_0 - z_0_last), with r = (lambda_older - lambda_last) / h,
    rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2
    """
    (z_0_last, lambda_last), *older = past
    if not older:
        return (z_0_last + z_0) / 2
    ((z_0_older, lambda_older),) = older
    h = lambda_t - lambda_last
    r = (lambda_older - lambda_last) / h
    B = expm1(-h)
    h_phi_2 = -B / h - 1
    b_1, b_2 = h_phi_2 / B, 2 * (-h_phi_2 / h - 1 / 2) / B
    rho_1 = (b_1 - b_2) / (1 - r)
    return z_0_last + rho_1 / r * (z_0_older - z_0_last) + (b_1 - rho_1) * (z_0 - z_0_last)
