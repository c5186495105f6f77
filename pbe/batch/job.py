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
    import numpy as np
    from PIL import Image

    from pbe.checkpoints.adapters import AdapterLike
    from pbe.editing.canvas import Canvas
    from pbe.editing.preview import Preview
    from pbe.editing.regions import Region
    from pbe.images.reading import Picture, PictureLike
    from pbe.models.paint_by_example import Distilled, PaintByExample
    from pbe.sampling import Callback

Box = Annotated[tuple[float, float, float, float], "a box x0,y0,x1,y1"]
Polygon = Annotated[tuple[tuple[float, float], ...], Range(3), "a polygon of three or more points x,y x,y x,y"]
Select = Annotated[
    tuple[float, float] | tuple[float, float, float, float], "a point x,y on the object or a box x0,y0,x1,y1 around it"
]
FileNames = Annotated[tuple[str, ...], "a list of file names (in one text: separated by ';')"]
Adapters = Annotated[tuple[str, ...], "a list of FILE or FILE:STRENGTH (in one text: separated by ';')"]


WHERE = ("mask", "box", "polygon", "select")


@dataclass(frozen=True, kw_only=True)
class RegionFiles:
    """What is repainted, and with what. At most one of mask, box, polygon and select says where.

    Each exemplar may be COLOUR=FILE, as `regions_by_colour` has it: it is for what has that colour in the mask.
    ValueError where the fields contradict each other.
    """

    exemplar: FileNames
    mask: str | None = None
    box: Box | None = None
    polygon: Polygon | None = None
    select: Select | None = None
    exemplar_select: Select | None = None
    exemplar_mask: FileNames | None = None
    exemplar_weights: tuple[float, ...] | None = None
    negative: FileNames | None = None
    negative_mask: FileNames | None = None
    negative_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = [name for name in WHERE if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of mask, box, polygon and select, got {' and '.join(given)}")
        if self.exemplar_select is not None and (self.exemplar_mask is not None or len(self.exemplar) > 1):
            raise ValueError("exemplar_select is for one exemplar without an exemplar_mask")
        for kind, what in product(("exemplar", "negative"), ("mask", "weights")):
            pictures, values = getattr(self, kind) or (), getattr(self, f"{kind}_{what}")
            if values is not None and len(values) != len(pictures):
                raise ValueError(f"{kind}_{what} has {len(values)} values for {len(pictures)} {kind}s; give one each")
        colours = [colour for colour, _ in map(with_colour, self.exemplar)]
        if any(colours) and (not all(colours) or self.mask is None or self.exemplar_weights is not None):
            raise ValueError("exemplars as COLOUR=FILE need a mask picture and no weights, and all have a colour")

    @property
    def files(self) -> list[str]:
        """The files it reads."""
        exemplars = [file for _, file in map(with_colour, self.exemplar)]
        others = (self.exemplar_mask, self.negative, self.negative_mask)
        return [*([self.mask] if self.mask else []), *exemplars, *(name for names in others for name in names or ())]


@dataclass(frozen=True, kw_only=True)
class NextRegion(RegionFiles):
    """One of an edit's regions after the first, which may have settings of its own: a row's mask_2, guidance_2, …"""

    guidance: float | None = None
    strength: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(getattr(self, name) is None for name in WHERE):
            raise ValueError("mask, box, polygon or select missing")


@dataclass(frozen=True, kw_only=True)
class Job(RegionFiles):
    """One edit of a photo and where its result goes; see `pbe.edit` and `pbe.edit_regions`.

    Paths are as the user wrote them, relative to `folder`. ValueError where the fields contradict each other.
    """

    image: str
    out: str
    adapters: Adapters | None = None
    regions: tuple[NextRegion, ...] = ()
    settings: EditSettings = field(default_factory=EditSettings)
    folder: Path = Path()
    line: int = 0  # of the batch file

    def __post_init__(self) -> None:
        super().__post_init__()
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
        regions = tuple(filter(None, (next_region(row, n) for n in NUMBERS)))
        job = cls(**fields, regions=regions, folder=folder, line=line)
        given = {name: row[name] for name in SETTINGS if name in row}
        return replace(job, settings=EditSettings.from_texts(given, distilled(job)))

    def to_row(self) -> dict[str, Any]:
        """The job as JSON values by column, without what is None; `from_row` reads them back."""
        files = {name: getattr(self, name) for name in FILES if getattr(self, name) is not None}
        for n, region in enumerate(self.regions, 2):
            files |= {f"{name}_{n}": value for name, value in vars(region).items() if value is not None}
        return {**files, **self.settings.to_json()}

    @property
    def inputs(self) -> list[str]:
        """The files it reads."""
        return [self.image, *self.files, *(name for region in self.regions for name in region.files)]

    def with_adapters(self, given: Sequence[AdapterLike]) -> tuple[AdapterLike, ...]:
        """Its own adapters and their strengths, or those given where it names none."""
        if self.adapters is None:
            return tuple(given)
        return tuple((self.path(str(file)), strength) for file, strength in map(adapter, self.adapters))

    def path(self, name: str) -> Path:
        """The path of one of its files; adapters may lie on the Hugging Face Hub."""
        return Path(name) if name.startswith("hf:") else self.folder / name


def with_colour(name: str) -> tuple[str | None, str]:
    """The colour and the file of an exemplar, COLOUR=FILE or FILE."""
    found = re.fullmatch(r"(#?[0-9a-fA-F]{6}|\d{1,3})=(.+)", name)
    return (found[1], found[2]) if found else (None, name)


def next_region(row: Mapping[str, Any], n: int) -> NextRegion | None:
    """The n-th region of a row, if it has one; ValueError naming the region or the column."""
    names = {name: f"{name}_{n}" for name in PARTS}
    given = {name: read(own, row[own], PARTS[name]) for name, own in names.items() if is_given(row.get(own))}
    if given and "exemplar" not in given:
        raise ValueError(f"exemplar_{n} missing")
    try:
        return NextRegion(**given) if given else None
    except ValueError as error:
        raise ValueError(f"region {n}: {error}") from None


FILES = {name: kind for name, kind in field_types(Job).items() if name not in ("regions", "settings", "folder", "line")}
PARTS = field_types(NextRegion)
NUMBERS = range(2, 10)  # of the regions after the first
REGION_COLUMNS = {f"{name}_{n}": kind for n in NUMBERS for name, kind in PARTS.items()}
COLUMNS = (*FILES, *SETTINGS, *REGION_COLUMNS)
RENAMED = {
    "reference": "exemplar",
    "reference_mask": "exemplar_mask",
    "reference_weights": "exemplar_weights",
    "scale": "guidance",
    "raw": "composite",
    "regions": "split_mask",
}


class Inputs(NamedTuple):
    """What a job's files hold."""

    canvas: Canvas
    exemplars: list[Image.Image]
    negatives: list[Image.Image] | None
    regions: Sequence[Region] = ()  # where there are several

    @property
    def picture(self) -> Picture:
        """The photo, with what `extend` adds."""
        return self.canvas.picture

    @property
    def photo(self) -> Image.Image:
        """The picture as Pillow has it, which a file's is."""
        return cast("Image.Image", self.picture.source)


def select(source: PictureLike | Picture, where: Sequence[float], name: str = "image") -> np.ndarray:
    """`pbe.select_object` at a point or in a box; without OpenCV, which an extra has, a ValueError too."""
    try:
        from pbe.images.grabcut import select_object
    except ImportError as error:
        column = "select" if name == "image" else f"{name}_select"
        raise ValueError(f"{column} is not possible: {error}") from error
    return select_object(source, **{"point" if len(where) == 2 else "box": where}, name=name)


def read_inputs(job: Job) -> Inputs:
    """Reads a job's pictures; raises as `pbe.images.reading` does."""
    from pbe.editing.canvas import Canvas, read_canvas
    from pbe.editing.condition import read_exemplars
    from pbe.editing.regions import Region, read_canvases, regions_by_colour
    from pbe.images.reading import read_exemplar, read_picture

    def read_all(names: FileNames, masks: FileNames | None, kind: str) -> list[Image.Image]:
        paths = None if masks is None else [job.path(name) for name in masks]
        return read_exemplars([job.path(name) for name in names], paths, kind, job.settings.fit_mask)

    picture = read_picture(job.path(job.image))
    exemplars: list[Image.Image] = []  # of all regions
    regions: list[Region] = []
    for one in (job, *job.regions):
        colours, names = zip(*map(with_colour, one.exemplar), strict=True)
        if one.exemplar_select is None:
            own = read_all(names, one.exemplar_mask, "exemplar")
        else:
            own = [read_exemplar(file := job.path(*names), select(file, one.exemplar_select, "exemplar"))]
        negatives = None if one.negative is None else read_all(one.negative, one.negative_mask, "negative")
        mask: Any = job.path(one.mask) if one.mask else one.box or one.polygon
        if one.select is not None:
            mask = select(picture, one.select)
        found = [Region(mask, own, exemplar_weights=one.exemplar_weights)]
        if any(colours):
            by_colour = {key: [x for c, x in zip(colours, own, strict=True) if c == key] for key in colours}
            found = regions_by_colour(mask, by_colour)
        also = {name: getattr(one, name) for name in PARTS.keys() - FILES.keys()} if isinstance(one, NextRegion) else {}
        also |= {"negative": negatives, "negative_weights": one.negative_weights}
        regions += [replace(region, **also) for region in found]
        exemplars += own

    if len(regions) == 1:
        name = next((name for name in ("box", "polygon") if getattr(job, name) is not None), "mask")
        canvas = read_canvas(picture, regions[0].mask, job.settings, exemplars[0].size[::-1], name)
        return Inputs(canvas, exemplars, negatives)
    areas = [area for canvas in read_canvases(picture, regions, job.settings) for area in canvas.regions]
    return Inputs(Canvas(picture, areas), exemplars, None, regions)


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
    from pbe.editing.regions import edit_regions

    rest: dict[str, Any] = {"num_images": num_images, "batch_size": batch_size, "callback": callback}
    rest |= {"preview": preview, **vars(job.settings)}
    try:
        if inputs.regions:
            return cast("list[Image.Image]", edit_regions(model, inputs.picture, inputs.regions, **rest))
        results = yield from editing.edit.begin(
            model,
            inputs.canvas,
            None,
            inputs.exemplars,
            exemplar_weights=job.exemplar_weights,
            negative=inputs.negatives,
            negative_weights=job.negative_weights,
            **rest,
        )
        return cast("list[Image.Image]", results)
    except RuntimeError as error:
        # Only CUDA has an error class for it; "can't allocate" is the CPU's, "out of memory" that of MPS.
        if isinstance(error, torch.OutOfMemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            raise MemoryError(
                "the device's memory is full; a smaller batch size, resolution or precision needs less"
            ) from error
        raise
