"""Pairs of an object's pictures from two frames of a video, by its tracked boxes.

The pose, size and light differ, so that the exemplar cannot be copied (AnyDoor, arXiv 2307.09481, section 3.3).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pbe.data.crop import to_pixels, usable
from pbe.data.example import make_generator
from pbe.data.manifest import Manifest
from pbe.data.recipe import PHOTO_SIDE
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record, UnusablePicture, number_photos, upright_size
from pbe.images.reading import over_white, read_exemplar
from pbe.io.fields import read
from pbe.io.rows import read_rows

ALIASES = {"track_id": "track", "frame_id": "frame"}
USUAL_GAP = 0.1  # of a track
SIDE = 512  # long side up to which exemplars are kept; their encoder sees 224


class Frame(NamedTuple):
    """One row of tracked boxes."""

    record: Record  # with one box
    mask: Path | None
    track: tuple[Path, str]  # with the folder: trackers number the objects of each video from the start
    time: float  # the frame's number


def read_frames(path: Path) -> tuple[list[Frame], list[UnusablePicture]]:
    """The rows of a manifest with a `track` each, and perhaps a `frame`; and what is wrong with those that cannot be
    used. Raises as `Manifest` does, and ValueError naming the line where a track or a frame is missing."""
    manifest = Manifest(path)
    frames: list[Frame] = []
    problems: list[UnusablePicture] = []
    seen: Counter[tuple[Path, str]] = Counter()
    numbered = False
    for i, (line, cells) in enumerate(read_rows(path, ("track", "frame", "mask"), aliases=ALIASES, ignore_others=True)):
        try:
            if isinstance(cells, ValueError):
                raise cells
            if "track" not in cells:
                raise ValueError(f"it has no track; it has: {', '.join(cells)}")
            numbered = numbered if i else "frame" in cells
            if numbered != ("frame" in cells):
                raise ValueError(f"all rows have a frame, or none; it has: {', '.join(cells)}")
            number = read("frame", cells["frame"], float) if numbered else None
            with usable(f"{path}, line {line}"):
                record = manifest.record_of([i])._replace(masks=None)  # a mask's file is enough
            track = record.image.parent, str(cells["track"])
            mask = path.parent / cells["mask"] if "mask" in cells else None
            frames.append(Frame(record, mask, track, seen[track] if number is None else number))
            seen[track] += 1
        except UnusablePicture as problem:
            problems.append(problem)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    return frames, problems


def choose_pairs(frames: Sequence[Frame], min_gap: float | None, count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs (target, exemplar) of numbers of frames: for each frame up to `count` others of its track, all as likely,
    in other pictures at least `min_gap` away in time; None: a tenth of the track."""
    tracks: dict[tuple[Path, str], list[int]] = defaultdict(list)
    for i, frame in enumerate(frames):
        tracks[frame.track].append(i)
    pairs = []
    for members in tracks.values():
        times = np.array([frames[i].time for i in members])
        pictures = number_photos([frames[i].record.image for i in members])
        gap = USUAL_GAP * np.ptp(times) if min_gap is None else min_gap
        for i, time, picture in zip(members, times, pictures, strict=True):
            others = np.flatnonzero((abs(times - time) >= gap) & (pictures != picture))
            chosen = torch.randperm(len(others), generator=make_generator(seed, i))[:count]
            pairs += [(i, members[others[k]]) for k in chosen.tolist()]
    return pairs


def cut_exemplar(frame: Frame) -> Image.Image:
    """A frame's object, RGB, of up to SIDE pixels: before white where it has a mask, as in editing; else its box with
    the recipe's usual margin. UnusablePicture if the photo or the mask cannot be read."""
    image, boxes, *_ = frame.record
    with usable(image):
        size = upright_size(image)
        margin = round(RecipeConfig.exemplar_margin * max(size) / PHOTO_SIDE)
        exemplar = over_white(
            read_exemplar(image, frame.mask or to_pixels(boxes[0], size).grown(margin, size), fit=True)
        )
    exemplar.thumbnail((SIDE, SIDE))
    return exemplar
