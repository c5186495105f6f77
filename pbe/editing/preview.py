"""Small pictures of what is being painted, step by step: soon, and not exact."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pbe.acceleration.offloading import on_device
from pbe.models.paint_by_example import PaintByExample
from pbe.models.vae import AutoencoderKL
from pbe.sampling import Callback, StepInfo, make_generators, randn

Preview = Callable[[list[Image.Image], StepInfo], object]

MAX_SIDE = 256  # in pixels
_MAPS: WeakKeyDictionary[AutoencoderKL, Tensor] = WeakKeyDictionary()


def with_previews(model: PaintByExample, callback: Callback | None, preview: Preview, every: int) -> Callback:
    """A sampler's callback that calls `callback`, and after the first step, and each `every`-th from there, `preview`
    with 8-bit RGB pictures of z_0, one per result of the batch: the model's own pictures of its window.

    They are the tiny decoder's, averaged to at most 256 pixels a side, or a linear map's, a pixel for each latent cell.
    """
    if model.tiny_decoder is None and model.vae not in _MAPS:
        _MAPS[model.vae] = latents_to_rgb(model)

    def after_step(step: StepInfo) -> None:
        if callback is not None:
            callback(step)
        if step.index % every == 0:
            preview(pictures(model, step.z_0), step)

    return after_step


def pictures(model: PaintByExample, z_0: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures of latents z_0 (B, z, h, w)."""
    if model.tiny_decoder is not None:
        rgb = model.tiny_decoder(z_0.to(model.dtype))
        rgb = F.avg_pool2d(rgb, -(-max(rgb.shape[2:]) // MAX_SIDE))
    else:
        to_rgb = _MAPS[model.vae].T  # (3, z + 1)
        rgb = F.conv2d(z_0.float(), to_rgb[:, :-1, None, None], to_rgb[:, -1])
    pixels = ((rgb.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def latents_to_rgb(model: PaintByExample) -> Tensor:
    """The affine map (z + 1, 3) from a latent cell to the mean colour in [-1, 1] of its pixels, by least squares.

    It is fitted to how the autoencoder encodes coloured tiles, always the same: for docs/demo-model.md's 64-pixel model
    R² is 0.80 on photos that were held out, where a map fitted to other photos has 0.87.
    """
    f = model.config.vae.downsampling
    tiles = [F.interpolate(randn((3, n, n), make_generators(n, 4)), size=16 * f) for n in (4, 8, 16, 32)]
    picture = (0.3 * torch.stack(tiles).sum(dim=0)).clamp(-1, 1)  # (4, 3, 16 f, 16 f)
    with on_device(model.vae, model.device):
        z_0 = model.vae.encode(picture.to(model.device, model.dtype)).mean.float().cpu()
    known = F.pad(z_0, (0, 0, 0, 0, 0, 1), value=1.0)  # (4, z + 1, 16, 16)
    cells, colours = (x.transpose(0, 1).flatten(1).T for x in (known, F.avg_pool2d(picture, f)))  # (1024, …)
    return torch.linalg.lstsq(cells, colours).solution.to(model.device)
