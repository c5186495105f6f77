"""A canvas for the page: a picture to draw a mask on, or to crop.

Gradio's own image editor draws no boxes, re-encodes pictures and needs WebGL. This one sends only a mask. Its value is
None or a dict of two data URLs: `picture`, what is shown, and `mask`, opaque where something is drawn, or "" without.
What the browser gets are canvas.html, canvas.css and canvas.js.
"""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from string import Template

import gradio as gr
import numpy as np
from PIL import Image

from pbe.images.pillow import UNREADABLE

MAX_SIDE = 1536  # of the picture as shown: more only makes the brush slow
BARS_HEIGHT = 68  # of the tools above the picture and the line below it
DRAWING, CROPPING = ("brush", "box", "select", "eraser"), ("crop", "select", "brush", "eraser")
_PNG = "data:image/png;base64,"


def to_value(picture: Image.Image, mask: np.ndarray | str | None = None) -> dict[str, str]:
    """The component's value that shows an RGB picture, with a mask drawn on it: bool (H, W) of any size, or the `mask`
    of an earlier value for it."""
    shown = picture.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    drawn = mask if isinstance(mask, str) else ""
    if isinstance(mask, np.ndarray):
        layer = Image.new("RGBA", shown.size)
        layer.putalpha(_resized(mask, shown.size))
        drawn = _PNG + _encoded(layer, "PNG")
    return {"picture": "data:image/jpeg;base64," + _encoded(shown, "JPEG"), "mask": drawn}


def drawn_mask(value: dict[str, str] | None, size: tuple[int, int]) -> np.ndarray | None:
    """What is drawn, as bool (H, W) for `size` (height, width); None if that is nothing.

    ValueError for a value that the component does not make.
    """
    if not value:
        return None
    try:
        if not value["mask"]:
            return None
        png = base64.b64decode(value["mask"].removeprefix(_PNG), validate=True)
        with Image.open(io.BytesIO(png), formats=["PNG"]) as layer:
            if max(layer.size) > MAX_SIDE or layer.mode != "RGBA":
                raise ValueError(f"it is {layer.width}x{layer.height} in mode {layer.mode}")
            drawn = np.asarray(layer.getchannel("A")) >= 128
    except UNREADABLE as error:
        raise ValueError(f"the mask that the browser sent is not one that this page draws: {error}") from error
    return np.asarray(_resized(drawn, (size[1], size[0]))) > 0 if drawn.any() else None


def _resized(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A bool (H, W) mask as a picture of 0 and 255 of `size` (width, height), its outline smooth."""
    gray = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)
    return gray.point(lambda v: 255 * (v >= 128))


def _encoded(image: Image.Image, file_format: str) -> str:
    file = io.BytesIO()
    image.save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


def canvas(label: str, tools: tuple[str, ...], height: int, elem_id: str) -> gr.HTML:
    """The component, hidden until there is a picture. Its event `close` asks for another picture, `select` for the mask
    of an object: its data `at` are x, y or x0, y0, x1, y1, as shares of width and height."""
    html, css, js = (files("pbe.app").joinpath(f"canvas.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    # Not as properties of the component: an update of its value makes Gradio forget them.
    html = Template(html).substitute(label=label, name=elem_id, tools=" ".join(tools), height=height - BARS_HEIGHT)
    return gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=js,
        visible=False,
        elem_id=elem_id,
        apply_default_css=False,
    )
