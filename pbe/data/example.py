"""One training example, batches of them, and the random numbers that make each one reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.data import default_collate

NEVER = torch.zeros(())
GRAY = torch.zeros(1, 1, 1)
_64_BITS = (1 << 64) - 1


class Example(NamedTuple):
    """A photo with a region to repaint and the exemplar to repaint it as; in a batch each tensor has B in front."""

    image: Tensor  # (3, H, W) float32 in [-1, 1], what the edit should give
    source: Tensor  # (3, H, W), the photo to edit; the same tensor as `image` unless there is a target picture
    mask: Tensor  # (1, H, W) in {0, 1}, 1 = keep
    exemplar: Tensor  # (3, S, S), CLIP-normalised
    seed: Tensor  # int64 (), of the training step's draws (timestep, noise, posterior, dropped exemplar)
    file: str | list[str]  # for messages; a list in a batch
    noisy: Tensor = NEVER  # float32 (), see `Record.noisy`
    hole: Tensor = GRAY  # (3, H, W) in [-1, 1], or (1, 1, 1): what is shown where the source is repainted

    @property
    def masked_image(self) -> Tensor:
        """What is kept of the source, (3, H, W) in [-1, 1], and the hole where it is repainted.

        Computed and not stored: it need not travel from worker processes and to the device.
        """
        return self.source * self.mask + self.hole


class EncodedExample(NamedTuple):
    """An `Example` whose pictures an autoencoder has encoded; in a batch each tensor has B in front."""

    posteriors: Tensor  # (2, 2, z, h, w) float32: of the image and of the masked image, mean and standard deviation
    mask: Tensor  # (1, h, w), 1 = keep, at latent size
    exemplar: Tensor
    seed: Tensor
    file: str | list[str]
    noisy: Tensor = NEVER


@overload
def collate(examples: Sequence[Example]) -> Example: ...
@overload
def collate(examples: Sequence[EncodedExample]) -> EncodedExample: ...
def collate(examples: Sequence[Example] | Sequence[EncodedExample]) -> Example | EncodedExample:
    """A batch of examples: tensors stacked, files in a list; image and source are one tensor if they are in each."""
    if isinstance(examples[0], EncodedExample):
        *tensors, files, noisy = map(list, zip(*examples, strict=True))
        return EncodedExample._make([*map(default_collate, tensors), files, default_collate(noisy)])
    images, sources, masks, exemplars, seeds, files, *last = map(list, zip(*examples, strict=True))
    image = default_collate(images)
    shared = all(a is b for a, b in zip(images, sources, strict=True))
    source = image if shared else default_collate(sources)
    others = map(default_collate, (masks, exemplars, seeds))
    return Example._make([image, source, *others, files, *map(default_collate, last)])


def hash64(*values: int) -> int:
    """A well-mixed number in [0, 2^64) from a sequence of integers: the same on every machine and in every version.

    Each is XORed into the state of SplitMix64 (Steele, Lea and Flood 2014), which then takes a step.
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


def draw_bernoulli(probability: float, generator: torch.Generator) -> bool:
    """True with this probability."""
    return draw_uniform(0, 1, generator) < probability
