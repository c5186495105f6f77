"""What a source of training pictures gives: records, and the boxes, masks and strings they are made of.

Boxes are (N, 4) float32 x0, y0, x1, y1 as fractions of the width and height of the upright picture (with its EXIF
orientation applied), so that they fit the picture at any size it is decoded to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from pbe.images import pillow
from pbe.images.reading import read_mask, read_picture
from pbe.images.windows import mask_bounding_box


class DataWarning(UserWarning):
    """A data set can be used, but not all of what it lists."""


class UnusablePicture(ValueError):
    """A picture that no example can be made of; `reason` is "missing", "unreadable" or "no box" (that can be used)."""

    def __init__(self, reason: Literal["missing", "unreadable", "no box"], message: str):
        super().__init__(message)
        self.reason = reason


class MaskSource(Protocol):
    """Where an object is, drawn when it is wanted."""

    def draw(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W) at `size` = (H, W) of the whole picture, True = object. ValueError or OSError if unreadable."""


class Record(NamedTuple):
    """One picture with its objects."""

    image: Path
    boxes: np.ndarray  # (N, 4) float32, fractions
    masks: tuple[MaskSource, ...] | None = None  # one per box, or None where only boxes are known
    exemplar: Path | None = None  # a picture to take as the exemplar in place of the object's crop
    target: Path | None = None  # what the edited picture should be, in place of the image itself
    labels: tuple[str, ...] | None = None  # one per box
    repaint_masks: bool = False  # the masks say what to repaint, not only where objects are, unless the recipe decides
    noisy: float = 0.0  # probability that its examples are trained on at the noisier half of the timesteps alone
    bucket: tuple[int, int] | None = None  # that its example is to have, if the recipe has buckets; None: its photo's
    fixed: bool = False  # the edit of a test set: the whole picture, its one mask and its exemplar, whatever the recipe

    @property
    def is_paired(self) -> bool:
        """Whether the exemplar or the target is another picture than `image`."""
        return self.exemplar is not None or self.target is not None


class Source(Protocol):
    """A data set as a sequence of records, cheap to hand to worker processes.

    Reading an item may raise OSError or ValueError where that one picture is missing, unreadable or has no object.
    """

    name: str

    @property
    def photos(self) -> np.ndarray:
        """Each record's photo (N,), numbered from 0 to the number of photos: records of one photo have one number."""

    def __len__(self) -> int:
        """The number of records."""

    def __getitem__(self, i: int) -> Record: ...


def number_photos(names: Sequence[Hashable]) -> np.ndarray:
    """Numbers (N,) as `Source.photos` has them, in the order of appearance; equal names are one photo."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int32)


# --- boxes ------------------------------------------------------------------------------------------------

EDGE_TOLERANCE = 0.05  # annotators' boxes reach a little over the edge; further out, the unit or the picture is wrong


def clip_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) cut off at the picture's edges, and which of them (N,) are sound: finite, not far outside of the
    picture, with an area inside it."""
    near = (boxes >= -EDGE_TOLERANCE) & (boxes <= 1 + EDGE_TOLERANCE)  # False for NaN
    clipped = np.clip(boxes, 0, 1).astype(np.float32)
    return clipped, near.all(axis=1) & (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """(N,) areas of (N, 4) boxes: shares of the picture."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def in_area(boxes: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """(N,) bool: which boxes take a share of the picture within `area` = (least, most)."""
    shares = box_areas(boxes)
    return (shares >= area[0]) & (shares <= area[1])


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture once its orientation is applied, from the file's header alone."""
    with pillow.open_image(path) as image:
        return pillow.upright_size(image)


def check_shape(path: Path, size: tuple[int, int], annotated: tuple[int, int]) -> None:
    """UnusablePicture unless a picture of `size` (height, width) is one of the `annotated` size, up to its scale."""
    if not _same_shape(size, annotated):
        raise UnusablePicture(
            "no box",
            f"{path} is {size[1]}x{size[0]} (upright), but was annotated as {annotated[1]}x{annotated[0]} "
            "(width x height)",
        )


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes differ only in scale, but for rounding to whole pixels."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)  # one pixel of the smaller one


# --- masks ------------------------------------------------------------------------------------------------


class MaskArray(NamedTuple):
    """A mask in memory: bool (h, w) of the whole picture at any scale, True = object."""

    mask: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        height, width = self.mask.shape
        return height, width

    def draw(self, size: tuple[int, int]) -> np.ndarray:
        if not _same_shape(size, self.size):
            raise ValueError(
                f"a mask of {self.size[1]}x{self.size[0]} does not fit a picture of {size[1]}x{size[0]} "
                "(width x height)"
            )
        # Nearest: the source pixel under each target pixel's centre.
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, self.size, strict=True))
        return self.mask[rows[:, None], columns]

    def box(self) -> np.ndarray:
        """(1, 4) float32: the object's bounding box. ValueError if the mask is empty."""
        height, width = self.size
        return np.array([mask_bounding_box(self.mask)], dtype=np.float32) / np.array([width, height] * 2, np.float32)


class MaskFile(NamedTuple):
    """A mask picture of the whole picture: white = object, cut at 50 %."""

    path: Path

    def read(self) -> MaskArray:
        picture = read_picture(self.path, name="mask")
        return MaskArray(read_mask(picture.source, picture.size, name=f"mask {self.path}"))

    def draw(self, size: tuple[int, int]) -> np.ndarray:
        try:
            return self.read().draw(size)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


# --- strings ----------------------------------------------------------------------------------------------


class PackedStrings:
    """Strings in two arrays, which worker processes share; to touch the items of a list would copy them."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"string {i} of {len(self)}")
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes().decode()
