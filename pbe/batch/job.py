"""One edit as a row says it: its files, its settings, and where the result goes.

The columns are the fields of `Job` and of `EditSettings`; the flags of `pbe edit` and a result's provenance have the
same names. What is heavy is imported where it is used: the command line reads its arguments before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

from pbe.editing.loading import adapter
from pbe.editing.settings import SETTINGS, EditSettings, is_given
from pbe.editing.together import Steps, sampled
from pbe.io.fields import Range, field_types, read

if TYPE_CHECKING:
    from PIL import Image

    from pbe.checkpoints.adapters import AdapterLike
    from pbe.editing.canvas import Canvas
    from pbe.editing.preview import Preview
    from pbe.images.reading import Picture
    from pbe.models.paint_by_example import Distilled, PaintByExample
    from pbe.sampling import Callback

Box = Annotated[tuple[float, float, float, float], "a box x0,y0,x1,y1"]
Polygon = Annotated[tuple[tuple[float, float], ...], Range(3), "a polygon of three or more points x,y x,y x,y"]
FileNames = Annotated[tuple[str, ...], "a list of file names (in one text: separated by ';')"]
Adapters = Annotated[tuple[str, ...], "a list of FILE or FILE:STRENGTH (in one text: separated by ';')"]


@dataclass(frozen=True)
class Job:
    """One edit of a photo and where its result goes; see `pbe.edit`.

    Paths are as the user wrote them, relative to `folder`. At most one of mask, box and polygon says what to repaint.
    ValueError where the fields contradict each other.
    """

    image: str
    exemplar: FileNames
    out: str
    mask: str | None = None
    box: Box | None = None
    polygon: Polygon | None = None
    exemplar_mask: FileNames | None = None
    exemplar_weights: tuple[float, ...] | None = None
    adapters: Adapters | None = None
    negative: FileNames | None = None
    negative_mask: FileNames | None = None
    negative_weights: tuple[float, ...] | None = None
    settings: EditSettings = field(default_factory=EditSettings)
    folder: Path = Path()
    line: int = 0  # of the batch file

    def __post_init__(self) -> None:
        given = [name for name in ("mask", "box", "polygon") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of mask, box and polygon, got {' and '.join(given)}")
        for kind, what in product(("exemplar", "negative"), ("mask", "weights")):
            pictures, values = getattr(self, kind) or (), getattr(self, f"{kind}_{what}")
            if values is not None and len(values) != len(pictures):
                number = f"{len(values)} values for {len(pictures)} {kind}s"
                raise ValueError(f"{kind}_{what} has {number}; give one each")
        for name in self.inputs:
            # not Path.resolve, which raises something else than ValueError for a link that leads back to itself
            if os.path.realpath(self.path(name)) == os.path.realpath(self.path(self.out)):
                raise ValueError(f"out {self.out} is also an input: it would be overwritten")

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        folder: Path = Path(),
        line: int = 0,
        distilled: Callable[[Job], Distilled | None] = lambda _: None,
    ) -> Job:
        """A job from texts or JSON values by column; None and blank texts are not given.

        `distilled` says of a job, with its files, what its model was distilled for, which settings follow from.
        ValueError for a value that cannot be read, for a required one that is missing, and as `Job`.
        """
        fields = {name: read(name, row[name], FILES[name]) for name in FILES if is_given(row.get(name))}
        missing = [name for name in ("image", "exemplar", "out") if name not in fields]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing")
        job = cls(**fields, folder=folder, line=line)
        given = {name: row[name] for name in SETTINGS if name in row}
        return replace(job, settings=EditSettings.from_texts(given, distilled(job)))

    def to_row(self) -> dict[str, Any]:
        """The job as JSON values by column, without what is None; `from_row` reads them back."""
        files = {name: getattr(self, name) for name in FILES if getattr(self, name) is not None}
        return {**files, **self.settings.to_json()}

    @property
    def inputs(self) -> list[str]:
        """The files it reads."""
        masks = [self.mask] if self.mask else []
        negatives = (*(self.negative or ()), *(self.negative_mask or ()))
        return [self.image, *masks, *self.exemplar, *(self.exemplar_mask or ()), *negatives]

    def with_adapters(self, given: Sequence[AdapterLike]) -> tuple[AdapterLike, ...]:
        """Its own adapters and their strengths, or those given where it names none."""
        if self.adapters is None:
            return tuple(given)
        return tuple((self.path(str(file)), strength) for file, strength in map(adapter, self.adapters))

    def path(self, name: str) -> Path:
        """The path of one of its files."""
        return self.folder / name


FILES = {name: kind for name, kind in field_types(Job).items() if name not in ("settings", "folder", "line")}
COLUMNS = (*FILES, *SETTINGS)
RENAMED = {
    "reference": "exemplar",
    "reference_mask": "exemplar_mask",
    "reference_weights": "exemplar_weights",
    "scale": "guidance",
    "raw": "composite",
}


class Inputs(NamedTuple):
    """What a job's files hold."""

    canvas: Canvas
    exemplars: list[Image.Image]
    negatives: list[Image.Image] | None

    @property
    def picture(self) -> Picture:
        """The photo, with what `extend` adds."""
        return self.canvas.picture

    @property
    def photo(self) -> Image.Image:
        """The picture as Pillow has it, which a file's is."""
        return cast("Image.Image", self.picture.source)


def read_inputs(job: Job) -> Inputs:
    """Reads a job's pictures; raises as `pbe.images.reading` does."""
    from pbe.editing.canvas import read_canvas
    from pbe.editing.condition import read_exemplars

    def read_all(names: FileNames, masks: FileNames | None, kind: str) -> list[Image.Image]:
        paths = None if masks is None else [job.path(name) for name in masks]
        return read_exemplars([job.path(name) for name in names], paths, kind, job.settings.fit_mask)

    exemplars = read_all(job.exemplar, job.exemplar_mask, "exemplar")
    negatives = None if job.negative is None else read_all(job.negative, job.negative_mask, "negative")
    drawn = {"mask": job.mask and job.path(job.mask), "box": job.box, "polygon": job.polygon}
    name, mask = next(((name, mask) for name, mask in drawn.items() if mask is not None), ("mask", None))
    canvas = read_canvas(job.path(job.image), mask, job.settings, exemplars[0].size[::-1], name)
    return Inputs(canvas, exemplars, negatives)


@sampled
def run_job(
    model: PaintByExample,
    job: Job,
    inputs: Inputs,
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
    preview: Preview | None = None,
) -> Steps[list[Image.Image]]:
    """The results for the job's seed and the next ones; raises as `pbe.edit`, MemoryError on full memory."""
    import torch

    from pbe.editing import edit as editing

    try:
        results = yield from editing.edit.begin(
            model,
            inputs.canvas,
            None,
            inputs.exemplars,
            exemplar_weights=job.exemplar_weights,
            negative=inputs.negatives,
            negative_weights=job.negative_weights,
            num_images=num_images,
            batch_size=batch_size,
            callback=callback,
            preview=preview,
            **vars(job.settings),
        )
        return cast("list[Image.Image]", results)
    except RuntimeError as error:
        # Only CUDA has an error class for it; "can't allocate" is the CPU's, "out of memory" that of MPS.
        if isinstance(error, torch.OutOfMemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            raise MemoryError(
                "the device's memory is full; a smaller batch size, resolution or precision needs less"
            ) from error
        raise
