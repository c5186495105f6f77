"""A test set like COCOEE from photos with labelled boxes (arXiv 2211.13227, section 4.1).

An image is a square part of a photo with one object's box to repaint; its exemplar is the patch of an object of the
same category in another photo, the one whose features are nearest to those of the image's own object.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pbe import __version__
from pbe.data.crop import usable
from pbe.data.records import DataWarning, Record, Source, UnusablePicture, upright_size
from pbe.evaluation.backbones import Backbone
from pbe.evaluation.cocoee import read_rgb, squared
from pbe.evaluation.surrogate import object_box
from pbe.evaluation.test_set import EXEMPLAR_MASKS, MANIFEST
from pbe.images.windows import Box
from pbe.io.atomic import replacing

BATCH = 64
T = TypeVar("T")


@dataclass(frozen=True)
class BuildConfig:
    """What a test set is made by.

    num_items: how many images; None takes all that fit.
    size: side of the images in pixels. area: least and most share of an image that its box takes.
    grow: pixels of an exemplar's surroundings on each side of its box, as in training.
    min_side: of an exemplar's box, in pixels.
    candidates: how many objects of a category, drawn by the seed, are looked at for exemplars.
    """

    num_items: int | None = 3500
    size: int = 512
    area: tuple[float, float] = (0.02, 0.8)
    grow: int = 10
    min_side: int = 32
    candidates: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_items is not None and self.num_items < 2:
            raise ValueError(f"num_items must be 2 or more, got {self.num_items}")
        if self.size < 16 or self.min_side < 1 or self.candidates < 1 or self.grow < 0:
            raise ValueError("size must be 16 or more, min_side and candidates 1 or more, grow 0 or more")
        if not 0 < self.area[0] < self.area[1] < 1:
            raise ValueError(f"area must be two shares, 0 < least < most < 1, got {self.area}")


class _Object(NamedTuple):
    """One box of a data set: the record's position and the box's in it."""

    record: int
    box: int


class _Chosen(NamedTuple):
    """An image before its exemplar is known."""

    id: int
    record: Record
    position: int  # of the box among the record's
    box: Box  # in the photo
    window: Box
    label: str


def build_test_set(
    images: Source,
    exemplars: Source,
    out: str | Path,
    backbone: Backbone,
    config: BuildConfig = BuildConfig(),
    overwrite: bool = False,
    on_item: Callable[[], None] | None = None,
) -> int:
    """Writes a folder in COCOEE's layout with `test_set.json`, and returns the number of its items.

    Where the exemplar's object has a mask, it stands beside: `Ref_mask_3500/<id>_ref_mask.png`, white on the object.

    `images` and `exemplars` may be one data set: an object's own photo is never its exemplar. The same data,
    settings and backbone give the same folder. Images whose category has no object in another photo are left out, and
    so, with a warning (DataWarning), are pictures that cannot be read.
    Ids are those in the files' names, as in COCO's, if all have one; else they count from 1.

    ValueError where labels are missing or nothing fits; FileExistsError for an existing folder unless `overwrite`.
    """
    out = Path(out)
    if out.exists() and not (overwrite and (out / "id_list.npy").is_file()):
        raise FileExistsError(f"{out} exists; --force (overwrite=True) replaces it, if it is a test set")
    rng = np.random.default_rng(config.seed)
    candidates = _by_label(exemplars, config, rng)
    ids = _ids(images)
    features: dict[str, tuple[list[_Object], Tensor]] = {}
    items: list[dict[str, Any]] = []
    with replacing(out, overwrite) as part:
        for folder in ("GT_3500", "Ref_3500", "Mask_bbox_3500"):
            (part / folder).mkdir(parents=True)
        for i in rng.permutation(len(images)).tolist():
            if len(items) == config.num_items:
                break
            chosen = _choose(images[i], ids[i], config, rng) if i in ids else None
            if chosen is None or chosen.label not in candidates:
                continue
            if chosen.label not in features:
                features[chosen.label] = _candidate_features(candidates[chosen.label], exemplars, backbone, config)
            found = _nearest(chosen, exemplars, *features[chosen.label], backbone, config)
            if found is None:
                continue
            nearest, similarity = found
            exemplar = exemplars[nearest.record]
            patch = _patch(exemplar, nearest.box, config)
            if patch is None:
                continue
            items.append(_write(part, chosen, exemplar, nearest.box, patch, similarity, config))
            if on_item is not None:
                on_item()
        if len(items) < 2:
            raise ValueError(
                f"{images.name} gives {len(items)} items: boxes of {config.area[0]:g} to {config.area[1]:g} of a "
                f"square, whose category has a box of {config.min_side} pixels or more in another photo, are too few"
            )
        items.sort(key=lambda item: item["id"])
        np.save(part / "id_list.npy", np.array([item["id"] for item in items], dtype=np.int64))
        manifest = {
            "pbe": __version__,
            "images": Path(images.name).name,
            "exemplars": Path(exemplars.name).name,
            "backbone": {"name": backbone.name, "file": backbone.file, "sha256": backbone.sha256},
            "settings": asdict(config),
            "items": items,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(items)


def _usable(name: str | Path, read: Callable[[], T]) -> T | None:
    """What `read` gives; None, with a warning, where it cannot read a picture."""
    try:
        with usable(name):
            return read()
    except UnusablePicture as problem:
        warnings.warn(f"{problem}; it is left out", DataWarning, stacklevel=3)
        return None


def _records(source: Source) -> Iterator[tuple[int, Record]]:
    """The records that can be read, one after the other, with their numbers."""
    for i in range(len(source)):
        if (record := _usable(f"{source.name}[{i}]", partial(source.__getitem__, i))) is not None:
            yield i, record


# --- images ----------------------------------------------------------------------------------------------


def _ids(source: Source) -> dict[int, int]:
    """An id for each readable record: the number in its file's name, if all have one of their own, else 1, 2, …"""
    stems = {i: record.image.stem for i, record in _records(source)}
    if all(stem.isascii() and stem.isdigit() and len(stem) <= 12 for stem in stems.values()):
        numbers = {i: int(stem) for i, stem in stems.items()}
        if len(set(numbers.values())) == len(numbers):
            return numbers
    return {i: i + 1 for i in stems}


