"""Samplers: from noise to a sample, by a network's prediction eps(x_t, t) along a grid of steps.

An algorithm is a generator that takes the steps; `sampler` gives it the contract that all share, `Sampler`. Those here
know the last state alone; `multistep` and `consistency` have others, `registry` the names of all. Symbols are DDIM's
(arXiv 2010.02502) with DDPM's bar: x_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from pbe.sampling.noise import check_generators, randn
from pbe.sampling.schedule import Grid

Eps = Callable[[Tensor, Tensor], Tensor]  # eps(x_t, t) with t (B,) long, on x_t's device
Draw = Callable[[], Tensor]  # standard normal noise, shaped as x_t
States = Iterator[tuple[Tensor, Tensor]]  # after each step: x_t, and the estimate of z_0 that the step was made with
Noise = Literal["never", "always", "eta"]
Algorithm = Callable[[Eps, Tensor, Grid, Draw, float], States]  # (eps, x_T, grid, draw, eta)


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What a sampler reports after each step."""

    index: int  # 0 for the first step
    steps: int
    t: int  # the timestep that the step started from
    x_t: Tensor  # after the step
    z_0: Tensor  # the estimate of the clean sample that the step was made with


Callback = Callable[[StepInfo], None]


# ----------------------------------------------------------------------------------------------------------------------
# The contract


