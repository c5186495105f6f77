"""PLMS, the pseudo linear multistep method (Liu et al., arXiv 2202.09778), as latent diffusion uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pbe.sampling.ddim import ddim_step
from pbe.sampling.schedule import Callback, Eps, NoiseSchedule, StepInfo, evaluate

# Adams-Bashforth weights by the number of predictions at hand, newest first
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def plms(
    eps: Eps,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """PLMS, equation 12: DDIM steps along an Adams-Bashforth mean of the last four predictions.

    The first step, without a past, is a pseudo improved Euler step: steps + 1 evaluations in all. `generators` are
    not used: the method is deterministic.
    """
    x_t = x_T
    history: list[Tensor] = []  # newest first
    grid = schedule.grid(steps)
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        eps_t = evaluate(eps, x_t, t)
        history = [eps_t, *history[:3]]
        if index == 0:
            # eps' = (eps(x_t, t) + eps(x_prev, t_prev)) / 2; with a single step t_prev is t, as in the original
            x_prev, _ = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
            t_prev = grid[min(1, steps - 1)][0]
            eps_t = (eps_t + evaluate(eps, x_prev, t_prev)) / 2
        else:
            eps_t = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
        x_t, z_0 = ddim_step(x_t, eps_t, alpha_bar_t, alpha_bar_prev)
        if callback is not None:
            callback(StepInfo(index, steps, t, x_t, z_0))
    return x_t
