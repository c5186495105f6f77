"""DPM-Solver++(2M) (Lu et al., arXiv 2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, log, sqrt

import torch
from torch import Tensor

from pbe.sampling.schedule import Callback, Eps, NoiseSchedule, StepInfo, evaluate, predict_z_0


@torch.no_grad()
def dpm_solver(
    eps: Eps,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2: a second-order multistep method on the prediction of z_0.

    The first step is of first order, and below 15 steps the last one too, where extrapolating over the long last
    step is unstable. `generators` are not used: the method is deterministic.
    """
    x_t = x_T
    z_0_last = lambda_last = None  # of the step before
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(schedule.grid(steps)):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        lambda_t = half_log_snr(alpha_bar_t)
        h = half_log_snr(alpha_bar_prev) - lambda_t

        # D = (1 + 1 / 2r) z_0 - 1 / 2r z_0_last, with r = h_last / h
        D = z_0
        if index > 0 and not (index == steps - 1 and steps < 15):
            h_last = lambda_t - lambda_last
            D = z_0 + h / (2 * h_last) * (z_0 - z_0_last)
        # x_prev = sigma_prev / sigma_t x_t - alpha_prev (exp(-h) - 1) D
        to_x_t = sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        x_t = to_x_t * x_t - sqrt(alpha_bar_prev) * expm1(-h) * D

        z_0_last, lambda_last = z_0, lambda_t
        if callback is not None:
            callback(StepInfo(index, steps, t, x_t, z_0))
    return x_t


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), the time in which the solver steps."""
    return 0.5 * log(alpha_bar / (1 - alpha_bar))
