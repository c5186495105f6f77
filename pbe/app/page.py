"""The page: load an image, draw a mask, load an exemplar, look at the results; the same over Gradio's API.

The canvases show smaller copies of image and exemplar, and only the masks drawn come back from there. The edits are
made by `pbe.app.editor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from os.path import isdir
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from pbe.app.canvas import CROPPING, DRAWING, MAX_SIDE, canvas, to_value
from pbe.app.editor import Adapters, Editor, Upload
from pbe.app.serving import cancel_edit, workplace
from pbe.batch.provenance import Weights
from pbe.editing.loading import AdaptedModels
from pbe.editing.settings import QUICK, EditSettings
from pbe.images.pillow import open_image
from pbe.images.reading import read_mask, read_picture
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import SAMPLERS
from pbe.serve.uploads import MAX_RESULTS, take

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"  # of the repository; an installed package has none
EXAMPLE_FILES = (  # image, mask, exemplar
    ("flower.jpg", "flower_mask.png", "flower_red.jpg"),
    ("coffee.png", "coffee_mask.png", "flower.png"),
    ("coffee.png", "coffee_mask.png", "cat.png"),
    ("china.jpg", "china_mask.png", "shuttle.png"),
)
HEIGHT = 520  # of image and results
INTRODUCTION = """
# Paint by Example
Load an image, and draw a mask over what to replace. Load an exemplar: a picture of what to put there. Then paint.
"""


# ----------------------------------------------------------------------------------------------------------------------
# What the parts do: values in, values or updates of components out


def open_upload(path: str, name: str) -> tuple[Upload, Image.Image]:
    """An uploaded picture, and a copy of it to show: upright 8-bit RGB, no larger than it need be."""
    with workplace() as folder:
        picture = read_picture(folder / take(Path(path), folder, name), name)
    # The floats of all pixels would take gigabytes.
    stride = max(1, max(picture.size) // (2 * MAX_SIDE))
    return Upload(path, picture.size), replace(picture, pixels=picture.pixels[::stride, ::stride]).to_rgb8()


def show(path: str, name: str, mask: np.ndarray | None = None) -> tuple[object, ...]:
    """For a `PictureInput`: the picture in place of the drop zone."""
    upload, shown = open_upload(path, name)
    return upload, gr.update(value=None, visible=False), gr.update(value=to_value(shown, mask), visible=True)


def show_drop_zone() -> tuple[object, ...]:
    return None, gr.update(visible=True), gr.update(value=None, visible=False)


def show_example(index: int) -> tuple[object, ...]:
    image, mask, exemplar = example_files()[index]
    with open_image(Path(image)) as opened:
        repaint = read_mask(mask, (opened.height, opened.width))
    return *show(image, "image", repaint), *show(exemplar, "exemplar")


def choose_result(results: list[tuple[str, str]], event: gr.SelectData) -> tuple[int, str]:
    return event.index, results[event.index][0]


def reuse_result(results: list[tuple[str, str]], chosen: int) -> tuple[object, ...]:
    return show(results[chosen][0], "image")


# ----------------------------------------------------------------------------------------------------------------------
# What the parts look like


class PictureInput(NamedTuple):
    """A picture to load: the upload, the drop zone for it, the canvas that shows it."""

    upload: gr.State
    file: gr.File
    canvas: gr.HTML


def picture_input(name: str, label: str, tools: tuple[str, ...], tools_label: str, height: int) -> PictureInput:
    file = gr.File(label=label, file_types=SUFFIXES, height=height, elem_id=f"{name}-file")
    return PictureInput(gr.State(), file, canvas(tools_label, tools, height, elem_id=name))


def edit_controls(settings: EditSettings, adapters: Adapters) -> dict[str, gr.blocks.Block]:
    """The controls of the settings that a page's user may change, of the number of results, and of the adapters'
    strengths, by name."""
    about_guidance = "How closely the result follows the exemplar; too much distorts it"
    guidance = gr.Slider(0, 15, settings.guidance, step=0.5, label="Guidance", info=about_guidance)
    num_images = gr.Slider(1, MAX_RESULTS, 2, step=1, label="Results")
    with gr.Accordion("Steps, seed, sampler", open=False):
        steps = gr.Slider(min(4, settings.steps), 200, settings.steps, step=1, label="Steps")
        with gr.Row():
            seed = gr.Number(settings.seed, precision=0, minimum=0, label="Seed", min_width=80)
            sampler = gr.Dropdown(list(SAMPLERS), value=settings.sampler, label="Sampler", min_width=80)
    controls: dict[str, gr.blocks.Block] = {
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
        "num_images": num_images,
        "sampler": sampler,
    }
    for i, (path, strength) in enumerate(adapters, start=1):
        label, least, most = f"{path.name}: strength", min(-1, strength), max(2, strength)
        controls[f"strength_{i}"] = gr.Slider(least, most, strength, step=0.05, label=label)
    return controls


class ResultView(NamedTuple):
    """The results: all of them, the number of the chosen one, and what can be done with it."""

    gallery: gr.Gallery
    chosen: gr.State
    download: gr.DownloadButton
    actions: gr.Row
    reuse: gr.Button


def result_view() -> ResultView:
    gallery = gr.Gallery(
        label="Results",
        preview=True,
        object_fit="contain",
        interactive=False,
        buttons=["fullscreen"],
        height=HEIGHT,
        elem_id="results",
    )
    with gr.Row(visible=False) as actions:
        download = gr.DownloadButton("Download PNG", elem_id="download")
        reuse = gr.Button("Use result as image", elem_id="reuse")
    return ResultView(gallery, gr.State(0), download, actions, reuse)


def example_files() -> list[list[str]]:
    """Image, mask and exemplar of the examples that are there."""
    paths = [[EXAMPLES / name for name in names] for names in EXAMPLE_FILES]
    return [[str(path) for path in example] for example in paths if all(path.is_file() for path in example)]


def example_row(samples: list[list[str]]) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(label=name, render=False) for name in ("Image", "Mask", "Exemplar")],
        samples=samples,
        type="index",
        label="Examples",
        elem_id="examples",
    )


# What the components of an event take from a program, beside nothing at all where that is a type too.
VALUES: dict[type[gr.blocks.Block], tuple[tuple[type, ...], str]] = {
    gr.Slider: ((int, float), "a number"),
    gr.Number: ((int, float), "a number"),
    gr.Dropdown: ((str,), "a text"),
    gr.Dataset: ((int,), "an example's number"),
    gr.File: ((dict, NoneType), "a file, as gradio_client.handle_file gives it"),
    gr.HTML: ((dict, str, NoneType), "a canvas's value"),  # a text, which is empty, where it is hidden
    gr.Gallery: ((list, NoneType), "results"),
}


class Page(gr.Blocks):
    """Gradio's page, whose inputs are checked: what a program sends may be anything."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *others: Any, **named: Any) -> list[Any]:
        """What the handler gets; `gr.Error`, without a traceback in the log, for what it cannot get."""
        try:
            for name, block, value in zip(block_fn.input_parameter_names, block_fn.inputs, inputs, strict=False):
                types, words = VALUES.get(type(block), ((object,), ""))
                is_right = isinstance(value, types) and not isinstance(value, bool) and value not in (inf, -inf)
                if isinstance(block, gr.File) and isinstance(value, dict):
                    path = value.get("path")  # Gradio would fetch an address
                    is_right = isinstance(path, str) and "://" not in path and "meta" in value and not isdir(path)
                if words and not (is_right and value == value):  # NaN does not equal itself
                    raise ValueError(f"{name} must be {words}, got {value!r:.100}")
            return await super().preprocess_data(block_fn, inputs, *others, **named)
        except Exception as error:
            words = error.message if isinstance(error, gr.Error) else " ".join(str(error).split())
            raise gr.Error(words[:300], print_exception=False) from error


