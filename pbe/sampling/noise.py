"""Noise that depends on a sample's seed alone: not on its batch, nor on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator per sample, seeded `seed`, `seed + 1`, …, so that each sample can be made again by itself."""
    if n < 1:
        raise ValueError(f"n must be at least 1, one generator per sample, got {n}")
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(n)]


def randn(
    shape_of_one: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (len(generators), *shape_of_one), sample i drawn from generator i.

    It is drawn in float32 on the CPU, then moved and cast: a seed gives the same noise on every device.
    """
    noise = [torch.randn(*shape_of_one, generator=g, device="cpu", dtype=torch.float32) for g in generators]
    return torch.stack(noise).to(device=device, dtype=dtype)


def check_generators(generators: Sequence[torch.Generator] | None, batch: int, sampler: str) -> None:
    """Raises a ValueError unless there is one generator for each of the `batch` samples."""
    if generators is None or len(generators) != batch:
        given = "none" if generators is None else len(generators)
        raise ValueError(
            f"{sampler} draws noise: it needs one generator per sample ({batch}), got {given}; "
            f"make_generators(seed, {batch}) makes them"
        )
