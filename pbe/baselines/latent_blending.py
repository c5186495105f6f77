"""Sampling one region of a picture and keeping the rest: the background is put back, noised as the sample is, at each
step (Blended Diffusion, Avrahami et al., arXiv 2111.14818; in latents, arXiv 2206.02779)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from pbe.sampling.noise import check_generators, randn
from pbe.sampling.samplers import Eps, clean_end, ddim_step, evaluate
from pbe.sampling.schedule import Grid

Blend = Callable[[Tensor, float], Tensor]  # (x_t, alpha_bar_t) → x_t


def background(x_0: Tensor, keep: Tensor, generators: Sequence[torch.Generator]) -> Blend:
    """The hook that puts `x_0` (B, C, h, w), noised to the sample's level, where `keep` (B, 1, h, w) is 1.

    At alpha_bar_t = 1, where samplers arrive, it is x_0 itself.

    Raises:
        ValueError: without one generator per sample.
    """
    check_generators(generators, x_0.shape[0], "background")

    def blend(x_t: Tensor, alpha_bar_t: float) -> Tensor:
        noise = randn(x_0.shape[1:], generators, x_0.device, x_0.dtype)
        # x_t = m x_fg + (1 - m) x_bg, with x_bg ~ q(x_t | x_0)                              (algorithm 2)
        x_bg = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * noise
        return (1 - keep) * x_t + keep * x_bg

    return blend


@torch.no_grad()
def blended_ddim(eps: Eps, x_T: Tensor, grid: Grid, blend: Blend) -> Tensor:
    """DDIM at eta = 0 with `blend` applied to the start and after each step.

    The last step arrives at alpha_bar = 1, the clean sample, where DDIM by itself stops at alpha_bar[0].
    """
    x_t = blend(x_T, grid[0].alpha_bar_t)
    for t, alpha_bar_t, alpha_bar_prev in clean_end(grid):
        x_t, _ = ddim_step(x_t, evaluate(eps, x_t, t), alpha_bar_t, alpha_bar_prev)
        x_t = blend(x_t, alpha_bar_prev)
    return x_t