def build_page(
    model: PaintByExample | AdaptedModels, weights: Weights, settings: EditSettings = QUICK, adapters: Adapters = ()
) -> gr.Blocks:
    """The page for one model; `weights` says in the results which it was, the controls begin with `settings`.

    Where `model` gives one by its adapters, they have a control of their strength each. `serve` shows the page.
    """
    models = model if isinstance(model, AdaptedModels) else AdaptedModels(lambda _: model)
    editor = Editor(models, weights, settings, adapters)
    with Page(title="Paint by Example", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=5, min_width=400):
                image = picture_input("image", "Image", DRAWING, "Image · draw the mask", HEIGHT)
            with gr.Column(scale=3, min_width=280):
                exemplar = picture_input("exemplar", "Exemplar", CROPPING, "Exemplar · drag to crop", 300)
                with gr.Row():
                    start = gr.Button("Paint", variant="primary", size="lg", scale=3, elem_id="paint")
                    cancel = gr.Button("Cancel", size="lg", scale=1, min_width=80, elem_id="cancel")
                preview = gr.Gallery(label="Being painted", visible=False, height=180, elem_id="preview")
                controls = edit_controls(editor.changed({}), adapters)
            with gr.Column(scale=5, min_width=400):
                results = result_view()
        if samples := example_files():
            examples = example_row(samples)
            listen(examples.click, show_example, examples, [*image, *exemplar])

        connect_picture(image, "image")
        connect_picture(exemplar, "exemplar")
        painting = start.click(
            editor.paint,
            [image.upload, image.canvas, exemplar.upload, exemplar.canvas],
            [*results[:4], preview],
            inputs_kwargs=controls,
            api_visibility="private",
            show_progress_on=results.gallery,
            concurrency_id="model",
            concurrency_limit=1,
        )
        listen(painting.failure, lambda: gr.Gallery(visible=False), None, preview)
        # not by way of the queue, whose messages would say that the visitor still waits
        cancel.click(cancel_edit, None, preview, cancels=[painting], queue=False, api_visibility="private")
        listen(results.gallery.select, choose_result, results.gallery, [results.chosen, results.download])
        listen(results.reuse.click, reuse_result, [results.gallery, results.chosen], [*image])
        # The same for programs: the endpoint's arguments are components too, which nobody sees.
        with gr.Row(visible=False):
            files = [gr.File(label=name) for name in ("image", "mask", "exemplar")]
            saved = gr.File(label="results", file_count="multiple")
            endpoint = gr.Button()
        endpoint.click(
            editor.edit,
            files,
            saved,
            inputs_kwargs=controls,
            api_name="edit",
            concurrency_id="model",
            concurrency_limit=1,
        )
    return page


def connect_picture(picture: PictureInput, name: str) -> None:
    shown = listen(picture.file.upload, partial(show, name=name), picture.file, [*picture])
    # A file that is refused leaves the drop zone, which would not take another beside it.
    listen(shown.failure, lambda: None, None, picture.file)
    listen(picture.canvas.close, show_drop_zone, None, [*picture])


def listen(event: Callable[..., Any], handler: Callable[..., object], inputs: Any, outputs: Any) -> Any:
    """Has an event of the page handled at once: without a progress bar, and not over the API."""
    return event(handler, inputs, outputs, api_visibility="private", show_progress="hidden", concurrency_id="pictures")
