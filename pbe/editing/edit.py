"""Editing: pictures in, pictures out. Window → condition → sample → decode → composite."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from torch import Tensor

from pbe.acceleration import PreparedModel, is_compiled, prepare_for_inference
from pbe.acceleration.offloading import on_device
from pbe.editing.preview import Preview, with_previews
from pbe.editing.settings import BY_SAMPLER, COUNT, SETTINGS, EditKeywords, EditSettings, settings_for
from pbe.editing.window import crop_window, feather_width, place_window, whole_window
from pbe.images import windows
from pbe.images.pillow import PictureWarning
from pbe.images.reading import (
    MaskLike,
    Picture,
    PictureLike,
    exemplar_tensor,
    read_exemplar,
    read_mask,
    read_picture,
)
from pbe.images.seams import poisson_blend
from pbe.io.fields import Range, check
from pbe.models.paint_by_example import Condition, Distilled, PaintByExample
from pbe.sampling import SPACINGS, Callback, NoiseSchedule, get_sampler, guided_eps, make_generators, randn

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weights = tuple[Annotated[float, Range(0)], ...]


@torch.no_grad()
def edit(
    model: PaintByExample,
    image: PictureLike | Picture,
    mask: MaskLike,
    exemplar: PictureLike | Sequence[PictureLike],
    *,
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None = None,
    exemplar_weights: Sequence[float] | None = None,
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
    preview: Preview | None = None,
    preview_every: int = 5,
    **keywords: Unpack[EditKeywords],
) -> list[PictureLike]:
    """The photo with the masked region repainted as the exemplar's object, `num_images` times.

    Each result has the photo's own size, kind and bit depth: a PIL image for a path or PIL image, an array for an
    array, a tensor for a tensor. Outside the mask every pixel is bit-identical to the photo's; what Pillow cannot give
    back (palettes, CMYK, 16-bit colour files) becomes 8-bit RGB, with a warning where depth is lost.

    Args:
        model: an ordinary model, or `pbe.acceleration.prepare_for_inference`'s, which saves preparing it for each edit.
        image: the photo; or what `pbe.images.reading.read_picture` made of it.
        mask: what to repaint: a picture of the photo's size (white = repaint), a box (x0, y0, x1, y1) or a polygon.
        exemplar: the object to paint; or a list of them, mixed as `exemplar_weights` say (default: equally).
        exemplar_mask: where the object is in its picture (white = object); for several exemplars a list of one each.
        num_images: how many results: the first has the seed `seed`, the others `seed + 1`, …
        batch_size: how many results are sampled at once.
        callback: called with a `StepInfo` after each step, for each batch and region again.
        preview: called after the first step, and each `preview_every`-th from there, with small pictures of what is
            painted, 8-bit RGB images of Pillow, one for each result of the batch, and the `StepInfo`. What it or
            `callback` raises ends the edit.
        keywords: the fields of `EditSettings`: steps, guidance, seed, … Where sampler, steps or guidance are not given,
            they are what the model was distilled for, and with the sampler comes its spacing; other values warn.

    Raises:
        FileNotFoundError: for a picture that is not there.
        ValueError: for any other input that cannot be edited, naming it and what would be right.
    """
    if not isinstance(model, PaintByExample):
        raise ValueError(f"editing needs a Paint by Example model, not a {type(model).__name__}")
    settings = settings_for(keywords, model.config.distilled)
    counts = {"num_images": num_images, "batch_size": batch_size, "preview_every": preview_every}
    for name, count in counts.items():
        check(name, count, COUNT)
    check("the last result's seed", settings.seed + num_images - 1, SETTINGS["seed"])
    if settings.decoder == "tiny" and model.tiny_decoder is None:
        raise ValueError("decoder='tiny' needs a model with a tiny decoder: --tiny-decoder FILE, tiny_decoder=FILE")
    warn_of_low_start(settings)
    warn_of_distillation(settings, model.config.distilled)
    picture = read_picture(image)
    repaint = read_mask(mask, picture.size)
    if not isinstance(model, PreparedModel) and not is_compiled(model):  # what a user compiled is used as it is
        model = prepare_for_inference(model)  # for each edit: the weights may have changed since the last
    if preview is not None:
        callback = with_previews(model, callback, preview, preview_every)
    with on_device(model.cond_stage_model, model.device):
        context = mixed_context(model, exemplar, exemplar_mask, exemplar_weights)

    results = [picture] * num_images
    for region in windows.connected_regions(repaint) if settings.regions == "each" else [repaint]:
        results = edit_region(model, results, region, context, settings, batch_size, callback)
    return [result.with_pixels(result.pixels) for result in results]


def with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with `EditSettings`' fields as keywords of their own, for `help` and completion."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    settings = inspect.signature(EditSettings).parameters.values()
    return signature.replace(parameters=[*own, *settings])


edit.__signature__ = with_settings(edit)  # type: ignore[attr-defined]


def edit_region(
    model: PaintByExample,
    photos: list[Picture],
    repaint: np.ndarray,
    context: Tensor,
    settings: EditSettings,
    batch_size: int,
    callback: Callback | None,
) -> list[Picture]:
    """The photos, one per seed, with `repaint` (H, W) edited in one window: condition → sample → decode → composite."""
    device, resolution = model.device, settings.resolution or model.config.resolution
    box = place_window(repaint, settings.window, settings.margin, resolution)
    size = windows.model_size(box, resolution, multiple=model.config.vae.downsampling)
    width = feather_width(box, resolution) if settings.feather is None else settings.feather
    weights = windows.feather_weights(repaint, width) if settings.composite else whole_window(box, repaint.shape)
    results = []
    for first in range(0, len(photos), batch_size):
        batch = photos[first : first + batch_size]
        seen, keep = crop_window(batch, repaint, box, size)
        with on_device(model.vae, device):
            condition = window_condition(model, seen, keep, context, len(batch))
            z_photo = photo_latents(model, seen) if settings.strength < 1 else None
        with on_device(model.unet, device):
            z_0 = sample_latents(model, condition, settings, settings.seed + first, callback, z_photo)
        with on_device(model.vae, device):
            tiny = model.tiny_decoder if settings.decoder == "tiny" else None
            edited = (tiny or model.vae.decode)(z_0.to(model.dtype))[..., : size[0], : size[1]]
        check_finite(edited)
        if settings.composite and settings.seam == "poisson":
            edited = poisson_blend(edited, seen, keep)
        results += [
            replace(photo, pixels=windows.composite(photo.pixels, one[None], box, weights))
            for photo, one in zip(batch, edited, strict=True)
        ]
    return results


def sample_latents(
    model: PaintByExample,
    condition: Condition,
    settings: EditSettings,
    seed: int,
    callback: Callback | None = None,
    z_photo: Tensor | None = None,
) -> Tensor:
    """Latents z_0 (B, 4, h, w) for a condition, sampled as the settings say with the seeds `seed`, `seed + 1`, …

    With a strength below 1 they start from the photo's, `z_photo` (B or 1, 4, h, w).
    """
    generators = make_generators(seed, len(condition.z_masked))
    x_t = randn(condition.z_masked.shape[1:], generators, model.device)
    grid = SPACINGS[settings.spacing](NoiseSchedule.scaled_linear(), settings.steps)
    if z_photo is not None:
        grid = grid.last(settings.steps_taken)
        x_t = grid.start_from(z_photo.to(x_t), x_t)
    eps = guided_eps(model, condition, settings.guidance, grid, settings.guidance_interval, settings.reuse)
    sampler = get_sampler(settings.sampler)
    return sampler(eps, x_t, grid, eta=settings.eta, generators=generators, callback=callback)


def check_finite(edited: Tensor) -> None:
    """Raises `ValueError` for a picture with NaN or infinity, which float16 can bring about."""
    if not edited.isfinite().all():
        narrow = edited.dtype == torch.float16
        advice = "use bfloat16 or float32" if narrow else "is the guidance too large, or the checkpoint damaged?"
        raise ValueError(f"the model's picture is not finite in {edited.dtype}: {advice}")


def warn_of_low_start(settings: EditSettings) -> None:
    """Warns where the first timestep is too low for pure noise: few or odd numbers of steps leave the end out."""
    schedule, steps = NoiseSchedule.scaled_linear(), settings.steps
    start = SPACINGS[settings.spacing](schedule, steps)[0].t
    if settings.strength == 1 and start < 0.75 * schedule.num_timesteps:
        warnings.warn(
            f"steps={steps} begins at timestep {start} of {schedule.num_timesteps}, where pictures show already, "
            "and the result will be poor: 4 to 333 steps, a divisor of 1000, or spacing='trailing' begin higher",
            PictureWarning,
            stacklevel=3,
        )


def warn_of_distillation(settings: EditSettings, distilled: Distilled | None) -> None:
    """Warns where a distilled model is used otherwise than it was distilled for, or an ordinary one as if it were."""
    used = {name: getattr(settings, name) for name in ("sampler", "steps", "guidance")}
    if distilled is None and settings.sampler in BY_SAMPLER:
        problem = f"sampler={settings.sampler!r} is for distilled models, which this one is not, and the result will"
        warnings.warn(f"{problem} be poor: dpm_solver needs few steps of any model", PictureWarning, stacklevel=3)
    elif distilled is not None and used != vars(distilled):
        asked, right = (", ".join(f"{k}={v!r}" for k, v in values.items()) for values in (used, vars(distilled)))
        message = f"the model was distilled for {right}; with {asked} the result may be poor"
        warnings.warn(message, PictureWarning, stacklevel=3)


# ----------------------------------------------------------------------------------------------------------------------
# The condition


def mixed_context(
    model: PaintByExample,
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    weights: Sequence[float] | None,
) -> Tensor:
    """The condition (1, 1, context_dim) of one exemplar, or the weighted mean of several exemplars' conditions."""
    if isinstance(exemplar, list | tuple):
        exemplars = list(exemplar)
        masks = [None] * len(exemplars) if mask is None else list(cast("Sequence[MaskLike | None]", mask))
        names = [f"exemplar {i + 1}" for i in range(len(exemplars))]
    else:
        exemplars, masks, names = [exemplar], [cast("MaskLike | None", mask)], ["exemplar"]
    if not exemplars:
        raise ValueError("exemplar is an empty list; at least one picture is needed")
    shares = check("exemplar_weights", [1.0] * len(exemplars) if weights is None else weights, Weights)
    for name, values in (("exemplar_mask", masks), ("exemplar_weights", shares)):
        if len(values) != len(exemplars):
            raise ValueError(f"{name} has {len(values)} values for {len(exemplars)} exemplars; give one each")
    if not sum(shares):
        raise ValueError(f"exemplar_weights must not all be 0, got {weights!r}")

    size = model.config.exemplar.vision.image_size
    pixels = torch.cat([exemplar_tensor(read_exemplar(*e), size) for e in zip(exemplars, masks, names, strict=True)])
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
