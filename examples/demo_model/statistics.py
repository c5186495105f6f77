"""Means and ratios of a sample with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its spread over `n` independent cases: standard error and 95 % interval of the bootstrap."""

    value: float
    standard_error: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.2g}"


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of (N,) values, one a case; ValueError for fewer than two."""
    return ratio(values, np.ones(len(values)))


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Estimate:
    """The ratio of two means, of (N,) values each: steadier than a mean of ratios where a denominator is near 0.

    Cases are drawn again with both of their values (the percentile bootstrap), always in the same way. ValueError for
    fewer than two cases, values that are not finite, or a mean denominator of 0.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"a figure needs one value a case and at least 2 cases, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a figure cannot be made of values that are not finite")
    if b.sum() == 0:
        raise ValueError("the denominators of a ratio are 0 on average")
    drawn = np.random.default_rng(0).multinomial(len(a), np.full(len(a), 1 / len(a)), size=RESAMPLES)  # (R, N) counts
    below = drawn @ b
    again = (drawn @ a)[below != 0] / below[below != 0]
    low, high = np.quantile(again, [0.025, 0.975])
    return Estimate(float(a.sum() / b.sum()), float(again.std(ddof=1)), float(low), float(high), len(a))
