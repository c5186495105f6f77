"""Samplers: functions over eps(x_t, t) with one contract, which know no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pbe.sampling.ddim import ddim
from pbe.sampling.ddpm import ddpm
from pbe.sampling.dpm_solver import dpm_solver
from pbe.sampling.guidance import guided_eps
from pbe.sampling.noise import make_generators, randn
from pbe.sampling.plms import plms
from pbe.sampling.schedule import Callback, Eps, NoiseSchedule, StepInfo

__all__ = [
    "SAMPLERS",
    "Callback",
    "Eps",
    "NoiseSchedule",
    "Sampler",
    "StepInfo",
    "ddim",
    "ddpm",
    "dpm_solver",
    "get_sampler",
    "guided_eps",
    "make_generators",
    "plms",
    "randn",
]


class Sampler(Protocol):
    """The contract: from noise x_T (B, ...) to a sample of its shape, dtype and device, without gradients.

    Args:
        eps: the prediction of the noise, eps(x_t, t) with t (B,) long on x_T's device.
        x_T: standard normal noise; the state stays in its dtype, so float32 is wise whatever the network's.
        schedule: the schedule that eps was trained with.
        steps: how many steps to take, from 1 to the schedule's T: exactly as many as callbacks.
        generators: one a sample, for the samplers that draw noise; the others ignore them.
        callback: called with a StepInfo after each step; an exception it raises ends the sampling.
    """

    def __call__(
        self,
        eps: Eps,
        x_T: Tensor,
        schedule: NoiseSchedule,
        steps: int,
        *,
        generators: Sequence[torch.Generator] | None = None,
        callback: Callback | None = None,
    ) -> Tensor: ...


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "plms": plms, "ddpm": ddpm, "dpm_solver": dpm_solver}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`; a ValueError that lists the choices if there is none."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
