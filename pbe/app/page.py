"""The page: load an image, draw a mask, load an exemplar, look at the results; the same over Gradio's API.

What is loaded and drawn is in `pbe.app.pictures`, the settings are in `pbe.app.controls`, several regions in
`pbe.app.regions`. The edits are made by `pbe.app.editor`.
"""

from __future__ import annotations

from math import inf
from os.path import isdir
from pathlib import Path
from types import NoneType
from typing import Any

import gradio as gr

from pbe.app.canvas import CROPPING, DRAWING
from pbe.app.controls import edit_controls
from pbe.app.editor import Adapters, Editor
from pbe.app.pictures import connect_picture, listen, load_mask, picture_buttons, picture_input, show, thumbnail
from pbe.app.regions import connect_regions, region_list
from pbe.app.results import HEIGHT, connect_results, result_view
from pbe.app.serving import cancel_edit
from pbe.batch.provenance import Weights
from pbe.editing.loading import AdaptedModels
from pbe.editing.settings import QUICK, EditSettings
from pbe.images.pillow import open_image
from pbe.images.reading import read_mask
from pbe.models.paint_by_example import PaintByExample

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"  # of the repository; an installed package has none
EXAMPLE_FILES = (  # image, mask, exemplar
    ("coffee.png", "coffee_mask.png", "dahlia.webp"),
    ("flower.jpg", "flower_mask.png", "helmet.webp"),
    ("astronaut.jpg", "astronaut_mask.png", "uniform.webp"),
    ("coffee.png", "coffee_mask.png", "cat.png"),
)
INTRODUCTION = """
# Paint by Example
Load an image, and draw a mask over what to replace. Load an exemplar: a picture of what to put there. Then paint.
"""
TRY = "New here? A click on one of the [examples](#examples) below paints it."


# ----------------------------------------------------------------------------------------------------------------------
# What the parts do, and what they look like


def show_example(index: int) -> tuple[object, ...]:
    image, mask, exemplar = example_files()[index]
    with open_image(Path(image)) as opened:
        repaint = read_mask(mask, (opened.height, opened.width))
    return *show(image, "image", repaint), *show(exemplar, "exemplar")


def example_files() -> list[list[str]]:
    """Image, mask and exemplar of the examples that are there."""
    paths = [[EXAMPLES / name for name in names] for names in EXAMPLE_FILES]
    return [[str(path) for path in example] for example in paths if all(path.is_file() for path in example)]


def example_row(examples: list[list[str]]) -> gr.Dataset:
    pictures = [[thumbnail(path, Path(path).stem.replace("_", " ")) for path in example] for example in examples]
    return picture_buttons(["".join(one) for one in pictures], "Examples: a click loads and paints one", "examples")


A_FILE = "a file, as gradio_client.handle_file gives it"
# What the components of an event take from a program, beside nothing at all where that is a type too.
VALUES: dict[type[gr.blocks.Block], tuple[tuple[type, ...], str]] = {
    gr.Slider: ((int, float), "a number"),
    gr.Number: ((int, float), "a number"),
    gr.Dropdown: ((str,), "a text"),
    gr.Dataset: ((int,), "an example's number"),
    gr.Textbox: ((str,), "a text"),
    gr.Checkbox: ((bool,), "true or false"),
    gr.File: ((dict, NoneType), A_FILE),
    gr.UploadButton: ((dict, NoneType), A_FILE),
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
                is_right = isinstance(value, types) and value not in (inf, -inf)
                is_right = is_right and (bool in types or not isinstance(value, bool))
                if words == A_FILE and isinstance(value, dict):
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
        gr.Markdown(INTRODUCTION + (TRY if (samples := example_files()) else ""))
        with gr.Row():
            with gr.Column(scale=5, min_width=400):
                image = picture_input("image", "Image", DRAWING, "Image", HEIGHT)
            with gr.Column(scale=3, min_width=280):
                exemplar = picture_input("exemplar", "Exemplar", CROPPING, "Exemplar", 300)
                with gr.Row():
                    start = gr.Button("Paint", variant="primary", size="lg", scale=3, elem_id="paint")
                    cancel = gr.Button("Cancel", size="lg", scale=1, min_width=80, elem_id="cancel")
                preview = gr.Gallery(label="Being painted", visible=False, height=180, elem_id="preview")
                regions = region_list()
                controls, mask_file = edit_controls(editor.changed({}), adapters)
            with gr.Column(scale=5, min_width=400):
                results = result_view()
        if samples:
            examples = example_row(samples)
            loaded = listen(examples.click, show_example, examples, [*image, *exemplar])
            loaded.success(None, js="() => document.querySelector('#paint').click()")

        connect_picture(image, "image")
        connect_picture(exemplar, "exemplar")
        connect_regions(regions, image, exemplar)
        listen(mask_file.upload, load_mask, [mask_file, *image[::2], controls["fit_mask"]], image.canvas)
        painting = start.click(
            editor.paint,
            [image.upload, image.canvas, exemplar.upload, exemplar.canvas],
            [*results.shown, preview],
            inputs_kwargs=controls | {"kept": regions.kept},
            api_visibility="private",
            show_progress_on=[results.gallery, results.slider],
            concurrency_id="model",
            concurrency_limit=1,
        )
        start.click(None, None, results.status, js="() => 'Painting …'")
        listen(painting.failure, lambda: (gr.Gallery(visible=False), ""), None, [preview, results.status])
        # not by way of the queue, whose messages would say that the visitor still waits
        cancel.click(cancel_edit, None, preview, cancels=[painting], queue=False, api_visibility="private")
        cancel.click(None, None, results.status, js="() => 'Cancelled.'")
        connect_results(results, painting, image, exemplar, regions, controls)
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
