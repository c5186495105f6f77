"""Manifests: a CSV or JSONL of one's own that lists pictures and the objects in them.

A row is one object. Its columns (docs/data.md has examples):

    image, or file     the picture, relative to the manifest's folder or to `images/` in it
    x0, y0, x1, y1     its box, or as `box`, a list of the four, in JSONL; of the upright picture. Where no number of
                       the file is above 1.5 they are fractions of its width and height, otherwise pixels
    width, height      optional: the size of picture that boxes in pixels were drawn on, if not the file's own
    mask               a mask picture, white = object; a row needs this or a box, or has both
    reference          optional: a picture to take as the exemplar in place of the object
    target             optional: what the edited picture should be, in place of itself
    label, or class    optional: a name

Rows of the same picture make one record, but for those with a reference or target, which make one each. Further
columns are ignored.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.records import (
    MaskArray,
    MaskFile,
    Record,
    Texts,
    check_shape,
    clip_boxes,
    in_area,
    number_photos,
    upright_size,
)
from pbe.io.fields import read
from pbe.io.rows import read_rows

CORNERS = ("x0", "y0", "x1", "y1")
ALIASES = {"file": "image", "class": "label"}
TEXTS = ("image", "mask", "reference", "target", "label")
COLUMNS = (*TEXTS, *CORNERS, "box", "width", "height", *ALIASES)
LARGEST_FRACTION = 1.5  # more than a box in fractions may reach over the edge, less than any real box in pixels


def _number(name: str, value: Any) -> float:
    try:
        return read(name, value, float)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, not a number") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} is {value!r}, not a text")
    value.encode()  # a ValueError for half of a surrogate pair, which JSON can spell
    return value


def _size(row: dict[str, Any]) -> list[float]:
    """Height and width of a row; zeros where it has none."""
    if "width" not in row and "height" not in row:
        return [0, 0]
    if "width" not in row or "height" not in row:
        raise ValueError("width and height need each other")
    size = [_number(name, row[name]) for name in ("height", "width")]
    if min(size) < 1:
        raise ValueError(f"width and height are {size[1]:g} and {size[0]:g}; a picture has 1 pixel at least")
    return size


def _corners(row: dict[str, Any]) -> list[float] | None:
    """The box of a row; None where it has only a mask."""
    given = [name for name in CORNERS if name in row]
    if "box" in row:
        if given:
            raise ValueError("give box or x0, y0, x1, y1, not both")
        if not isinstance(row["box"], list) or len(row["box"]) != 4:
            raise ValueError(f"box is {row['box']!r}, not a list of x0, y0, x1, y1")
        return [_number(name, value) for name, value in zip(CORNERS, row["box"], strict=True)]
    if not given and "mask" in row:
        return None
    if len(given) < 4:
        missing = next(name for name in CORNERS if name not in row)
        raise ValueError(f"it has no {missing}; a row needs x0, y0, x1 and y1, or a box, or a mask")
    return [_number(name, row[name]) for name in CORNERS]


class Manifest:
    """The pictures of a manifest that have an object within `area` (least and most share of the picture).

    images: where the pictures are, if neither in the manifest's folder nor in `images/` in it. ValueError naming the
    line where a row cannot be right; FileNotFoundError where none of its pictures is to be found.
    """

    def __init__(self, path: str | Path, images: str | Path = "", area: tuple[float, float] = (0.0, 1.0)) -> None:
        self.name, self._folder, self._area = str(path), Path(path).parent, area
        lines, texts, boxes, sizes = [], {name: [] for name in TEXTS}, [], []
        for line, row in read_rows(Path(path), COLUMNS, ignore_others=True):
            try:
                if isinstance(row, ValueError):
                    raise row
                row = {ALIASES.get(name, name): value for name, value in row.items()}
                if "image" not in row:
                    raise ValueError(f"it has no image (or file); it has: {', '.join(row) or 'nothing'}")
                for name in TEXTS:
                    texts[name].append(_text(name, row.get(name, "")))
                boxes.append(_corners(row) or [math.nan] * 4)
                sizes.append(_size(row))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            lines.append(line)
        if not lines:
            raise ValueError(f"{path} has no rows")

        self._boxes, self._sizes = np.array(boxes), np.array(sizes).astype(np.int64)  # (N, 4), (N, 2)
        in_pixels = bool(np.nanmax(self._boxes, initial=0) > LARGEST_FRACTION)
        if in_pixels:
            given = self._sizes.all(axis=1)
            self._boxes[given] /= np.tile(self._sizes[given, ::-1], 2)
        # Boxes in pixels of a size that only the file tells: checked when it is opened.
        self._in_pixels = in_pixels & ~self._sizes.all(axis=1) if in_pixels else np.zeros(len(lines), dtype=bool)
        known = ~self._in_pixels & ~np.isnan(self._boxes[:, 0])
        clipped, sound = clip_boxes(self._boxes[known])
        if not sound.all():
            first = np.flatnonzero(known)[~sound][0]
            raise ValueError(
                f"{path}, line {lines[first]}: box {boxes[first]} is not inside the picture with x0 < x1 and y0 < y1 "
                f"(taken as {'pixels' if in_pixels else 'fractions'}: see docs/data.md)"
            )
        self._boxes[known] = clipped
        usable = np.ones(len(lines), dtype=bool)
        usable[known] = in_area(clipped, area)

        records: dict[Any, list[int]] = {}
        for i in np.flatnonzero(usable).tolist():
            paired = texts["reference"][i] or texts["target"][i]
            key = i if paired else (texts["image"][i], bool(texts["mask"][i]))  # a record has all masks or none
            records.setdefault(key, []).append(i)
        if not records:
            raise ValueError(f"{path}: no picture has a box of {area[0]:g} to {area[1]:g} of its area")
        self._rows = np.array([i for rows in records.values() for i in rows])
        self._ends = np.cumsum([0, *map(len, records.values())])
        self.photos = number_photos([os.path.normpath(texts["image"][rows[0]]) for rows in records.values()])
        self._texts = {name: Texts(values) for name, values in texts.items()}
        self._images = self._find_images(images)

    def _find_images(self, images: str | Path) -> Path:
        folders = [Path(images)] if images else [self._folder, self._folder / "images"]
        names = self._texts["image"]
        for folder in folders:
            if any((folder / names[i]).is_file() for i in range(len(names))):
                return folder
        raise FileNotFoundError(
            f"none of the pictures of {self.name}, such as {names[0]}, is in {' or '.join(map(str, folders))}"
        )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Record:
        rows = self._rows[self._ends[i] : self._ends[i + 1]].tolist()
        image = self._images / self._texts["image"][rows[0]]
        size = upright_size(image)
        boxes, masks = zip(*(self._object(row, image, size) for row in rows), strict=True)
        boxes = np.stack(boxes)
        chosen = np.flatnonzero(in_area(boxes, self._area))
        if not chosen.size:
            raise ValueError(f"{image}: no box is of {self._area[0]:g} to {self._area[1]:g} of its area")
        labels = [self._texts["label"][row] for row in rows]
        return Record(
            image,
            boxes[chosen],
            tuple(masks[k] for k in chosen) if masks[0] is not None else None,
            self._other(rows[0], "reference"),
            self._other(rows[0], "target"),
            tuple(labels[k] for k in chosen) if all(labels) else None,
            repaint_masks=masks[0] is not None,
        )

    def _object(self, row: int, image: Path, size: tuple[int, int]) -> tuple[np.ndarray, MaskArray | MaskFile | None]:
        """The box (4,) and the mask, if it has one, of a row."""
        mask = self._other(row, "mask")
        if np.isnan(self._boxes[row, 0]):
            read = MaskFile(mask).read()
            check_shape(mask, read.mask.shape, size)
            return read.box()[0], read
        if self._sizes[row].all():
            check_shape(image, size, tuple(self._sizes[row].tolist()))
        box = self._boxes[row : row + 1]
        clipped, sound = clip_boxes(box / np.tile(size[::-1], 2) if self._in_pixels[row] else box)
        if not sound.all():
            raise ValueError(f"{image} is {size[1]}x{size[0]}; its box {box[0].tolist()} is not inside it")
        return clipped[0], MaskFile(mask) if mask else None

    def _other(self, row: int, name: str) -> Path | None:
        text = self._texts[name][row]
        return self._folder / text if text else None
