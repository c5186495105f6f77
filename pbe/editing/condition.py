"""What the networks are told about an edit: its exemplars, and the window around what is repainted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, cast

import torch
from PIL import Image
from torch import Tensor

from pbe.editing.settings import EditSettings
from pbe.images.pillow import PictureWarning
from pbe.images.reading import MaskLike, PictureLike, exemplar_tensor, read_exemplar
from pbe.io.fields import Range, check
from pbe.models.detail import at_strength
from pbe.models.paint_by_example import Condition, Distilled, PaintByExample

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
    if len(masks) != len(exemplars):
        raise ValueError(f"{name}_mask has {len(masks)} values for {len(exemplars)} {name}s; give one each")
    return [read_exemplar(*each, fit) for each in zip(exemplars, masks, names, strict=True)]


def mixed_context(
    model: PaintByExample,
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    weights: Sequence[float] | None,
    name: str = "exemplar",
    fit: bool = False,
) -> Tensor:
    """The condition (1, T, context_dim) of one exemplar, or the weighted mean of several exemplars', token by token."""
    exemplars = read_exemplars(exemplar, mask, name, fit)
    shares = check(f"{name}_weights", [1.0] * len(exemplars) if weights is None else weights, Weights)
    if len(shares) != len(exemplars):
        raise ValueError(f"{name}_weights has {len(shares)} values for {len(exemplars)} {name}s; give one each")
    if not sum(shares):
        raise ValueError(f"{name}_weights must not all be 0, got {weights!r}")

    size = model.config.exemplar.vision.image_size
    pixels = torch.cat([exemplar_tensor(one, size) for one in exemplars])
    contexts = model.encode_exemplar(pixels.to(model.device, model.dtype))  # (N, T, context_dim)
    w = torch.tensor(shares, dtype=torch.float32, device=model.device)[:, None, None] / sum(shares)
    return (w * contexts.float()).sum(dim=0, keepdim=True).to(model.dtype)


def contexts(
    model: PaintByExample,
    settings: EditSettings,
    exemplar: PictureLike | Sequence[PictureLike],
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None,
    exemplar_weights: Sequence[float] | None,
    negative: PictureLike | Sequence[PictureLike] | None,
    negative_mask: MaskLike | Sequence[MaskLike | None] | None,
    negative_weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor | None]:
    """`mixed_context` of the exemplars, and of the negative ones if there are any, with detail at its strength."""
    fit = settings.fit_mask
    if negative is None and not (negative_mask is None and negative_weights is None):
        raise ValueError("negative_mask and negative_weights are those of negative, which is not given")
    context = mixed_context(model, exemplar, exemplar_mask, exemplar_weights, fit=fit)
    null_context = None
    if negative is not None:
        warn_of_idle_negative(settings, model.config.distilled)
        null_context = mixed_context(model, negative, negative_mask, negative_weights, "negative", fit)
    if model.detail is None or settings.detail is None:
        return context, null_context
    both = context, model.null_context if null_context is None else null_context
    context, null_context = (at_strength(x, model.detail.config.tokens, settings.detail) for x in both)
    return context, null_context


def warn_of_idle_negative(settings: EditSettings, distilled: Distilled | None) -> None:
    """Warns where guidance leaves out the half that a negative exemplar is for."""
    if settings.guidance == 1:
        why = ", for which the model was distilled" if distilled is not None and distilled.guidance == 1 else ""
        message = f"negative does nothing at guidance=1{why}: it acts from above 1, more the larger guidance is"
        warnings.warn(message, PictureWarning, stacklevel=3)


def placed_size(
    exemplar: PictureLike | Sequence[PictureLike],
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None,
    settings: EditSettings,
) -> tuple[int, int] | None:
    """(height, width) of the first exemplar, where a mask's `placement` needs it."""
    if settings.placement == "fill":
        return None
    return read_exemplars(exemplar, exemplar_mask, fit=settings.fit_mask)[0].size[::-1]


def window_condition(model: PaintByExample, pixels: Tensor, keep: Tensor, context: Tensor, batch: int) -> Condition:
    """What the UNet needs to know to repaint what `crop_window` gives, for `batch` results."""
    pixels, keep = pixels.to(model.device, model.dtype), keep.to(model.device, model.dtype)
    z_masked, mask = model.encode_masked(pixels, keep.expand(len(pixels), -1, -1, -1))
    check_visible(mask)
    return Condition(*(x.expand(batch, *x.shape[1:]) for x in (z_masked, mask, context)))


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
