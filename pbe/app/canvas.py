"""A canvas for the page: a picture to brush, box and erase a region on, or to crop.

Gradio's own image editor draws no boxes, re-encodes pictures and needs WebGL. This one sends only a mask. Its value is
None or a dict of two data URLs: `picture`, what is shown, and `mask`, opaque where the region is, or "" without one.
"""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pbe.images.reading import UNREADABLE

if TYPE_CHECKING:
    import gradio as gr

MAX_SIDE = 1536  # of the picture as shown: more only makes the brush slow
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


HTML = """
<div class="bar">
  <span class="name">LABEL</span>
  <button data-tool="brush" title="Brush over the region">Brush</button>
  <button data-tool="box" title="Drag a box over the region">Box</button>
  <button data-tool="eraser" title="Take away some of the region">Eraser</button>
  <input type="range" min="1" max="100" value="40" title="Size of the brush" aria-label="Size of the brush">
  <span class="space"></span>
  <button data-act="undo" title="Take back the last stroke">Undo</button>
  <button data-act="reset" title="Start anew">Clear</button>
  <button data-act="close" title="Load another picture" aria-label="Load another picture">✕</button>
</div>
<div class="stage"><canvas></canvas></div>
"""

CSS = """
border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); overflow: hidden;
.bar { display: flex; flex-wrap: wrap; gap: 2px; align-items: center; min-height: 40px; padding: 0 8px;
       font-size: var(--text-sm); background: var(--block-background-fill);
       border-bottom: 1px solid var(--border-color-primary); }
.bar .name { color: var(--block-label-text-color); margin-right: 8px; }
.bar .space { flex: 1; }
.bar button { padding: 2px 8px; border-radius: 6px; cursor: pointer; color: var(--body-text-color); }
.bar button:hover { background: var(--background-fill-secondary); }
.bar button[aria-pressed=true] { background: var(--primary-500); color: white; }
.bar input { width: 80px; margin-left: 6px; accent-color: var(--primary-500); }
.bar .absent { display: none; }
.stage { height: HEIGHTpx; display: flex; align-items: center; justify-content: center;
         background: var(--background-fill-secondary); }
canvas { max-width: 100%; max-height: 100%; touch-action: none; cursor: crosshair; }
"""

