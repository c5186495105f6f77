"""A test set in COCOEE's layout: its items with their files and ids, and folders of results for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.cocoee import CocoEE
from pbe.data.records import MaskFile
from pbe.evaluation.cocoee import read_rgb
from pbe.io.json_text import parse_json
from pbe.io.rows import read_rows

# What a test set may hold beside COCOEE's own files:
MANIFEST = "test_set.json"  # by `build`
EXEMPLAR_MASKS = "Ref_mask_3500"  # <id>_ref_mask.png, white where the object is
RESULT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", "_GT.png")  # the last for the images as they are


@dataclass(frozen=True)
class Item:
    """One edit of the test set: its id and the files of its image, its exemplar and its mask (white = repaint)."""

    id: int
    image: Path
    exemplar: Path
    mask: Path
    label: str | None = None  # the object's class, where the test set's manifest or a file of labels tells it
    exemplar_mask: Path | None = None  # where the object is in the exemplar (white), where the test set has it

    @property
    def name(self) -> str:
        """The id zero-filled to 12 digits, after which all its files are called."""
        return f"{self.id:012d}"

    def repaint(self) -> np.ndarray:
        """bool (H, W), True where to repaint; raises as `pbe.images.reading.read_mask`."""
        return MaskFile(self.mask).read().mask


class TestSet(CocoEE):
    """The items of a folder in COCOEE's layout, or the first `limit` of them; raises as `CocoEE`.

    `labels`, by id, replace those of the test set's manifest. ValueError for one of an id that is not there.
    """

    __test__ = False  # for pytest, which would take it for tests

    def __init__(self, folder: str | Path, limit: int | None = None, labels: Mapping[int, str] | None = None) -> None:
        super().__init__(folder)
        if limit is not None and limit < 2:
            raise ValueError(f"limit must be 2 or more, got {limit}")
        self.folder, self.total = Path(folder), len(self)
        if len(np.unique(self._ids)) < len(self._ids):
            raise ValueError(f"{folder}/id_list.npy names an id twice")
        if labels is None:
            manifest = self.folder / MANIFEST
            labels = manifest_labels(manifest) if manifest.is_file() else {}
        elif unknown := labels.keys() - set(self._ids.tolist()):
            raise ValueError(f"there is a label for the id {min(unknown)}, which {folder}/id_list.npy does not list")
        self.items = []
        for i, id_ in enumerate(self._ids.tolist()[:limit]):
            exemplar_mask = self.folder / EXEMPLAR_MASKS / f"{id_:012d}_ref_mask.png"
            there = exemplar_mask if exemplar_mask.is_file() else None
            self.items.append(Item(id_, *self._paths(i), labels.get(id_), there))


def manifest_labels(path: Path) -> dict[int, str]:
    """The labels by id of a test set's manifest; ValueError for another file."""
    try:
        items = parse_json(path.read_text(encoding="utf-8"))["items"]
        return {item["id"]: item["label"] for item in items}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as `build` writes it ({error!r}); with --labels it is not read") from None


def read_labels(path: str | Path) -> dict[int, str]:
    """The labels by id of a CSV or JSONL file with the columns `id` and `label`; ValueError naming file and line."""
    labels: dict[int, str] = {}
    for line, row in read_rows(Path(path), ("id", "label"), ignore_others=True, allow_short=True):
        if isinstance(row, ValueError):
            raise ValueError(f"{path}, line {line}: {row}")
        id_, label = (str(row.get(name, "")).strip() for name in ("id", "label"))
        if not (id_.isascii() and id_.isdigit()) or not label:
            raise ValueError(f"{path}, line {line}: {id_!r},{label!r} is not an id and its label")
        if int(id_) in labels:
            raise ValueError(f"{path}, line {line}: the id {id_} has a label already")
        labels[int(id_)] = label
    if not labels:
        raise ValueError(f"{path} has no rows; each is to have an id and a label")
    return labels


def result_files(test_set: TestSet, folder: str | Path) -> list[Path]:
    """Each item's result in a folder: `<id>.png`, or another suffix. FileNotFoundError where any is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of results")
    there = {path.name: path for path in folder.iterdir()}
    files, missing = [], []
    for item in test_set.items:
        found = [there[name] for suffix in RESULT_SUFFIXES if (name := item.name + suffix) in there]
        files += found[:1]
        missing += [] if found else [item.name + RESULT_SUFFIXES[0]]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the results of {len(missing)} of {len(test_set.items)} items; the first is {missing[0]}"
        )
    return files


def read_result(path: Path, item: Item, image: Image.Image) -> Image.Image:
    """A result as RGB; ValueError unless it has its image's size."""
    result = read_rgb(path, "result")
    if result.size != image.size:
        raise ValueError(
            f"result {path} is {result.width}x{result.height}, but the image of {item.name} is "
            f"{image.width}x{image.height} (width x height)"
        )
    return result
