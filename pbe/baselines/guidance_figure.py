"""The paper's figure 8: ever more precise texts against the exemplar as guidance (arXiv 2211.13227, section 4.4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pbe import __version__
from pbe.baselines import Edit, Weights, get_baseline
from pbe.batch.provenance import identify
from pbe.checkpoints.loading import choose_device, choose_dtype
from pbe.images.saving import save_picture
from pbe.images.windows import mask_bounding_box

BACKGROUND, INK, OUTLINE = "white", (24, 24, 24), (230, 30, 30)
TEXT, EXEMPLAR = "stable-diffusion-text", "paint-by-example"


def save_guidance_figure(
    out: Path,
    source: Path,
    mask: Path,
    exemplar: Path,
    texts: Sequence[str],
    seeds: Sequence[int],
    weights: Weights,
    steps: int | None = None,
    on_picture: Callable[[], None] | None = None,
) -> None:
    """Writes one picture: the source, Stable Diffusion's result for each text, the exemplar, Paint by Example's result.

    A row a seed, which both systems draw from. The file holds the texts, seeds, settings and checksums of the weights.
    ValueError for no or blank texts, repeated seeds, a file not given and as `Edit.read` and `open_baseline`;
    FileNotFoundError for a file that is not there.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"the figure needs texts that say something, got {list(texts)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"the figure needs seeds, each once, got {list(seeds)}")
    edit = Edit.read(source, mask, exemplar)
    dtype = choose_dtype(weights.dtype, choose_device(weights.device))
    about: dict[str, Any] = {
        "texts": list(texts),
        "seeds": list(seeds),
        "dtype": str(dtype).removeprefix("torch."),
        "systems": {},
    }
    for name in (TEXT, EXEMPLAR):
        baseline = get_baseline(name)
        files = {kind: identify(Path(weights.path(kind)), dtype) for kind in baseline.files}
        about["systems"][name] = baseline.choose_settings({"steps": steps}) | {
            "weights": {kind: {"file": file.checkpoint, "crc32": file.crc32} for kind, file in files.items()}
        }
    by_text, by_exemplar = paint_both(edit, texts, seeds, weights, steps, on_picture)
    rows = [[outlined(edit), *painted, edit.exemplar, ours] for painted, ours in zip(by_text, by_exemplar, strict=True)]
    labels = ["source", *texts, "exemplar", "Paint by Example"]
    row_labels = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else None
    info = {
        "pbe": json.dumps({**about, "pbe": __version__}),
        "Description": "Text against an exemplar as guidance",
        "Software": f"pbe {__version__}",
    }
    save_picture(labelled_grid(rows, labels, row_labels), out, info)


def paint_both(
    edit: Edit,
    texts: Sequence[str],
    seeds: Sequence[int],
    weights: Weights,
    steps: int | None,
    on_picture: Callable[[], None] | None = None,
) -> tuple[list[list[Image.Image]], list[Image.Image]]:
    """By seed: the results for each text, and that for the exemplar. One system's networks are in memory at a time."""

    def done(picture: Image.Image) -> Image.Image:
        if on_picture is not None:
            on_picture()
        return picture

    def open_(name: str) -> Any:
        baseline = get_baseline(name)
        return replace(baseline.load(weights), **baseline.choose_settings({"steps": steps}))

    system = open_(TEXT)
    by_text = [[done(system.paint(replace(edit, seed=seed), text)) for text in texts] for seed in seeds]
    del system
    system = open_(EXEMPLAR)
    return by_text, [done(system(replace(edit, seed=seed))) for seed in seeds]


def outlined(edit: Edit) -> Image.Image:
    """The photo with the mask's box."""
    photo, box = Image.fromarray(edit.photo), mask_bounding_box(edit.repaint)
    width = max(2, photo.height // 100)
    ImageDraw.Draw(photo).rectangle((box.x0, box.y0, box.x1 - 1, box.y1 - 1), outline=OUTLINE, width=width)
    return photo


# --- layout -----------------------------------------------------------------------------------------------


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    row_labels: Sequence[str] | None = None,
    cell_height: int = 320,
) -> Image.Image:
    """Rows of pictures under labels of any length, which are broken into lines as wide as their column.

    All pictures fit into cells of the first one's shape.
    """
    first = rows[0][0]
    cell_width = min(2 * cell_height, max(cell_height // 2, round(cell_height * first.width / first.height)))
    gap = max(4, cell_height // 26)
    font = ImageFont.load_default(size=max(11, cell_height // 16))
    line_height = round(1.25 * sum(font.getmetrics()))
    wrapped = [wrap(label, font, cell_width) for label in labels]
    top = gap + max(map(len, wrapped)) * line_height + gap // 2
    left = gap + (round(max(map(font.getlength, row_labels))) + gap if row_labels else 0)
    size = (left + len(labels) * (cell_width + gap), top + len(rows) * (cell_height + gap))
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(wrapped):
        for k, line in enumerate(reversed(lines)):  # the last line stands on the picture
            at = (left + i * (cell_width + gap) + cell_width / 2, top - gap // 2 - (k + 0.5) * line_height)
            draw.text(at, line, INK, font, anchor="mm")
    for j, row in enumerate(rows):
        y = top + j * (cell_height + gap)
        if row_labels:
            draw.text((gap, y + cell_height / 2), row_labels[j], INK, font, anchor="lm")
        for i, picture in enumerate(row):
            scale = min(cell_width / picture.width, cell_height / picture.height)
            fitted = picture.convert("RGB").resize(
                (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
            )
            x = left + i * (cell_width + gap)
            canvas.paste(fitted, (x + (cell_width - fitted.width) // 2, y + (cell_height - fitted.height) // 2))
    return canvas


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words, or within one that is longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
