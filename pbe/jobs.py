"""One edit as plain values: read from texts, run, and saved with its settings.

The fields of `Job` are at once the flags of `pbe edit`, the columns of a batch file and the settings kept in a result.
Only the standard library is imported on top: the command line reads its arguments before it loads anything heavy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from pbe.models.paint_by_example import PaintByExample
    from pbe.pictures import Picture
    from pbe.sampling import Callback

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Job:
    """One edit of a photo and where its result goes; see `pbe.edit` for the settings.

    Paths are as the user wrote them, relative to `folder`. Exactly one of mask, box and polygon says what to repaint.
    ValueError where the fields contradict each other.
    """

    image: str
    reference: tuple[str, ...]
    out: str
    mask: str | None = None
    box: Box | None = None
    polygon: tuple[tuple[float, float], ...] | None = None
    reference_mask: tuple[str, ...] | None = None
    reference_weights: tuple[float, ...] | None = None
    sampler: str = "plms"
    eta: float = 0.0
    steps: int = 50
    scale: float = 5.0
    seed: int = 321
    window: Literal["auto", "full"] | Box = "auto"
    regions: Literal["together", "each"] = "together"
    raw: bool = False
    feather: int | None = None
    margin: float = 0.1
    resolution: int | None = None
    folder: Path = Path()
    line: int = 0  # of the batch file

    def __post_init__(self) -> None:
        given = [name for name in ("mask", "box", "polygon") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of mask, box and polygon, got {' and '.join(given) or 'none'}")
        for name in ("reference_mask", "reference_weights"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.reference):
                raise ValueError(f"{name} has {len(values)} values for {len(self.reference)} reference pictures")
        for name in self.inputs:
            if self.path(name).resolve() == self.path(self.out).resolve():
                raise ValueError(f"out {self.out} is also an input: it would be overwritten")

    @property
    def inputs(self) -> list[str]:
        """The files it reads."""
        masks = [self.mask] if self.mask else []
        return [self.image, *masks, *self.reference, *(self.reference_mask or ())]

    def path(self, name: str) -> Path:
        return self.folder / name


# --- values from text -------------------------------------------------------------------------------------


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def parse_texts(value: Any) -> tuple[str, ...]:
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(f"{value!r} is not a list of file names (in one text: separated by ';')")
    return tuple(part.strip() for part in parts)


def parse_int(value: Any) -> int:
    number = parse_float(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def parse_float(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    return number


def parse_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise ValueError(f"{value!r} is neither true nor false")
    return words[word]


def parse_numbers(value: Any) -> tuple[float, ...]:
    """Numbers of a text, separated by commas, semicolons or blanks, or of a list, nested or not."""
    if isinstance(value, str):
        return tuple(parse_float(part) for part in re.split(r"[,;\s]+", value.strip()))
    if isinstance(value, list):
        return tuple(number for part in value for number in parse_numbers(part))
    return (parse_float(value),)


def parse_box(value: Any) -> Box:
    numbers = parse_numbers(value)
    if len(numbers) != 4:
        raise ValueError(f"{value!r} is not a box x0,y0,x1,y1")
    return numbers


def parse_polygon(value: Any) -> tuple[tuple[float, float], ...]:
    numbers = parse_numbers(value)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{value!r} is not a polygon of three or more points: x,y x,y x,y")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def parse_window(value: Any) -> str | Box:
    if value in ("auto", "full"):
        return value
    try:
        return tuple(parse_int(number) for number in parse_box(value))
    except ValueError:
        raise ValueError(f"{value!r} is not auto, full or x0,y0,x1,y1 in whole pixels") from None


def parse_regions(value: Any) -> str:
    if value not in ("together", "each"):
        raise ValueError(f"{value!r} is not one of together, each")
    return value


COLUMNS: dict[str, Callable[[Any], Any]] = {
    "image": parse_text,
    "mask": parse_text,
    "box": parse_box,
    "polygon": parse_polygon,
    "reference": parse_texts,
    "reference_mask": parse_texts,
    "reference_weights": parse_numbers,
    "out": parse_text,
    "sampler": parse_text,
    "eta": parse_float,
    "steps": parse_int,
    "scale": parse_float,
    "seed": parse_int,
    "window": parse_window,
    "regions": parse_regions,
    "raw": parse_bool,
    "feather": parse_int,
    "margin": parse_float,
    "resolution": parse_int,
}


def parse(name: str, value: Any) -> Any:
    """The value of a column from text or JSON; ValueError that names the column where it cannot be read."""
    try:
        return COLUMNS[name](value.strip() if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def make_job(values: Mapping[str, Any], folder: Path = Path(), line: int = 0) -> Job:
    """A job from texts or JSON values by column; None and blank texts count as not given.

    ValueError for a value that cannot be read, for a required one that is missing, and as `Job`.
    """
    fields = {}
    for name, value in values.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        fields[name] = parse(name, value)
    missing = [name for name in ("image", "reference", "out") if name not in fields]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing")
    return Job(**fields, folder=folder, line=line)


# --- running a job ----------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a job's files hold."""

    picture: Picture
    repaint: np.ndarray  # bool (H, W)
    exemplars: list[Image.Image]


