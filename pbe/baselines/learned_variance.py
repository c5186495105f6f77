"""DDPM with a learned variance, optionally guided by a loss: guided diffusion's sampler.

Nichol and Dhariwal, arXiv 2102.09672 (the variance); Dhariwal and Nichol, arXiv 2105.05233 (the guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

import torch
from torch import Tensor

from pbe.baselines.latent_blending import Blend
from pbe.sampling.noise import check_generators, randn
from pbe.sampling.samplers import Callback, StepInfo, clean_end, evaluate, posterior, predict_z_0
from pbe.sampling.schedule import Grid, NoiseSchedule, Step
from pbe.sampling.spacing import check_steps

Prediction = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) → (B, 2 C, ...): eps, then the variance's interpolation
Loss = Callable[[Tensor, Tensor, float], Tensor]  # (x_0, x_t, alpha_bar_t) → a sum over the samples


def respaced(schedule: NoiseSchedule, steps: int) -> list[Step]:
    """Guided diffusion's spacing: `steps` of the timesteps, evenly spaced with both ends, rounded."""
    last = check_steps(schedule, steps) - 1
    return schedule.grid([last] if steps == 1 else [round(i * last / (steps - 1)) for i in reversed(range(steps))])


@torch.no_grad()
def learned_variance_ddpm(
    prediction: Prediction,
    x_start: Tensor,
    grid: Grid,
    *,
    generators: Sequence[torch.Generator],
    loss: Loss | None = None,
    blend: Blend | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM over `grid` from x_start (B, C, ...), whose noise is that of the first step.

    log Sigma = v log beta_t + (1 - v) log beta~_t with the predicted v (arXiv 2102.09672, equation 15). A `loss` of the
    estimate x_0 and of x_t moves the mean by -Sigma times its gradient in x_t (arXiv 2105.05233, algorithm 1).
    `blend` is applied to each x_t that a step arrives at; the last step arrives at alpha_bar = 1 and adds no noise.

    Raises:
        ValueError: without one generator per sample.
    """
    check_generators(generators, x_start.shape[0], "learned_variance_ddpm")

    x_t = x_start
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(clean_end(grid)):
        with torch.set_grad_enabled(loss is not None):
            x_t = x_t.detach().requires_grad_(loss is not None)
            eps_t, v = evaluate(prediction, x_t, t).chunk(2, dim=1)
            x_0 = predict_z_0(x_t, eps_t, alpha_bar_t)
            gradient = 0.0 if loss is None else torch.autograd.grad(loss(x_0, x_t, alpha_bar_t), x_t)[0]
        x_t, x_0 = x_t.detach(), x_0.detach()

        mean, beta_t, beta_tilde_t = posterior(x_0, x_t, alpha_bar_t, alpha_bar_prev)
        v = (v.detach() + 1) / 2  # the network's is in [-1, 1]
        # In the last step, which adds no noise, this only scales the guidance: beta_t stands in for the log of 0.
        variance = torch.exp(v * log(beta_t) + (1 - v) * log(beta_tilde_t or beta_t))
        noise = randn(x_t.shape[1:], generators, x_t.device, x_t.dtype)
        if alpha_bar_prev == 1:
            noise = torch.zeros_like(noise)
        x_t = mean - variance * gradient + variance.sqrt() * noise
        if blend is not None:
            x_t = blend(x_t, alpha_bar_prev)
        if callback is not None:
            callback(StepInfo(index, len(grid), t, x_t, x_0))
    return x_t
