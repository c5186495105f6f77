"""AdamW with a warm-up, for every training task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import nn


@dataclass
class OptimizerConfig:
    """Settings of AdamW; the defaults are Paint by Example's.

    lr: reached linearly after `warmup_steps` optimiser steps, from `warmup_start` times itself.
    decay_steps: steps after the warm-up in which the rate falls to 0 along a cosine; None: it stays.
    """

    lr: float = 1e-5
    weight_decay: float = 0.01
    warmup_steps: int = 10_000
    warmup_start: float = 1e-6
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr must be positive, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"optimizer.warmup_start must be between 0 and 1, got {self.warmup_start}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optimizer.decay_steps must be at least 1, or null for none, got {self.decay_steps}")


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step`, from 0, as a factor of the highest."""
    if step < config.warmup_steps:
        return config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    if config.decay_steps is None:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / config.decay_steps, 1)))


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over those of the parameters that train."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def make_optimizer(module: lightning.LightningModule, config: OptimizerConfig) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW over the parameters that train, and its learning rate's schedule."""
    trainer = module.trainer
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    # The fused step removes fp16's loss scale itself, too late for Lightning to clip the gradients before.
    clips_scaled = scaled and bool(trainer.gradient_clip_val)
    optimizer = adamw(module.parameters(), config, fused=module.device.type == "cuda" and not clips_scaled)
    if not scaled:
        # Where nothing is scaled Lightning would refuse too: it looks at this mark of a fused optimizer alone.
        optimizer._step_supports_amp_scaling = False
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
