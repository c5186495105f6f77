"""Editing: pictures in, pictures out. Window → condition → sample → decode → composite."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pbe.acceleration import PreparedModel, is_compiled, prepare_for_inference
from pbe.acceleration.offloading import on_device
from pbe.images import windows
from pbe.images.reading import (
    MaskLike,
    Picture,
    PictureLike,
    PictureWarning,
    exemplar_tensor,
    read_exemplar,
    read_mask,
    read_picture,
)
from pbe.images.seams import meet_photo
from pbe.images.windows import Box
from pbe.models.paint_by_example import Condition, PaintByExample
from pbe.sampling import Callback, NoiseSchedule, Sampler, get_sampler, guided_eps, make_generators, randn


@torch.no_grad()
def edit(
    model: PaintByExample,
    image: PictureLike,
    mask: MaskLike,
    exemplar: PictureLike | Sequence[PictureLike],
    *,
    exemplar_mask: MaskLike | Sequence[MaskLike | None] | None = None,
    exemplar_weights: Sequence[float] | None = None,
    steps: int = 50,
    guidance: float = 5.0,
    guidance_interval: tuple[int, int] | None = None,
    sampler: str = "plms",
    eta: float = 0.0,
    spacing: Literal["leading", "trailing"] = "leading",
    seed: int = 321,
    num_images: int = 1,
    batch_size: int = 4,
    window: Literal["auto", "full"] | tuple[int, int, int, int] = "auto",
    regions: Literal["together", "each"] = "together",
    composite: bool = True,
    seam: Literal["poisson", "feather"] = "poisson",
    feather: int | None = None,
    margin: float = 0.1,
    resolution: int | None = None,
    callback: Callback | None = None,
) -> list[PictureLike]:
    """The photo with the masked region repainted as the exemplar's object, `num_images` times.

    Each result has the photo's own size, kind and bit depth: a PIL image for a path or PIL image, an array for an
    array, a tensor for a tensor. Outside the mask every pixel is bit-identical to the photo's; what Pillow cannot give
    back (palettes, CMYK, 16-bit colour files) becomes 8-bit RGB, with a warning where depth is lost.

    Args:
        model: an ordinary model, or `pbe.acceleration.prepare_for_inference`'s, which saves preparing it for each edit.
        image: the photo.
        mask: what to repaint: a picture of the photo's size (white = repaint), a box (x0, y0, x1, y1) or a polygon.
        exemplar: the object to paint; or a list of them, mixed as `exemplar_weights` say (default: equally).
        exemplar_mask: where the object is in its picture (white = object); a list of one each for several exemplars.
        steps: sampling steps, 1 to 1000.
        guidance: the scale λ of classifier-free guidance, eps_u + λ (eps_c - eps_u).
        guidance_interval: the timesteps (t_low, t_high] with guidance, of 0 to 999, the noisiest; at others λ is 1, and
            the network has half the work (default: all).
        sampler: "plms", "ddim", "ddpm" or "dpm_solver"; `eta` in [0, 1] is for "ddim" alone.
        spacing: of the timesteps: "leading", the original's, or "trailing", which starts from the noisiest timestep
            whatever their number, and with few steps comes nearer to what many give.
        seed: of the first result; the others have seed + 1, … A result depends on its own seed alone.
        batch_size: how many results are sampled at once.
        window: the part of the photo that the model sees: "auto" (around the mask, so that it is neither tiny nor
            without context), "full" (the whole photo), or a box.
        regions: "together" edits the whole mask in one window, "each" its separate regions one after the other.
        composite: put only the masked pixels into the photo; False puts in the model's own picture of all the window.
        seam: "poisson" lets the result meet the photo at the mask's border: what the model's picture differs from the
            photo by around the mask is continued harmonically into it and taken off, as in Poisson image editing (Pérez
            et al. 2003). "feather" leaves the model's colours as they are.
        feather: width in photo pixels of the soft seam, which lies inside the mask (default: a 64th of the window, and
            two of the model's pixels at least).
        margin: the share of an automatic window's side that is kept free on each side of the mask.
        resolution: side in pixels at which the model works (default: the one it was trained on).
        callback: called with a `StepInfo` after each step, for each batch and region anew.

    Raises:
        FileNotFoundError: for a picture that is not there.
        ValueError: for any other input that cannot be edited, naming it and what would be right.
    """
    if not isinstance(model, PaintByExample):
        raise ValueError(f"editing needs a Paint by Example model, not a {type(model).__name__}")
    check_settings(
        steps=steps,
        guidance=guidance,
        guidance_interval=guidance_interval,
        sampler=sampler,
        eta=eta,
        spacing=spacing,
        seed=seed,
        num_images=num_images,
        batch_size=batch_size,
        window=window,
        regions=regions,
        seam=seam,
        feather=feather,
        margin=margin,
        resolution=resolution,
    )
    schedule = NoiseSchedule.scaled_linear(spacing=spacing)
    timesteps = schedule.timesteps(steps)
    warn_of_low_start(schedule, steps)
    draw = partial(choose_sampler(sampler, eta), schedule=schedule, steps=steps, callback=callback)
    if resolution is None:
        resolution = model.config.resolution

    picture = read_picture(image)
    repaint = read_mask(mask, picture.size)
    if not isinstance(model, PreparedModel) and not is_compiled(model):  # what a user compiled is used as it is
        model = prepare_for_inference(model)  # anew for each edit: the weights may have changed since the last
    device = model.device
    with on_device(model.cond_stage_model, device):
        context = mixed_context(model, exemplar, exemplar_mask, exemplar_weights)

    results = [picture] * num_images
    for region in windows.connected_regions(repaint) if regions == "each" else [repaint]:
        box = place_window(region, window, margin, resolution)
        size = windows.model_size(box, resolution, multiple=model.config.vae.downsampling)
        width = feather_width(box, resolution) if feather is None else feather
        weights = windows.feather_weights(region, width) if composite else whole_window(box, picture.size)
        for first in range(0, num_images, batch_size):
            batch = results[first : first + batch_size]
            seen, keep = see_window(batch, region, box, size)
            with on_device(model.vae, device):
                condition = window_condition(model, seen, keep, context, len(batch))
            generators = make_generators(int(seed) + first, len(batch))
            x_T = randn(condition.z_masked.shape[1:], generators, device)
            with on_device(model.unet, device):
                eps = guided_eps(model, condition, guidance, timesteps, guidance_interval)
                z_0 = draw(eps, x_T, generators=generators)
            with on_device(model.vae, device):
                edited = model.vae.decode(z_0.to(model.dtype))[..., : size[0], : size[1]]
            check_finite(edited)
            if composite and seam == "poisson":
                edited = meet_photo(edited, seen, keep)
            results[first : first + batch_size] = [
                replace(photo, pixels=windows.composite(photo.pixels, one[None], box, weights))
                for photo, one in zip(batch, edited, strict=True)
            ]
    return [result.with_pixels(result.pixels) for result in results]


def check_settings(
    *,
    steps: int,
    guidance: float,
    guidance_interval: tuple[int, int] | None,
    sampler: str,
    eta: float,
    spacing: str,
    seed: int,
    num_images: int,
    batch_size: int,
    window: Literal["auto", "full"] | tuple[int, int, int, int],
    regions: str,
    seam: str,
    feather: int | None,
    margin: float,
    resolution: int | None,
) -> None:
    """Raises `ValueError` for settings of `edit` that no model and no photo could make right."""
    NoiseSchedule.scaled_linear(spacing=spacing).timesteps(steps)
    choose_sampler(sampler, eta)
    if not (is_number(guidance) and guidance >= 0):
        raise ValueError(f"guidance must be 0 or more, got {guidance!r}")
    if guidance_interval is not None and not is_interval(guidance_interval):
        raise ValueError(
            "guidance_interval must be two whole timesteps (t_low, t_high), -1 <= t_low <= t_high <= 1000, "
            f"got {guidance_interval!r}"
        )
    if not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f"eta must be between 0 and 1, got {eta!r}")
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    if not (isinstance(seed, Integral) and 0 <= int(seed) <= 2**64 - int(num_images)):  # torch's seeds have 64 bits
        raise ValueError(
            f"seed must be a whole number from 0 to 2**64 - 1, the last result's too; "
            f"got {seed!r} with num_images={num_images}"
        )
    if regions not in ("together", "each"):
        raise ValueError(f"regions must be 'together' or 'each', got {regions!r}")
    if seam not in ("poisson", "feather"):
        raise ValueError(f"seam must be 'poisson' or 'feather', got {seam!r}")
    if isinstance(window, str):
        is_window = window in ("auto", "full")
    else:
        is_window = isinstance(window, Sequence | np.ndarray) and len(window) == 4
        is_window = is_window and all(is_number(x) and x == int(x) for x in window)
    if not is_window:
        raise ValueError(f"window must be 'auto', 'full' or a box (x0, y0, x1, y1) of whole pixels, got {window!r}")
    if feather is not None and not (isinstance(feather, Integral) and feather >= 0):
        raise ValueError(f"feather must be a whole number of pixels, 0 or more, got {feather!r}")
    if not (is_number(margin) and 0 <= margin < 0.5):
        raise ValueError(f"margin must be at least 0 and below 0.5, got {margin!r}")
    if resolution is not None and not (isinstance(resolution, Integral) and resolution >= 8 and resolution % 8 == 0):
        raise ValueError(f"resolution must be a whole number, a positive multiple of 8, got {resolution!r}")


def is_number(value: object) -> bool:
    """Whether `value` is a real number, neither NaN nor infinite."""
    return isinstance(value, Real) and math.isfinite(value)


def is_interval(value: tuple[int, int]) -> bool:
    """Whether `value` is a guidance interval; a lower end of -1 takes in timestep 0."""
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(t, Integral) for t in value)
    return is_pair and -1 <= value[0] <= value[1] <= 1000


def check_finite(edited: Tensor) -> None:
    """Raises `ValueError` for a picture with NaN or infinity, which float16 can bring about."""
    if not edited.isfinite().all():
        narrow = edited.dtype == torch.float16
        advice = "use bfloat16 or float32" if narrow else "is the guidance too large, or the checkpoint damaged?"
        raise ValueError(f"the model's picture is not finite in {edited.dtype}: {advice}")


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def choose_sampler(name: str, eta: float) -> Sampler:
    """The sampler called `name`, with DDIM's `eta`."""
    sampler = get_sampler(name)
    if name == "ddim":
        return partial(sampler, eta=eta)
    if eta:
        raise ValueError(f"eta={eta} is for the sampler 'ddim', not {name!r}")
    return sampler


def warn_of_low_start(schedule: NoiseSchedule, steps: int) -> None:
    """Warns where the first timestep is too low for pure noise: few or odd numbers of steps leave the end out."""
    start = max(schedule.timesteps(steps))
    if start < 0.75 * schedule.num_timesteps:
        warnings.warn(
            f"steps={steps} begins at timestep {start} of {schedule.num_timesteps}, where pictures show already, "
            "and the result will be poor: 4 to 333 steps, a divisor of 1000, or spacing='trailing' begin higher",
            PictureWarning,
            stacklevel=3,
        )


# ----------------------------------------------------------------------------------------------------------------------
# The condition


def mixed_context(
    model: PaintByExample,
    exemplar: PictureLike | Sequence[PictureLike],
    mask: MaskLike | Sequence[MaskLike | None] | None,
    weights: Sequence[float] | None,
) -> Tensor:
    """The condition (1, 1, context_dim) of one exemplar, or the weighted mean of several exemplars' conditions."""
    several = isinstance(exemplar, list | tuple)
    exemplars, masks = (list(exemplar), mask) if several else ([exemplar], [mask])
    if not exemplars:
        raise ValueError("exemplar is an empty list; at least one picture is needed")
    masks = [None] * len(exemplars) if masks is None else list(masks)
    try:
        weights = [1.0] * len(exemplars) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError):
        raise ValueError(f"exemplar_weights must be numbers, one for each exemplar, got {weights!r}") from None
    for name, values in (("exemplar_mask", masks), ("exemplar_weights", weights)):
        if len(values) != len(exemplars):
            raise ValueError(f"{name} has {len(values)} entries for {len(exemplars)} exemplars; one each is needed")
    if not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
        raise ValueError(f"exemplar_weights must be 0 or more and not all 0, got {weights}")

    names = [f"exemplar {i}" for i in range(1, len(exemplars) + 1)] if several else ["exemplar"]
    size = model.config.exemplar.vision.image_size
    pixels = torch.cat([exemplar_tensor(read_exemplar(*e), size) for e in zip(exemplars, masks, names, strict=True)])
    contexts = model.encode_exemplar(pixels.to(model.device, model.dtype))  # (N, 1, context_dim)
    w = torch.tensor(weights, dtype=torch.float32, device=model.device)[:, None, None] / sum(weights)
    return (w * contexts.float()).sum(dim=0, keepdim=True).to(model.dtype)


