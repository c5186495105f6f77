"""Several regions on the page, each with its exemplar: chips for those that are kept, beside the one that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from pbe.app.canvas import drawn_mask, to_value
from pbe.app.editor import Drawn, Loaded, Upload
from pbe.app.pictures import PictureInput, listen, open_upload, show, show_drop_zone
from pbe.app.serving import workplace
from pbe.batch.job import NUMBERS
from pbe.images.windows import mask_bounding_box

Kept = tuple[Drawn, ...]
Canvas = dict[str, str] | None
COLOURS = ("#e11d48", "#059669", "#d97706", "#0284c7", "#9333ea", "#65a30d", "#c026d3", "#0d9488")  # of the chips
TINT = 140  # of 255, on the image
ABOUT = (
    "For several objects: draw the first mask, load its exemplar, add the region, and go on with the next. A click on "
    "a region opens it again. All are painted, one after the other where they overlap."
)
HTML = """{{#each value}}<span class="chip" style="border-color: {{this.colour}}">
<button data-act="edit" data-index="{{@index}}" title="Open {{this.name}} again">
<img src="{{this.thumbnail}}" alt="">{{this.name}}</button>
<button data-act="remove" data-index="{{@index}}" aria-label="Remove {{this.name}}">✕</button>
</span>{{/each}}"""
CSS = """display: flex; flex-wrap: wrap; gap: 8px;
.chip { display: inline-flex; border: 2px solid; border-radius: 8px; overflow: hidden; }
.chip button { display: inline-flex; align-items: center; gap: 6px; padding: 2px 8px; cursor: pointer;
               color: var(--body-text-color); }
.chip img { width: 32px; height: 32px; object-fit: cover; border-radius: 4px; }"""
JS = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const data = { index: Number(button.dataset.index) };
  if (button.dataset.act === "edit") trigger("edit", data); else trigger("remove", data);
});"""


class RegionList(NamedTuple):
    """The regions that are kept, their chips, and the button that keeps another."""

    kept: gr.State
    chips: gr.HTML
    add: gr.Button


def region_list() -> RegionList:
    with gr.Accordion("Several regions", open=False):
        gr.Markdown(ABOUT)
        chips = gr.HTML(
            [], html_template=HTML, css_template=CSS, js_on_load=JS, apply_default_css=False, elem_id="chips"
        )
        return RegionList(gr.State(()), chips, gr.Button("Add region", elem_id="add-region"))


def connect_regions(regions: RegionList, image: PictureInput, exemplar: PictureInput) -> None:
    kept, chips, add = regions
    now, shown = [kept, image.upload, image.canvas], [kept, chips, image.canvas]
    listen(add.click, add_region, [*now, exemplar.upload, exemplar.canvas], [*shown, *exemplar])
    listen(chips.edit, open_region, [*now, exemplar.upload, exemplar.canvas], [*shown, *exemplar])
    listen(chips.remove, remove_region, now, shown)
    listen(image.upload.change, forget_others, [kept, image.upload], [kept, chips])


def add_region(
    kept: Kept, image: Upload | None, drawn: Canvas, exemplar: Upload | None, crop: Canvas
) -> tuple[object, ...]:
    """Keeps the region that is drawn, and begins another."""
    with workplace():
        kept = with_drawn(kept, Drawn(image, drawn, exemplar, crop))
        assert image is not None  # else there is an error before
        return *show_regions(kept, image), *show_drop_zone()


def open_region(
    kept: Kept, image: Upload, drawn: Canvas, exemplar: Upload | None, crop: Canvas, event: gr.EventData
) -> tuple[object, ...]:
    """Goes on with a region that was kept; the one that is drawn, if there is one, is kept for it."""
    with workplace():
        chosen, others = kept[event.index], kept[: event.index] + kept[event.index + 1 :]
        now = Drawn(image, drawn, exemplar, crop)
        others = others if now.is_empty else with_drawn(others, now)
        picture = chosen.exemplar, gr.update(visible=False), gr.update(value=chosen.crop, visible=True)
        return *show_regions(others, image, chosen.mask), *picture


def remove_region(kept: Kept, image: Upload, drawn: Canvas, event: gr.EventData) -> tuple[object, ...]:
    with workplace():
        return show_regions(kept[: event.index] + kept[event.index + 1 :], image, drawn)


def forget_others(kept: Kept, image: Upload | None) -> tuple[Kept, list[dict[str, str]]]:
    """No regions where those that are kept are of another image."""
    kept = tuple(one for one in kept if one.image == image)
    return kept, chips_of(kept)


def show_loaded(loaded: Loaded) -> tuple[object, ...]:
    """For the image's and the exemplar's `PictureInput`, and the regions and chips: what results were made of."""
    kept, chips, canvas = show_regions(loaded.kept, loaded.image, {"mask": loaded.mask})
    image = loaded.image, gr.update(value=None, visible=False), gr.update(value=canvas, visible=True)
    exemplar = show(loaded.exemplar.path, "exemplar", loaded.crop) if loaded.exemplar else show_drop_zone()
    return *image, *exemplar, kept, chips


def with_drawn(kept: Kept, region: Drawn) -> Kept:
    """The regions, and another with the thumbnail of its exemplar; ValueError where that is not complete."""
    if len(kept) == len(NUMBERS):
        raise ValueError(f"There may be {len(NUMBERS) + 1} regions, with the one that is drawn.")
    _, exemplar, crop = region.files()
    _, shown = open_upload(str(exemplar), "exemplar")
    part = None if crop is None else drawn_mask(region.crop, shown.size[::-1])
    if part is not None:
        shown = shown.crop(mask_bounding_box(part))
    shown.thumbnail((64, 64))
    return *kept, region._replace(thumbnail=to_value(shown)["picture"])


def show_regions(kept: Kept, image: Upload, drawn: Canvas = None) -> tuple[Kept, list[dict[str, str]], dict[str, str]]:
    """The regions, their chips, and the image's canvas with their masks in their colours, and what is drawn on it."""
    _, shown = open_upload(image.path, "image")
    for colour, region in coloured(kept):
        mask = drawn_mask(region.mask, shown.size[::-1])
        assert mask is not None
        shown.paste(colour, mask=Image.fromarray(mask * np.uint8(TINT)))
    return kept, chips_of(kept), to_value(shown) | {"mask": drawn["mask"] if drawn else ""}


def chips_of(kept: Kept) -> list[dict[str, str]]:
    numbered = enumerate(coloured(kept), start=1)
    return [{"name": f"region {i}", "colour": colour, "thumbnail": one.thumbnail} for i, (colour, one) in numbered]


def coloured(kept: Kept) -> Iterator[tuple[str, Drawn]]:
    """Each region with its colour."""
    return zip(COLOURS[: len(kept)], kept, strict=True)
