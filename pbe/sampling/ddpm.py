"""DDPM's ancestral sampling (Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from pbe.sampling.noise import check_generators, randn
from pbe.sampling.schedule import Callback, Eps, NoiseSchedule, StepInfo, evaluate, predict_z_0


@torch.no_grad()
def ddpm(
    eps: Eps,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM, equations 6 and 7: draws from the posterior q(x_prev | x_t, z_0), betas respaced if steps < T.

    The last step arrives at alpha_bar = 1, where the variance is 0: it returns its estimate of z_0.

    Raises:
        ValueError: without one generator a sample.
    """
    check_generators(generators, x_T.shape[0], "ddpm")

    x_t = x_T
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(schedule.grid(steps, alpha_bar_end=1.0)):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        mean, _, beta_tilde_t = posterior(z_0, x_t, alpha_bar_t, alpha_bar_prev)
        x_t = mean + sqrt(beta_tilde_t) * randn(x_t.shape[1:], generators, x_t.device, x_t.dtype)
        if callback is not None:
            callback(StepInfo(index, steps, t, x_t, z_0))
    return x_t


def posterior(z_0: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_prev: float) -> tuple[Tensor, float, float]:
    """The mean of q(x_prev | x_t, z_0), beta_t, and the variance beta~_t (equations 6 and 7).

    mean = sqrt(alpha_bar_prev) beta_t / (1 - alpha_bar_t) z_0
         + sqrt(alpha_t) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x_t
    beta~_t = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    to_z_0 = sqrt(alpha_bar_prev) * beta_t / (1 - alpha_bar_t)
    to_x_t = sqrt(alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return to_z_0 * z_0 + to_x_t * x_t, beta_t, (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t
