"""The noise schedule, and the few things every sampler shares.

Notation of DDIM (arXiv 2010.02502) with DDPM's bar: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Eps = Callable[[Tensor, Tensor], Tensor]  # eps(x_t, t) with t (B,) long, on x_t's device


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s) of a discrete diffusion with T timesteps, 0 being the least noisy.

    `spacing` says which timesteps a sampler visits, see `timesteps`.

    The table stays float64 on the CPU whatever the device of the samples: samplers read Python floats from it,
    which costs no device synchronisation and works where float64 does not exist.

    Raises:
        ValueError: if alpha_bar is not a float64 CPU vector that falls strictly inside (0, 1).
    """

    alpha_bar: Tensor  # (T,)
    spacing: Literal["leading", "trailing"] = "leading"

    def __post_init__(self) -> None:
        a = self.alpha_bar
        if self.spacing not in ("leading", "trailing"):
            raise ValueError(f"spacing must be leading or trailing, got {self.spacing!r}")
        if a.ndim != 1 or a.numel() == 0 or a.dtype != torch.float64 or a.device.type != "cpu":
            raise ValueError(
                "alpha_bar must be a non-empty float64 vector on the CPU, "
                f"got shape {tuple(a.shape)}, {a.dtype} on {a.device}"
            )
        # `not all` rather than `any`, so that NaN is refused too
        if not (bool(((a > 0) & (a < 1)).all()) and bool((a[1:] < a[:-1]).all())):
            raise ValueError(
                "alpha_bar must decrease strictly and lie strictly between 0 and 1, "
                f"got {a[0].item():.6g} … {a[-1].item():.6g}"
            )

    @classmethod
    def from_betas(cls, betas: Tensor, spacing: Literal["leading", "trailing"] = "leading") -> NoiseSchedule:
        """The schedule of the variances beta_t, a (T,) vector of values in (0, 1)."""
        return cls(torch.cumprod(1 - betas.to("cpu", torch.float64), dim=0), spacing)

    @classmethod
    def scaled_linear(
        cls,
        num_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        spacing: Literal["leading", "trailing"] = "leading",
    ) -> NoiseSchedule:
        """Stable Diffusion's and Paint by Example's schedule: sqrt(beta_t) is linear in t (arXiv 2112.10752)."""
        return cls.from_betas(_linspace(sqrt(beta_start), sqrt(beta_end), num_timesteps) ** 2, spacing)

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """DDPM's and guided diffusion's schedule: beta_t is linear in t (arXiv 2006.11239, section 4)."""
        return cls.from_betas(_linspace(beta_start, beta_end, num_timesteps))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alpha_bar.numel()

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps a sampler visits, noisiest first: exactly `steps` of them, evenly spaced.

        "leading": arange(S) * (T // S) + 1 reversed, the original's for every S that divides T. For S = T, where the
        offset would leave the table, they are arange(T) reversed. With few steps the first of them lies well below
        T - 1, although sampling starts from pure noise. "trailing": round(T - i T / S) - 1 for i = 0, ..., S - 1, which
        always starts at T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2).

        Raises:
            ValueError: if `steps` is not an integer from 1 to T.
        """
        T = self.num_timesteps
        if not isinstance(steps, Integral) or not 1 <= steps <= T:
            raise ValueError(f"steps must be an integer from 1 to {T}, got {steps!r}")
        if self.spacing == "trailing":
            return [(2 * T * (steps - i) + steps) // (2 * steps) - 1 for i in range(int(steps))]
        offset = 0 if steps == T else 1
        return [i * int(T // steps) + offset for i in reversed(range(steps))]

    def grid(self, steps: int, alpha_bar_end: float | None = None) -> list[tuple[int, float, float]]:
        """One (t, alpha_bar_t, alpha_bar_prev) for each step, noisiest first, as Python numbers.

        alpha_bar_prev belongs to the timestep that the step arrives at; the last step arrives at `alpha_bar_end`,
        by default alpha_bar[0] as in the original.
        """
        timesteps = self.timesteps(steps)
        alpha_bar = self.alpha_bar[timesteps].tolist()
        end = self.alpha_bar[0].item() if alpha_bar_end is None else alpha_bar_end
        return list(zip(timesteps, alpha_bar, [*alpha_bar[1:], end], strict=True))

    def add_noise(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t ~ q(z_t | z_0), the forward process: sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) noise.

        Args:
            z_0: (B, ...) clean latents.
            noise: standard normal, shaped as z_0.
            t: (B,) long, 0 <= t < T, on z_0's device.

        Raises:
            ValueError: if noise or t does not have the shape above.
        """
        if noise.shape != z_0.shape:
            raise ValueError(f"noise must be shaped as z_0 {tuple(z_0.shape)}, got {tuple(noise.shape)}")
        if t.shape != z_0.shape[:1]:
            raise ValueError(f"t must have shape ({z_0.shape[0]},), one timestep a sample, got {tuple(t.shape)}")
        # the table moves to t, not t to the table, and CUDA's is not waited for (MPS might copy what is freed by then):
        # a CPU that waits for the device starts the network's work late
        alpha, sigma = (
            table.float().to(z_0.device, non_blocking=z_0.is_cuda)[t].to(z_0.dtype).view(-1, *[1] * (z_0.ndim - 1))
            for table in (self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        )  # (B, 1, ...)
        return alpha * z_0 + sigma * noise


class StepInfo(NamedTuple):
    """What a sampler reports after each step."""

    index: int  # 0 for the first step
    steps: int
    t: int  # the timestep the step started from
    x_t: Tensor  # after the step
    z_0: Tensor  # the estimate of the clean sample that the step was made with


Callback = Callable[[StepInfo], None]


def evaluate(eps: Eps, x_t: Tensor, t: int) -> Tensor:
    """eps(x_t, t) with every sample at timestep `t`, in x_t's dtype whatever the network computes in."""
    return eps(x_t, torch.full((x_t.shape[0],), t, device=x_t.device, dtype=torch.long)).to(x_t.dtype)


def predict_z_0(x_t: Tensor, eps_t: Tensor, alpha_bar_t: float) -> Tensor:
    """The clean sample that `eps_t` implies: (x_t - sqrt(1 - alpha_bar_t) eps_t) / sqrt(alpha_bar_t)."""
    return (x_t - sqrt(1 - alpha_bar_t) * eps_t) / sqrt(alpha_bar_t)


def _linspace(start: float, end: float, num: int) -> Tensor:
    if num < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num}")
    return torch.linspace(start, end, num, dtype=torch.float64, device="cpu")
