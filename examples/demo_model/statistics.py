"""Means and ratios over cases, with their bootstrap's standard error and 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pbe.evaluation.bootstrap import Bootstrap

BOOTSTRAP = Bootstrap(resamples=2000)


@dataclass(frozen=True)
class Statistic:
    """A value over `n` independent cases, and its spread."""

    value: float
    standard_error: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.2g}"


def mean(values: Sequence[float] | np.ndarray) -> Statistic:
    """The mean of (N,) values, one per case; ValueError for fewer than two."""
    return ratio(values, np.ones(len(values)))


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Statistic:
    """The ratio of two means, of (N,) values each: steadier than a mean of ratios where a denominator is near 0.

    Cases are resampled with both of their values, always in the same way. ValueError for fewer than two cases, values
    that are not finite, or a mean denominator of 0.
    """
    a, b = (torch.as_tensor(np.asarray(values, dtype=np.float64)) for values in (numerators, denominators))
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"a statistic needs one value per case and at least 2 cases, got shapes {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if wrong := [x for x in [*a.tolist(), *b.tolist()] if not math.isfinite(x)]:
        raise ValueError(f"a statistic needs finite values, got {wrong[0]}")
    if b.sum() == 0:
        raise ValueError("the denominators of a ratio are 0 on average")
    numerator, denominator = (resampled_counts(len(a)) @ torch.stack([a, b], dim=1)).unbind(dim=1)  # (R,)
    again = (numerator / denominator)[denominator != 0]
    value, low, high = BOOTSTRAP.interval(a.sum() / b.sum(), again)
    return Statistic(value.item(), again.std().item(), low.item(), high.item(), len(a))


@cache
def resampled_counts(n: int) -> Tensor:
    """How often each resample of the bootstrap has each of n cases: float64 (resamples, n)."""
    return BOOTSTRAP.draws(lambda drawn: torch.bincount(drawn, minlength=n), torch.arange(n))
