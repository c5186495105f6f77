"""Stable Diffusion v1: the text-conditioned model that Paint by Example starts from (arXiv 2112.10752)."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pbe.models.clip import CLIPTextConfig, CLIPTextTower
from pbe.models.unet import UNet, UNetConfig
from pbe.models.vae import AutoencoderKL, VAEConfig


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Sizes of `StableDiffusion`; the defaults are those of v1-4. `text` is None in files without their text tower."""

    unet: UNetConfig = UNetConfig(in_channels=4)
    vae: VAEConfig = VAEConfig()
    text: CLIPTextConfig | None = CLIPTextConfig()
    resolution: int = 512


class StableDiffusion(nn.Module):
    """The networks of Stable Diffusion v1 under the keys of the original checkpoint."""

    def __init__(self, config: StableDiffusionConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"diffusion_model": UNet(config.unet)})
        self.first_stage_model = AutoencoderKL(config.vae)
        if config.text:
            tower = nn.ModuleDict({"text_model": CLIPTextTower(config.text)})
            self.cond_stage_model = nn.ModuleDict({"transformer": tower})

    @property
    def unet(self) -> UNet:
        """The denoising network: `unet(unet_in, t, context)`."""
        return cast(UNet, self.model["diffusion_model"])

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder between pictures and latents."""
        return self.first_stage_model

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """The context (B, 77, context_dim) of token ids (B, 77)."""
        return self.cond_stage_model.get_submodule("transformer.text_model")(token_ids)
