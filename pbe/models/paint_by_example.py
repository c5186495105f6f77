"""Paint by Example: repaint the masked part of a picture as the object of an exemplar (arXiv 2211.13227)."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.collage import collages
from pbe.models.detail import Resampler
from pbe.models.exemplar import ExemplarConfig, ExemplarEncoder
from pbe.models.tiny_autoencoder import TinyConfig, TinyDecoder
from pbe.models.unet import UNet, UNetConfig
from pbe.models.vae import AutoencoderKL, VAEConfig, pad_to_multiple


@dataclass(frozen=True)
class Distilled:
    """What a model was distilled for, the settings of an edit that it needs: `lcm` or `tcd` in few steps, with the
    teacher's guidance inside the network."""

    sampler: str
    steps: int
    guidance: float


TIMESTEPS = 1000
COLLAGE_TIMESTEPS = 650


@dataclass(frozen=True)
class PaintByExampleConfig:
    """Sizes of `PaintByExample`; the defaults are those of the released model.

    `resolution` is the side in pixels of the pictures it was trained on, `distilled` is None for an ordinary model. A
    `tiny_decoder` stands beside the autoencoder, for drafts and previews. With `collage` the hole of the masked image
    shows the exemplar (`pbe.models.collage`), which the released model does not.
    """

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    exemplar: ExemplarConfig = ExemplarConfig()
    resolution: int = 512
    distilled: Distilled | None = None
    tiny_decoder: TinyConfig | None = None
    collage: bool = False

    def __post_init__(self) -> None:
        kinds = [f"{c.latent_channels} channels at 1/{c.downsampling}" for c in (self.vae, self.tiny_decoder) if c]
        if len({*kinds}) > 1:
            raise ValueError(f"the tiny decoder takes latents of {kinds[1]} of a picture's size, not of {kinds[0]}")

    @property
    def num_timesteps(self) -> int:
        """How many of the schedule's timesteps training and sampling go through.

        With `collage` 650: what the hole shows is already much of the result, and where the noise of the others
        hides it (alpha_bar falls from 0.12 to 0.0047) it is lost for no gain.
        """
        return COLLAGE_TIMESTEPS if self.collage else TIMESTEPS


class Condition(NamedTuple):
    """What the UNet is told about an edit; the same at every step."""

    z_masked: Tensor  # (B, 4, h, w) scaled latent of the masked image
    mask: Tensor  # (B, 1, h, w) in [0, 1], 1 = keep
    context: Tensor  # (B, T, context_dim); the tokens of a detail adapter come last


