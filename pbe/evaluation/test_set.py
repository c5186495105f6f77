"""COCOEE as a benchmark: its items with their files and ids, and folders of results for them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.cocoee import CocoEE
from pbe.data.records import MaskFile
from pbe.evaluation.cocoee import read_rgb

# What a benchmark may hold beside COCOEE's own files:
MANIFEST = "benchmark.json"  # by `build`
REFERENCE_MASKS = "Ref_mask_3500"  # <id>_ref_mask.png, white where the object is
RESULT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", "_GT.png")  # the last for the sources as they are


@dataclass(frozen=True)
class Item:
    """One edit of the benchmark: its id and the files of its source, its reference and its mask (white = repaint)."""

    id: int
    source: Path
    reference: Path
    mask: Path
    label: str | None = None  # the object's class, where the benchmark's manifest or a file of labels tells it
    reference_mask: Path | None = None  # where the object is in the reference (white), where the benchmark has it

    @property
    def name(self) -> str:
        """The id zero-filled to 12 digits, after which all its files are called."""
        return f"{self.id:012d}"

    def repaint(self) -> np.ndarray:
        """bool (H, W), True where to repaint; raises as `pbe.images.reading.read_mask`."""
        return MaskFile(self.mask).read().mask


class Benchmark(CocoEE):
    """The items of a COCOEE folder, or the first `limit` of them; raises as `CocoEE`.

    `labels`, by id, are instead of those of the benchmark's manifest. ValueError for one of an id that is not there.
    """

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
        for i in range(min(self.total, limit or self.total)):
            source, reference, mask = self._paths(i)
            id_ = int(self._ids[i])
            mask_of_reference = self.folder / REFERENCE_MASKS / f"{id_:012d}_ref_mask.png"
            there = mask_of_reference if mask_of_reference.is_file() else None
            self.items.append(Item(id_, source, reference, mask, labels.get(id_), there))


def manifest_labels(path: Path) -> dict[int, str]:
    """The labels by id of a benchmark's manifest; ValueError for another file."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        return {item["id"]: item["label"] for item in items}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as `build` writes it ({error!r}); --labels does without it") from None


def read_labels(path: str | Path) -> dict[int, str]:
    """The labels by id of a CSV file with the columns `id` and `label`; ValueError that names what is wrong with it."""
    labels: dict[int, str] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := {"id", "label"} - set(reader.fieldnames or ()):
                raise ValueError(f"{path} has no column {min(missing)!r}; its first line must name id and label")
            for row in reader:
                id_, label = ((row[name] or "").strip() for name in ("id", "label"))
                if not (id_.isascii() and id_.isdigit()) or not label:
                    raise ValueError(f"{path}, line {reader.line_num}: {id_!r},{label!r} is not an id and its label")
                if int(id_) in labels:
                    raise ValueError(f"{path}, line {reader.line_num}: the id {id_} has a label already")
                labels[int(id_)] = label
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    return labels


def result_files(benchmark: Benchmark, folder: str | Path) -> list[Path]:
    """Each item's result in a folder: `<id>.png`, or another suffix. FileNotFoundError where any is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of results")
    there = {path.name: path for path in folder.iterdir()}
    files, missing = [], []
    for item in benchmark.items:
        found = next((name for suffix in RESULT_SUFFIXES if (name := item.name + suffix) in there), None)
        files.append(there.get(found))
        missing += [] if found else [item.name + RESULT_SUFFIXES[0]]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the results of {len(missing)} of {len(files)} items; the first is {missing[0]}"
        )
    return files


def read_result(path: Path, item: Item, source: Image.Image) -> Image.Image:
    """A result as RGB; ValueError unless it has its source's size."""
    result = read_rgb(path, "result")
    if result.size != source.size:
        raise ValueError(
            f"result {path} is {result.width}x{result.height}, but the source of {item.name} is "
            f"{source.width}x{source.height} (width x height)"
        )
    return result
