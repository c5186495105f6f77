"""Spacings: which of a schedule's timesteps the steps of a sampler start from."""

from __future__ import annotations

from numbers import Integral
from typing import Protocol

import numpy as np

from pbe.sampling.schedule import NoiseSchedule, ScheduleGrid, Step

DISTILLED_TIMESTEPS = 50  # of the spacing lcm: as many as consistency models are trained at


class Spacing(Protocol):
    """Makes the grid of `steps` steps, from 1 to the schedule's T; a ValueError for another number."""

    def __call__(self, schedule: NoiseSchedule, steps: int) -> ScheduleGrid: ...


def leading(schedule: NoiseSchedule, steps: int) -> ScheduleGrid:
    """arange(S) * (T // S) + 1, reversed: the original's timesteps wherever S divides T.

    For S = T, where the offset would leave the table, arange(T) reversed. With few steps the first timestep lies well
    below T - 1, although sampling starts from pure noise.
    """
    T = check_steps(schedule, steps)
    offset = 0 if steps == T else 1
    return schedule.grid([i * (T // steps) + offset for i in reversed(range(steps))])


def trailing(schedule: NoiseSchedule, steps: int) -> ScheduleGrid:
    """round(T - i T / S) - 1 for i = 0, ..., S - 1: always from T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    T = check_steps(schedule, steps)
    return schedule.grid([(2 * T * (steps - i) + steps) // (2 * steps) - 1 for i in range(steps)])


def karras(schedule: NoiseSchedule, steps: int) -> ScheduleGrid:
    """sigma evenly spaced in its seventh root over all of the schedule, then 0 (Karras et al., arXiv 2206.00364,
    equation 5, rho = 7): most steps at little noise.

    These levels lie between those of the timesteps; the network, trained at whole ones, is asked at the nearest by
    log sigma, more than once where many steps fall on one.
    """
    T = check_steps(schedule, steps)
    sigmas = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt().numpy()
    levels = np.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps) ** 7
    timesteps = np.interp(np.log(levels), np.log(sigmas), np.arange(T)).round().astype(int).tolist()
    alpha_bar = (1 / (1 + levels**2)).tolist()
    return ScheduleGrid(map(Step, timesteps, alpha_bar, [*alpha_bar[1:], 1.0]), schedule)


def lcm(schedule: NoiseSchedule, steps: int) -> ScheduleGrid:
    """`steps` of the 50 timesteps k - 1, 2k - 1, …, T - 1 of consistency distillation, k = T // 50, from the noisiest
    (Luo et al., arXiv 2310.04378, section 4.3)."""
    T = check_steps(schedule, steps)
    if steps > DISTILLED_TIMESTEPS:
        raise ValueError(f"the spacing 'lcm' has {DISTILLED_TIMESTEPS} timesteps, got steps={steps}")
    k, skip = T // DISTILLED_TIMESTEPS, DISTILLED_TIMESTEPS
    return schedule.grid([k * (skip - i * skip // steps) - 1 for i in range(steps)])


SPACINGS: dict[str, Spacing] = {"leading": leading, "trailing": trailing, "karras": karras, "lcm": lcm}


def get_spacing(name: str) -> Spacing:
    """The spacing called `name`; a ValueError that lists the choices if there is none."""
    if name not in SPACINGS:
        raise ValueError(f"unknown spacing {name!r}, choose one of {', '.join(SPACINGS)}")
    return SPACINGS[name]


def check_steps(schedule: NoiseSchedule, steps: int) -> int:
    """The schedule's T, if `steps` is an integer from 1 to T; else a ValueError."""
    T = schedule.num_timesteps
    if not isinstance(steps, Integral) or not 1 <= steps <= T:
        raise ValueError(f"steps must be an integer from 1 to {T}, got {steps!r}")
    return T
