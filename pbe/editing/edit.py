"""Editing: pictures in, pictures out. Window → condition → sample → decode → composite."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pbe.acceleration import PreparedModel, is_compiled, prepare_for_inference
from pbe.acceleration.offloading import on_device
from pbe.editing.canvas import Canvas, read_canvas
from pbe.editing.condition import Told, placed_size, read_told, window_condition
from pbe.editing.preview import Preview, with_previews
from pbe.editing.settings import BY_SAMPLER, COUNT, SETTINGS, EditKeywords, EditSettings, settings_for
from pbe.editing.together import Sampling, Steps, sampled
from pbe.editing.window import crop_window, place_window, seam_weights
from pbe.images import windows
from pbe.images.pillow import PictureWarning
from pbe.images.reading import MaskLike, Picture, PictureLike
from pbe.images.seams import poisson_blend
from pbe.images.windows import Box
from pbe.io.fields import check
from pbe.models.paint_by_example import Condition, Distilled, PaintByExample
from pbe.sampling import SPACINGS, Callback, NoiseSchedule, get_sampler, guided_eps, make_generators, randn

if TYPE_CHECKING:
    from typing_extensions import Unpack


@sampled
def edit(
    model: PaintByExample,
    image: PictureLike | Picture | Canvas,
    mask: MaskLike | None,
    exemplar: PictureLike | Sequence[PictureLike],
    *,
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None = None,
    exemplar_weights: Sequence[float] | None = None,
    negative: PictureLike | Sequence[PictureLike] | None = None,
    negative_mask: MaskLike | Sequence[MaskLike | None] | None = None,
    negative_weights: Sequence[float] | None = None,
    latents: Tensor | None = None,
    output: Literal["pictures", "latents"] = "pictures",
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
    preview: Preview | None = None,
    preview_every: int = 5,
    **keywords: Unpack[EditKeywords],
) -> Steps[list[PictureLike]]:
    """The photo with the masked region repainted as the exemplar's object, `num_images` times.

    Each result has the photo's own size, kind and bit depth: a PIL image for a path or PIL image, an array for an
    array, a tensor for a tensor. Outside the mask every pixel is bit-identical to the photo's; what Pillow cannot give
    back (palettes, CMYK, 16-bit colour files) becomes 8-bit RGB, with a warning where depth is lost.

    Args:
        model: an ordinary model, or `pbe.acceleration.prepare_for_inference`'s, which saves preparing it for each edit.
        image: the photo; or what `pbe.images.reading.read_picture` made of it, or `pbe.editing.canvas.read_canvas` of
            it and the mask, which then is None.
        mask: what to repaint: a picture of the photo's size (white = repaint), a box (x0, y0, x1, y1) or a polygon.
            None: what `extend` adds, or without that the transparent part of the photo, which becomes opaque.
        exemplar: the object to paint; or a list of them, mixed as `exemplar_weights` say (default: equally).
        exemplar_mask: where the object is in its picture (white = object); for several exemplars a list of one each.
        negative: what guidance leads away from, as `exemplar`: it stands in the place of the learned vector.
        negative_mask: as `exemplar_mask`.
        negative_weights: as `exemplar_weights`.
        latents: standard normal noise (num_images or 1, 4, h, w) in place of the seeds', for windows of h x w latents.
        output: "latents" for each result's z_0 (1, 4, h, w) of its window, float32 on the CPU, in place of a picture.
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
    settings = choose_settings(model, keywords, num_images, batch_size, preview_every)
    check("output", output, Literal["pictures", "latents"])
    given = exemplar, exemplar_mask, exemplar_weights, negative, negative_mask, negative_weights
    if isinstance(image, Canvas):
        canvas = image
    else:
        canvas = read_canvas(image, mask, settings, placed_size(exemplar, exemplar_mask, settings))
    if output == "latents" and len(canvas.regions) > 1:
        raise ValueError(f"output='latents' is of one window, and split_mask has {len(canvas.regions)} here")
    noise = None if latents is None else check_latents(latents, num_images)
    model, callback = make_ready(model, callback, preview, preview_every)
    with on_device(model.cond_stage_model, model.device):
        told = read_told(model, settings, *given)

    results = [canvas.picture] * num_images
    for region in canvas.regions:
        painted = yield from paint_region(model, results, region, told, settings, batch_size, callback, noise)
        if output == "latents":
            return [z_0 for batch in painted for z_0 in batch.z_0.float().cpu().split(1)]
        results = edit_region(model, results, region, painted, settings)
    return [canvas.finish(result) for result in results]


