"""The page's pictures: uploads, and the canvases that show smaller copies of them, from which only masks come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from pbe.app.canvas import MAX_SIDE, canvas, drawn_mask, to_value
from pbe.app.editor import NO_IMAGE, Upload
from pbe.app.serving import workplace
from pbe.batch.job import Select, select
from pbe.editing.canvas import HAS_ALPHA
from pbe.images.reading import over_white, read_mask, read_picture
from pbe.images.windows import white_level
from pbe.io.fields import read
from pbe.serve.uploads import take

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]


class PictureInput(NamedTuple):
    """A picture to load: the upload, the drop zone for it, the canvas that shows it."""

    upload: gr.State
    file: gr.File
    canvas: gr.HTML


def picture_input(name: str, label: str, tools: tuple[str, ...], tools_label: str, height: int) -> PictureInput:
    file = gr.File(label=label, file_types=SUFFIXES, height=height, elem_id=f"{name}-file")
    return PictureInput(gr.State(), file, canvas(tools_label, tools, height, elem_id=name))


def open_upload(path: str, name: str) -> tuple[Upload, Image.Image]:
    """An uploaded picture, and a copy of it to show: upright 8-bit RGB, white where it is transparent, no larger than
    it need be."""
    with workplace() as folder:
        picture = read_picture(folder / take(Path(path), folder, name), name)
    # The floats of all pixels would take gigabytes.
    stride = max(1, max(picture.size) // (2 * MAX_SIDE))
    small = replace(picture, pixels=picture.pixels[::stride, ::stride])
    shown = small.to_rgb8()
    if picture.pixels.shape[2] in HAS_ALPHA:
        alpha = small.pixels[..., -1].astype(np.float32) * (255 / white_level(picture.pixels.dtype))
        shown.putalpha(Image.fromarray(alpha.round().astype(np.uint8)))
    return Upload(path, picture.size), over_white(shown)


def show(path: str, name: str, mask: np.ndarray | str | None = None) -> tuple[object, ...]:
    """For a `PictureInput`: the picture in place of the drop zone, with a mask as `to_value` takes it."""
    upload, shown = open_upload(path, name)
    return upload, gr.update(value=None, visible=False), gr.update(value=to_value(shown, mask), visible=True)


def show_drop_zone() -> tuple[object, ...]:
    return None, gr.update(visible=True), gr.update(value=None, visible=False)


def select_object(upload: Upload, drawn: dict[str, str], event: gr.EventData, name: str) -> dict[str, str]:
    """The canvas with the object at a click, or in a rough box, whose coordinates are shares of the picture's sides.

    In the image it is added to the mask, of the exemplar only it is left.
    """
    _, shown = open_upload(upload.path, name)
    with workplace():
        shares = np.clip(read("select", event.at, Select), 0, 1)
        found = select(shown, tuple(shares * np.resize(shown.size, len(shares))), name)
        if name == "image" and (before := drawn_mask(drawn, found.shape)) is not None:
            found |= before
    return drawn | {"mask": to_value(shown, found)["mask"]}


def load_mask(path: str, upload: Upload | None, drawn: dict[str, str], fit_mask: bool) -> dict[str, str]:
    """The image's canvas with the mask of a file."""
    with workplace() as folder:
        if upload is None:
            raise ValueError(NO_IMAGE)
        mask = read_mask(folder / take(Path(path), folder, "mask"), upload.size, fit=fit_mask)
    _, shown = open_upload(upload.path, "image")
    return drawn | {"mask": to_value(shown, mask)["mask"]}


def connect_picture(picture: PictureInput, name: str) -> None:
    shown = listen(picture.file.upload, partial(show, name=name), picture.file, [*picture])
    # A file that is refused leaves the drop zone, which would not take another beside it.
    listen(shown.failure, lambda: None, None, picture.file)
    listen(picture.canvas.close, show_drop_zone, None, [*picture])

    def selected(upload: Upload, drawn: dict[str, str], event: gr.EventData) -> dict[str, str]:
        return select_object(upload, drawn, event, name)

    listen(picture.canvas.select, selected, [picture.upload, picture.canvas], picture.canvas)


def listen(event: Callable[..., Any], handler: Callable[..., object], inputs: Any, outputs: Any) -> Any:
    """Has an event of the page handled at once: without a progress bar, and not over the API."""
    return event(handler, inputs, outputs, api_visibility="private", show_progress="hidden", concurrency_id="pictures")


def thumbnail(path: str, name: str) -> str:
    """HTML of a small picture, which screen readers read out as its name."""
    _, shown = open_upload(path, "picture")
    shown.thumbnail((144, 144))
    return f'<img src="{to_value(shown)["picture"]}" alt="{escape(name)}">'


def picture_buttons(samples: list[str], label: str, elem_id: str) -> gr.Dataset:
    """Buttons with HTML in them; a click on one gives its number."""
    return gr.Dataset(
        components=[gr.HTML(render=False)],
        samples=[[html] for html in samples],
        type="index",
        label=label,
        samples_per_page=100,
        visible=bool(samples),
        elem_id=elem_id,
    )
