"""The nodes, thin over the library: a model with adapters, exemplars, edits, and windows to edit by other means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pbe
from pbe.editing.canvas import Canvas, read_canvas
from pbe.editing.loading import load_editor
from pbe.editing.settings import QUICK, SETTINGS, EditSettings
from pbe.editing.window import crop_window as crop
from pbe.editing.window import place_window, seam_weights
from pbe.images import windows
from pbe.images.reading import Picture
from pbe.images.seams import poisson_blend
from pbe.io.fields import Range
from pbe.models.paint_by_example import PaintByExample

from . import host
from .batches import batch_of, drawn, masks_of, pixels_of, together
from .declaring import Socket, node

# The settings that most people turn, and those of an edit's mask, which a window takes too.
FIRST = ("seed", "steps", "guidance", "sampler", "spacing", "strength", "window", "seam")
OF_MASKS = ("fit_mask", "invert", "extend", "fill_holes", "smooth", "grow")
RESOLUTION = 512  # the released model's, from which the least size of a window follows


class Exemplar(NamedTuple):
    """A picture of what to paint, where the object is in it, and how much it counts in a mixture."""

    pixels: np.ndarray
    mask: np.ndarray | None
    weight: float


class Window(NamedTuple):
    """A window of photos, one photo for each result."""

    canvases: list[Canvas]
    box: windows.Box


Adapters = tuple[tuple[str, float], ...]  # files and their strengths
Mixture = tuple[Exemplar, ...]

IMAGE, MASK, MODEL, ADAPTERS = Socket("IMAGE"), Socket("MASK"), Socket("PBE_MODEL"), Socket("PBE_ADAPTERS")
EXEMPLAR, PICTURE_OR_EXEMPLAR, WINDOW = Socket("PBE_EXEMPLAR"), Socket("IMAGE,PBE_EXEMPLAR"), Socket("PBE_WINDOW")


@node()
def load_model(
    model: Annotated[str, host.models, "The checkpoint."],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "The precision; auto is what ComfyUI would take."
    ] = "auto",
    low_memory: Annotated[bool, "Keep each network on the graphics card only while it computes: slower."] = False,
    adapters: Annotated[Adapters, ADAPTERS, "Adapters that the model is used with."] = (),
) -> tuple[Annotated[PaintByExample, MODEL]]:
    """Loads a model from ComfyUI's folder models/pbe: a file, or a folder of diffusers' or of pbe export. The demo
    model comes with the library."""
    path = host.find(host.MODELS, model)
    files = [(host.find(host.ADAPTERS, name), strength) for name, strength in adapters]
    host.make_room(path.stat().st_size if path.is_file() else 0)
    with torch.inference_mode(False):  # in which ComfyUI runs nodes: tensors made in it cannot be used outside
        return (load_editor(path, *host.device_and_dtype(dtype), low_memory, adapters=files),)


@node()
def adapter(
    file: Annotated[str, host.adapters, "A file in ComfyUI's folder models/loras."],
    strength: Annotated[float, Range(-10, 10), "How much of it: 1 is as it was trained, 0 nothing."] = 1.0,
    others: Annotated[Adapters, ADAPTERS, "Adapters to use beside it."] = (),
) -> tuple[Annotated[Adapters, ADAPTERS]]:
    """Adapters (LoRA and its kin) for Paint by Example or Stable Diffusion 1. For several, connect one to the next."""
    return ((*others, (file, strength)),)


@node()
def exemplar(
    image: Annotated[Tensor, IMAGE, "What to paint; a batch is as many exemplars."],
    weight: Annotated[float, Range(0, 100), "Its share in the mixture."] = 1.0,
    mask: Annotated[Tensor | None, MASK, "Where the object is in the picture, 1 = object."] = None,
    others: Annotated[Mixture, EXEMPLAR, "Exemplars to mix with this one."] = (),
) -> tuple[Annotated[Mixture, EXEMPLAR]]:
    """An exemplar with a weight, to mix with others: connect one to the next, and the last to an edit."""
    masks = [None] if mask is None else [drawn(one, "the exemplar's mask") for one in masks_of(mask)]
    pairs = together(image=image, mask=masks)
    return ((*others, *(Exemplar(pixels_of(picture), shown, weight) for picture, shown in pairs)),)


@node(*FIRST, advanced=[name for name in SETTINGS if name not in FIRST])
def edit(
    model: Annotated[PaintByExample, MODEL, "The model."],
    image: Annotated[Tensor, IMAGE, "The photo, of any size."],
    mask: Annotated[Tensor, MASK, "Where to repaint, 1 = repaint; with extend it may be empty."],
    exemplar: Annotated[Tensor | Mixture, PICTURE_OR_EXEMPLAR, "What to paint: a picture, or several that are mixed."],
    exemplar_mask: Annotated[Tensor | None, MASK, "Where the object is in its picture, 1 = object."] = None,
    negative: Annotated[Tensor | Mixture, PICTURE_OR_EXEMPLAR, "What guidance leads away from: not like this."] = (),
    negative_mask: Annotated[Tensor | None, MASK, "Where that is in its picture, 1 = object."] = None,
    **values: object,
) -> tuple[Annotated[Tensor, IMAGE]]:
    """Repaints the masked part of a photo as the exemplar's object; all other pixels stay. Of a batch, each photo has
    its own mask and exemplar, or the one that there is, and the next seed."""
    settings = EditSettings.from_texts(values, model.config.distilled, QUICK)
    exemplars, negatives = mixtures(exemplar, exemplar_mask), mixtures(negative, negative_mask)
    edits, results = together(image=image, mask=masks_of(mask), exemplar=exemplars, negative=negatives), []
    preview = host.progress(len(edits))
    host.make_room()
    for i, (photo, repaint, positive, not_this) in enumerate(edits):
        pixels, drawn_mask = photo_and_mask(photo, repaint, settings)
        results += pbe.edit(
            model,
            pixels,
            drawn_mask,
            **told("exemplar", positive),
            **told("negative", not_this),
            preview=preview,
            preview_every=1,
            **{**vars(settings), "seed": settings.seed + i},
        )
    return (batch_of(results),)


def photo_and_mask(photo: Tensor, mask: Tensor, settings: EditSettings) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of both; None for an empty mask where `extend` says what is painted."""
    return pixels_of(photo), None if settings.extend and not mask.any() else drawn(mask, "the mask")