def read_inputs(job: Job) -> Inputs:
    """Read a job's pictures, and check what can be checked without a model; raises as `pbe.pictures` does."""
    from pbe.pictures import read_exemplar, read_mask, read_picture
    from pbe.sampling import NoiseSchedule, get_sampler

    get_sampler(job.sampler)
    NoiseSchedule.scaled_linear().timesteps(job.steps)
    picture = read_picture(job.path(job.image))
    if job.mask is not None:
        repaint = read_mask(job.path(job.mask), picture.size, name=f"mask {job.mask}")
    elif job.box is not None:
        repaint = read_mask(job.box, picture.size, name="box")
    else:
        repaint = read_mask(job.polygon, picture.size, name="polygon")
    masks = [job.path(name) for name in job.reference_mask] if job.reference_mask else [None] * len(job.reference)
    exemplars = [
        read_exemplar(job.path(name), mask, name="reference") for name, mask in zip(job.reference, masks, strict=True)
    ]
    return Inputs(picture, repaint, exemplars)


def check_output(path: Path, image: Image.Image) -> None:
    """Find out that a result of the kind of `image` cannot be saved at `path`, before it is computed.

    The folder is made. ValueError for a suffix that cannot hold it, OSError where nothing can be written.
    """
    from pbe.pictures import save_picture

    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file name")
    trial = path.with_name(f".{path.stem}.trial{path.suffix}")
    try:
        save_picture(image.crop((0, 0, 1, 1)), trial)
    except ValueError as error:
        raise ValueError(str(error).replace(str(trial), str(path))) from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    trial.unlink()


def load_editor(checkpoint: Path, device: str | torch.device = "auto", dtype: str = "auto") -> PaintByExample:
    """`pbe.load_model` for a file that must hold Paint by Example; ValueError if it is another model."""
    from pbe.checkpoints.loading import load_model
    from pbe.models.paint_by_example import PaintByExample

    model = load_model(checkpoint, device, dtype)
    if not isinstance(model, PaintByExample):
        raise ValueError(f"{checkpoint} holds {type(model).__name__}, editing needs Paint by Example")
    return model


def run_job(
    model: PaintByExample,
    job: Job,
    inputs: Inputs,
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
) -> list[Image.Image]:
    """The results for the seeds `job.seed`, `job.seed + 1`, ...; raises as `pbe.edit`, MemoryError on a full device."""
    import torch

    from pbe.editing import edit

    try:
        return edit(
            model,
            inputs.picture.source,
            inputs.repaint,
            inputs.exemplars,
            exemplar_weights=job.reference_weights,
            steps=job.steps,
            guidance=job.scale,
            sampler=job.sampler,
            eta=job.eta,
            seed=job.seed,
            num_images=num_images,
            batch_size=batch_size,
            window=job.window,
            regions=job.regions,
            composite=not job.raw,
            feather=job.feather,
            margin=job.margin,
            resolution=job.resolution,
            callback=callback,
        )
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            "the device's memory is full; a smaller batch size, resolution or precision needs less"
        ) from error


def settings_of(job: Job, checkpoint: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a result follows from, as JSON values by column name."""
    fields = {name: value for name, value in asdict(job).items() if name in COLUMNS and value is not None}
    del fields["out"]
    return json.loads(json.dumps(fields)) | {
        "checkpoint": checkpoint.name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def save_result(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Save a result with its settings: as JSON under the key `pbe` and as a line to read; see `save_picture`."""
    from pbe import __version__
    from pbe.pictures import save_picture

    about = {"pbe": __version__, "size": list(image.size)}
    shown = ("sampler", "steps", "scale", "seed", "window", "checkpoint", "dtype")
    info = {
        "pbe": json.dumps({**settings, **about}),
        "Description": "Paint by Example: " + ", ".join(f"{name} {settings[name]}" for name in shown),
        "Software": f"pbe {__version__}",
    }
    save_picture(image, path, info)


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that `save_result` stored in a picture, or None where there are none."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            text = image.info.get("pbe")
            if text is None:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
                text = json.loads(comment.removeprefix(b"ASCII\0\0\0"))["pbe"]
            settings = json.loads(text)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, AttributeError):
        return None  # not a picture, or not one of ours
    return settings if isinstance(settings, dict) else None