def see_window(photos: list[Picture], repaint: np.ndarray, box: Box, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One window of each photo at `size` (height, width): pixels (B, 3, H, W) in [-1, 1], or (1, 3, H, W) if the photos
    are all the same, and the mask (1, 1, H, W), 1 = keep."""
    different = photos if any(photo is not photos[0] for photo in photos) else photos[:1]
    pixels = torch.cat([windows.resample(photo.rgb(box), size) for photo in different])
    return pixels, 1 - windows.extract_repaint(repaint, box, size)


def window_condition(model: PaintByExample, pixels: Tensor, keep: Tensor, context: Tensor, batch: int) -> Condition:
    """What the UNet needs to know to repaint what `see_window` gives, for `batch` results."""
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


# ----------------------------------------------------------------------------------------------------------------------
# The window


def place_window(
    repaint: np.ndarray, window: Literal["auto", "full"] | tuple[int, int, int, int], margin: float, resolution: int
) -> Box:
    """The window of the photo to edit; raises `ValueError` for one outside the photo or not around the mask."""
    height, width = repaint.shape
    if isinstance(window, str):
        whole = Box(0, 0, width, height)
        return whole if window == "full" else windows.choose_window(repaint, resolution, margin=margin)
    box, inner = Box(*map(int, window)), windows.mask_bounding_box(repaint)
    across = 0 <= box.x0 <= inner.x0 and inner.x1 <= box.x1 <= width
    down = 0 <= box.y0 <= inner.y0 and inner.y1 <= box.y1 <= height
    if not (across and down):
        raise ValueError(
            f"window {tuple(box)} must hold the mask {tuple(inner)} and lie inside the photo of {width}x{height}"
        )
    return box


def feather_width(box: Box, resolution: int) -> int:
    """The seam's width in photo pixels where none is asked for."""
    return max(1, round(min(box.width, box.height) * max(1 / 64, 2 / resolution)))


def whole_window(box: Box, size: tuple[int, int]) -> np.ndarray:
    """Weights that show all of the window and nothing of the photo there."""
    weights = np.zeros(size, dtype=np.float32)
    weights[box.slices] = 1
    return weights