JS = """
const tools = TOOLS, crops = tools.includes("crop");
const all = (selector) => [...element.querySelectorAll(selector)];
const canvas = element.querySelector("canvas"), screen = canvas.getContext("2d");
const mask = document.createElement("canvas"), paint = mask.getContext("2d");
const size = element.querySelector("input");
const COLOUR = "rgb(79, 70, 229)";
let tool, picture, drawn = false, box = null, hover = null, last = null, past = [];

function choose(name) {
  tool = name;
  all("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.tool === name));
}

// --- showing

function draw() {
  if (!picture) return;
  const unit = canvas.width / Math.max(1, canvas.getBoundingClientRect().width);  // a pixel of the screen
  screen.globalAlpha = 1;
  screen.drawImage(picture, 0, 0);
  if (crops && (box || drawn)) {  // what is left out is dark
    const kept = new OffscreenCanvas(mask.width, mask.height), layer = kept.getContext("2d");
    if (box) layer.fillRect(...box); else layer.drawImage(mask, 0, 0);
    layer.globalCompositeOperation = "source-in";
    layer.drawImage(picture, 0, 0);
    screen.fillStyle = "rgba(20, 20, 20, .7)";
    screen.fillRect(0, 0, canvas.width, canvas.height);
    screen.drawImage(kept, 0, 0);
  } else {
    screen.globalAlpha = .6;
    screen.drawImage(mask, 0, 0);
    screen.fillStyle = COLOUR;
    if (box) screen.fillRect(...box);
  }
  screen.globalAlpha = 1;
  screen.lineWidth = 1.5 * unit;
  screen.strokeStyle = "white";
  if (box) screen.strokeRect(...box);
  if (hover && (tool === "brush" || tool === "eraser")) {
    screen.beginPath();
    screen.arc(...hover, width() / 2, 0, 7);
    screen.stroke();
  }
}
const width = () => Math.max(canvas.width, canvas.height) * size.value / 400;

function load() {
  const value = props.value;
  box = last = hover = null;
  past = [];
  if (!value) { picture = null; return; }
  const image = new Image(), region = new Image();
  image.src = value.picture;
  if (value.mask) region.src = value.mask;
  Promise.all([image.decode(), value.mask && region.decode()]).then(() => {
    canvas.width = mask.width = image.naturalWidth;
    canvas.height = mask.height = image.naturalHeight;
    if (value.mask) paint.drawImage(region, 0, 0);
    paint.globalCompositeOperation = "source-in";
    paint.fillStyle = paint.strokeStyle = COLOUR;
    paint.fillRect(0, 0, mask.width, mask.height);
    paint.lineCap = paint.lineJoin = "round";
    picture = image;
    drawn = Boolean(value.mask);
    draw();
  });
}

// --- drawing

function at(event) {
  const on = canvas.getBoundingClientRect();
  return [(event.clientX - on.left) * canvas.width / on.width, (event.clientY - on.top) * canvas.height / on.height];
}
const pixels = () => paint.getImageData(0, 0, mask.width, mask.height);
function remember() {
  past = [...past.slice(-19), pixels()];
}
function publish() {
  drawn = new Uint32Array(pixels().data.buffer).some((v) => v);
  props.value = {picture: props.value.picture, mask: drawn ? mask.toDataURL("image/png") : ""};
}
function clear() {
  paint.globalCompositeOperation = "source-over";
  paint.clearRect(0, 0, mask.width, mask.height);
}
function stroke(from, to) {
  paint.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  paint.lineWidth = width();
  paint.beginPath();
  paint.moveTo(...from);
  paint.lineTo(...to);
  paint.stroke();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!picture || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = at(event);
  if (tool === "brush" || tool === "eraser") stroke(last, last); else box = [...last, 0, 0];
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  hover = at(event);
  if (last && box) box = [...last, hover[0] - last[0], hover[1] - last[1]];
  else if (last) { stroke(last, hover); last = hover; }
  draw();
});
canvas.addEventListener("pointerup", () => {
  if (!last) return;
  if (box) {
    if (crops) clear();
    paint.globalCompositeOperation = "source-over";
    if (box[2] && box[3]) paint.fillRect(...box.map(Math.round));
  }
  last = box = null;
  publish();
  draw();
});
canvas.addEventListener("pointerleave", () => { hover = null; draw(); });

const acts = {
  undo() { if (past.length) paint.putImageData(past.pop(), 0, 0); publish(); draw(); },
  reset() { remember(); clear(); publish(); draw(); },
  close() { trigger("close"); },
};
all("[data-act]").forEach((b) => b.addEventListener("click", () => acts[b.dataset.act]()));
all("[data-tool]").forEach((b) => {
  b.classList.toggle("absent", !tools.includes(b.dataset.tool) || tools.length === 1);
  b.addEventListener("click", () => choose(b.dataset.tool));
});
size.classList.toggle("absent", crops);
choose(tools[0]);
watch("value", load);
load();
"""


def painter(label: str, tools: tuple[str, ...], height: int, elem_id: str) -> gr.HTML:
    """The component, hidden until there is a picture; its event `close` asks for another picture."""
    import gradio as gr

    # Not as properties of the component: an update of its value makes Gradio forget them.
    return gr.HTML(
        html_template=HTML.replace("LABEL", label),
        css_template=CSS.replace("HEIGHT", str(height - 42)),
        js_on_load=JS.replace("TOOLS", json.dumps(tools)),
        visible=False,
        elem_id=elem_id,
        apply_default_css=False,
    )
