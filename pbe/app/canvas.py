"""A canvas for the page: a picture to brush, box and erase a region on, or to crop.

Gradio's own image editor draws no boxes, re-encodes pictures and needs WebGL. This one sends only a mask. Its value is
None or a dict of two data URLs: `picture`, what is shown, and `mask`, opaque where the region is, or "" without one.
What the browser gets are canvas.html, canvas.css and canvas.js.
"""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pbe.images.reading import UNREADABLE

if TYPE_CHECKING:
    import gradio as gr

MAX_SIDE = 1536  # of the picture as shown: more only makes the brush slow
BAR_HEIGHT = 42  # of the tools above the picture
DRAWING, CROPPING = ("brush", "box", "eraser"), ("crop",)
_PNG = "data:image/png;base64,"


def to_value(picture: Image.Image, region: np.ndarray | None = None) -> dict[str, str]:
    """The component's value that shows an RGB picture, with a region, bool (H, W) of any size, drawn on it."""
    shown = picture.copy()
    shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    mask = ""
    if region is not None:
        alpha = _resized(region, shown.size)
        layer = Image.new("RGBA", shown.size)
        layer.putalpha(alpha)
        mask = _PNG + _encoded(layer, "PNG")
    return {"picture": "data:image/jpeg;base64," + _encoded(shown, "JPEG"), "mask": mask}


def region_of(value: dict[str, str] | None, size: tuple[int, int]) -> np.ndarray | None:
    """The region drawn, as bool (H, W) for `size` (height, width); None if nothing is drawn.

    ValueError for a value that the component does not make.
    """
    if value is None:
        return None
    try:
        if not value["mask"]:
            return None
        png = base64.b64decode(value["mask"].removeprefix(_PNG), validate=True)
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if max(image.size) > MAX_SIDE or image.mode != "RGBA":
                raise ValueError(f"it is {image.width}x{image.height} in mode {image.mode}")
            drawn = np.asarray(image.getchannel("A")) >= 128
    except (KeyError, AttributeError, *UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"the region that the browser sent is not one of this page: {error}") from error
    return np.asarray(_resized(drawn, (size[1], size[0]))) > 0 if drawn.any() else None


def _resized(region: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A bool (H, W) region as a picture of 0 and 255 of `size` (width, height), its outline smooth."""
    gray = Image.fromarray(region).convert("L").resize(size, Image.Resampling.BILINEAR)
    return gray.point(lambda v: 255 * (v >= 128))


def _encoded(image: Image.Image, file_format: str) -> str:
    file = io.BytesIO()
    image.save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


def canvas(label: str, tools: tuple[str, ...], height: int, elem_id: str) -> gr.HTML:
    """The component, hidden until there is a picture; its event `close` asks for another picture."""
    import gradio as gr

    html, css, js = (files("pbe.app").joinpath(f"canvas.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    # Not as properties of the component: an update of its value makes Gradio forget them.
    html = Template(html).substitute(label=label, tools=" ".join(tools), height=height - BAR_HEIGHT)
    return gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=js,
        visible=False,
        elem_id=elem_id,
        apply_default_css=False,
    )
