"""Manifests: a CSV or JSONL of one's own that lists pictures and the objects in them.

A row is one object. Its columns (docs/data.md has examples):

    image, or file     the picture, relative to the manifest's folder or to `images/` in it
    x0, y0, x1, y1     its box, or as `box`, a list of the four, in JSONL; of the upright picture. Where no number of
                       the file is above 1.5 they are fractions of its width and height, otherwise pixels
    width, height      optional: the size of picture that boxes in pixels were drawn on, if not the file's own
    mask               a mask picture, white = object; a row needs this or a box, or has both
    exemplar           optional: a picture to take as the exemplar in place of the object
    target             optional: what the edited picture should be, in place of itself
    label, or class    optional: a name

Rows of the same picture make one record, except those with an exemplar or target, which make one each. Names that other
tools give these columns are read too (ALIASES, and x1, y1, x2, y2); further columns are ignored.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pbe.data.picture_sizes import read_sizes
from pbe.data.records import (
    DataWarning,
    MaskArray,
    MaskFile,
    PackedStrings,
    Record,
    UnusablePicture,
    check_shape,
    clip_boxes,
    in_area,
    number_photos,
    upright_size,
)
from pbe.io.fields import read
from pbe.io.json_text import shown
from pbe.io.rows import read_rows

CORNERS = ("x0", "y0", "x1", "y1")
ALIASES = dict.fromkeys(("file", "filename", "file_name", "filepath", "file_path", "image_path", "path"), "image")
ALIASES |= dict.fromkeys(("class", "class_name", "category"), "label")
ALIASES |= dict(zip(("xmin", "ymin", "xmax", "ymax"), CORNERS, strict=True))
ALIASES |= dict(zip(("x_min", "y_min", "x_max", "y_max"), CORNERS, strict=True))
ALIASES |= dict(zip(("left", "top", "right", "bottom"), CORNERS, strict=True))
FROM_1 = {"x1": "x0", "y1": "y0", "x2": "x1", "y2": "y1"}  # corners where they are counted from 1
TEXTS = ("image", "mask", "exemplar", "target", "label")
COLUMNS = (*TEXTS, *CORNERS, "box", "width", "height")
RENAMED = {"reference": "exemplar"}  # columns, new names by old ones
LARGEST_FRACTION = 1.5  # more than a box in fractions may reach over the edge, less than any real box in pixels
OTHER_UNITS: dict[float, str] = {100: "percent", 1000: "thousandths"}
MOST_SKIPPED = 0.1  # share of the pictures that may be skipped without a warning
MAX_SIDE = 2**31


class _Row(NamedTuple):
    """An object; a text that is not given is empty."""

    image: str
    mask: str
    exemplar: str
    target: str
    label: str
    box: list[float]  # x0, y0, x1, y1; NaN where there is only a mask
    size: list[float]  # height and width; zeros where not given


def _read_row(cells: dict[str, Any]) -> _Row:
    if "x2" in cells and "x0" not in cells:
        cells = {FROM_1.get(name, name): value for name, value in cells.items()}
    if "image" not in cells:
        raise ValueError(f"it has no image (or file); it has: {', '.join(cells) or 'nothing'}")
    texts = {name: _text(name, cells.get(name, "")) for name in TEXTS}
    return _Row(box=_box(cells), size=_size(cells), **texts)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} is {shown(value)}, not a text")
    value.encode()  # a ValueError for half of a surrogate pair, which JSON can spell
    return value


def _box(cells: dict[str, Any]) -> list[float]:
    given = {name: cells[name] for name in CORNERS if name in cells}
    if "box" in cells:
        if given:
            raise ValueError("give box or x0, y0, x1, y1, not both")
        if not isinstance(cells["box"], list) or len(cells["box"]) != 4:
            raise ValueError(f"box is {shown(cells['box'])}, not a list of x0, y0, x1, y1")
        given = dict(zip(CORNERS, cells["box"], strict=True))
    elif not given and "mask" in cells:
        return [math.nan] * 4
    if len(given) < 4:
        missing = next(name for name in CORNERS if name not in given)
        raise ValueError(
            f"it has no {missing}; a row needs x0, y0, x1 and y1, or a box, or a mask; it has: {', '.join(cells)}"
        )
    return [read(name, given[name], float) for name in CORNERS]


def _size(cells: dict[str, Any]) -> list[float]:
    size = [read(name, cells[name], float) for name in ("height", "width") if name in cells]
    if len(size) == 1:
        raise ValueError("give both width and height, or neither")
    if size and not 1 <= min(size) <= max(size) < MAX_SIDE:
        raise ValueError(f"width and height are {size[1]:g} and {size[0]:g}; a picture has at least 1 pixel")
    return size or [0, 0]


class Manifest:
    """The pictures of a manifest that have an object within `area` (least and most share of the picture).

    images: where the pictures are, if neither in the manifest's folder nor in `images/` in it. ValueError naming the
    line where a row cannot be right; FileNotFoundError where none of its pictures is found.
    """

    def __init__(self, path: str | Path, images: str | Path = "", area: tuple[float, float] = (0.0, 1.0)) -> None:
        self.name, self._folder, self._area = str(path), Path(path).parent, area
        lines, rows = [], []
        for line, cells in read_rows(Path(path), COLUMNS, renamed=RENAMED, aliases=ALIASES, ignore_others=True):
            try:
                if isinstance(cells, ValueError):
                    raise cells
                rows.append(_read_row(cells))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            lines.append(line)
        if not rows:
            raise ValueError(f"{path} has no rows")
        self._boxes = np.array([row.box for row in rows])  # (N, 4) as given
        self._sizes = np.array([row.size for row in rows]).astype(np.int64)  # (N, 2) as given; zeros: not given
        self._in_pixels = bool(np.nanmax(self._boxes, initial=0) > LARGEST_FRACTION)
        self._check_boxes(lines)
        names = [row.image for row in rows]
        self._images = self._find_images(names, Path(images) if images else None)
        usable = self._choose(names)
        self._texts = {name: PackedStrings([getattr(row, name) for row in rows]) for name in TEXTS}
        records: dict[Any, list[int]] = {}
        for i in np.flatnonzero(usable).tolist():
            row = rows[i]
            key = i if row.exemplar or row.target else (row.image, bool(row.mask))  # a record has all masks or none
            records.setdefault(key, []).append(i)
        if not records:
            raise ValueError(f"{path}: no picture has a box of {area[0]:g} to {area[1]:g} of its area")
        self._rows = np.array([i for group in records.values() for i in group])
        self._ends = np.cumsum([0, *map(len, records.values())])
        self.photos = number_photos([os.path.normpath(rows[group[0]].image) for group in records.values()])

    def _fractions(self, boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) as given, in pictures of `sizes` (n, 2), as fractions; and which are sound (`clip_boxes`)."""
        with np.errstate(divide="ignore", invalid="ignore"):  # where the size is not known
            return clip_boxes(boxes / np.tile(sizes[:, ::-1], 2) if self._in_pixels else boxes)

    def _check_boxes(self, lines: list[int]) -> None:
        """ValueError for a box that cannot be, as far as the rows alone say."""
        wrong = ~(self._boxes[:, 2:] > self._boxes[:, :2]).all(axis=1)
        wrong |= ~self._fractions(self._boxes, self._sizes)[1] & (self._sizes.all(axis=1) | (not self._in_pixels))
        for i in np.flatnonzero(wrong & ~np.isnan(self._boxes[:, 0])):
            raise ValueError(
                f"{self.name}, line {lines[i]}: box {self._boxes[i].tolist()} is not inside the picture with x0 < x1 "
                f"and y0 < y1 (taken as {'pixels' if self._in_pixels else 'fractions'}: see docs/data.md)"
            )

    def _find_images(self, images: list[str], given: Path | None) -> Path:
        """The folder in which any of the pictures is."""
        folders = [given] if given else [self._folder, self._folder / "images"]
        for folder in folders:
            if any((folder / image).is_file() for image in images):
                return folder
        raise FileNotFoundError(
            f"none of the pictures of {self.name}, such as {images[0]}, is in {' or '.join(map(str, folders))}"
        )

    def _choose(self, images: list[str]) -> np.ndarray:
        """Which rows (N,) may have a box within the area, by the pictures' own sizes where no others are given.

        Pictures that cannot be read, and those with no box inside, stay: whoever reads them is told. Warns
        (DataWarning) where they are many, and where the boxes are hardly in pixels.
        """
        sizes, problems = self._sizes.copy(), np.zeros(len(images), dtype="U10")
        measured = ~np.isnan(self._boxes[:, 0]) & ~sizes.all(axis=1) & self._in_pixels
        names = dict.fromkeys(images[i] for i in np.flatnonzero(measured))
        cache = self._folder / f".{Path(self.name).name}.sizes.json"
        found = dict(zip(names, read_sizes(self._images, list(names), cache) if names else (), strict=True))
        for i in np.flatnonzero(measured):
            size = found[images[i]]
            if isinstance(size, str):
                problems[i] = size
            else:
                sizes[i] = size
        boxes, sound = self._fractions(self._boxes, sizes)
        problems[measured & ~sound & (problems == "")] = "outside"
        problems[sound & ~in_area(boxes, self._area)] = "no box"
        photos = number_photos(images)
        bad = np.bincount(photos, problems == "") == 0  # photos without a row that may be used
        firsts = np.unique(photos, return_index=True)[1][bad]
        if len(firsts) > MOST_SKIPPED * len(bad):
            self._warn_of_skipped(problems[firsts], [images[i] for i in firsts], len(bad))
        if self._in_pixels:
            self._warn_of_unit(sizes, problems == "outside")
        return (problems != "no box") & ((problems != "outside") | bad[photos])

    def _warn_of_skipped(self, problems: np.ndarray, images: list[str], of: int) -> None:
        """Tells why pictures cannot be used."""
        least, most = (f"{100 * share:g}" for share in self._area)
        texts = {
            "no box": f"have no box of {least} to {most} % of their area",
            "outside": "have a box that is not inside of them",
            "missing": "are missing",
            "unreadable": "cannot be read",
        }
        places = {text: np.flatnonzero(problems == problem) for problem, text in texts.items()}
        reasons = "; ".join(f"{len(at)} {text}, such as {images[at[0]]}" for text, at in places.items() if len(at))
        warnings.warn(
            f"{self.name}: {len(images)} of {of} pictures cannot be used: {reasons}", DataWarning, stacklevel=4
        )

    def _warn_of_unit(self, sizes: np.ndarray, outside: np.ndarray) -> None:
        """Says so where the boxes are probably in another unit than pixels."""
        known = sizes.all(axis=1) & ~np.isnan(self._boxes[:, 0])
        largest, sizes = self._boxes[known].max(initial=0), sizes[known]
        unit = next((unit for unit in OTHER_UNITS if largest <= unit), math.inf)
        # How probable it is that right and lower edges, anywhere in their pictures, all are this near to the corner.
        log_chance = np.log(np.minimum(1, unit / sizes)).sum()
        if log_chance < math.log(0.01) or (unit / 2 < largest <= unit < math.inf and outside[known].mean() > 0.05):
            height, width = sizes.max(axis=0)
            warnings.warn(
                f"{self.name}: the boxes are probably not in pixels but in {OTHER_UNITS[unit]}: none of their numbers "
                f"is above {largest:g}, in pictures of up to {width}x{height}; give pixels, or fractions from 0 to 1",
                DataWarning,
                stacklevel=4,
            )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Record:
        return self.record_of(self._rows[self._ends[i] : self._ends[i + 1]].tolist())

    def record_of(self, rows: list[int]) -> Record:
        """The objects of rows of one picture, which are numbered from 0 as in the file."""
        image = self._images / self._texts["image"][rows[0]]
        size = upright_size(image)
        objects = [self._object(row, image, size) for row in rows]
        boxes, masks = np.stack([box for box, _ in objects]), [mask for _, mask in objects if mask is not None]
        chosen = np.flatnonzero(in_area(boxes, self._area))
        if not chosen.size:
            raise UnusablePicture("no box", f"{image}: no box is of {self._area[0]:g} to {self._area[1]:g} of its area")
        labels = [self._texts["label"][row] for row in rows]
        return Record(
            image,
            boxes[chosen],
            tuple(masks[k] for k in chosen) if masks else None,
            self._path(rows[0], "exemplar"),
            self._path(rows[0], "target"),
            tuple(labels[k] for k in chosen) if all(labels) else None,
            repaint_masks=bool(masks),
        )

    def _object(self, row: int, image: Path, size: tuple[int, int]) -> tuple[np.ndarray, MaskArray | MaskFile | None]:
        """The box (4,) and the mask, if it has one, of a row."""
        mask = self._path(row, "mask")
        if mask and np.isnan(self._boxes[row, 0]):
            read = MaskFile(mask).read()
            check_shape(mask, read.size, size)
            return read.box()[0], read
        height, width = self._sizes[row].tolist()
        if height:
            check_shape(image, size, (height, width))
        (box,), (sound,) = self._fractions(self._boxes[[row]], np.array([(height, width) if height else size]))
        if not sound:
            raise UnusablePicture(
                "no box", f"{image} is {size[1]}x{size[0]}; its box {self._boxes[row].tolist()} is not inside it"
            )
        return box, MaskFile(mask) if mask else None

    def _path(self, row: int, name: str) -> Path | None:
        text = self._texts[name][row]
        return self._folder / text if text else None


def written_row(record: Record, k: int, folder: Path) -> dict[str, str | float]:
    """Object `k` of a record as cells of a manifest in `folder`, without its mask."""
    label = record.labels[k] if record.labels else ""
    edges = {name: round(float(v), 6) for name, v in zip(CORNERS, record.boxes[k], strict=True)}
    return {"image": os.path.relpath(record.image, folder), "label": label, **edges}
