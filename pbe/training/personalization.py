"""My object, from a few pictures: the data and the settings of a run that teaches a model one object, as adapters.

A region of one picture of the object is to be painted as the object that another one shows. Beside those pairs come
other examples, so that other exemplars are painted as before: the prior preservation of DreamBooth (Ruiz et al. 2022,
arXiv 2208.12242).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as T

from pbe.data.augment import draw_recoloring
from pbe.data.example import make_generator
from pbe.editing.edit import edit
from pbe.editing.settings import EditSettings
from pbe.images.reading import Picture, read_exemplar, read_mask, read_picture
from pbe.images.saving import SUFFIXES, save_picture
from pbe.images.windows import Box, mask_bounding_box, white_level
from pbe.io.atomic import replacing
from pbe.models.paint_by_example import PaintByExample

LEAST = 2  # pictures: the exemplar is from one, the region to paint from another
SIDE = 1024  # long side of the copies that training reads
GRABCUT_SIDE = 512  # as of `pbe cut-out`
MARGIN = 0.02  # of the crops around the object, as a share of the picture's sides: about the recipe's
SMALLEST = 0.02  # share of its picture that the object's box takes, as the recipe has it
PREVIEWS = 4
RESULTS = 4  # of the model's own, for each picture


@dataclass(frozen=True)
class View:
    """A picture of the object."""

    name: str
    photo: Image.Image  # RGB
    mask: np.ndarray  # bool (H, W), True = object

    @property
    def box(self) -> Box:
        return mask_bounding_box(self.mask)


# ----------------------------------------------------------------------------------------------------------------------
# The pictures


def read_views(folder: Path, masks: Path | None = None) -> Iterator[View]:
    """The pictures in a folder, with the object's mask: of the same stem in `masks`, else the picture's own alpha,
    else found by GrabCut.

    FileNotFoundError or ValueError for fewer than two pictures, for one that cannot be read, and for one in which no
    whole object is found.
    """
    files, given = picture_files(folder), picture_files(masks) if masks else {}
    if len(files) < LEAST:
        raise ValueError(f"{folder} has {len(files)} pictures; give at least {LEAST} of one object, better 3 to 10")
    if lost := sorted(given.keys() - files.keys()):
        raise ValueError(f"{given[lost[0]]} is the mask of no picture in {folder}; its stem must be a picture's")
    for number, (stem, file) in enumerate(files.items()):
        picture = read_picture(file, "picture")
        photo = picture.to_rgb8()
        photo.thumbnail((SIDE, SIDE))
        mask = find_mask(picture, photo, file, given.get(stem))
        view = View(f"{number:02}", photo, mask)
        if (share := view.box.area / mask.size) < SMALLEST:
            raise ValueError(f"{file}: the object takes {share:.1%} of the picture; cut out a part with {SMALLEST:.0%}")
        yield view


def picture_files(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by stem, in order. FileNotFoundError where it is none, ValueError for a stem that two
    have."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of pictures")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if files.setdefault(path.stem, path) != path:
                raise ValueError(f"{files[path.stem]} and {path.name} have one stem, by which masks are found")
    return files


def find_mask(picture: Picture, photo: Image.Image, file: Path, given: Path | None) -> np.ndarray:
    """Where the object is in a picture, at the size of `photo`: bool (H, W)."""
    found: np.ndarray | None
    if given:
        found = read_mask(given, picture.size)
    elif picture.pixels.shape[2] in (2, 4) and picture.pixels[..., -1].min() < white_level(picture.pixels.dtype):
        found = picture.pixels[..., -1] >= white_level(picture.pixels.dtype) / 2
    else:
        from pbe.images.grabcut import whole_object  # which needs OpenCV

        small = photo.copy()
        small.thumbnail((GRABCUT_SIDE, GRABCUT_SIDE))
        found = whole_object(np.asarray(small))
    if found is None or not found.any():
        raise ValueError(f"{file}: no whole object is found in it; put its mask, white = object, into --masks DIR as "
                         f"{file.stem}.png")  # fmt: skip
    resized = Image.fromarray(found).convert("L").resize(photo.size, Image.Resampling.BILINEAR)
    return np.asarray(resized) >= 128


# ----------------------------------------------------------------------------------------------------------------------
# The data


def write_object(views: Sequence[View], folder: Path) -> None:
    """Writes what training reads of the object: `pairs.jsonl`, `donors.jsonl`, `previews.jsonl` and their pictures.

    Each picture is a region to paint as each other picture's object, and as its own; exemplars are shown with what
    surrounds them and without, as people give both.
    """
    with replacing(folder, overwrite=True) as part:
        for view in views:
            dx, dy = (round(MARGIN * side) for side in view.photo.size)
            box = view.box
            crop = Box(box.x0 - dx, box.y0 - dy, box.x1 + dx, box.y1 + dy)
            crop = Box(
                max(crop.x0, 0), max(crop.y0, 0), min(crop.x1, view.photo.width), min(crop.y1, view.photo.height)
            )
            save_picture(view.photo, part / f"{view.name}.png")
            save_picture(Image.fromarray(view.mask).convert("L"), part / f"{view.name}_mask.png")
            save_picture(view.photo.crop(crop), part / f"{view.name}_crop.png")
            save_picture(read_exemplar(view.photo, view.mask), part / f"{view.name}_cut_out.png")
        names = [view.name for view in views]
        regions = {name: {"image": f"{name}.png", "mask": f"{name}_mask.png"} for name in names}
        pairs = [
            {**regions[a], "exemplar": f"{b}_{kind}.png"} for a in names for b in names for kind in ("crop", "cut_out")
        ]
        shown = zip(names, [*names[1:], names[0]], strict=True)
        previews = [{**regions[a], "exemplar": f"{b}_crop.png"} for a, b in shown][:PREVIEWS]
        write_rows(part / "pairs.jsonl", pairs)
        write_rows(part / "donors.jsonl", regions.values())
        write_rows(part / "previews.jsonl", previews)


def write_results(model: PaintByExample, folder: Path, out: Path, settings: EditSettings, seed: int) -> Iterator[None]:
    """Writes the model's own results as examples, `out`/results.jsonl: the pictures in a folder of `write_object`, each
    repainted with objects of other colours; yields after each."""
    names = [path.stem.removesuffix("_mask") for path in sorted(folder.glob("*_mask.png"))]
    generator, rows = make_generator(seed), []
    told = {name: getattr(settings, name) for name in ("sampler", "spacing", "steps", "guidance")}
    with replacing(out, overwrite=True) as part:
        for number in range(RESULTS * len(names)):
            name, other = names[number % len(names)], names[(number + number // len(names)) % len(names)]
            crop = T.to_dtype(T.pil_to_tensor(read_exemplar(folder / f"{other}_crop.png")), scale=True)
            whole = Box(0, 0, crop.shape[2], crop.shape[1])
            exemplar = T.to_pil_image(draw_recoloring(generator)(crop, whole, whole))
            mask = f"{folder}/{name}_mask.png"
            (result,) = edit(model, f"{folder}/{name}.png", mask, exemplar, seed=seed + number, **told)
            save_picture(result, part / f"{number:03}.png")
            save_picture(exemplar, part / f"{number:03}_exemplar.png")
            rows.append({"image": f"{number:03}.png", "mask": f"../{folder.name}/{name}_mask.png",
                         "exemplar": f"{number:03}_exemplar.png"})  # fmt: skip
            yield
        write_rows(part / "results.jsonl", rows)


def write_rows(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The run


def steps_for(pictures: int) -> int:
    """How many optimiser steps suit this many pictures."""
    return 100 + 50 * pictures


def run_settings(
    ckpt: str | Path, run: Path, edits: EditSettings, *, steps: int, rank: int, seed: int, prior: Path | None
) -> dict[str, Any]:
    """The settings, for `pbe.training.config.load_config`, of a run in a folder with what `write_object` wrote into
    its `object`, and without the manifest `prior` `write_results` into its `prior`.

    With `prior` the object is also put into the photos of that manifest, in place of what its rows show.
    """
    warmup, mine = max(1, steps // 10), {"kind": "manifest", "path": f"{run}/object/pairs.jsonl"}
    data: dict[str, Any] = {"batch_size": 4, "workers": 2, "seed": seed}
    recipe = {"antialias": True, "fit": "letterbox", "max_area": 1.0, "object_mask": 0.3, "flip": 0.0}
    if prior is None:
        others = {"kind": "manifest", "path": f"{run}/prior/results.jsonl"}
    else:
        others = {"kind": "manifest", "path": str(prior), "weight": 2.0}
        recipe["transplant"] = 0.5
        data["donors"] = {"kind": "manifest", "path": f"{run}/object/donors.jsonl"}
    return {
        "task": "paint_by_example",
        "run": str(run),
        "seed": seed,
        "model": {"init": str(ckpt)},
        "training": {
            "train": [],
            "lora": {"rank": rank, "alpha": float(rank)},
            "noise_draws": 4,  # the photos are few, and seen many times
            "frozen": "bfloat16",
            "norms": "half",
        },
        "optimizer": {"lr": 5e-4, "warmup_steps": warmup, "decay_steps": max(1, steps - warmup)},
        "data": {**data, "sources": [mine, others], "recipe": recipe},
        "checkpoint": {"every_n_steps": 100, "keep": 1, "best": False},
        "samples": {
            "every_n_steps": max(1, steps // 4),
            "edits": f"{run}/object/previews.jsonl",
            "edit": {"seed": seed, "steps": edits.steps, "guidance": edits.guidance, "sampler": edits.sampler},
        },
        "trainer": {
            "max_steps": steps,
            "devices": 1,
            "precision": "bf16-mixed",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
    }