def with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with `EditSettings`' fields as keywords of their own, for `help` and completion."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    settings = inspect.signature(EditSettings).parameters.values()
    return signature.replace(parameters=[*own, *settings], return_annotation="list[PictureLike]")


edit.__signature__ = with_settings(edit)  # type: ignore[attr-defined]


def choose_settings(
    model: PaintByExample, keywords: EditKeywords, num_images: int, batch_size: int, preview_every: int
) -> EditSettings:
    """The settings of an edit by a model; ValueError for what it cannot do, and warnings as `check_edit`."""
    if not isinstance(model, PaintByExample):
        raise ValueError(f"editing needs a Paint by Example model, not a {type(model).__name__}")
    settings = settings_for(keywords, model.config.distilled)
    check_edit(model, settings, num_images=num_images, batch_size=batch_size, preview_every=preview_every)
    return settings


def make_ready(
    model: PaintByExample, callback: Callback | None, preview: Preview | None, preview_every: int
) -> tuple[PaintByExample, Callback | None]:
    """The model as it edits, and what is called after its steps."""
    if not isinstance(model, PreparedModel) and not is_compiled(model):  # what a user compiled is used as it is
        model = prepare_for_inference(model)  # for each edit: the weights may have changed since the last
    return model, callback if preview is None else with_previews(model, callback, preview, preview_every)


class Painted(NamedTuple):
    """What is painted in one window of some photos, one per seed."""

    box: Box
    seen: Tensor  # what the model saw of them, (B or 1, 3, H, W) in [-1, 1]
    keep: Tensor  # (1, 1, H, W), 1 = keep
    z_0: Tensor  # (B, 4, h, w)


def paint_region(
    model: PaintByExample,
    photos: list[Picture],
    repaint: np.ndarray,
    told: Told,
    settings: EditSettings,
    batch_size: int,
    callback: Callback | None = None,
    noise: Tensor | None = None,
) -> Steps[list[Painted]]:
    """Latents for the region `repaint` (H, W) of the photos, one per seed, in one window: condition → sample.

    `noise` (as many as photos, or 1, 4, h, w) stands in the place of the seeds'.
    """
    device, resolution = model.device, settings.resolution or model.config.resolution
    box = place_window(repaint, settings.window, settings.margin, resolution)
    size = windows.model_size(box, resolution, multiple=model.config.vae.downsampling)
    painted: list[Painted] = []
    for first in range(0, len(photos), batch_size):
        batch = photos[first : first + batch_size]
        seen, keep = crop_window(batch, repaint, box, size)
        with on_device(model.vae, device):
            condition = window_condition(model, seen, keep, told, len(batch))
            z_photo = model.vae.encode(seen.to(device, model.dtype)).mean if settings.strength < 1 else None
        own = noise if noise is None or len(noise) == 1 else noise[first : first + batch_size]
        seeds = range(settings.seed + first, settings.seed + first + len(batch))
        z_0 = yield Sampling(model, condition, settings, seeds, callback, z_photo, told.null_context, own)
        painted.append(Painted(box, seen, keep, z_0))
    return painted


def edit_region(
    model: PaintByExample,
    photos: Sequence[Picture],
    repaint: np.ndarray,
    painted: Iterable[Painted],
    settings: EditSettings,
) -> list[Picture]:
    """The photos with what `paint_region` has painted in the region: decode → composite."""
    results: list[Picture] = []
    for box, seen, keep, z_0 in painted:
        with on_device(model.vae, model.device):
            tiny = model.tiny_decoder if settings.decoder == "tiny" else None
            edited = (tiny or model.vae.decode)(z_0.to(model.dtype))[..., : seen.shape[2], : seen.shape[3]]
        check_finite(edited)
        if settings.composite and settings.seam == "poisson":
            edited = poisson_blend(edited, seen, keep)
        if not results:
            weights = seam_weights(repaint, box, settings, settings.resolution or model.config.resolution)
        results += [
            replace(photo, pixels=windows.composite(photo.pixels, one[None], box, weights))
            for photo, one in zip(photos[len(results) : len(results) + len(edited)], edited, strict=True)
        ]
    return results


