"""Models of seeded random weights in the original layout: for tests, benchmarks and trying things without a download.

A picture they make shows the mechanics only.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.writing import BETA_END, BETA_START, NUM_TIMESTEPS
from pbe.models.clip import CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig

CONFIGS = {
    "full": PaintByExampleConfig(),
    "small": PaintByExampleConfig(
        unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1),
        vae=VAEConfig(channels=32, num_res_blocks=1),
        exemplar=ExemplarConfig(
            vision=CLIPVisionConfig(width=128, num_layers=4, num_heads=2, mlp_width=512), mapper_layers=1
        ),
        resolution=256,
    ),
}


def seeded_state(config: PaintByExampleConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every parameter of a model, drawn from one generator: weights of variance 1 / fan-in, norms and biases near the
    identity, so that activations keep their size through all layers."""
    generator = torch.Generator().manual_seed(seed)
    model = build_on_meta(PaintByExample, config)
    return {name: draw(name, tuple(p.shape), generator).to(dtype) for name, p in model.state_dict().items()}


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return x.div_(math.sqrt(math.prod(shape[1:])))
    return x.mul_(0.1).add_(1.0) if name.endswith("weight") else x.mul_(0.1)


def seeded_checkpoint(size: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `torch.load` would give for an original `model.ckpt`: a Lightning dictionary whose `state_dict` also holds
    the schedule's buffers and CLIP's position ids.

    `size` is "full" (the released model's) or "small". A small one carries a `pbe` entry too, since its heads and its
    resolution are not the original's.
    """
    if size not in CONFIGS:
        raise ValueError(f"size={size!r} is not one of {', '.join(CONFIGS)}")
    config = CONFIGS[size]
    positions = config.exemplar.vision.num_positions
    state = seeded_state(config, seed, dtype)
    state |= schedule_buffers()
    state["cond_stage_model.transformer.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    checkpoint = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "1.4.2", "state_dict": state}
    return checkpoint if size == "full" else {**checkpoint, "pbe": pbe_entry(config)}


def schedule_buffers() -> dict[str, Tensor]:
    """The noise schedule as the original code stores it with its weights, in float32."""
    beta = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x_0), DDPM eq. 7
    buffers = {
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar),
    }
    return {name: buffer.float() for name, buffer in buffers.items()}
