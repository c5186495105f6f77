"""Blended Diffusion (Avrahami et al., CVPR 2022, arXiv 2111.14818): a pixel diffusion guided by CLIP's gradients.

Where the paper and its released code differ the code is followed, since published comparisons ran it: the spherical
distance for D_CLIP, the blend of x_0 and x_t that CLIP sees, the loss weights, and a start from the noised image a
quarter of the way down. Two things are otherwise: the background has the noise level that a step arrives at, where the
code's has that which it starts from; and a seed makes one picture, where the paper ranks many by CLIP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pbe.baselines.latent_blending import background
from pbe.baselines.learned_variance import Loss, Prediction, learned_variance_ddpm, respaced
from pbe.baselines.stable_diffusion import image_embedding
from pbe.baselines.systems import System, Task, WeightFiles, to_picture
from pbe.models.adm import ADM
from pbe.models.clip import CLIP, CLIP_MEAN, CLIP_STD
from pbe.models.tokenizer import CLIPTokenizer
from pbe.sampling import Callback, NoiseSchedule, make_generators, randn


@dataclass(frozen=True, eq=False)
class BlendedDiffusion(System):
    """Paints what brings CLIP's view of the masked region to "a photo of a <class>", or to the exemplar.

    steps: of the respaced process, of which the first `skipped` are left out: the start is the noised image.
    augmentations: how many views of each estimate CLIP sees, the first one as it is.
    clip_weight, range_weight: of the distance to the target, and of how far colours leave [-1, 1].
    tokenizer: for the target "text" alone.
    """

    model: ADM
    clip: CLIP
    target: Literal["text", "image"]
    tokenizer: CLIPTokenizer | None = None
    steps: int = 100
    skipped: int = 25
    augmentations: int = 8
    clip_weight: float = 1000.0
    range_weight: float = 50.0

    def __post_init__(self) -> None:
        if not 0 <= self.skipped < self.steps:
            raise ValueError(f"skipped={self.skipped} of steps={self.steps} leaves no step to take")
        if self.augmentations < 1:
            raise ValueError(f"augmentations must be at least 1, got {self.augmentations}")
        if self.target == "text" and self.tokenizer is None:
            raise ValueError("target='text' needs a tokenizer")

    @classmethod
    def load_text(cls, weights: WeightFiles) -> "BlendedDiffusion":
        """Raises as `WeightFiles.load` does."""
        return cls(*load_networks(weights), "text", CLIPTokenizer.from_file(weights.path("vocabulary")))

    @classmethod
    def load_image(cls, weights: WeightFiles) -> "BlendedDiffusion":
        """Raises as `WeightFiles.load` does."""
        return cls(*load_networks(weights), "image")

    def __call__(self, task: Task) -> Image.Image:
        return to_picture(self.sample(task), task.size)

    @torch.no_grad()
    def sample(self, task: Task, callback: Callback | None = None) -> Tensor:
        """The edit at the network's resolution, (1, 3, H', W') in about [-1, 1]: outside the mask exactly the image."""
        device = next(self.model.parameters()).device
        config = self.model.config
        image, keep = task.network_inputs(config.resolution, config.multiple, device)
        generators = make_generators(task.seed, 1)
        schedule = NoiseSchedule.linear()
        grid = respaced(schedule, self.steps)[self.skipped :]
        start = torch.tensor([grid[0].t], device=device)
        x_start = schedule.add_noise(image, randn(image.shape[1:], generators, device), start)
        return learned_variance_ddpm(
            predict_with_random_classes(self.model, generators),
            x_start,
            grid,
            generators=generators,
            loss=self.loss(self.embed_target(task), 1 - keep, generators),
            blend=background(image, keep, generators),
            callback=callback,
        )

    def embed_target(self, task: Task) -> Tensor:
        """CLIP's embedding (1, embed_dim) of the task's text or exemplar, of length 1."""
        if self.target == "image":
            return F.normalize(image_embedding(self.clip, task.exemplar).float(), dim=-1)
        assert self.tokenizer is not None  # as the target is text
        token_ids = self.tokenizer(task.prompt(), self.clip.config.text.context_length, truncate=True)
        return F.normalize(self.clip.encode_text(token_ids.to(self.clip.logit_scale.device)).float(), dim=-1)

    def loss(self, target: Tensor, repaint: Tensor, generators: Sequence[torch.Generator]) -> Loss:
        """lambda D_CLIP + how far x_0 leaves its range, of the masked region (`repaint` (1, 1, H, W), 1 = repaint)."""

        def loss(x_0: Tensor, x_t: Tensor, alpha_bar_t: float) -> Tensor:
            # the noisier x_t, the more of the estimate and the less of x_t itself
            sigma_t = math.sqrt(1 - alpha_bar_t)
            seen = (sigma_t * x_0 + (1 - sigma_t) * x_t) * repaint
            views = extending_augmentations(seen, self.clip.config.vision.image_size, self.augmentations, generators)
            distance = clip_distance(self.clip, views, target) / self.augmentations
            out_of_range = (x_0 - x_0.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
            return self.clip_weight * distance.sum() + self.range_weight * out_of_range.sum()

        return loss


def clip_distance(clip: CLIP, views: Tensor, target: Tensor) -> Tensor:
    """Half the squared angle (N,) between the embeddings of views (N, 3, S, S) in [-1, 1] and the target (1, D)."""
    mean, std = (torch.tensor(values, device=views.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pixels = ((views + 1) / 2 - mean) / std
    embeddings = F.normalize(clip.encode_image(pixels.to(clip.logit_scale.dtype)).float(), dim=-1)
    chord = (embeddings - target).norm(dim=-1)
    return 2 * (chord / 2).clamp(max=1).arcsin().square()


def extending_augmentations(x: Tensor, size: int, number: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Views (number B, 3, size, size) of pictures x (B, 3, H, W): first each as it is, then in random perspectives.

    Of the random ones 70 % are turned by up to 15 degrees and moved by up to a tenth of the side, and 70 % seen in
    perspective, each corner drawn in by up to 0.35 of the side.
    """
    x = F.adaptive_avg_pool2d(x, size)
    if number == 1:
        return x
    corners = torch.stack([random_corners(number - 1, generator) for generator in generators], dim=1)
    grids = sampling_grids(corners.flatten(0, 1), size).to(x)  # ((number - 1) B, size, size, 2)
    return torch.cat([x, F.grid_sample(x.repeat(number - 1, 1, 1, 1), grids, align_corners=False)])


CORNERS = torch.tensor([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])


def random_corners(number: int, generator: torch.Generator) -> Tensor:
    """Where each view's corners lie in the picture: (number, 4, 2) of (x, y), the picture spanning [-1, 1]."""
    u = torch.rand(number, 13, generator=generator)
    turned, skewed = (u[:, :1] < 0.7), (u[:, 1:2] < 0.7)
    angle = torch.deg2rad(15.0 * (2 * u[:, 2] - 1)) * turned[:, 0]
    shift = 0.2 * (2 * u[:, 3:5] - 1) * turned  # a tenth of the side, which is 2 long
    # the picture's corners go in where the view's corners, in the picture's own coordinates, go out
    stretch = 1 + 0.7 * u[:, 5:13].unflatten(1, (4, 2)) * skewed[..., None]
    corners = CORNERS * stretch
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))
    return corners @ rotation.transpose(1, 2) + shift[:, None]


def sampling_grids(corners: Tensor, size: int) -> Tensor:
    """Grids (N, size, size, 2) for `grid_sample` of the projective maps that take the square's corners to `corners`."""
    x, y = CORNERS.expand_as(corners).unbind(-1)  # (N, 4)
    x_to, y_to = corners.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    # x_to (h_6 x + h_7 y + 1) = h_0 x + h_1 y + h_2, and y_to (…) = h_3 x + h_4 y + h_5
    for_x = torch.stack([x, y, one, zero, zero, zero, -x_to * x, -x_to * y], dim=-1)
    for_y = torch.stack([zero, zero, zero, x, y, one, -y_to * x, -y_to * y], dim=-1)
    h = torch.linalg.solve(torch.cat([for_x, for_y], dim=1), torch.cat([x_to, y_to], dim=1))  # (N, 8)
    homography = torch.cat([h, one[:, :1]], dim=1).unflatten(1, (3, 3))

    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    points = torch.stack([*torch.meshgrid(centres, centres, indexing="xy"), torch.ones(size, size)], dim=-1)
    mapped = torch.einsum("nij,hwj->nhwi", homography, points)
    return mapped[..., :2] / mapped[..., 2:]


def predict_with_random_classes(model: ADM, generators: Sequence[torch.Generator]) -> Prediction:
    """The network in its own precision; one with classes is given a random one at each step, as the code does."""
    dtype = next(model.parameters()).dtype
    num_classes = model.config.num_classes

    def prediction(x_t: Tensor, t: Tensor) -> Tensor:
        y = None
        if num_classes is not None:
            y = torch.cat([torch.randint(num_classes, (1,), generator=g) for g in generators]).to(x_t.device)
        return model(x_t.to(dtype), t, y)

    return prediction


def load_networks(weights: WeightFiles) -> tuple[ADM, CLIP]:
    """The diffusion network, and CLIP in float32, through which gradients pass; neither keeps gradients of its own."""
    model, clip = weights.load("adm", ADM), replace(weights, dtype="float32").load("clip", CLIP)
    return model.requires_grad_(False), clip.requires_grad_(False)
