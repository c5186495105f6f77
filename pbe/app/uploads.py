"""An edit of files that somebody uploaded: within bounds, with errors that name them as the page does.

The edit is `pbe.batch.job.run_job`, as for `pbe edit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pbe.batch.job import Job, read_inputs, run_job
from pbe.batch.provenance import Weights, check_writable, provenance_of, save_result
from pbe.editing.settings import MAX_SEED, QUICK, SETTINGS, EditSettings
from pbe.images.reading import UNREADABLE, read_picture
from pbe.images.saving import save_picture
from pbe.images.windows import Box
from pbe.io.fields import read
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import StepInfo

MAX_PIXELS = 64_000_000  # of an uploaded picture
MAX_RESULTS = 8
BATCH_SIZE = 4


class Settings(NamedTuple):
    """What the sliders say, and the spacing, which has none; see `pbe.edit`."""

    guidance: float
    steps: int
    seed: int
    num_images: int
    sampler: str
    spacing: str = QUICK.spacing


class Edit(NamedTuple):
    """What is to be edited: uploaded files; a mask may be a bool (H, W) array, True = repaint."""

    photo: Path
    mask: Path | np.ndarray
    exemplar: Path
    crop: Box | None = None  # of the exemplar


def save_edits(
    model: PaintByExample,
    weights: Weights,
    edit: Edit,
    settings: Settings,
    folder: Path,
    progress: Callable[..., object],
) -> list[str]:
    """Edits and saves the results as PNG files with their settings in `folder`; returns their paths.

    The folder takes copies of the pictures under plain names, which the settings and the error messages then hold.
    ValueError, OSError and MemoryError as of `pbe.edit`, and ValueError for more pixels or results than a page takes.
    """
    if settings.num_images not in range(1, MAX_RESULTS + 1):
        raise ValueError(
            f"num_images must be a whole number from 1 to {MAX_RESULTS} on this page, got {settings.num_images}"
        )
    num_images = int(settings.num_images)
    given = {name: value for name, value in settings._asdict().items() if name in SETTINGS}
    # an emptied field is None, which is refused by name, and a program may send 20.0 steps
    chosen = EditSettings(**{name: read(name, value, SETTINGS[name]) for name, value in given.items()})
    steps, seed = chosen.steps, chosen.seed
    last = seed + num_images - 1
    if last > MAX_SEED:
        raise ValueError(f"the last result's seed would be {last}, and the largest is {MAX_SEED}")
    job = Job(
        image=take(edit.photo, folder, "photo"),
        mask=take(edit.mask, folder, "mask"),
        exemplar=(take(edit.exemplar, folder, "exemplar", edit.crop),),
        out=f"{edit.photo.stem}-{seed}.png",
        settings=chosen,
        folder=folder,
    )
    inputs = read_inputs(job)
    about = provenance_of(job, weights)
    check_writable(job.path(job.out), inputs.photo, about)

    done, total = 0, steps * -(-num_images // BATCH_SIZE)
    progress((0, total), desc="Painting")

    def step_done(_: StepInfo) -> None:
        nonlocal done
        done += 1
        progress((done, total), desc="Painting")

    images = run_job(model, job, inputs, num_images, BATCH_SIZE, step_done)
    paths = [folder / f"{edit.photo.stem}-{seed + i}.png" for i in range(len(images))]
    for i, (image, path) in enumerate(zip(images, paths, strict=True)):
        save_result(image, path, {**about, "seed": seed + i})
    return [str(path) for path in paths]


def take(source: Path | np.ndarray, folder: Path, name: str, crop: Box | None = None) -> str:
    """Puts a picture or mask into the folder under `name`; returns its file name there."""
    if isinstance(source, np.ndarray):
        Image.fromarray(source).save(folder / f"{name}.png")
        return f"{name}.png"
    if not source.exists():
        raise ValueError(f"the {name} is here no longer, since files are kept for a day: load it again")
    check_pixels(source, name)
    taken = shutil.copyfile(source, folder / f"{name}{source.suffix.lower()}")
    if crop is None:
        return taken.name
    picture = read_picture(taken, name)
    cropped = folder / f"{name}-crop.tif"  # TIFF holds every mode
    save_picture(picture.with_pixels(picture.pixels[crop.slices]), cropped)
    return cropped.name


def check_pixels(path: Path, name: str) -> None:
    """ValueError for a picture of more than MAX_PIXELS, before they are read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (*UNREADABLE, Image.DecompressionBombError):
        return  # the library, which reads it next, says what is wrong
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width}x{height}: this page takes up to {MAX_PIXELS // 10**6} megapixels, `pbe edit` takes more"
        )
