"""What the networks are told about an edit: its exemplars, and the window around what is repainted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from pbe.editing.settings import EditSettings
from pbe.images.pillow import PictureWarning
from pbe.images.reading import MaskLike, PictureLike, exemplar_tensor, read_exemplar, shown_tensor
from pbe.io.fields import Range, check
from pbe.models.collage import collages
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


class Mixture(NamedTuple):
    """Exemplars, and how much of the result each has a say in."""

    pixels: Tensor  # (N, 3, S, S) as CLIP takes them
    shown: Tensor  # (N, 1, S, S) in [0, 1], their objects
    aspects: list[float]  # height over width of their pictures
    shares: Tensor  # (N,), their sum is 1

    def context(self, model: PaintByExample) -> Tensor:
        """The condition (1, T, context_dim): of several exemplars the weighted mean, token by token."""
        contexts = model.encode_exemplar(self.pixels.to(model.device, model.dtype)).float()  # (N, T, context_dim)
        shares = self.shares.to(model.device)
        return (shares[:, None, None] * contexts).sum(dim=0, keepdim=True).to(model.dtype)

    def hole(self, windows: Tensor, keep: Tensor) -> Tensor:
        """The holes (B, 3, H, W) of windows of which `keep` (1, 1, H, W) is kept: each a weighted mean of collages."""
        N, means = len(self.pixels), []
        for window in windows.float().cpu():
            image, mask = (x.expand(N, -1, -1, -1) for x in (window, keep.float().cpu()))
            holes = collages(image, mask, self.pixels, self.aspects, self.shown)
            means.append((self.shares[:, None, None, None] * holes).sum(dim=0))
        return torch.stack(means)


def read_mixture(
    model: PaintByExample,
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    weights: Sequence[float] | None,
    name: str = "exemplar",
    fit: bool = False,
) -> Mixture:
    """One exemplar or several, for a model."""
    exemplars = read_exemplars(exemplar, mask, name, fit)
    shares = check(f"{name}_weights", [1.0] * len(exemplars) if weights is None else weights, Weights)
    if len(shares) != len(exemplars):
        raise ValueError(f"{name}_weights has {len(shares)} values for {len(exemplars)} {name}s; give one each")
    if not sum(shares):
        raise ValueError(f"{name}_weights must not all be 0, got {weights!r}")

    size = model.config.exemplar.vision.image_size
    pixels, shown = (torch.cat([make(one, size) for one in exemplars]) for make in (exemplar_tensor, shown_tensor))
    return Mixture(pixels, shown, [one.height / one.width for one in exemplars], torch.tensor(shares) / sum(shares))


class Told(NamedTuple):
    """What the UNet is told about an edit, whatever its window."""

    context: Tensor  # (1, T, context_dim)
    null_context: Tensor | None  # in the place of the model's own
    shown: Mixture | None  # in the hole of the masked image, if the model wants that


def read_told(
    model: PaintByExample,
    settings: EditSettings,
    exemplar: PictureLike | Sequence[PictureLike],
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None,
    exemplar_weights: Sequence[float] | None,
    negative: PictureLike | Sequence[PictureLike] | None,
    negative_mask: MaskLike | Sequence[MaskLike | None] | None,
    negative_weights: Sequence[float] | None,
) -> Told:
    """The contexts of the exemplars, and of the negative ones if there are any, with detail at its strength."""
    fit = settings.fit_mask
    if negative is None and not (negative_mask is None and negative_weights is None):
        raise ValueError("negative_mask and negative_weights are those of negative, which is not given")
    mixture = read_mixture(model, exemplar, exemplar_mask, exemplar_weights, fit=fit)
    context, null_context = mixture.context(model), None
    shown = mixture if model.config.collage else None
    if negative is not None:
        warn_of_idle_negative(settings, model.config.distilled)
        null_context = read_mixture(model, negative, negative_mask, negative_weights, "negative", fit).context(model)
    if model.detail is not None and settings.detail is not None:
        both = context, model.null_context if null_context is None else null_context
        context, null_context = (at_strength(x, model.detail.config.tokens, settings.detail) for x in both)
    return Told(context, null_context, shown)


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


def window_condition(model: PaintByExample, pixels: Tensor, keep: Tensor, told: Told, batch: int) -> Condition:
    """What the UNet needs to know to repaint what `crop_window` gives, for `batch` results."""
    hole = None if told.shown is None else told.shown.hole(pixels, keep).to(model.device, model.dtype)
    pixels, keep = pixels.to(model.device, model.dtype), keep.to(model.device, model.dtype)
    z_masked, mask = model.encode_masked(pixels, keep.expand(len(pixels), -1, -1, -1), hole=hole)
    check_visible(mask)
    return Condition(*(x.expand(batch, *x.shape[1:]) for x in (z_masked, mask, told.context)))


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
