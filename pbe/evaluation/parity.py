"""What a checkpoint's networks make of seeded inputs, and a short edit, in this library and in diffusers.

Needs the extra `verify`. float32 on the CPU; one side is in memory at a time.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe.checkpoints.loading import load_model
from pbe.checkpoints.writing import BETA_END, BETA_START, save_diffusers
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.sampling import NoiseSchedule, guided_eps, leading, plms

SIZE = 256  # pixels at most: all layers are used, and a CPU takes minutes
TIMESTEPS, STEPS, GUIDANCE = (1, 250, 500, 750, 999), 4, 5.0
# What is compared, with limits of the largest difference over the largest value: float32 rounding through all layers is
# about 2e-6 at full size, more on other processors, and more steps with more guidance multiply it.
LIMITS = {
    **dict.fromkeys(("VAE, encoding", "VAE, decoding", "exemplar encoder", "unconditional vector"), 1e-4),
    **{f"UNet, t = {t}": 1e-4 for t in TIMESTEPS},
    **{f"edit of {STEPS} steps, {what}": 1e-3 for what in ("latents", "picture")},
}


class Comparison(NamedTuple):
    """The largest difference of an output's values, that over the largest value, and the limit of the ratio."""

    output: str
    largest: float
    relative: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the ratio is within its limit; NaN and infinity are not."""
        return self.relative <= self.limit


def compare_with_diffusers(path: Path) -> list[Comparison]:
    """Runs every network of a checkpoint and a short edit on both sides. diffusers reads a folder of its own itself;
    another checkpoint is converted into a temporary one.

    Raises as `load_model`; `ImportError` that names the extra; `ValueError` for what diffusers cannot express.
    """
    for package in ("diffusers", "transformers"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"verifying needs {package}, the extra verify: pip install pbe[verify]") from error
    model = load_model(path, "cpu", "float32")
    if not isinstance(model, PaintByExample) or model.config.exemplar.tokens != "class" or model.config.collage:
        kind = type(model).__name__
        raise ValueError(f"{path} holds {kind}; diffusers has Paint by Example of one token and gray holes")
    config, inputs = model.config, seeded_inputs(model.config)
    ours = outputs_here(model, *inputs)
    with TemporaryDirectory() as temporary:
        folder = path if path.is_dir() else Path(temporary) / "model"
        if not path.is_dir():
            save_diffusers(model.state_dict(), config, folder)
        del model  # 5 GB at full size
        theirs = outputs_of_diffusers(folder, *inputs)
    found = []
    for (name, limit), a, b in zip(LIMITS.items(), ours, theirs, strict=True):
        largest = (a - b).abs().max()
        found.append(Comparison(name, largest.item(), (largest / b.abs().max()).item(), limit))
    return found


def seeded_inputs(config: PaintByExampleConfig) -> tuple[Tensor, ...]:
    """image, mask, exemplar, x_T, unet_in and context."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    size, exemplar_size = min(config.resolution, SIZE), config.exemplar.vision.image_size
    h = size // config.vae.downsampling
    mask = torch.ones(1, 1, size, size)
    mask[..., size // 4 : size // 2, size // 4 : -size // 4] = 0  # whole latents, which both sides resize alike
    image, exemplar = draw(1, 3, size, size).clamp(-1, 1), draw(1, 3, exemplar_size, exemplar_size)
    return image, mask, exemplar, draw(1, 4, h, h), draw(1, 9, h, h), draw(1, 1, config.unet.context_dim)


@torch.inference_mode()
def outputs_here(
    model: PaintByExample, image: Tensor, mask: Tensor, exemplar: Tensor, x_T: Tensor, unet_in: Tensor, context: Tensor
) -> list[Tensor]:
    """What `LIMITS` lists, of this library's networks."""
    vae, unet = model.vae, model.unet
    eps = guided_eps(model, model.condition(image, mask, exemplar), GUIDANCE)
    z_0 = plms(eps, x_T, leading(NoiseSchedule.scaled_linear(), STEPS))
    conditions = [model.encode_exemplar(exemplar), model.null_context.clone()]
    steps = [unet(unet_in, torch.tensor([t]), context) for t in TIMESTEPS]
    return [vae.moments(image), vae.decode(x_T), *conditions, *steps, z_0, vae.decode(z_0)]


@torch.inference_mode()
def outputs_of_diffusers(
    folder: Path, image: Tensor, mask: Tensor, exemplar: Tensor, x_T: Tensor, unet_in: Tensor, context: Tensor
) -> list[Tensor]:
    """What `LIMITS` lists, of the networks in a diffusers folder."""
    from diffusers import AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel

    # opened one by one, since the name by which folders call the encoder's class has moved
    encoder_class = sys.modules[PaintByExamplePipeline.__module__].PaintByExampleImageEncoder
    encoder = encoder_class.from_pretrained(folder / "image_encoder").float().eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    schedule = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1)
    pipeline: Any = PaintByExamplePipeline(vae, encoder, unet, scheduler, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    scale = vae.config.scaling_factor
    # its own draws from the posterior, of which this library takes the mean
    pipeline._encode_vae_image = lambda image, generator: scale * vae.encode(image).latent_dist.mode()
    edit = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": x_T, "output_type": "latent"}
    z_0 = pipeline(exemplar, image, 1 - mask, **edit).images
    moments, *pictures = vae.encode(image).latent_dist.parameters, *(vae.decode(z / scale).sample for z in (x_T, z_0))
    steps = [unet(unet_in, t, encoder_hidden_states=context).sample for t in TIMESTEPS]
    return [moments, pictures[0], encoder(exemplar), encoder.uncond_vector, *steps, z_0, pictures[1]]
