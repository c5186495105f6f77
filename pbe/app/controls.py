"""The page's controls of an edit's settings: their kinds, bounds and explanations are those of `EditSettings`."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import gradio as gr
import numpy as np

from pbe.app.editor import Adapters
from pbe.app.pictures import SUFFIXES
from pbe.editing.settings import SETTINGS, EditSettings, setting_docs
from pbe.io.fields import Range
from pbe.sampling import SAMPLERS
from pbe.serve.uploads import MAX_RESULTS

OF_MASK = ("fit_mask", "invert", "fill_holes", "smooth", "grow", "split_mask", "placement", "extend")
OF_WINDOW = ("window", "margin", "resolution", "composite", "seam", "feather")
DOCS = setting_docs()
MASK_FILE = "White is repainted. The file's mask takes the place of what is drawn, and can be brushed on."
NEGATIVE = "A negative exemplar is a picture of what guidance leads away from, where that is above 1."


class Controls(NamedTuple):
    """What is handed to an edit, by name, and how a mask file is loaded."""

    values: dict[str, gr.blocks.Block]
    mask_file: gr.UploadButton


def edit_controls(settings: EditSettings, adapters: Adapters) -> Controls:
    """The controls of the settings that a page's user may change, of the number of results, the negative exemplar, and
    the adapters' strengths."""
    about_guidance = "How closely the result follows the exemplar; too much distorts it"
    guidance = gr.Slider(0, 15, settings.guidance, step=0.5, label="Guidance", info=about_guidance)
    num_images = gr.Slider(1, MAX_RESULTS, 2, step=1, label="Results", info="How many, each of a seed of its own")
    with gr.Accordion("Steps, seed, sampler", open=False):
        about = "Of sampling: each takes the same time"
        steps = gr.Slider(min(4, settings.steps), 200, settings.steps, step=1, label="Steps", info=about)
        with gr.Row():
            about = "The same gives the same result; the next results have the next seeds"
            seed = gr.Number(settings.seed, precision=0, minimum=0, label="Seed", info=about, min_width=80)
            about = "The method; lcm and tcd are for distilled models"
            sampler = gr.Dropdown(list(SAMPLERS), value=settings.sampler, label="Sampler", info=about, min_width=80)
    values: dict[str, gr.blocks.Block] = {
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
        "num_images": num_images,
        "sampler": sampler,
    }
    with gr.Accordion("Mask", open=False):
        gr.Markdown(MASK_FILE)
        mask_file = gr.UploadButton("Load a mask file", file_types=SUFFIXES, elem_id="mask-file")
        values |= {name: control(name, settings) for name in OF_MASK}
    with gr.Accordion("Strength, negative exemplar", open=False):
        values["strength"] = control("strength", settings)
        gr.Markdown(NEGATIVE)
        values["negative"] = gr.File(label="Negative exemplar", file_types=SUFFIXES, height=120, elem_id="negative")
    with gr.Accordion("Window and seam", open=False):
        values |= {name: control(name, settings) for name in OF_WINDOW}
    for i, (path, strength) in enumerate(adapters, start=1):
        label, least, most = f"{path.name}: strength", min(-1, strength), max(2, strength)
        about = "How much of the adapter is used; 0 is nothing"
        values[f"strength_{i}"] = gr.Slider(least, most, strength, step=0.05, label=label, info=about)
    return Controls(values, mask_file)


def control(name: str, settings: EditSettings) -> gr.blocks.Block:
    """The control that fits a setting's type: a text field for a list, and for what may be left empty."""
    kind, value, label, info = SETTINGS[name], getattr(settings, name), words(name), DOCS[name]
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    bounds = next((extra for extra in get_args(kind) if isinstance(extra, Range)), None)
    if base is bool:
        return gr.Checkbox(value, label=label, info=info)
    if get_origin(base) is Literal:
        return gr.Dropdown(list(get_args(base)), value=value, label=label, info=info)
    if base is int and bounds:
        return gr.Number(value, precision=0, minimum=bounds.low, maximum=bounds.high, label=label, info=info)
    if base is float and bounds:
        step = 0.05
        low, high = bounds.low + step * bounds.above, bounds.high - step * bounds.below
        return gr.Slider(low, high, value, step=step, label=label, info=info)
    text = "" if value is None else ",".join(map(str, np.ravel(value)))
    return gr.Textbox(text, max_lines=1, label=label, info=info)


def words(name: str) -> str:
    """A setting's name as a label."""
    return name.replace("_", " ").capitalize()
