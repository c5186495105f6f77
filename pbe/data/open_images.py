"""OpenImages: its pictures and the boxes of their index (`pbe.data.open_images_index`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.open_images_index import (
    ARRAYS,
    FLAGS,
    LEVELS,
    check_folder,
    contains,
    ids_in,
    read_facts,
    sub_folders,
)
from pbe.data.records import DataWarning, Record, in_area
from pbe.io.suggest import did_you_mean

ROWS = 1 << 18  # boxes of an index looked at in one step


class OpenImages:
    """The pictures of an index that have a box to train on.

    index: a folder that `index_boxes` wrote. images: the pictures, `<id>.jpg` in it, or in sub-folders whose names end
    in the id's first digit, as the official archives (`train_0` to `train_f`) make them. exclude: names of FLAGS whose
    boxes are left out. area: the least and most share of the picture that a box takes.

    Every instance, also one sent to a worker process, maps the arrays again and itself holds 4 bytes per picture.
    FileNotFoundError or ValueError where the index is not found, or none of its pictures is.
    """

    _ids: np.ndarray  # the arrays of the index, as `pbe.data.open_images_index` describes them
    _offsets: np.ndarray
    _boxes: np.ndarray
    _labels: np.ndarray
    _flags: np.ndarray

    def __init__(
        self,
        index: str | Path,
        images: str | Path,
        exclude: Sequence[str] = (),
        area: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        unknown = [flag for flag in exclude if flag not in FLAGS]
        if unknown:
            raise ValueError(f"exclude: OpenImages has no flag {unknown[0]!r}{did_you_mean(unknown[0], FLAGS)}")
        self.name = str(index)
        self._index, self._images, self._area = Path(index), Path(images), area
        self._excluded = sum(1 << FLAGS.index(flag) for flag in set(exclude))
        self._facts = read_facts(self._index)
        self._map()
        self._chosen = self._choose()
        if not len(self._chosen):
            raise ValueError(f"{index}: no picture has a box of {area[0]:g} to {area[1]:g} of its area")
        self._shards = self._find_pictures()

    @property
    def photos(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> Record:
        picture = int(self._chosen[i])
        start, end = self._offsets[picture : picture + 2].tolist()
        boxes, usable = self._usable(start, end)
        labels = tuple(self._facts.labels[k] for k in self._labels[start:end][usable])
        name = f"{int(self._ids[picture]):016x}"
        return Record(self._images / self._shards.get(name[0], "") / f"{name}.jpg", boxes[usable], labels=labels)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name.removeprefix("_") not in ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        images, boxes = self._facts.images, self._facts.boxes
        shapes: dict[str, tuple[int, ...]] = {"ids": (images,), "offsets": (images + 1,), "boxes": (boxes, 4)}
        for name, dtype in ARRAYS.items():
            path = self._index / name
            shape = shapes.get(name, (boxes,))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} must have {size} bytes by meta.json; run `pbe index-boxes` again")
            setattr(self, f"_{name}", np.asarray(np.memmap(path, dtype, mode="r", shape=shape)))

    def _usable(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes start to end, (N, 4) float32 fractions, and which of them (N,) may be drawn."""
        boxes = self._boxes[start:end].astype(np.float32) / np.float32(LEVELS)
        return boxes, in_area(boxes, self._area) & (self._flags[start:end] & self._excluded == 0)

    def _choose(self) -> np.ndarray:
        """The numbers (N,) uint32 of the pictures with a usable box."""
        usable = np.concatenate([self._usable(start, start + ROWS)[1] for start in range(0, self._facts.boxes, ROWS)])
        return np.flatnonzero(np.logical_or.reduceat(usable, self._offsets[:-1])).astype(np.uint32)

    def _find_pictures(self) -> dict[str, str]:
        """The sub-folders by the first digit of their pictures, none where all lie in one folder; pictures of digits
        that have no sub-folder are dropped. Only some file names are read: a folder may hold a million."""
        check_folder(self._images)
        if contains(self._ids, ids_in(self._images, most=256)).any():
            return {}
        shards: dict[str, str] = {}
        for path in sub_folders(self._images):
            ids = ids_in(path, most=256)
            digits = {f"{first:x}" for first in (ids[contains(self._ids, ids)] >> np.uint64(60)).tolist()}
            if digits and (digits != {path.name[-1]} or path.name[-1] in shards):
                raise ValueError(
                    f"{path} holds pictures whose ids start with {', '.join(sorted(digits))}; the pictures must be in "
                    f"{self._images} itself or in one sub-folder for each first digit, whose name ends in it"
                )
            shards |= dict.fromkeys(digits, path.name)
        if not shards:
            raise FileNotFoundError(
                f"none of the {self._facts.images} pictures of {self._index}, such as {int(self._ids[0]):016x}.jpg, is "
                f"among the first in {self._images} or its sub-folders"
            )
        there = np.isin(self._ids[self._chosen] >> np.uint64(60), [int(digit, 16) for digit in shards])
        if not there.all():
            warnings.warn(
                f"{self._images} has sub-folders for ids starting with {', '.join(sorted(shards))} only: "
                f"{np.count_nonzero(~there)} of {len(there)} pictures are left out",
                DataWarning,
                stacklevel=3,
            )
            self._chosen = self._chosen[there]
        return shards