def mixtures(given: Tensor | Mixture, mask: Tensor | None) -> list[Mixture]:
    """What is painted in each result, or in all: the pictures of a batch one by one, or what was mixed."""
    if isinstance(given, Tensor):
        return [(one,) for one in exemplar(given, mask=mask)[0]]
    if mask is not None:
        raise ValueError("a mask at the edit is for one picture: those of mixed exemplars go to their own nodes")
    return [given]


def told(name: str, mixture: Mixture) -> dict[str, Any]:
    """The arguments of `pbe.edit` for exemplars or negative ones, none for none."""
    return dict(zip((name, f"{name}_mask", f"{name}_weights"), zip(*mixture, strict=True), strict=bool(mixture)))


@node("window", "margin", advanced=OF_MASKS)
def crop_window(
    image: Annotated[Tensor, IMAGE, "The photo."],
    mask: Annotated[Tensor, MASK, "Where it is to be repainted, 1 = repaint."],
    **values: object,
) -> tuple[Annotated[Tensor, IMAGE], Annotated[Tensor, MASK], Annotated[Window, WINDOW]]:
    """Cuts the window around the mask out of a photo, for any nodes to edit, and Stitch window to put it back. For an
    edit by example set that one's window to full, and composite to false. A batch has one window."""
    settings = EditSettings.from_texts(values)
    pairs = together(image=image, mask=masks_of(mask))
    canvases = [read_canvas(*photo_and_mask(photo, repaint, settings), settings) for photo, repaint in pairs]
    union = np.logical_or.reduce([canvas.repaint for canvas in canvases])
    box = place_window(union, settings.window, settings.margin, RESOLUTION)
    pixels = batch_of([canvas.picture.pixels[box.slices] for canvas in canvases])
    return pixels, batch_of([canvas.repaint[box.slices] for canvas in canvases]), Window(canvases, box)


@node("seam", "composite", advanced=["feather"])
def stitch_window(
    window: Annotated[Window, WINDOW, "Where the picture belongs."],
    image: Annotated[Tensor, IMAGE, "The edited window, of any size, without a seam of its own."],
    **values: object,
) -> tuple[Annotated[Tensor, IMAGE]]:
    """Puts an edited window back into its photo: the masked pixels alone, with a seam that meets the photo's light and
    colour."""
    settings, box, results = EditSettings.from_texts(values), window.box, []
    for canvas, picture in together(window=window.canvases, image=image):
        pixels = pixels_of(picture)
        edited = Picture(pixels, pixels).rgb()  # (1, 3, h, w)
        height, width = edited.shape[2:]
        if settings.composite and settings.seam == "poisson":
            edited = poisson_blend(edited, *crop([canvas.picture], canvas.repaint, box, (height, width)))
        weights = seam_weights(canvas.repaint, box, settings, min(height, width))
        results.append(windows.composite(canvas.picture.pixels, edited, box, weights))
    return (batch_of(results),)


@node()
def select_object(
    image: Annotated[Tensor, IMAGE, "The picture."],
    x: Annotated[int, Range(0, 100_000), "Pixels from the left."] = 0,
    y: Annotated[int, Range(0, 100_000), "Pixels from the top."] = 0,
) -> tuple[Annotated[Tensor, MASK]]:
    """The mask of the object at a point of a photo or an exemplar, by GrabCut."""
    return (batch_of([pbe.select_object(pixels_of(one), point=(x, y)) for one in image]),)
