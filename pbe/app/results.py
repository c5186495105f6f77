"""The results on the page: those of an edit, one of them over the image as it was, and those of earlier edits.

Files are kept for a day, or less where they are many (`pbe.serve.guard`): results that are gone are left out, in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from pbe.app.editor import Loaded, Upload, show_results
from pbe.app.pictures import PictureInput, listen, open_upload, picture_buttons, show, thumbnail
from pbe.app.regions import RegionList, show_loaded
from pbe.batch.provenance import made_from
from pbe.editing.settings import QUICK, SETTINGS
from pbe.images.pillow import open_image

HEIGHT = 520  # of image and results
MAX_HISTORY = 12  # edits
SHOWN_BY_BROWSERS = ("PNG", "JPEG", "MPO", "WEBP")
ALWAYS_SAID = ("seed", "steps", "guidance", "sampler")
GONE = "These results were deleted, since files are kept for a day at most: paint them again."
NUM_SHOWN = 1 + 5 + 3 + 8  # outputs of `show_entry` for the status, the results, their comparison and `show_loaded`
Results = list[tuple[str, str]]  # files and captions


class Entry(NamedTuple):
    """An edit of this visit: the files of its results, what they were made of, their settings in words, and the first
    one's thumbnail, both as HTML."""

    paths: tuple[str, ...]
    loaded: Loaded
    words: str
    picture: str


class ResultView(NamedTuple):
    """The results, the number of the chosen one, and what can be done with it; first what `show_results` gives."""

    gallery: gr.Gallery
    chosen: gr.State
    download: gr.DownloadButton
    actions: gr.Row
    loaded: gr.State
    reuse: gr.Button
    compared: gr.Checkbox
    slider: gr.ImageSlider
    position: gr.Slider
    status: gr.HTML
    history: gr.State
    earlier: gr.Dataset

    @property
    def shown(self) -> tuple[gr.blocks.Block, ...]:
        return self[:5]

    @property
    def comparison(self) -> tuple[gr.blocks.Block, ...]:
        return self.compared, self.slider, self.position


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
    slider = gr.ImageSlider(
        label="Before (left) and after (right)",
        format="png",
        interactive=False,
        visible=False,
        buttons=["fullscreen"],
        height=HEIGHT,
        max_height=HEIGHT,
        elem_id="comparison",
    )
    about = "How much of the image as it was is shown; the line in the picture can be dragged, too"
    position = gr.Slider(0, 100, 50, step=1, label="Before", info=about, visible=False, elem_id="position")
    status = gr.HTML("", html_template='<p role="status">${value}</p>', elem_id="status")  # screen readers read it out
    with gr.Row(visible=False) as actions:
        download = gr.DownloadButton("Download PNG", size="md", elem_id="download", min_width=150)
        reuse = gr.Button("Use result as image", size="md", elem_id="reuse", min_width=150)
        compared = gr.Checkbox(label="Before and after", container=False, elem_id="compare", min_width=150)
    earlier = picture_buttons([], "History: a click shows the results again", "history")
    return ResultView(
        gallery,
        gr.State(0),
        download,
        actions,
        gr.State(),
        reuse,
        compared,
        slider,
        position,
        status,
        gr.State(()),
        earlier,
    )


def connect_results(
    results: ResultView,
    painting: Any,
    image: PictureInput,
    exemplar: PictureInput,
    regions: RegionList,
    controls: Mapping[str, gr.blocks.Block],
) -> None:
    """`painting`: the event that paints; the `controls` of its settings go back with the pictures."""
    after, now = [results.history, results.earlier, results.status], [results.gallery, results.chosen]
    edited = [results.gallery, results.loaded, results.history]
    listen(painting.success, add_entry, edited, [*after, *results.comparison])
    listen(results.gallery.select, choose_result, results.gallery, [results.chosen, results.download])
    listen(results.reuse.click, reuse_result, now, [*image])
    shown = [results.gallery, results.slider, results.position]
    comparing = listen(results.compared.input, compare, [results.compared, *now, results.loaded], shown)
    listen(comparing.failure, lambda: False, None, results.compared)
    move = "at => ({__type__: 'update', slider_position: at})"
    results.position.input(None, results.position, results.slider, js=move)
    pictures = [*image, *exemplar, *regions[:2]]
    everything = [*after, *results.shown, *results.comparison, *pictures, *controls.values()]
    again = partial(show_entry, names=tuple(controls))
    listen(results.earlier.click, again, [results.earlier, results.history], everything)


