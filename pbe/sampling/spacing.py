"""Spacings: which of a schedule's timesteps the steps of a sampler start from."""

from __future__ import annotations

from numbers import Integral
from typing import Protocol

from pbe.sampling.schedule import NoiseSchedule, Step


class Spacing(Protocol):
    """Makes the grid of `steps` steps, from 1 to the schedule's T; a ValueError for another number."""

    def __call__(self, schedule: NoiseSchedule, steps: int) -> list[Step]: ...


def leading(schedule: NoiseSchedule, steps: int) -> list[Step]:
    """arange(S) * (T // S) + 1, reversed: the original's timesteps wherever S divides T.

    For S = T, where the offset would leave the table, arange(T) reversed. With few steps the first timestep lies well
    below T - 1, although sampling starts from pure noise.
    """
    T = check_steps(schedule, steps)
    offset = 0 if steps == T else 1
    return schedule.grid([i * (T // steps) + offset for i in reversed(range(steps))])


def trailing(schedule: NoiseSchedule, steps: int) -> list[Step]:
    """round(T - i T / S) - 1 for i = 0, ..., S - 1: always from T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    T = check_steps(schedule, steps)
    return schedule.grid([(2 * T * (steps - i) + steps) // (2 * steps) - 1 for i in range(steps)])


SPACINGS: dict[str, Spacing] = {"leading": leading, "trailing": trailing}


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