class Sampler:
    """An algorithm as a function from noise to a sample, without gradients.

    `noise` says when the algorithm draws noise: "never", "always", or as much as "eta" says.
    """

    def __init__(self, algorithm: Algorithm, noise: Noise):
        self.algorithm, self.noise = algorithm, noise
        self.__name__, self.__doc__ = algorithm.__name__, algorithm.__doc__

    @torch.no_grad()
    def __call__(
        self,
        eps: Eps,
        x_T: Tensor,
        grid: Grid,
        *,
        eta: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """The sample, of x_T's shape, dtype and device.

        Args:
            eps: the prediction of the noise, eps(x_t, t) with t (B,) long on x_T's device.
            x_T: (B, ...) standard normal noise; the state stays in its dtype, so float32 is wise whatever the
                network's.
            grid: the steps to take, noisiest first, of the schedule that eps was trained with: see
                `pbe.sampling.spacing`.
            eta: from 0, deterministic, to 1, as noisy as DDPM; for the samplers whose noise is "eta".
            generators: one per sample; samplers that draw no noise ignore them.
            callback: called with a StepInfo after each step; an exception that it raises ends the sampling.

        Raises:
            ValueError: for an empty grid, an eta that `check_eta` refuses, or noise without one generator per sample.
        """
        if not grid:
            raise ValueError("the grid has no steps")
        self.check_eta(eta)
        if self.noise == "always" or eta > 0:
            check_generators(generators, len(x_T), self.__name__ if eta == 0 else f"{self.__name__} with eta = {eta}")

        def draw() -> Tensor:
            return randn(x_T.shape[1:], generators or (), x_T.device, x_T.dtype)

        x_t = x_T
        for index, (x_t, z_0) in enumerate(self.algorithm(eps, x_T, grid, draw, eta)):
            if callback is not None:
                callback(StepInfo(index, len(grid), grid[index].t, x_t, z_0))
        return x_t

    def check_eta(self, eta: float) -> None:
        """Raises a ValueError for an eta outside [0, 1], or other than 0 where the sampler's noise is not "eta"."""
        if self.noise == "eta" and not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 (deterministic) to 1 (as noisy as DDPM), got {eta}")
        if self.noise != "eta" and eta != 0:
            raise ValueError(
                f"eta={eta} says how much noise a sampler such as 'ddim' draws; {self.__name__!r} draws it {self.noise}"
            )


def sampler(noise: Noise) -> Callable[[Algorithm], Sampler]:
    """The decorator that makes an algorithm a `Sampler`."""
    return lambda algorithm: Sampler(algorithm, noise)


# ----------------------------------------------------------------------------------------------------------------------
# What the algorithms share


def evaluate(eps: Eps, x_t: Tensor, t: int) -> Tensor:
    """eps(x_t, t) with every sample at timestep `t`, in x_t's dtype whatever the network computes in."""
    return eps(x_t, torch.full((x_t.shape[0],), t, device=x_t.device, dtype=torch.long)).to(x_t.dtype)


def predict_z_0(x_t: Tensor, eps_t: Tensor, alpha_bar_t: float) -> Tensor:
    """The clean sample that `eps_t` implies: (x_t - sqrt(1 - alpha_bar_t) eps_t) / sqrt(alpha_bar_t)."""
    return (x_t - sqrt(1 - alpha_bar_t) * eps_t) / sqrt(alpha_bar_t)


def clean_end(grid: Grid) -> Grid:
    """The grid, whose last step arrives at alpha_bar = 1, the clean sample, rather than at alpha_bar[0]."""
    return [*grid[:-1], grid[-1]._replace(alpha_bar_prev=1.0)]


def ddim_step(
    x_t: Tensor, eps_t: Tensor, alpha_bar_t: float, alpha_bar_prev: float, sigma_t: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean of one DDIM step and the estimate of z_0 that it is made from.

    x_prev = sqrt(alpha_bar_prev) z_0 + sqrt(1 - alpha_bar_prev - sigma_t^2) eps_t
    """
    z_0 = predict_z_0(x_t, eps_t, alpha_bar_t)
    # negative only by rounding, at eta = 1 and alpha_bar_t near 0
    direction = sqrt(max(1 - alpha_bar_prev - sigma_t**2, 0.0))
    return sqrt(alpha_bar_prev) * z_0 + direction * eps_t, z_0


def posterior(z_0: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_prev: float) -> tuple[Tensor, float, float]:
    """The mean of q(x_prev | x_t, z_0), beta_t, and the variance beta~_t (DDPM, equations 6 and 7).

    mean = sqrt(alpha_bar_prev) beta_t / (1 - alpha_bar_t) z_0
         + sqrt(alpha_t) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x_t
    beta~_t = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    to_z_0 = sqrt(alpha_bar_prev) * beta_t / (1 - alpha_bar_t)
    to_x_t = sqrt(alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return to_z_0 * z_0 + to_x_t * x_t, beta_t, (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t


# ----------------------------------------------------------------------------------------------------------------------
# The algorithms


@sampler(noise="eta")
def ddim(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """DDIM, equation 12 (Song et al., arXiv 2010.02502)."""
    for t, alpha_bar_t, alpha_bar_prev in grid:
        # sigma_t = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)   (16)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        sigma_t = eta * sqrt(variance)
        x_t, z_0 = ddim_step(x_t, evaluate(eps, x_t, t), alpha_bar_t, alpha_bar_prev, sigma_t)
        if eta > 0:
            x_t = x_t + sigma_t * draw()
        yield x_t, z_0


@sampler(noise="always")
def ddpm(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """DDPM, equations 6 and 7 (Ho et al., arXiv 2006.11239): draws from q(x_prev | x_t, z_0), its betas respaced.

    The last step arrives at alpha_bar = 1, where the variance is 0: it returns its estimate of z_0.
    """
    for t, alpha_bar_t, alpha_bar_prev in clean_end(grid):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        mean, _, beta_tilde_t = posterior(z_0, x_t, alpha_bar_t, alpha_bar_prev)
        x_t = mean + sqrt(beta_tilde_t) * draw()
        yield x_t, z_0


@sampler(noise="never")
def euler(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """Euler's method in sigma = sqrt((1 - alpha_bar) / alpha_bar), algorithm 1 without churn (Karras et al.,
    arXiv 2206.00364): the steps of DDIM at eta = 0, under the name that other tools have for them.

    (x / sqrt(alpha_bar))_prev = (x / sqrt(alpha_bar))_t + (sigma_prev - sigma_t) eps_t
    """
    return ddim.algorithm(eps, x_t, grid, draw, 0.0)


@sampler(noise="always")
def euler_ancestral(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """Euler's step to sigma_down, then noise of sigma_up, as k-diffusion's: the steps of DDIM at eta = 1 to the end.

    sigma_up^2 = sigma_prev^2 (sigma_t^2 - sigma_prev^2) / sigma_t^2, sigma_down^2 = sigma_prev^2 - sigma_up^2
    """
    return ddim.algorithm(eps, x_t, clean_end(grid), draw, 1.0)
