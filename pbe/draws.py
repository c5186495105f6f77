"""A training step's random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pbe.data.example import Example
from pbe.sampling import randn


class Draws(NamedTuple):
    """The random numbers of one step. Each sample's follow from its own seed: not from its batch or its process."""

    t: Tensor  # (B,) long, 0 <= t < T
    noise: Tensor  # (B, 4, h, w)
    posterior_noise: Tensor  # (B, 2, 4, h, w), for the latents of the image and of the masked image
    drop: Tensor  # (B,) uniform in [0, 1): below the probability, the exemplar is dropped


class Batch(NamedTuple):
    """Examples and what was drawn for them."""

    example: Example
    draws: Draws


def make_draws(seeds: Sequence[int], latent_shape: Sequence[int], num_timesteps: int) -> Draws:
    """The draws of the samples with these seeds, on the CPU; `latent_shape` is (4, h, w)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return Draws(
        drop=torch.cat([torch.rand(1, generator=g) for g in generators]),
        t=torch.cat([torch.randint(num_timesteps, (1,), generator=g) for g in generators]),
        noise=randn(latent_shape, generators),
        posterior_noise=randn((2, *latent_shape), generators),
    )
