"""COCOEE as a benchmark: its items with their files and ids, and folders of results for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pbe.data.cocoee import CocoEE
from pbe.data.records import MaskFile
from pbe.evaluation.views import read_rgb

MANIFEST = "benchmark.json"  # what `build` writes beside the pictures; COCOEE has none
RESULT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Item:
    """One edit of the benchmark: its id and the files of its source, its reference and its mask (white = repaint)."""

    id: int
    source: Path
    reference: Path
    mask: Path
    label: str | None = None  # the object's class, where the benchmark's manifest tells it

    @property
    def name(self) -> str:
        """The id zero-filled to 12 digits, after which all its files are called."""
        return f"{self.id:012d}"

    def repaint(self) -> np.ndarray:
        """bool (H, W), True where to repaint; raises as `pbe.pictures.read_mask`."""
        return MaskFile(self.mask).read().mask


class Benchmark(CocoEE):
    """The items of a COCOEE folder, or the first `limit` of them; raises as `CocoEE`."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        super().__init__(folder)
        if limit is not None and limit < 2:
            raise ValueError(f"limit must be 2 or more, got {limit}")
        self.folder, self.total = Path(folder), len(self)
        if len(np.unique(self._ids)) < len(self._ids):
            raise ValueError(f"{folder}/id_list.npy names an id twice")
        manifest = self.folder / MANIFEST
        listed = json.loads(manifest.read_text(encoding="utf-8"))["items"] if manifest.is_file() else []
        labels = {item["id"]: item["label"] for item in listed}
        self.items = []
        for i in range(min(self.total, limit or self.total)):
            source, reference, mask = self._paths(i)
            id_ = int(self._ids[i])
            self.items.append(Item(id_, source, reference, mask, labels.get(id_)))


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
