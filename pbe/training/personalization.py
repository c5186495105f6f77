"""My object, from a few pictures: the data and the settings of a run that teaches a model one object, as adapters.

A region of one picture of the object is to be painted as the object that another one shows. Beside those pairs come
other examples, so that other exemplars are painted as before: the prior preservation of DreamBooth (Ruiz et al. 2022,
arXiv 2208.12242).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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

SIDE = 1024  # long side of the copies that training reads
GRABCUT_SIDE = 512  # as of `pbe cut-out`
SMALLEST = 0.005  # share of its picture that an object takes
MARGIN = 10  # of crops around the object, in pixels of the copies, as the recipe's
PREVIEWS = 4
SAMPLING = ("sampler", "spacing", "steps", "guidance")
RESULTS = 4  # of the model's own, for each picture


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder, in order. FileNotFoundError where it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of pictures")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def pictures_of(folder: Path, masks: Path | None) -> dict[Path, Path | None]:
    """The pictures of an object in a folder, and their masks, which are named alike, in another.

    FileNotFoundError for a folder that is not there, ValueError for fewer than two pictures, or a mask of none.
    """
    files = picture_files(folder)
    given = {path.stem: path for path in picture_files(masks)} if masks else {}
    if len(files) < 2:  # the exemplar is from one, the region to paint from another
        raise ValueError(f"{folder}: give at least 2 pictures of one object, better 3 to 10; it has {len(files)}")
    for stem in given.keys() - {file.stem for file in files}:
        raise ValueError(f"{given[stem]} is the mask of no picture in {folder}; a mask has its picture's name")
    return {file: given.get(file.stem) for file in files}


def write_object(pictures: Mapping[Path, Path | None], folder: Path) -> Iterator[None]:
    """Writes what training reads of an object, of which there are these pictures and masks: `pairs.jsonl`,
    `donors.jsonl`, `previews.jsonl` and their pictures; yields after each picture.

    A mask that is not given is the picture's own alpha, or found by GrabCut. Each picture is a region to paint as each
    picture's object, shown with what surrounds it and without, as people give both.

    ValueError for a picture that cannot be read, and for one in which no whole object is found.
    """
    files = list(pictures)
    regions = [{"image": f"{i:02}.png", "mask": f"{i:02}_mask.png"} for i in range(len(files))]
    shown = [[f"{i:02}_{kind}.png" for kind in ("crop", "cut_out")] for i in range(len(files))]
    with replacing(folder, overwrite=True) as part:
        for file, region, exemplars in zip(files, regions, shown, strict=True):
            picture = read_picture(file, "picture")
            photo = picture.to_rgb8()
            photo.thumbnail((SIDE, SIDE))
            mask = find_mask(picture, photo, pictures[file])
            if mask is None or mask.mean() < SMALLEST:
                advice = f"put its mask, white = object, into --masks as {file.stem}.png, or cut out the part around it"
                raise ValueError(f"{file}: no whole object of at least {SMALLEST:.1%} of it is found; {advice}")
            drawn = Image.fromarray(mask).convert("L").resize(photo.size, Image.Resampling.BILINEAR)
            box = mask_bounding_box(np.asarray(drawn) >= 128).grown(MARGIN, (photo.height, photo.width))
            crops = photo.crop(box), read_exemplar(photo, drawn)
            for name, image in zip([*region.values(), *exemplars], [photo, drawn, *crops], strict=True):
                save_picture(image, part / name)
            yield
        pairs = [{**region, "exemplar": name} for region in regions for names in shown for name in names]
        others = zip(regions, [*shown[1:], shown[0]], strict=True)
        write_rows(part / "pairs.jsonl", pairs)
        write_rows(part / "donors.jsonl", regions)
        write_rows(part / "previews.jsonl", [{**a, "exemplar": b[0]} for a, b in others][:PREVIEWS])


def find_mask(picture: Picture, photo: Image.Image, given: Path | None) -> np.ndarray | None:
    """Where the object is in a picture, of which `photo` is a smaller copy: bool (H, W) of any size; None: nowhere."""
    if given:
        return read_mask(given, picture.size)
    alpha, white = picture.pixels[..., -1], white_level(picture.pixels.dtype)
    if picture.pixels.shape[2] in (2, 4) and alpha.min() < white:
        return alpha >= white / 2
    from pbe.images.grabcut import whole_object  # which needs OpenCV

    small = photo.copy()
    small.thumbnail((GRABCUT_SIDE, GRABCUT_SIDE))
    return whole_object(np.asarray(small))


def write_results(model: PaintByExample, folder: Path, out: Path, settings: EditSettings, seed: int) -> Iterator[None]:
    """Writes results of the model as examples, `out`/results.jsonl: the pictures that `write_object` wrote into a
    folder, each repainted as objects of other colours; yields after each."""
    names = [path.stem.removesuffix("_mask") for path in sorted(folder.glob("*_mask.png"))]
    generator, rows = make_generator(seed), []
    told = {name: getattr(settings, name) for name in SAMPLING}
    with replacing(out, overwrite=True) as part:
        for i in range(RESULTS * len(names)):
            name, other = names[i % len(names)], names[(i + i // len(names)) % len(names)]
            crop = T.to_dtype(T.pil_to_tensor(read_exemplar(folder / f"{other}_crop.png")), scale=True)
            whole = Box(0, 0, crop.shape[2], crop.shape[1])
            exemplar = T.to_pil_image(draw_recoloring(generator)(crop, whole, whole))
            mask = folder / f"{name}_mask.png"
            (result,) = edit(model, folder / f"{name}.png", mask, exemplar, seed=seed + i, **told)
            row = {"image": f"{i:03}.png", "mask": f"../{folder.name}/{mask.name}", "exemplar": f"{i:03}_exemplar.png"}
            assert isinstance(result, Image.Image)  # since a path was given
            save_picture(result, part / row["image"])
            save_picture(exemplar, part / row["exemplar"])
            rows.append(row)
            yield
        write_rows(part / "results.jsonl", rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_settings(
    ckpt: str | Path, run: Path, edits: EditSettings, *, steps: int, rank: int, seed: int, prior: Path | None
) -> dict[str, Any]:
    """The settings, for `pbe.training.config.load_config`, of a run in a folder with what `write_object` wrote into
    its `object`, and without the manifest `prior` `write_results` into its `prior`.

    With `prior` the object is also put into the photos of that manifest, in place of what its rows show.
    """
    warmup = max(1, steps // 10)
    mine = f"{run}/object"
    others = {"path": str(prior), "weight": 2.0} if prior else {"path": f"{run}/prior/results.jsonl"}
    recipe = {"min_area": SMALLEST, "max_area": 1.0, "coverage": [0.1, 0.7], "object_mask": 0.3, "flip": 0.0}
    recipe |= {"antialias": True, "fit": "letterbox", "transplant": 0.5 if prior else 0.0}
    sources = {"sources": [{"path": f"{mine}/pairs.jsonl"}, others], "donors": {"path": f"{mine}/donors.jsonl"}}
    told = {name: getattr(edits, name) for name in SAMPLING} | {"seed": seed}
    # the photos are few, and seen many times: several noise draws of each
    training = {"train": [], "noise_draws": 4, "frozen": "bfloat16", "norms": "half"}
    trainer = {"max_steps": steps, "devices": 1, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    return {
        "run": str(run),
        "seed": seed,
        "model": {"init": str(ckpt)},
        "training": {**training, "lora": {"rank": rank, "alpha": float(rank)}},
        "optimizer": {"lr": 5e-4, "warmup_steps": warmup, "decay_steps": max(1, steps - warmup)},
        "data": {"batch_size": 4, "workers": 2, "seed": seed, "recipe": recipe, **sources},
        "checkpoint": {"every_n_steps": 100, "keep": 1, "best": False},
        "samples": {"every_n_steps": max(1, steps // 4), "edits": f"{mine}/previews.jsonl", "edit": told},
        "trainer": {**trainer, "log_every_n_steps": 1, "enable_model_summary": False},
    }
