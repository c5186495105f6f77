"""The pictures of docs/editing.md: a strip for each control of an edit, by the small model that is part of the package.

python examples/gallery.py docs/images/gallery              all of them
python examples/gallery.py docs/images/gallery grow seam    these

A strip begins with the photo, coloured where its mask is, and the exemplars in its corner, a negative one crossed out.
Each picture beside it is the one edit with seed 0 of what its label says.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageOps
from tqdm import tqdm

import pbe
from pbe.editing.loading import limit_threads
from pbe.editing.regions import regions_by_colour
from pbe.editing.settings import quick_settings
from pbe.images.grids import grid

EXAMPLES = Path(__file__).resolve().parent
SEED = 0
CELL, QUALITY = 112, 90  # height of a picture in a strip, in pixels; of JPEG
INSET, FRAME = 124, 4  # of an exemplar in the photo's corner, in the photo's pixels

PHOTO, MASK = Image.open(EXAMPLES / "flower.jpg"), Image.open(EXAMPLES / "flower_mask.png").convert("RGB")
RED, YELLOW, PINK, VIOLET, WHITE = (
    Image.open(EXAMPLES / f"flower_{colour}.jpg") for colour in ("red", "yellow", "pink", "violet", "white")
)
COFFEE, CUP = Image.open(EXAMPLES / "coffee.png"), Image.open(EXAMPLES / "coffee_mask.png").convert("RGB")
CHINA = Image.open(EXAMPLES / "china.jpg")
DAHLIA, LEFT, RIGHT = (144, 60, 472, 374), (5, 130, 135, 260), (490, 170, 620, 300)


def drawn(shape: str, *boxes: tuple[int, int, int, int], **style: Any) -> Image.Image:
    """A mask with an "ellipse" or a "rectangle" in each box."""
    mask = Image.new("RGB", PHOTO.size)
    for box in boxes:
        getattr(ImageDraw.Draw(mask), shape)(box, **(style or {"fill": "white"}))
    return mask


def dotted(number: int) -> Image.Image:
    """The dahlia's mask as a bad tool makes it: with dots around it and holes in it."""
    mask, draws = MASK.copy(), Random(0)
    for _ in range(number):
        x, y, r = draws.uniform(90, 530), draws.uniform(20, 410), draws.uniform(2, 6)
        ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=draws.choice(("white", "black")))
    return mask


def cut_out() -> Image.Image:
    """The photo, transparent where the dahlia was."""
    photo = PHOTO.convert("RGBA")
    photo.putalpha(ImageOps.invert(MASK).convert("L"))
    return photo


def selected(x: int, y: int) -> Image.Image:
    return Image.fromarray(pbe.select_object(PHOTO, point=(x, y))).convert("RGB")


def each(name: str, *values: Any) -> dict[str, dict[str, Any]]:
    """An edit for each value of a keyword, by its label."""
    return {f"{name}={value!r}": {name: value} for value in values}