def sample_latents(
    model: PaintByExample,
    condition: Condition,
    settings: EditSettings,
    seeds: Sequence[int],
    callback: Callback | None = None,
    z_photo: Tensor | None = None,
    null_context: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Latents z_0 (B, 4, h, w) for a condition, sampled as the settings say with one of the seeds each.

    They start from noise and what `model.start` gives or, with a strength below 1, from the photo's, `z_photo` (B or 1,
    4, h, w). `null_context` (B or 1, 1, context_dim) and `noise` (B or 1, 4, h, w) stand in the place of the model's
    own and of the seeds', whose later draws stay.
    """
    shape = condition.z_masked.shape
    generators = [generator for seed in seeds for generator in make_generators(seed, 1)]
    x_t = randn(shape[1:], generators, model.device)
    if noise is not None:
        if noise.shape[1:] != shape[1:]:
            wanted = ", ".join(map(str, shape[1:]))
            raise ValueError(f"latents must be (num_images or 1, {wanted}) for this window, got {tuple(noise.shape)}")
        x_t = noise.to(x_t).expand(shape)
    schedule = NoiseSchedule.scaled_linear().first(model.config.num_timesteps)
    grid = SPACINGS[settings.spacing](schedule, settings.steps)
    if z_photo is not None:
        grid = grid.last(settings.steps_taken)
    x_t = grid.start_from(model.start(condition) if z_photo is None else z_photo, x_t)
    guidance, interval = settings.guidance, settings.guidance_interval
    eps = guided_eps(model, condition, guidance, grid, interval, settings.reuse, null_context)
    sampler = get_sampler(settings.sampler)
    return sampler(eps, x_t, grid, eta=settings.eta, generators=generators, callback=callback)


def check_edit(model: PaintByExample, settings: EditSettings, **counts: int) -> None:
    """ValueError for what `edit` cannot do, and warnings for what it will do badly."""
    for name, count in counts.items():
        check(name, count, COUNT)
    check("the last result's seed", settings.seed + counts["num_images"] - 1, SETTINGS["seed"])
    if settings.decoder == "tiny" and model.tiny_decoder is None:
        raise ValueError("decoder='tiny' needs a model with a tiny decoder: --tiny-decoder FILE, tiny_decoder=FILE")
    if settings.detail and model.detail is None:
        raise ValueError(f"detail={settings.detail:g} needs a model with a detail adapter: --adapter, adapters=[FILE]")
    if not model.config.collage:  # which starts from more than noise
        warn_of_low_start(settings)
    warn_of_distillation(settings, model.config.distilled)


def check_latents(latents: Tensor, num_images: int) -> Tensor:
    """ValueError for what is not noise for one result, or for each."""
    kind = f"{tuple(latents.shape)} {latents.dtype}" if isinstance(latents, Tensor) else type(latents).__name__
    is_noise = isinstance(latents, Tensor) and latents.is_floating_point() and bool(latents.isfinite().all())
    if not (is_noise and latents.ndim == 4 and len(latents) in (1, num_images)):
        raise ValueError(f"latents must be finite floats of shape ({num_images} or 1, 4, h, w), got {kind}")
    return latents


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
            stacklevel=4,
        )


def warn_of_distillation(settings: EditSettings, distilled: Distilled | None) -> None:
    """Warns where a distilled model is used otherwise than it was distilled for, or an ordinary one as if it were."""
    used = {name: getattr(settings, name) for name in ("sampler", "steps", "guidance")}
    if distilled is None and settings.sampler in BY_SAMPLER:
        problem = f"sampler={settings.sampler!r} is for distilled models, which this one is not, and the result will"
        warnings.warn(f"{problem} be poor: dpm_solver needs few steps of any model", PictureWarning, stacklevel=4)
    elif distilled is not None and used != vars(distilled):
        asked, right = (", ".join(f"{k}={v!r}" for k, v in values.items()) for values in (used, vars(distilled)))
        message = f"the model was distilled for {right}; with {asked} the result may be poor"
        warnings.warn(message, PictureWarning, stacklevel=4)
