"""Distilling a tiny decoder: it learns to give the pictures that an autoencoder's own decoder gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from pbe.io.fields import Range, check_fields
from pbe.models.tiny_autoencoder import TinyConfig, TinyDecoder
from pbe.models.vae import AutoencoderKL, VAEConfig
from pbe.training.optimizer import OptimizerConfig
from pbe.training.vae import DecodingTask, mean_absolute


@dataclass
class TinyDecoderConfig:
    """How large a tiny decoder is, beside what its autoencoder's latents decide, and how it is trained."""

    channels: Annotated[int, Range(1)] = TinyConfig.channels
    """Of all its feature maps."""
    num_blocks: Annotated[int, Range(1)] = TinyConfig.num_blocks
    """At each resolution below the picture's, which has one."""
    gradient_weight: Annotated[float, Range(0)] = 1.0
    """Of the mean absolute error of differences between neighbouring pixels, against that of the pixels."""

    def __post_init__(self) -> None:
        check_fields(self, "training")

    def size(self, vae: VAEConfig) -> TinyConfig:
        """The decoder's sizes for an autoencoder's latents."""
        return TinyConfig(self.channels, vae.latent_channels, len(vae.channel_mult) - 1, self.num_blocks)


class TinyDecoderTraining(DecodingTask):
    """Trains a `TinyDecoder`; the autoencoder stays as it is.

    Its checkpoints have TAESD's keys, and an entry `pbe` with `about`.
    """

    def __init__(
        self,
        decoder: TinyDecoder,
        vae: AutoencoderKL,
        config: TinyDecoderConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
    ):
        super().__init__(vae.requires_grad_(False), optimizer, about)
        self.decoder = decoder
        self.weights = {"l1": 1.0, "gradient": config.gradient_weight}

    def errors(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Each picture's mean absolute errors from the autoencoder's decoding, of pixels and of their differences."""
        with torch.no_grad():
            z_0 = self.vae.encode(image).sample(noise)
            target = self.vae.decode(z_0).float().clamp(-1, 1)
        error = self.decoder(z_0).float() - target
        gradient = mean_absolute(error.diff(dim=2)) + mean_absolute(error.diff(dim=3))
        return {"l1": mean_absolute(error), "gradient": gradient}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {k.removeprefix("decoder."): x for k, x in state if k.startswith("decoder.")}
        checkpoint["pbe"] = self.about

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {f"decoder.{name}": x for name, x in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = state | {f"vae.{name}": x for name, x in self.vae.state_dict().items()}