COLOURS = ImageChops.add(drawn("ellipse", LEFT, fill="red"), drawn("ellipse", RIGHT, fill="blue"))
BY_COLOUR = {"ff0000": YELLOW, "0000ff": PINK}
BOXES = {LEFT: RED, DAHLIA: YELLOW, RIGHT: VIOLET}
REGIONS = [pbe.Region(*both) for both in BOXES.items()]
SAMPLERS = (("dpm_solver", 20), ("dpm_solver", 4), ("plms", 10))
# What is given in place of PHOTO, MASK and YELLOW, and what is told in each picture of a strip, by its label.
STRIPS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "strength": ({"image": COFFEE, "mask": CUP}, each("strength", 0.4, 0.7, 1.0)),
    "negative": (
        {"exemplar": [PINK]},
        {"negative=None": {}, "negative='flower_white.jpg'": {"negative": WHITE}},
    ),
    "exemplar_mask": (
        {"image": CHINA, "mask": drawn("ellipse", (380, 40, 560, 220)), "exemplar": [PHOTO]},
        {"exemplar_mask=None": {}, "exemplar_mask=mask": {"exemplar_mask": [MASK]}},
    ),
    "mixing": ({"exemplar": [YELLOW, VIOLET]}, each("exemplar_weights", (1, 0), (1, 1), (0, 1))),
    "guidance": ({}, each("guidance", 1.0, 2.0, 7.0)),
    "grow": ({}, each("grow", -70, 0, 50)),
    "fill_holes": ({"mask": drawn("ellipse", DAHLIA, outline="white", width=40)}, each("fill_holes", False, True)),
    "smooth": ({"mask": dotted(200)}, each("smooth", 0, 20)),
    "invert": ({"mask": ImageOps.invert(MASK)}, each("invert", False, True)),
    "hole": ({"image": cut_out(), "mask": None}, {"mask=None": {}}),
    "extend": ({"mask": None}, each("extend", "right,240")),
    "placement": ({"mask": drawn("rectangle", (30, 10, 190, 417))}, each("placement", "fill", "centre", "bottom")),
    "select": (
        {"mask": lambda: selected(310, 215)},
        {"mask=pbe.select_object(image, point=(310, 215))": {}, "the same mask, grow=12": {"grow": 12}},
    ),
    "regions": (
        {"mask": drawn("rectangle", *BOXES), "exemplar": list(BOXES.values())},
        {"pbe.edit_regions(model, image, regions)": {"regions": REGIONS}},
    ),
    "colours": (
        {"mask": COLOURS, "exemplar": list(BY_COLOUR.values())},
        {"regions=regions_by_colour(…)": {"regions": regions_by_colour(COLOURS, BY_COLOUR)}},
    ),
    "split_mask": ({"mask": drawn("ellipse", LEFT, RIGHT)}, each("split_mask", False, True)),
    "window": ({"mask": drawn("ellipse", LEFT)}, each("window", "auto", (0, 70, 300, 370), "full")),
    "composite": ({}, each("composite", True, False)),
    "seam": ({"image": COFFEE, "mask": CUP}, each("seam", "poisson", "feather")),
    "steps": ({}, {f"sampler={name!r}, steps={steps}": {"sampler": name, "steps": steps} for name, steps in SAMPLERS}),
}


def before(
    image: Image.Image, mask: Image.Image | None, insets: Sequence[Image.Image], is_negative: bool
) -> Image.Image:
    """The photo with the colours of the mask over it, and the insets in its corner."""
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    if mask is not None:
        shown.paste(mask, mask=mask.convert("L").point(lambda value: 160 * (value > 0)))
    for place, inset in enumerate(reversed(insets)):
        framed = ImageOps.expand(ImageOps.fit(inset, (INSET, INSET)), FRAME, "white")
        x, y = image.width - (place + 1) * framed.width, image.height - framed.height
        shown.paste(framed, (x, y))
        if is_negative and place == 0:  # the last one
            ImageDraw.Draw(shown).line((x, y, *image.size), "red", 2 * FRAME)
    return shown


def paint(model: pbe.PaintByExample, image: Any, mask: Any, exemplar: Any, **told: Any) -> Image.Image:
    if "regions" in told:
        return pbe.edit_regions(model, image, **told)[0]
    return pbe.edit(model, image, mask, exemplar, **told)[0]


def main(out: str, *names: str) -> None:
    """Writes the strips with these names, or all."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = pbe.load_model("demo", "cpu", "float32")  # the same pictures on every machine
    limit_threads(model)
    common = {**vars(quick_settings("demo")), "seed": SEED}
    for name in tqdm(names or STRIPS, unit="strip"):
        changes, edits = STRIPS[name]
        given = {"image": PHOTO, "mask": MASK, "exemplar": [YELLOW], **changes}
        given["mask"] = given["mask"]() if callable(given["mask"]) else given["mask"]
        negatives = [told["negative"] for told in edits.values() if told.get("negative")]
        shown = before(given["image"], given["mask"], given["exemplar"] + negatives, bool(negatives))
        cells = {"": shown, **{label: paint(model, **given, **{**common, **told}) for label, told in edits.items()}}
        strip = grid([list(cells.values())], column_labels=list(cells), cell_height=CELL)
        strip.save(folder / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
