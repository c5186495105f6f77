"""One training example, batches of them, and the numbers that make each one reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

_64_BITS = (1 << 64) - 1


class Example(NamedTuple):
    """A photo with a region to repaint and the exemplar to repaint it as; in a batch each tensor has B in front.

    image: (3, H, W) float32 in [-1, 1], what the edit should give. masked_image: (3, H, W), the source photo times
    the mask. mask: (1, H, W) in {0, 1}, 1 = keep. exemplar: (3, S, S), CLIP-normalised. seed: int64 (), for the
    draws of the training step (timestep, noise, posterior, dropped exemplar). file: for messages; a list in a batch.
    """

    image: Tensor
    masked_image: Tensor
    mask: Tensor
    exemplar: Tensor
    seed: Tensor
    file: str | list[str]


def collate(examples: Sequence[Example]) -> Example:
    """A batch of examples: tensors stacked, files in a list."""
    batch = default_collate(list(examples))
    return batch._replace(file=list(batch.file))


def hash64(*values: int) -> int:
    """A well-mixed number in [0, 2^64) of some integers in their order: the same everywhere and always.

    Each is added to the state of SplitMix64 (Steele, Lea and Flood 2014), which then takes a step.
    """
    h = 0
    for value in values:
        h = ((h ^ (value & _64_BITS)) + 0x9E3779B97F4A7C15) & _64_BITS
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _64_BITS
        h ^= h >> 31
    return h


def make_generator(*values: int) -> torch.Generator:
    """A generator seeded by `hash64` of some integers."""
    return torch.Generator().manual_seed(hash64(*values))


def draw_integers(high: Sequence[int], generator: torch.Generator) -> list[int]:
    """One integer each from 0 to `high[i]`, both included, uniformly."""
    # Drawn together: a call into torch for each would take longer than the arithmetic.
    u = torch.rand(len(high), generator=generator, dtype=torch.float64).tolist()
    return [int(share * (n + 1)) for share, n in zip(u, high, strict=True)]


def draw_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number from [low, high), uniformly."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def happens(probability: float, generator: torch.Generator) -> bool:
    """True with this probability."""
    return draw_uniform(0, 1, generator) < probability
