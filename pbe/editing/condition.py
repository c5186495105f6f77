"""What the networks are told about an edit: its exemplars, and the window around what is repainted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, cast

import torch
from PIL import Image
from torch import Tensor

from pbe.images.pillow import PictureWarning
from pbe.images.reading import MaskLike, PictureLike, exemplar_tensor, read_exemplar
from pbe.io.fields import Range, check
from pbe.models.paint_by_example import Condition, PaintByExample

Weights = tuple[Annotated[float, Range(0)], ...]


def read_exemplars(
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    name: str = "exemplar",
    fit: bool = False,
) -> list[Image.Image]:
    """One exemplar or a list of them, each cut out as `read_exemplar` does; ValueError for a wrong number of masks."""
    if isinstance(exemplar, list | tuple):
        exemplars = list(exemplar)
        masks = [None] * len(exemplars) if mask is None else list(cast("Sequence[MaskLike | None]", mask))
        names = [f"{name} {i + 1}" for i in range(len(exemplars))] if len(exemplars) > 1 else [name]
    else:
        exemplars, masks, names = [exemplar], [cast("MaskLike | None", mask)], [name]
    if not exemplars:
        raise ValueError(f"{name} is an empty list; at least one picture is needed")
    check_one_each(f"{name}_mask", len(masks), len(exemplars), name)
    return [read_exemplar(*each, fit) for each in zip(exemplars, masks, names, strict=True)]


def check_one_each(what: str, number: int, exemplars: int, name: str = "exemplar") -> None:
    """ValueError unless there is one value for each exemplar."""
    if number != exemplars:
        raise ValueError(f"{what} has {number} values for {exemplars} {name}s; give one each")


def mixed_context(
    model: PaintByExample,
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    weights: Sequence[float] | None,
    name: str = "exemplar",
    fit: bool = False,
) -> Tensor:
    """The condition (1, 1, context_dim) of one exemplar, or the weighted mean of several exemplars' conditions."""
    exemplars = read_exemplars(exemplar, mask, name, fit)
    shares = check(f"{name}_weights", [1.0] * len(exemplars) if weights is None else weights, Weights)
    check_one_each(f"{name}_weights", len(shares), len(exemplars), name)
    if not sum(shares):
        raise ValueError(f"{name}_weights must not all be 0, got {weights!r}")

    size = model.config.exemplar.vision.image_size
    pixels = torch.cat([exemplar_tensor(one, size) for one in exemplars])
    contexts = model.encode_exemplar(pixels.to(model.device, model.dtype))  # (N, 1, context_dim)
    w = torch.tensor(shares, dtype=torch.float32, device=model.device)[:, None, None] / sum(shares)
    return (w * contexts.float()).sum(dim=0, keepdim=True).to(model.dtype)


def window_condition(model: PaintByExample, pixels: Tensor, keep: Tensor, context: Tensor, batch: int) -> Condition:
    """What the UNet needs to know to repaint what `crop_window` gives, for `batch` results."""
    pixels, keep = pixels.to(model.device, model.dtype), keep.to(model.device, model.dtype)
    z_masked, mask = model.encode_masked(pixels, keep.expand(len(pixels), -1, -1, -1))
    check_visible(mask)
    return Condition(*(x.expand(batch, *x.shape[1:]) for x in (z_masked, mask, context)))


def photo_latents(model: PaintByExample, pixels: Tensor) -> Tensor:
    """The posterior's mean (B, 4, h, w) of what `crop_window` gives, the latents that `strength` starts from."""
    return model.vae.encode(pixels.to(model.device, model.dtype)).mean


LARGER_MASK = "draw it wider, zoom in on it (window='auto') or work at a higher resolution"


def check_visible(mask: Tensor) -> None:
    """Raises or warns if a mask (B, 1, h, w), 1 = keep, has all but vanished at latent size."""
    visible = (1 - mask.float()).sum().item() / len(mask)
    if visible == 0:
        raise ValueError(f"the mask is too small for the model to see in this window; {LARGER_MASK}")
    if visible < 1:
        warnings.warn(
            f"the mask covers {visible:.2f} of one cell of what the model sees, and will hardly show; {LARGER_MASK}",
            PictureWarning,
            stacklevel=4,
        )
