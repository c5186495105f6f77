"""AdamW with a warm-up, for every training task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import nn

from pbe.io.fields import Range, check_fields

if TYPE_CHECKING:
    import lightning
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


@dataclass
class OptimizerConfig:
    """Settings of AdamW; the defaults are Paint by Example's."""

    lr: Annotated[float, Range(0, above=True)] = 1e-5
    """The highest learning rate."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """Of all parameters that train."""
    warmup_steps: Annotated[int, Range(0)] = 10_000
    """Optimiser steps in which the rate rises to `lr` along a line."""
    warmup_start: Annotated[float, Range(0, 1)] = 1e-6
    """The share of `lr` that the warm-up starts from."""
    decay_steps: Annotated[int, Range(1)] | None = None
    """Steps after the warm-up in which the rate falls to 0 along a cosine; None: it stays."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


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


def make_optimizer(module: lightning.LightningModule, config: OptimizerConfig) -> OptimizerLRSchedulerConfig:
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
