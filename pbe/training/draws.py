"""A training step's random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe.data.example import EncodedExample, Example
from pbe.models.vae import VAEConfig
from pbe.sampling import randn


class NoiseDraws(NamedTuple):
    """The random numbers of one step. Each sample's follow from its own seed: not from its batch or its process.

    With K draws per sample, the first of all samples come first, then the second of all, and so on.
    """

    t: Tensor  # (K B,) long, 0 <= t < T
    noise: Tensor  # (K B, 4, h, w)
    posterior_noise: Tensor  # (B, 2, 4, h, w), for the latents of the image and of the masked image
    drop: Tensor  # (K B,) uniform in [0, 1): below the probability, the exemplar is dropped
    detail: Tensor  # (K B, 1 + D) as `drop`, of a detail adapter's tokens: of all, and of each; (K B, 0) without


class TrainingBatch(NamedTuple):
    """Examples and what was drawn for them."""

    example: Example | EncodedExample
    draws: NoiseDraws

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on a device; a CUDA device copies while the CPU goes on."""
        non_blocking = torch.device(device).type == "cuda"

        def moved(part: Any) -> Any:
            return part._make(x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x for x in part)

        return TrainingBatch(moved(self.example), moved(self.draws))


def add_noise_draws(
    example: Example | EncodedExample,
    vae: VAEConfig,
    num_timesteps: int = 1000,
    count: int = 1,
    detail_tokens: int = 0,
) -> TrainingBatch:
    """A batch of examples, on the CPU, with `count` noise draws per sample, which follow from the examples' seeds."""
    seeds = example.seed.tolist()
    noisy = example.noisy.expand(len(seeds)).tolist()
    if isinstance(example, EncodedExample):
        shape = example.posteriors.shape[-3:]
    else:
        shape = torch.Size(latent_shape(example.image, vae))
    return TrainingBatch(example, make_noise_draws(seeds, shape, num_timesteps, count, noisy, detail_tokens))


def latent_shape(image: Tensor, vae: VAEConfig) -> tuple[int, int, int]:
    """The shape (4, h, w) of one latent of images (B, 3, H, W)."""
    H, W = image.shape[-2:]
    return vae.latent_channels, -(-H // vae.downsampling), -(-W // vae.downsampling)


def make_noise_draws(
    seeds: Sequence[int],
    latent_shape: Sequence[int],
    num_timesteps: int,
    count: int = 1,
    noisy: Sequence[float] = (),
    detail_tokens: int = 0,
) -> NoiseDraws:
    """`count` draws for each of the samples with these seeds, on the CPU; `latent_shape` is (4, h, w).

    A sample's first draw is the same whatever `count` is; the timesteps of the others are T / count apart from it and
    from each other, modulo T, so that together they cover all T evenly (Kingma et al. 2021, arXiv 2107.00630, I.1).
    With the probability `noisy` of its own, a sample's timesteps are those of the noisier half, T / 2 to T, instead.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drop = [torch.cat([torch.rand(1, generator=g) for g in generators])]
    t = torch.cat([torch.randint(num_timesteps, (1,), generator=g) for g in generators])
    noise = [randn(latent_shape, generators)]
    posterior_noise = randn((2, *latent_shape), generators)
    for _ in range(count - 1):
        drop.append(torch.cat([torch.rand(1, generator=g) for g in generators]))
        noise.append(randn(latent_shape, generators))
    shifts = torch.tensor([k * num_timesteps // count for k in range(count)])
    t = (t + shifts[:, None]) % num_timesteps  # (K, B)
    for i, probability in enumerate(noisy):
        if probability and torch.rand((), generator=generators[i]) < probability:
            t[:, i] = (t[:, i] + num_timesteps) // 2
    # last of all, so that the others are the same without them
    detail = [torch.rand(count, 1 + detail_tokens if detail_tokens else 0, generator=g) for g in generators]
    return NoiseDraws(
        drop=torch.cat(drop),
        t=t.flatten(),
        noise=torch.cat(noise),
        posterior_noise=posterior_noise,
        detail=torch.stack(detail, dim=1).flatten(0, 1),
    )
