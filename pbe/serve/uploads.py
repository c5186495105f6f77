"""An edit of files that somebody uploaded: within bounds, with errors that name them as the page does.

The edit is `pbe.batch.job.run_job`, as for `pbe edit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image

from pbe.batch.job import Job, NextRegion, read_inputs, run_job
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


class RegionUpload(NamedTuple):
    """The uploaded files of one region of an edit."""

    mask: Path | np.ndarray | None  # an array is bool (H, W), True = repaint; None where `extend` says it
    exemplar: Path
    crop: Box | np.ndarray | None = None  # of the exemplar: all, or what an array, bool (H, W), shows


class EditFiles(NamedTuple):
    """The uploaded files of one edit; the first region's as `RegionUpload` has them."""

    image: Path
    mask: Path | np.ndarray | None
    exemplar: Path
    crop: Box | np.ndarray | None = None
    negative: Path | None = None  # for all regions
    others: Sequence[RegionUpload] = ()


def job_of(files: EditFiles, settings: EditSettings, folder: Path) -> Job:
    """The edit of files of which `folder` takes copies under plain names, which provenance and messages then hold.

    ValueError as `take`.
    """
    common = {} if files.negative is None else {"negative": (take(files.negative, folder, "negative"),)}

    def fields(mask: Path | np.ndarray | None, exemplar: Path, crop: Any, number: str = "") -> dict[str, Any]:
        box, shown = (None, crop) if isinstance(crop, np.ndarray) else (crop, None)
        return {
            "mask": None if mask is None else take(mask, folder, f"mask{number}"),
            "exemplar": (take(exemplar, folder, f"exemplar{number}", box),),
            "exemplar_mask": None if shown is None else (take(shown, folder, f"exemplar_mask{number}"),),
            **common,
        }

    return Job(
        image=take(files.image, folder, "image"),
        **fields(files.mask, files.exemplar, files.crop),
        out=f"{files.image.stem}-{settings.seed}.png",
        regions=tuple(NextRegion(**fields(*one, f"_{n}")) for n, one in enumerate(files.others, start=2)),
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
