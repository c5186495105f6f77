"""COCO's annotations (https://cocodataset.org/#format-data): boxes, and segmentations as masks."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pbe.data.records import (
    DataWarning,
    MaskArray,
    MaskSource,
    PackedStrings,
    Record,
    check_shape,
    clip_boxes,
    in_area,
    number_photos,
    upright_size,
)
from pbe.images.reading import fill_polygon
from pbe.io.json_text import parse_json, shown


class Polygons(NamedTuple):
    """The union of polygons, each (N, 2) x, y as fractions of the picture."""

    rings: tuple[np.ndarray, ...]

    def draw(self, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        mask = np.zeros(size, dtype=bool)
        for ring in self.rings:
            mask |= fill_polygon(ring * (width, height), size)
        return mask


def decode_counts(text: str) -> np.ndarray:
    """The run lengths (N,) int64 of a compressed RLE, as in the COCO API's `rleFrString`.

    A number is one or more characters of 5 bits each, the lowest first: character - 48 = bits, + 32 if more
    characters follow; bit 16 of the last is the sign. From the fourth number on, each is the difference to the number
    two before it. ValueError for another text.
    """
    codes = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32) + 1
    starts = np.append(0, ends[:-1])
    whole = ((codes >= 0) & (codes <= 63)).all() and len(ends) and ends[-1] == len(codes)
    if not whole or (ends - starts).max() > 7:  # 35 bits; no picture has that many pixels
        raise ValueError(f"{text[:40]!r} is not a compressed RLE")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= (codes[ends - 1] >> 4 & 1) << 5 * (ends - starts)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """bool (h, w) of an RLE {"size": [h, w], "counts": list or compressed text}: lengths of runs down the columns,
    alternately outside and inside the object. ValueError if they do not fill the size."""
    height, width = map(int, rle["size"])
    counts = rle["counts"]
    counts = decode_counts(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"the runs of an RLE add up to {counts.sum()}, not to the {height * width} of {width}x{height}"
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def check_segmentation(segmentation: Any) -> None:
    """ValueError unless it is a list of polygons or looks like an RLE, whose counts are decoded when it is drawn."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) in (int, float) and n >= 1 for n in size)):
            raise ValueError(f"the size of an RLE is {shown(size)}, not [height, width]")
        if size[0] * size[1] > MAX_PIXELS or any(n % 1 for n in size):
            raise ValueError(f"the size of an RLE is {shown(size)}, not whole numbers of up to {MAX_PIXELS} pixels")
        if not isinstance(counts, (list, str)):
            raise ValueError(f"the counts of an RLE are {shown(counts)}, not a list or a text")
        if isinstance(counts, list):
            check_numbers(counts, "the counts of an RLE hold")
    elif not isinstance(segmentation, list):
        raise ValueError(f"segmentation is {shown(segmentation)}, not a list of polygons or an RLE")
    else:
        for ring in segmentation:
            if not isinstance(ring, list) or len(ring) % 2:
                raise ValueError(f"a polygon is {shown(ring)}, not a list of x, y, x, y, ...")
            check_numbers(ring, "a polygon holds")


LARGEST = 2**53  # of the whole numbers that a float tells apart
MAX_PIXELS = 2**28  # more than Pillow reads


def check_numbers(values: list[Any], what: str) -> None:
    """ValueError, which begins with `what`, naming the first value that is not a number within LARGEST."""
    for value in values:
        if type(value) not in (int, float) or not abs(value) < LARGEST:
            raise ValueError(f"{what} {shown(value)}, not a number")


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> MaskSource:
    """A COCO `segmentation` (list of polygons x, y, x, y, ... or an RLE) of a picture of `size` (height, width)."""
    if isinstance(segmentation, dict):
        return MaskArray(decode_rle(segmentation))
    return Polygons(tuple(np.reshape(ring, (-1, 2)) / (size[1], size[0]) for ring in segmentation))


NUMBER, TEXT, ID = ((int, float), "a number"), ((str,), "a text"), ((int, float, str), "a number or a text")
LIST = ((list,), "a list")
Fields = dict[str, tuple[tuple[type, ...], str]]  # types and what they are called, by name
QUOTES = "'\""
FIELDS: dict[str, Fields] = {
    "images": {"id": ID, "file_name": TEXT, "width": NUMBER, "height": NUMBER},
    "categories": {"id": ID, "name": TEXT},
    "annotations": {"image_id": ID, "category_id": ID, "bbox": LIST},
}


def read_annotations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of an annotation file. ValueError naming the file and the first entry that is wrong."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for part, fields in FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{path} has no list {part!r}, as COCO's files of instances have")
        for k, entry in enumerate(content[part]):
            try:
                check_entry(entry, part, fields)
            except ValueError as error:
                raise ValueError(f"{path}: {part}[{k}]: {error}") from None
    return content