def _choose(record: Record, id_: int, config: BuildConfig, rng: np.random.Generator) -> _Chosen | None:
    """One of the record's boxes with a square around it of which it takes a share within the area; None without."""
    labels, size = _labels(record), _usable(record.image, partial(upright_size, record.image))
    if size is None:
        return None
    height, width = size
    for i in rng.permutation(len(record.boxes)).tolist():
        box = object_box(record, size, i)
        side = min(width, height)
        if max(box.width, box.height) < side and config.area[0] <= box.area / side**2 <= config.area[1]:
            x0, y0 = (
                min(max((low + high - side) // 2, 0), length - side)
                for low, high, length in ((box.x0, box.x1, width), (box.y0, box.y1, height))
            )
            return _Chosen(id_, record, i, box, Box(x0, y0, x0 + side, y0 + side), labels[i])
    return None


def _labels(record: Record) -> tuple[str, ...]:
    if record.labels is None or not all(record.labels):
        raise ValueError(f"{record.image} has no category, and an exemplar is of its image's category")
    return record.labels


# --- exemplars -------------------------------------------------------------------------------------------


def _by_label(source: Source, config: BuildConfig, rng: np.random.Generator) -> dict[str, list[_Object]]:
    """The objects that may be exemplars, by category, at most `candidates` of each."""
    found: dict[str, list[_Object]] = {}
    for i, record in _records(source):
        for k, label in enumerate(_labels(record)):
            found.setdefault(label, []).append(_Object(i, k))
    for label in sorted(found):
        if len(found[label]) > config.candidates:
            kept = np.sort(rng.choice(len(found[label]), config.candidates, replace=False))
            found[label] = [found[label][k] for k in kept]
    return found


def _patch(record: Record, i: int, config: BuildConfig) -> tuple[Image.Image, Box] | None:
    """An object with some surroundings, and its box; None where its picture cannot be read."""
    image = _usable(record.image, partial(read_rgb, record.image))
    if image is None:
        return None
    size = image.height, image.width
    box = object_box(record, size, i)
    return image.crop(box.grown(config.grow, size)), box


def _candidate_features(
    objects: list[_Object], source: Source, backbone: Backbone, config: BuildConfig
) -> tuple[list[_Object], Tensor]:
    """The objects that are large enough, and their features (N, C) of length 1."""
    kept: list[_Object] = []
    features, patches = [], []
    for number, one in enumerate(objects):
        found = _patch(source[one.record], one.box, config)
        if found is not None and min(found[1].width, found[1].height) >= config.min_side:
            kept.append(one)
            patches.append(squared(found[0]))
        if patches and (len(patches) == BATCH or number == len(objects) - 1):
            features.append(backbone.features(patches))
            patches = []
    return kept, F.normalize(torch.cat(features), dim=1) if kept else torch.zeros(0, backbone.num_features)


def _nearest(
    chosen: _Chosen,
    exemplars: Source,
    objects: list[_Object],
    features: Tensor,
    backbone: Backbone,
    config: BuildConfig,
) -> tuple[_Object, float] | None:
    """The object in another photo whose features have the greatest cosine with the image's, and that cosine."""
    own = _patch(chosen.record, chosen.position, config)
    if own is None:
        return None
    similarity = features @ F.normalize(backbone.features([squared(own[0])])[0], dim=0)
    for k in similarity.argsort(descending=True, stable=True).tolist():
        if exemplars[objects[k].record].image.resolve() != chosen.record.image.resolve():
            return objects[k], similarity[k].item()
    return None


# --- writing ----------------------------------------------------------------------------------------------


def _write(
    out: Path,
    chosen: _Chosen,
    exemplar: Record,
    exemplar_box: int,
    patch: tuple[Image.Image, Box],
    similarity: float,
    config: BuildConfig,
) -> dict[str, Any]:
    """Writes an item's pictures; returns its entry of the manifest."""
    name, size = f"{chosen.id:012d}", config.size
    scale = size / chosen.window.width
    image = read_rgb(chosen.record.image).crop(chosen.window).resize((size, size), Image.Resampling.LANCZOS)
    x0, y0, x1, y1 = (
        round((value - offset) * scale)
        for value, offset in zip(chosen.box, (*chosen.window[:2], *chosen.window[:2]), strict=True)
    )
    mask = Image.new("L", (size, size))
    mask.paste(255, (x0, y0, max(x1, x0 + 2), max(y1, y0 + 2)))
    crop, box = patch
    image.save(out / "GT_3500" / f"{name}_GT.png")
    crop.save(out / "Ref_3500" / f"{name}_ref.png")
    mask.save(out / "Mask_bbox_3500" / f"{name}_mask.png")
    if exemplar.masks is not None:
        draw = partial(exemplar.masks[exemplar_box].draw, upright_size(exemplar.image))
        drawn = _usable(f"the mask of {exemplar.image}", draw)
        shown = np.zeros(0) if drawn is None else drawn[box.grown(config.grow, drawn.shape).slices]
        if shown.any():  # else the mask is not of this box
            (out / EXEMPLAR_MASKS).mkdir(exist_ok=True)
            Image.fromarray(shown).save(out / EXEMPLAR_MASKS / f"{name}_ref_mask.png")
    return {
        "id": chosen.id,
        "label": chosen.label,
        "image": chosen.record.image.name,
        "window": list(chosen.window),
        "box": list(chosen.box),
        "exemplar": exemplar.image.name,
        "exemplar_box": list(box),
        "similarity": round(similarity, 6),
    }
