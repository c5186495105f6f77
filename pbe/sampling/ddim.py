"""DDIM (Song et al., arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from pbe.sampling.noise import check_generators, randn
from pbe.sampling.schedule import Callback, Eps, NoiseSchedule, StepInfo, evaluate, predict_z_0


@torch.no_grad()
def ddim(
    eps: Eps,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, equation 12: deterministic at eta = 0, needing no generators; as noisy as DDPM at eta = 1.

    Raises:
        ValueError: if eta is outside [0, 1], or eta > 0 without one generator a sample.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (deterministic) to 1 (as noisy as DDPM), got {eta}")
    if eta > 0:
        check_generators(generators, x_T.shape[0], f"ddim with eta = {eta}")

    x_t = x_T
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(schedule.grid(steps)):
        # sigma_t = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)   (16)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        sigma_t = eta * sqrt(variance)
        x_t, z_0 = ddim_step(x_t, evaluate(eps, x_t, t), alpha_bar_t, alpha_bar_prev, sigma_t)
        if eta > 0:
            x_t = x_t + sigma_t * randn(x_t.shape[1:], generators, x_t.device, x_t.dtype)
        if callback is not None:
            callback(StepInfo(index, steps, t, x_t, z_0))
    return x_t


def ddim_step(
    x_t: Tensor, eps_t: Tensor, alpha_bar_t: float, alpha_bar_prev: float, sigma_t: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean of one DDIM step and the estimate of z_0 that it is made from.

    x_prev = sqrt(alpha_bar_prev) z_0 + sqrt(1 - alpha_bar_prev - sigma_t^2) eps_t
    """
    z_0 = predict_z_0(x_t, eps_t, alpha_bar_t)
    # never negative but for rounding, at eta = 1 and alpha_bar_t near 0
    direction = sqrt(max(1 - alpha_bar_prev - sigma_t**2, 0.0))
    return sqrt(alpha_bar_prev) * z_0 + direction * eps_t, z_0
