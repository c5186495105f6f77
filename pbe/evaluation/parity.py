"""What a checkpoint's networks make of seeded inputs, and a short edit, in this library and in diffusers.

Needs the extra `verify`. float32 on the CPU; one side is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from pbe.checkpoints.loading import load_model
from pbe.checkpoints.writing import BETA_END, BETA_START, save_diffusers
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.sampling import NoiseSchedule, guided_eps, leading, plms

SIZE = 256  # pixels of the picture at most: enough for all layers, and minutes on a CPU
TIMESTEPS = (1, 250, 500, 750, 999)
STEPS, GUIDANCE = 4, 5.0
# Of the largest difference over the largest value: float32 rounding through all layers is about 1e-5, and guidance and
# the sampler's steps multiply it.
NETWORK_LIMIT, EDIT_LIMIT = 1e-4, 1e-3


class Comparison(NamedTuple):
    """The largest difference of an output's values, absolute and over its largest value, and the latter's limit."""

    output: str
    largest: float
    relative: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether it is within the limit; NaN and infinity are not."""
        return self.relative <= self.limit


class Networks(NamedTuple):
    """What is compared of one side."""

    encode: Callable[[Tensor], Tensor]  # image to the posterior's moments (B, 8, h, w)
    decode: Callable[[Tensor], Tensor]  # scaled latents to image
    encode_exemplar: Callable[[Tensor], Tensor]
    null_context: Tensor
    unet: Callable[[Tensor, Tensor, Tensor], Tensor]
    edit: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # image, mask, exemplar and x_T to z_0


def compare_with_diffusers(path: Path, say: Callable[[str], None] = lambda _: None) -> list[Comparison]:
    """Runs every network of a checkpoint and an edit of a few steps on both sides; `say` is told of each stage.

    A diffusers folder is read by diffusers itself, another checkpoint is converted in a temporary folder.

    Raises as `load_model`; `ImportError` that names the extra; `ValueError` for a checkpoint of anything but Paint by
    Example, or one that diffusers cannot express.
    """
    for package in ("diffusers", "transformers"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"verifying needs {package}, the extra verify: pip install pbe[verify]") from error
    say("this library")
    model = load_model(path, "cpu", "float32")
    if not isinstance(model, PaintByExample) or model.config.exemplar.tokens != "class":
        raise ValueError(f"{path} holds {type(model).__name__}; diffusers has Paint by Example of one token")
    config = model.config
    ours = outputs(ours_of(model), config)
    with TemporaryDirectory() as temporary:
        folder = path
        if not path.is_dir():
            say("conversion")
            folder = Path(temporary) / "model"
            save_diffusers(model.state_dict(), config, folder)
        del model
        say("diffusers")
        theirs = outputs(theirs_of(folder), config)
    return [compare(name, ours[name], theirs[name]) for name in ours]


def compare(name: str, a: Tensor, b: Tensor) -> Comparison:
    largest = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
    return Comparison(name, largest, largest / b.abs().max().item(), EDIT_LIMIT if "edit" in name else NETWORK_LIMIT)


@torch.inference_mode()
def outputs(networks: Networks, config: PaintByExampleConfig) -> dict[str, Tensor]:
    """What one side makes of the seeded inputs, by what it is."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size, clip_size = min(config.resolution, SIZE), config.exemplar.vision.image_size
    h = size // config.vae.downsampling
    image, exemplar = draw(1, 3, size, size).clamp(-1, 1), draw(1, 3, clip_size, clip_size)
    x_T, unet_in, context = draw(1, 4, h, h), draw(1, 9, h, h), draw(1, 1, config.unet.context_dim)
    keep = torch.ones(1, 1, size, size)
    keep[..., size // 4 : size // 2, size // 4 : -size // 4] = 0  # whole latents, which both sides resize alike
    z_0 = networks.edit(image, keep, exemplar, x_T)
    return {
        "VAE, encoding": networks.encode(image),
        "VAE, decoding": networks.decode(x_T),
        "exemplar encoder": networks.encode_exemplar(exemplar),
        "unconditional vector": networks.null_context.clone(),
        **{f"UNet, t = {t}": networks.unet(unet_in, torch.tensor([t]), context) for t in TIMESTEPS},
        f"edit of {STEPS} steps, latents": z_0,
        f"edit of {STEPS} steps, picture": (networks.decode(z_0) / 2 + 0.5).clamp(0, 1),
    }


def ours_of(model: PaintByExample) -> Networks:
    def edit(image: Tensor, keep: Tensor, exemplar: Tensor, x_T: Tensor) -> Tensor:
        eps = guided_eps(model, model.condition(image, keep, exemplar), GUIDANCE)
        return plms(eps, x_T, leading(NoiseSchedule.scaled_linear(), STEPS))

    vae = model.vae
    return Networks(vae.moments, vae.decode, model.encode_exemplar, model.null_context, model.unet, edit)


def theirs_of(folder: Path) -> Networks:
    """The networks in a diffusers folder, opened one by one: the name of the encoder's class has moved in diffusers."""
    from diffusers import AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel

    encoder_class = sys.modules[PaintByExamplePipeline.__module__].PaintByExampleImageEncoder
    encoder = encoder_class.from_pretrained(folder / "image_encoder").float().eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    schedule = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1)
    pipeline = PaintByExamplePipeline(vae, encoder, unet, scheduler, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    scale = vae.config.scaling_factor
    # its own draws from the posterior, of which this library takes the mean
    pipeline._encode_vae_image = lambda image, generator: scale * vae.encode(image).latent_dist.mode()

    def edit(image: Tensor, keep: Tensor, exemplar: Tensor, x_T: Tensor) -> Tensor:
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
        return pipeline(exemplar, image, 1 - keep, latents=x_T, **settings).images

    return Networks(
        lambda image: vae.encode(image).latent_dist.parameters,
        lambda z: vae.decode(z / scale).sample,
        lambda exemplar: encoder(exemplar),
        encoder.uncond_vector,
        lambda x, t, context: unet(x, t, encoder_hidden_states=context).sample,
        edit,
    )
