"""An edit of files that somebody uploaded: within bounds, with errors that name them as the page does.

The edit is `pbe.batch.job.run_job`, as for `pbe edit`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image

from pbe.batch.job import Job, read_inputs, run_job
from pbe.batch.provenance import Weights, check_writable, provenance_of, save_result
from pbe.editing.preview import Preview
from pbe.editing.settings import EditSettings
from pbe.editing.together import Steps
from pbe.images.pillow import UNREADABLE, open_image
from pbe.images.reading import read_picture
from pbe.images.saving import save_picture
from pbe.images.windows import Box
from pbe.io.fields import Range
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import Callback
from pbe.serve.engine import BATCH_SIZE, Ticket

MAX_MEMORY = 1_024_000_000  # bytes that reading an uploaded picture may take
# What it takes at the most, with the copies of Pillow and numpy, whether as image, mask or exemplar. Measured.
BYTES_PER_PIXEL = dict.fromkeys(("PNG", "JPEG", "MPO", "TIFF", "GIF", "BMP"), 16) | {"JPEG2000": 20, "WEBP": 22}
MAX_RESULTS = 8
NUMBER = Annotated[int, Range(1, MAX_RESULTS)]


class EditFiles(NamedTuple):
    """The uploaded files of one edit."""

    image: Path
    mask: Path | np.ndarray  # an array is bool (H, W), True = repaint
    exemplar: Path
    crop: Box | None = None  # of the exemplar


def job_of(files: EditFiles, settings: EditSettings, folder: Path) -> Job:
    """The edit of files of which `folder` takes copies under plain names, which provenance and messages then hold.

    ValueError as `take`.
    """
    return Job(
        image=take(files.image, folder, "image"),
        mask=take(files.mask, folder, "mask"),
        exemplar=(take(files.exemplar, folder, "exemplar", files.crop),),
        out=f"{files.image.stem}-{settings.seed}.png",
        settings=settings,
        folder=folder,
    )


def ticket_of(model: PaintByExample, weights: Weights, job: Job, number: int) -> Ticket[list[str]]:
    """The edit for an engine, which returns the paths of what `save_edits` has saved."""

    def begin(ticket: Ticket[list[str]]) -> Steps[list[str]]:
        return save_edits(model, weights, job, number, ticket.step, ticket.show)

    return Ticket(begin, number, replace(job.settings, seed=0))


def result_paths(job: Job, number: int) -> list[Path]:
    """Where the results go: to the job's `out`, which is NAME-SEED.png, and beside it."""
    seed = job.settings.seed
    name = Path(job.out).stem.removesuffix(f"-{seed}")
    return [job.path(f"{name}-{seed + i}.png") for i in range(number)]


def save_edits(
    model: PaintByExample, weights: Weights, job: Job, number: int, callback: Callback, preview: Preview
) -> Steps[list[str]]:
    """Edits and saves `number` results as PNG files with their provenance; returns their `result_paths`. `callback` and
    `preview` are those of `pbe.edit`.

    ValueError, OSError and MemoryError as `pbe.edit`.
    """
    paths = result_paths(job, number)
    inputs = read_inputs(job)
    provenance = provenance_of(job, weights)
    check_writable(paths[0], inputs.photo, provenance)
    results = yield from run_job.begin(model, job, inputs, number, BATCH_SIZE, callback, preview)
    for i, (result, path) in enumerate(zip(results, paths, strict=True)):
        save_result(result, path, {**provenance, "seed": job.settings.seed + i})
    return [str(path) for path in paths]


def take(source: Path | np.ndarray, folder: Path, name: str, crop: Box | None = None) -> str:
    """Puts a picture or mask into the folder under `name`; returns its file name there."""
    if isinstance(source, np.ndarray):
        Image.fromarray(source).save(folder / f"{name}.png")
        return f"{name}.png"
    if not source.exists():
        raise ValueError(f"the {name} was deleted, since files are kept for a day: load it again")
    check_memory(source, name)
    taken = shutil.copyfile(source, folder / f"{name}{source.suffix.lower()}")
    if crop is None:
        return taken.name
    picture = read_picture(taken, name)
    cropped = picture.with_pixels(picture.pixels[crop.slices])
    assert isinstance(cropped, Image.Image)  # as for every file
    save_picture(cropped, folder / f"{name}-crop.tif")  # TIFF holds every mode
    return f"{name}-crop.tif"


def check_memory(path: Path, name: str) -> None:
    """ValueError for a picture that takes more than MAX_MEMORY to read, before that is done."""
    try:
        with open_image(path) as image:
            (width, height), file_format = image.size, image.format or ""
    except UNREADABLE:
        return  # the library, which reads it next, says what is wrong
    pixels = MAX_MEMORY // BYTES_PER_PIXEL.get(file_format, 24)
    if width * height > pixels:
        raise ValueError(
            f"{name} is {width}x{height}: up to {pixels // 10**6} megapixels are taken here, `pbe edit` takes more"
        )
