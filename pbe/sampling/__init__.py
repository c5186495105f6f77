"""Sampling: functions over eps(x_t, t) that know no network.

grid = trailing(NoiseSchedule.scaled_linear(), steps=20)
z_0 = dpm_solver(guided_eps(model, condition, 5.0, grid), x_T, grid)
"""

from pbe.sampling.consistency import lcm, tcd
from pbe.sampling.guidance import guided_eps
from pbe.sampling.multistep import dpm_solver, plms, unipc
from pbe.sampling.noise import make_generators, randn
from pbe.sampling.registry import SAMPLERS, get_sampler
from pbe.sampling.samplers import Callback, Eps, Sampler, StepInfo, ddim, ddpm, euler, euler_ancestral, sampler
from pbe.sampling.schedule import Grid, NoiseSchedule, ScheduleGrid, Step
from pbe.sampling.spacing import SPACINGS, Spacing, get_spacing, karras, leading, trailing

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Callback",
    "Eps",
    "Grid",
    "NoiseSchedule",
    "Sampler",
    "ScheduleGrid",
    "Spacing",
    "Step",
    "StepInfo",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "get_sampler",
    "get_spacing",
    "guided_eps",
    "karras",
    "lcm",
    "leading",
    "make_generators",
    "plms",
    "randn",
    "sampler",
    "tcd",
    "trailing",
    "unipc",
]
