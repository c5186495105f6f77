"""The noise schedule, and the grids of steps through it that samplers take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One step of a sampler, as Python numbers: read without waiting for a device."""

    t: int  # the timestep that it starts from
    alpha_bar_t: float
    alpha_bar_prev: float  # of the timestep that it arrives at


Grid = Sequence[Step]  # noisiest first; made by a spacing function, see `pbe.sampling.spacing`


class ScheduleGrid(list[Step]):
    """A grid with the schedule that it goes through, for samplers that need levels between the steps."""

    def __init__(self, steps: Iterable[Step], schedule: NoiseSchedule):
        super().__init__(steps)
        self.schedule = schedule

    def last(self, steps: int) -> ScheduleGrid:
        """The grid's last `steps`; ValueError if it has fewer, or for none."""
        if not 1 <= steps <= len(self):
            raise ValueError(f"of {len(self)} steps from 1 to {len(self)} can be taken, got {steps}")
        return ScheduleGrid(self[len(self) - steps :], self.schedule)

    def start_from(self, z_0: Tensor | None, noise: Tensor) -> Tensor:
        """The state from which the steps lead back to pictures like z_0, of the standard normal `noise`'s shape: z_0
        with as much of the noise as the first step is for (SDEdit, Meng et al., arXiv 2108.01073, section 3).

        x_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) noise; without z_0 it is the noise.
        """
        if z_0 is None:
            return noise
        alpha_bar_t = self[0].alpha_bar_t  # a spacing's level may lie between the schedule's
        return sqrt(alpha_bar_t) * z_0.to(noise) + sqrt(1 - alpha_bar_t) * noise


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s) of a discrete diffusion with T timesteps, 0 being the least noisy.

    The table stays float64 on the CPU whatever the device of the samples: samplers read Python floats from it,
    which costs no device synchronisation and works where float64 does not exist.

    Raises:
        ValueError: if alpha_bar is not a float64 CPU vector that falls strictly inside (0, 1).
    """

    alpha_bar: Tensor  # (T,)

    def __post_init__(self) -> None:
        a = self.alpha_bar
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
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """The schedule of the variances beta_t, a (T,) vector of values in (0, 1)."""
        return cls(torch.cumprod(1 - betas.to("cpu", torch.float64), dim=0))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Stable Diffusion's and Paint by Example's schedule: sqrt(beta_t) is linear in t (arXiv 2112.10752)."""
        return cls.from_betas(linspace(sqrt(beta_start), sqrt(beta_end), num_timesteps) ** 2)

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """DDPM's and guided diffusion's schedule: beta_t is linear in t (arXiv 2006.11239, section 4)."""
        return cls.from_betas(linspace(beta_start, beta_end, num_timesteps))

    def first(self, num_timesteps: int) -> NoiseSchedule:
        """That of the first, least noisy timesteps, for a process that begins at the last of them.

        Raises:
            ValueError: for a number that is not from 1 to T.
        """
        if not 1 <= num_timesteps <= self.num_timesteps:
            raise ValueError(f"num_timesteps must be from 1 to {self.num_timesteps}, got {num_timesteps}")
        return self if num_timesteps == self.num_timesteps else NoiseSchedule(self.alpha_bar[:num_timesteps])

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.alpha_bar.numel()

    def grid(self, timesteps: Sequence[int]) -> ScheduleGrid:
        """The steps from each of `timesteps` to the next; the last one arrives at alpha_bar[0], as in the original.

        Raises:
            ValueError: unless there are timesteps that fall strictly, each from 0 to T - 1.
        """
        last = self.num_timesteps - 1
        falls = all(a > b for a, b in pairwise(timesteps))
        if not (timesteps and falls and timesteps[0] <= last and timesteps[-1] >= 0):
            raise ValueError(f"timesteps must fall strictly, each from {last} to 0, got {list(timesteps)}")
        alpha_bar = self.alpha_bar[list(timesteps)].tolist()
        ends = [*alpha_bar[1:], self.alpha_bar[0].item()]
        steps = (Step(int(t), *levels) for t, *levels in zip(timesteps, alpha_bar, ends, strict=True))
        return ScheduleGrid(steps, self)

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


def linspace(start: float, end: float, num: int) -> Tensor:
    if num < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num}")
    return torch.linspace(start, end, num, dtype=torch.float64, device="cpu")
