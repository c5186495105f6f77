"""Pictures side by side: rows and columns with captions and labels, as in the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pbe.images.reading import over_white
from pbe.images.windows import mask_bounding_box

BACKGROUND, INK, FAINT, OUTLINE = "white", (24, 24, 24), (96, 96, 96), (230, 30, 30)


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[Sequence[str]] | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell_height: int = 320,
) -> Image.Image:
    """One RGB picture of the pictures in `rows`, on white, which transparent parts show too.

    Each picture is scaled to `cell_height`, or, if it is wide, to twice that in width, and centred in its column; None
    leaves its place empty. `captions`, in the shape of `rows`, stand under the pictures, `row_labels` to the left,
    `column_labels` on top, broken into lines. Other text that is too long for its place is shortened.

    ValueError without pictures, and where captions or labels do not fit the rows.
    """
    if not any(cell for row in rows for cell in row):
        raise ValueError("a grid needs at least one picture")
    num_columns = max(map(len, rows))
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("captions must have the shape of the rows of the grid")
    for name, labels, expected in (("row", row_labels, len(rows)), ("column", column_labels, num_columns)):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"{len(labels)} {name} labels for {expected} {name}s; give one each")

    gutter = max(4, cell_height // 26)
    caption_font, label_font = _font(max(10, cell_height // 18)), _font(max(11, cell_height // 15))
    cells = [[cell and _fit(over_white(cell).convert("RGB"), cell_height) for cell in row] for row in rows]
    widths = [max((cell.width for cell in column if cell), default=0) for column in zip_longest(*cells)]
    heights = [max((cell.height for cell in row if cell), default=0) for row in cells]
    caption_height = 2 * _line_height(caption_font) if captions else 0
    wrapped = [wrap(label, label_font, width) for label, width in zip(column_labels or (), widths, strict=False)]
    top = gutter + ((1 + max(map(len, wrapped))) * _line_height(label_font) if wrapped else 0)
    label_width = 0
    if row_labels:
        row_labels = [_shorten(label, label_font, 2 * cell_height // 3) for label in row_labels]
        label_width = round(max(map(label_font.getlength, row_labels))) + 2 * gutter
    lefts = [gutter + label_width + sum(widths[:i]) + gutter * i for i in range(num_columns)]
    tops = [top + sum(heights[:j]) + (caption_height + gutter) * j for j in range(len(rows) + 1)]

    canvas = Image.new("RGB", (lefts[-1] + widths[-1] + gutter, tops[-1]), color=BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(wrapped):
        at = (lefts[i] + widths[i] / 2, (top + gutter / 2) / 2)
        draw.text(at, "\n".join(lines), INK, label_font, anchor="mm", align="center")
    for j, row in enumerate(cells):
        y = tops[j]
        if row_labels:
            draw.text((label_width - gutter, y + heights[j] / 2), row_labels[j], INK, label_font, anchor="rm")
        for i, cell in enumerate(row):
            if cell is None:
                continue
            canvas.paste(cell, (lefts[i] + (widths[i] - cell.width) // 2, y + (heights[j] - cell.height) // 2))
            if captions:
                text = _shorten(captions[j][i], caption_font, widths[i])
                below = (lefts[i] + widths[i] / 2, y + heights[j] + caption_height / 2)
                draw.text(below, text, FAINT, caption_font, anchor="mm")
    return canvas


def with_box(image: Image.Image, repaint: np.ndarray) -> Image.Image:
    """The image with the outline of the box around a mask, bool (H, W)."""
    image, box = image.copy(), mask_bounding_box(repaint)
    corners = (box.x0, box.y0, box.x1 - 1, box.y1 - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=OUTLINE, width=max(2, image.height // 100))
    return image


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


def _fit(image: Image.Image, height: int) -> Image.Image:
    scale = min(height / image.height, 2 * height / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as for every given size
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
