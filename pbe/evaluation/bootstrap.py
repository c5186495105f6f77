"""Gaussian statistics of features, the Fréchet distance between them, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (C,) and unbiased covariance (C, C) of `count` feature vectors, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (N, C)."""
        features = features.double()
        total = features.sum(dim=0)
        return cls.from_sums(total, features.T @ features, len(features))

    @classmethod
    def from_sums(cls, total: Tensor, outer: Tensor, count: int) -> Moments:
        """From the sum (C,) of x and the sum (C, C) of x xᵀ. ValueError for fewer than two vectors."""
        if count < 2:
            raise ValueError(f"a covariance needs two feature vectors or more, got {count}")
        mean = total / count
        return cls(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root (C, C) of the covariance; eigenvalues below 0 are rounding errors of 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments, quick: bool = False) -> Tensor:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    The root's trace is the sum of the singular values of Σ_a^½ Σ_b^½: the product's own square root loses half of the
    digits where a covariance is singular, as it is for fewer pictures than features. `quick` loses them too, and
    does without b's root.
    """
    if quick:
        trace_of_root = torch.linalg.eigvalsh(a.root @ b.covariance @ a.root).clamp(min=0).sqrt().sum()
    else:
        trace_of_root = torch.linalg.svdvals(a.root @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return distance.clamp(min=0)


# --- bootstrap --------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A value with its bootstrap interval: float64 tensors without dimensions."""

    value: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of `level` from `resamples` draws with replacement, by a generator seeded with `seed`."""

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be 1 or more, got {self.resamples}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be between 0 and 1, got {self.level:g}")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def draws(self, statistic: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
        """`statistic` of each draw of len(samples) rows: float64 (resamples,)."""
        generator, found = self.generator(), []
        for _ in range(self.resamples):
            chosen = torch.randint(len(samples), (len(samples),), generator=generator)
            found.append(statistic(samples[chosen.to(samples.device)]))
        return torch.stack(found).double()

    def interval(self, value: Tensor, draws: Tensor, centred: bool = False) -> Interval:
        """The middle `level` of the draws as an interval around `value`.

        `centred` moves the draws so that their mean is the value: for statistics such as FID, which resampling itself
        makes larger.
        """
        tails = torch.tensor([(1 - self.level) / 2, (1 + self.level) / 2], dtype=torch.float64, device=draws.device)
        low, high = torch.quantile(draws + (value - draws.mean() if centred else 0), tails)
        return Interval(value, low, high)
