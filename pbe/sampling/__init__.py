"""Sampling: functions over eps(x_t, t) that know no network.

grid = trailing(NoiseSchedule.scaled_linear(), steps=20)
z_0 = dpm_solver(guided_eps(model, condition, 5.0, grid), x_T, grid)
"""

from pbe.sampling.guidance import guided_eps
from pbe.sampling.noise import make_generators, randn
from pbe.sampling.samplers import (
    SAMPLERS,
    Callback,
    Eps,
    Sampler,
    StepInfo,
    ddim,
    ddpm,
    dpm_solver,
    get_sampler,
    plms,
    sampler,
)
from pbe.sampling.schedule import Grid, NoiseSchedule, Step
from pbe.sampling.spacing import SPACINGS, Spacing, get_spacing, leading, trailing

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Callback",
    "Eps",
    "Grid",
    "NoiseSchedule",
    "Sampler",
    "Spacing",
    "Step",
    "StepInfo",
    "ddim",
    "ddpm",
    "dpm_solver",
    "get_sampler",
    "get_spacing",
    "guided_eps",
    "leading",
    "make_generators",
    "plms",
    "randn",
    "sampler",
    "trailing",
]