class PaintByExample(nn.Module):
    """The networks of Paint by Example under the keys of the original checkpoint.

    `first_stage_model` is the VAE, `cond_stage_model` the exemplar encoder, `model.diffusion_model` the UNet,
    `learnable_vector` the condition that stands for "no exemplar" in classifier-free guidance.
    """

    def __init__(self, config: PaintByExampleConfig):
        super().__init__()
        self.config = config
        width, context_dim = config.exemplar.vision.width, config.unet.context_dim
        self.model = nn.ModuleDict({"diffusion_model": UNet(config.unet)})
        self.first_stage_model = AutoencoderKL(config.vae)
        self.cond_stage_model = ExemplarEncoder(config.exemplar)
        self.proj_out = nn.Linear(width, context_dim)
        self.learnable_vector = nn.Parameter(torch.empty(1, 1, context_dim))
        nn.init.normal_(self.learnable_vector)
        self.tiny_decoder = TinyDecoder(config.tiny_decoder) if config.tiny_decoder else None
        self.detail: Resampler | None = None  # of a detail adapter, `pbe.models.detail`

    @property
    def unet(self) -> UNet:
        """The denoising network: `unet(unet_in, t, context)`."""
        return cast(UNet, self.model["diffusion_model"])

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder between pictures and latents."""
        return self.first_stage_model

    @property
    def null_context(self) -> Tensor:
        """The learned unconditional vector (1, 1, context_dim), and what stands for the detail of no exemplar."""
        if self.detail is None:
            return self.learnable_vector
        own = self.learnable_vector.expand(-1, self.config.exemplar.num_tokens, -1)
        return torch.cat([own, self.detail.null_tokens], dim=1)

    @property
    def device(self) -> torch.device:
        return self.learnable_vector.device

    @property
    def dtype(self) -> torch.dtype:
        return self.learnable_vector.dtype

    def encode_exemplar(self, exemplar: Tensor) -> Tensor:
        """The context (B, T, context_dim) of CLIP-normalised exemplars (B, 3, 224, 224); T = 1 by default."""
        if self.detail is None:
            return self.proj_out(self.cond_stage_model(exemplar))
        encoder = self.cond_stage_model
        early = encoder.vision.early_tokens(exemplar)
        own = self.proj_out(encoder.mapped(encoder.vision.last_layer(early)))
        return torch.cat([own, self.detail(early)], dim=1)

    def encode_masked(
        self, image: Tensor, mask: Tensor, posterior_noise: Tensor | None = None, hole: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The masked image's latent (B, 4, h, w) and the mask at latent size (B, 1, h, w).

        `image` (B, 3, H, W) in [-1, 1]; `mask` (B, 1, H, W) in {0, 1}, 1 = keep. The latent is the posterior's mean, or
        its sample for `posterior_noise` (B, 4, h, w), as the original draws it. `hole` (B, 3, H, W), what `collages`
        gives, is for a model with `collage`, which needs it.

        Raises:
            ValueError: for shapes that do not fit, and a hole that is missing or that the model does not know.
        """
        if mask.shape != (image.shape[0], 1, *image.shape[2:]):
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit image {tuple(image.shape)}: (B, 1, H, W) is needed"
            )
        if (hole is not None) != self.config.collage:
            needs = "needs a hole: pbe.models.collage.collages" if hole is None else "was trained with gray holes"
            raise ValueError(f"this model {needs}")
        posterior = self.vae.encode(image * mask if hole is None else image * mask + hole)
        z_masked = posterior.mean if posterior_noise is None else posterior.sample(posterior_noise)
        return z_masked, latent_mask(mask, self.config.vae.downsampling)

    def condition(
        self,
        image: Tensor,
        mask: Tensor,
        exemplar: Tensor,
        posterior_noise: Tensor | None = None,
        hole: Tensor | None = None,
    ) -> Condition:
        """What the UNet needs to know of an edit: `encode_masked` and `encode_exemplar` together.

        A model with `collage` shows exemplars as square as they are given, unless `hole` shows them otherwise.
        """
        if self.config.collage and hole is None:
            hole = collages(image, mask, exemplar, [1.0] * len(exemplar))
        z_masked, mask = self.encode_masked(image, mask, posterior_noise, hole)
        return Condition(z_masked, mask, self.encode_exemplar(exemplar))

    def start(self, condition: Condition) -> Tensor | None:
        """The latents (B, 4, h, w) that sampling starts from, under the noise of its first step: of a model with
        `collage` what it is shown; else None, for noise alone.

        The noisiest timestep, alpha_bar = 0.0047, hides nothing altogether (Lin et al., arXiv 2305.08891, section 3.1).
        In training the object always shone through there, a little, and where it does not such a model makes shreds.
        """
        return condition.z_masked if self.config.collage else None


def latent_mask(mask: Tensor, downsampling: int) -> Tensor:
    """The mask (B, 1, H, W) at latent size, fractional along its border.

    Bilinear without antialiasing, as the original resized it; torch's newer default would blur it further.
    """
    mask = pad_to_multiple(mask, downsampling)
    h, w = mask.shape[-2] // downsampling, mask.shape[-1] // downsampling
    return F.interpolate(mask, size=(h, w), mode="bilinear", align_corners=False)
