"""Inpainting with Stable Diffusion v1 by blended latents, guided by text or by a CLIP picture embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pbe.baselines.latent_blending import background, blended_ddim
from pbe.baselines.systems import System, Task, WeightFiles, to_picture
from pbe.images.reading import exemplar_tensor
from pbe.models.clip import CLIP
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.tokenizer import CLIPTokenizer
from pbe.sampling import Eps, NoiseSchedule, leading, make_generators, randn


@dataclass(frozen=True, eq=False)
class StableDiffusionText(System):
    """Paints what "a photo of a <class>" says; needs the task's label."""

    model: StableDiffusion
    tokenizer: CLIPTokenizer
    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def load(cls, weights: WeightFiles) -> "StableDiffusionText":
        """Raises as `WeightFiles.load` does."""
        return cls(load_stable_diffusion(weights), CLIPTokenizer.from_file(weights.path("vocabulary")))

    def __call__(self, task: Task) -> Image.Image:
        return self.paint(task, task.prompt())

    @torch.no_grad()
    def paint(self, task: Task, text: str) -> Image.Image:
        """The task guided by any text."""
        null_context, context = encode_text(self.model, self.tokenizer, ["", text]).split(1)
        return inpaint(self.model, task, context, null_context, self.steps, self.guidance)


@dataclass(frozen=True, eq=False)
class StableDiffusionImage(System):
    """Paints with CLIP's embedding of the exemplar in the text tower's place, without any fine-tuning.

    CLIP's towers share a space after their projections; Stable Diffusion was trained on the text tower's tokens before
    theirs, so the embedding only resembles what it knows.
    """

    model: StableDiffusion
    clip: CLIP
    tokenizer: CLIPTokenizer
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self) -> None:
        width, context_dim = self.clip.config.embed_dim, self.model.config.unet.context_dim
        if width != context_dim:
            raise ValueError(
                f"this CLIP's embeddings have {width} numbers, Stable Diffusion's context {context_dim}: "
                "ViT-L/14 is needed for v1"
            )

    @classmethod
    def load(cls, weights: WeightFiles) -> "StableDiffusionImage":
        """Raises as `WeightFiles.load` does."""
        return cls(
            load_stable_diffusion(weights),
            weights.load("clip", CLIP),
            CLIPTokenizer.from_file(weights.path("vocabulary")),
        )

    @torch.no_grad()
    def __call__(self, task: Task) -> Image.Image:
        null_context = encode_text(self.model, self.tokenizer, [""])
        context = image_embedding(self.clip, task.exemplar)[:, None].to(null_context)  # (1, 1, context_dim)
        # attention to many equal tokens is attention to one: this lets both halves of the guidance share a batch
        context = context.expand_as(null_context)
        return inpaint(self.model, task, context, null_context, self.steps, self.guidance)


def inpaint(
    model: StableDiffusion, task: Task, context: Tensor, null_context: Tensor, steps: int, guidance: float
) -> Image.Image:
    """The whole frame, its masked part sampled by DDIM with the rest put back, noised, at each step."""
    parameter = next(model.parameters())
    config = model.config
    image, keep = task.network_inputs(config.resolution, config.vae.downsampling, parameter.device)
    z_0 = model.vae.encode(image.to(parameter.dtype)).mean.float()
    # a latent cell is painted if any of its pixels is
    keep = 1 - F.max_pool2d(1 - keep, config.vae.downsampling)
    generators = make_generators(task.seed, 1)
    x_T = randn(z_0.shape[1:], generators, z_0.device)
    eps = guided_by_context(model, context, null_context, guidance)
    grid = leading(NoiseSchedule.scaled_linear(), steps)
    z_0 = blended_ddim(eps, x_T, grid, background(z_0, keep, generators))
    return to_picture(model.vae.decode(z_0.to(parameter.dtype)), task.size)


def guided_by_context(model: StableDiffusion, context: Tensor, null_context: Tensor, guidance: float) -> Eps:
    """eps_u + guidance (eps_c - eps_u) (arXiv 2207.12598), contexts (1, T, context_dim), both halves in one batch."""
    both = torch.cat([null_context, context])

    def eps(x_t: Tensor, t: Tensor) -> Tensor:
        z_t = x_t.to(both.dtype).repeat(2, 1, 1, 1)
        eps_u, eps_c = model.unet(z_t, t.repeat(2), both.repeat_interleave(len(x_t), dim=0)).to(x_t.dtype).chunk(2)
        return eps_u + guidance * (eps_c - eps_u)

    return eps


def encode_text(model: StableDiffusion, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """The contexts (B, 77, context_dim) of texts."""
    assert model.config.text, "load_model refuses files without their text tower"
    token_ids = tokenizer(texts, model.config.text.context_length, truncate=True)
    return model.encode_text(token_ids.to(next(model.parameters()).device))


def image_embedding(clip: CLIP, exemplar: Image.Image) -> Tensor:
    """CLIP's embedding (1, embed_dim) of an exemplar, not normalised."""
    parameter = clip.logit_scale
    pixels = exemplar_tensor(exemplar, clip.config.vision.image_size)
    return clip.encode_image(pixels.to(parameter.device, parameter.dtype))


def load_stable_diffusion(weights: WeightFiles) -> StableDiffusion:
    model = weights.load("stable_diffusion", StableDiffusion)
    if model.config.unet.in_channels != 4:
        channels = model.config.unet.in_channels
        raise ValueError(f"{weights.stable_diffusion} has {channels} input channels; text to image, with 4, is needed")
    return model