def check_entry(entry: Any, part: str, fields: Fields) -> None:
    """ValueError for an entry of `part` without one of the fields, or with a value that cannot be. Polygons of fewer
    than three points are taken out."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is {shown(entry)}, not an object")
    for name, (kinds, expected) in fields.items():
        if name not in entry:
            raise ValueError(f"it has no {name}")
        value = entry[name]
        if not isinstance(value, kinds) or (kinds == ID[0] and isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{name} is {shown(value).strip(QUOTES)}, not {expected}")
        if kinds == NUMBER[0]:
            check_numbers([value], f"{name} is")
    if part == "images" and not (entry["width"] > 0 and entry["height"] > 0):
        raise ValueError(f"its size is {entry['width']}x{entry['height']} (width x height), not above 0")
    if part == "annotations":
        box = entry["bbox"]
        if len(box) != 4 or not all(type(number) in (int, float) and abs(number) < LARGEST for number in box):
            raise ValueError(f"bbox is {shown(box)}, not [x, y, width, height]")
        if entry.get("segmentation") and not entry.get("iscrowd"):
            check_segmentation(entry["segmentation"])
            if isinstance(entry["segmentation"], list):  # a point or a line is not a mask
                entry["segmentation"] = [ring for ring in entry["segmentation"] if len(ring) >= 6]


class Coco:
    """The pictures of an annotation file that have a box within `area` (least and most share of the picture).

    annotations: such as `instances_train2017.json`; read whole at the start. images: the folder of its `file_name`s.
    Crowds (`iscrowd`) are not single objects and are left out. Records have masks where every object of a picture has a
    segmentation. ValueError naming the first wrong entry; FileNotFoundError where none of the pictures is found.
    """

    def __init__(self, annotations: str | Path, images: str | Path, area: tuple[float, float] = (0.0, 1.0)) -> None:
        path = Path(annotations)
        self.name, self._images = str(path), Path(images)
        content = read_annotations(path)
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation["category_id"] not in names:
                raise ValueError(
                    f"{path}: annotations name category {annotation['category_id']}, which is not among the categories"
                )
            if not annotation.get("iscrowd"):
                objects[annotation["image_id"]].append(annotation)

        files, sizes, boxes, labels, segmentations, ends, bad = [], [], [], [], [], [0], []
        for image in content["images"]:
            # Removed one by one, so that the parsed file and what is made of it are never in memory together.
            found = objects.pop(image["id"], [])
            x, y, w, h = np.array([annotation["bbox"] for annotation in found], dtype=np.float64).reshape(-1, 4).T
            corners = np.stack([x, y, x + w, y + h], axis=1) / np.tile([image["width"], image["height"]], 2)
            clipped, sound = clip_boxes(corners)
            bad += [found[k] for k in np.flatnonzero(~sound)]
            chosen = np.flatnonzero(sound & in_area(clipped, area))
            if not chosen.size:
                continue
            files.append(image["file_name"])
            sizes.append((image["height"], image["width"]))
            boxes.append(clipped[chosen])
            ends.append(ends[-1] + len(chosen))
            for annotation in (found[k] for k in chosen):
                labels.append(names[annotation["category_id"]])
                segmentation = annotation.get("segmentation")
                segmentations.append(json.dumps(segmentation) if segmentation else "")
        if objects:
            raise ValueError(f"{path}: annotations name image {next(iter(objects))}, which is not among the images")
        if bad:
            warnings.warn(
                f"{path}: {len(bad)} boxes have no area inside their picture and are left out; the first is "
                f"{bad[0]['bbox']} of image {bad[0]['image_id']}",
                DataWarning,
                stacklevel=2,
            )
        if not files:
            raise ValueError(f"{path}: no picture has a box of {area[0]:g} to {area[1]:g} of its area")
        if not any((self._images / file).is_file() for file in files):
            raise FileNotFoundError(f"none of the {len(files)} pictures of {path}, such as {files[0]}, is in {images}")
        self._files, self._sizes, self._ends = PackedStrings(files), np.array(sizes), np.array(ends)
        self._boxes, self._labels = np.concatenate(boxes), PackedStrings(labels)
        self.photos = number_photos(files)
        # As JSON text: the parsed segmentations of COCO's 860,000 objects would take gigabytes in every worker.
        self._segmentations = PackedStrings(segmentations)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Record:
        path = self._images / self._files[i]
        height, width = self._sizes[i].tolist()
        check_shape(path, upright_size(path), (height, width))
        objects = range(*self._ends[i : i + 2].tolist())
        masks = None
        if all(self._segmentations[k] for k in objects):
            masks = tuple(read_segmentation(json.loads(self._segmentations[k]), (height, width)) for k in objects)
        return Record(
            path, self._boxes[objects.start : objects.stop], masks, labels=tuple(self._labels[k] for k in objects)
        )