# ----------------------------------------------------------------------------------------------------------------------
# What happens


def choose_result(results: Results, event: gr.SelectData) -> tuple[int, str]:
    return event.index, results[event.index][0]


def reuse_result(results: Results, chosen: int) -> tuple[object, ...]:
    return show(results[chosen][0], "image")


def compare(wanted: bool, results: Results, chosen: int, loaded: Loaded) -> tuple[object, ...]:
    """The chosen result over the image as it was, in the gallery's place; or the gallery."""
    if not wanted:
        return gr.Gallery(visible=True, selected_index=chosen), *not_compared()[1:]
    result = results[chosen][0]
    slider = gr.ImageSlider((before(loaded.image, result), result), slider_position=50, visible=True)
    return gr.Gallery(visible=False), slider, gr.Slider(value=50, visible=True)


def not_compared() -> tuple[object, ...]:
    return False, gr.ImageSlider(visible=False), gr.Slider(visible=False)


def before(image: Upload, result: str) -> str | Image.Image:
    """The image that a result was made of, with a gray strip where `extend` added something: its own file, or a copy
    where browsers do not show that."""
    sides = dict(made_from(Path(result)).get("extend", ()))
    if Path(image.path).is_file() and not sides:
        with open_image(Path(image.path)) as opened:
            if opened.format in SHOWN_BY_BROWSERS:
                return image.path
    _, shown = open_upload(image.path, "image")
    unit = shown.height / image.size[0]
    left, right, top, bottom = (round(unit * sides.get(side, 0)) for side in ("left", "right", "top", "bottom"))
    whole = Image.new("RGB", (left + shown.width + right, top + shown.height + bottom), "gray")
    whole.paste(shown, (left, top))
    return whole


def add_entry(results: Results, loaded: Loaded, history: Sequence[Entry]) -> tuple[object, ...]:
    """The history with an edit at its head, its settings in words as the status, and the results uncompared."""
    paths = tuple(path for path, _ in results)
    words = escape(in_words(made_from(Path(paths[0]))))
    entry = Entry(paths, loaded, words, thumbnail(paths[0], "result"))
    return *with_history([entry, *history]), words, *not_compared()


def with_history(history: Sequence[Entry]) -> tuple[tuple[Entry, ...], gr.Dataset]:
    """The newest entries whose files are there, and their list."""
    kept = tuple(entry for entry in history if all(Path(path).is_file() for path in entry.paths))[:MAX_HISTORY]
    return kept, gr.Dataset(samples=[[f"{one.picture}<span>{one.words}</span>"] for one in kept], visible=bool(kept))


def show_entry(index: int, history: Sequence[Entry], names: Sequence[str]) -> tuple[object, ...]:
    """The results of an entry, and pictures and controls, of those `names`, as they were made with."""
    kept, listed = with_history(history)
    entry = dict(enumerate(history)).get(index)
    if entry not in kept:
        gr.Warning(GONE)
        return kept, listed, *(gr.skip(),) * (NUM_SHOWN + len(names))
    try:
        pictures = show_loaded(entry.loaded)
    except gr.Error as error:
        gr.Warning(error.message)
        pictures = (gr.skip(),) * 8
    loaded = entry.loaded
    controls, negative = dict(loaded.controls), loaded.controls.get("negative")
    if negative is not None and not Path(str(negative)).is_file():
        del controls["negative"]
    values = [controls.get(name, gr.skip()) for name in names]
    return kept, listed, entry.words, *show_results(entry.paths, loaded), *not_compared(), *pictures, *values


def in_words(settings: Mapping[str, Any]) -> str:
    """A result's provenance in a line: what people turn most, and all else that is not as in QUICK."""
    usual = QUICK.to_json()
    said = [name for name in SETTINGS if name not in ALWAYS_SAID and settings.get(name) != usual.get(name)]
    words = [f"{name.replace('_', ' ')} {as_text(settings.get(name))}" for name in (*ALWAYS_SAID, *said)]
    return ", ".join(words + [f"{one['file']} {as_text(one['strength'])}" for one in settings.get("adapters", ())])


def as_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
