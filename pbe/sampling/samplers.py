"""Samplers: from noise to a sample, by a network's prediction eps(x_t, t) along a grid of steps.

An algorithm is a generator that takes the steps; `sampler` gives it the contract that all share, `Sampler`. Symbols are
DDIM's (arXiv 2010.02502) with DDPM's bar: x_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import expm1, log, sqrt
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
            with_eta = " or ".join(repr(name) for name, other in SAMPLERS.items() if other.noise == "eta")
            raise ValueError(f"eta={eta} is for the sampler {with_eta}, not {self.__name__!r}")


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
def dpm_solver(eps: Eps, x_t: Tensor, grid: Grid, draw: Draw, eta: float) -> States:
    """DPM-Solver++(2M), algorithm 2 (Lu et al., arXiv 2211.01095): a second-order multistep method on z_0.

    The first step is of first order, and below 15 steps the last one too, where extrapolating over the long last
    step is unstable.
    """
    last: tuple[Tensor, float] | None = None  # z_0 and lambda of the step before
    for index, (t, alpha_bar_t, alpha_bar_prev) in enumerate(grid):
        z_0 = predict_z_0(x_t, evaluate(eps, x_t, t), alpha_bar_t)
        lambda_t = half_log_snr(alpha_bar_t)
        h = half_log_snr(alpha_bar_prev) - lambda_t
        # D = (1 + 1 / 2r) z_0 - 1 / 2r z_0_last, with r = h_last / h
        D = z_0
        if last is not None and not (index == len(grid) - 1 and len(grid) < 15):
            z_0_last, lambda_last = last
            h_last = lambda_t - lambda_last
            D = z_0 + h / (2 * h_last) * (z_0 - z_0_last)
        # x_prev = sigma_prev / sigma_t x_t - alpha_prev (exp(-h) - 1) D
        to_x_t = sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        x_t = to_x_t * x_t - sqrt(alpha_bar_prev) * expm1(-h) * D
        last = z_0, lambda_t
        yield x_t, z_0


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), the time in which the solver steps."""
    return 0.5 * log(alpha_bar / (1 - alpha_bar))


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "plms": plms, "ddpm": ddpm, "dpm_solver": dpm_solver}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`; a ValueError that lists the choices if there is none."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
