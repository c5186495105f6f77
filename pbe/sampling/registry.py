"""The samplers by name."""

from __future__ import annotations

from pbe.sampling.consistency import lcm, tcd
from pbe.sampling.multistep import dpm_solver, plms, unipc
from pbe.sampling.samplers import Sampler, ddim, ddpm, euler, euler_ancestral

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "ddpm": ddpm,
    "dpm_solver": dpm_solver,
    "unipc": unipc,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "lcm": lcm,
    "tcd": tcd,
}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`; a ValueError that lists the choices if there is none."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
