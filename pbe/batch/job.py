"""One edit as plain values, and running it. `pbe.editing.parsing` reads them, `pbe.batch.provenance` saves what comes.

The fields of `Job` are at once the flags of `pbe edit`, the columns of a batch file and the settings kept in a result.
Only the standard library is imported on top: the command line reads its arguments before it loads anything heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pbe.editing.parsing import Corners, parse

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from pbe.acceleration import Compile
    from pbe.images.reading import Picture
    from pbe.models.paint_by_example import PaintByExample
    from pbe.sampling import Callback

MAX_SEED = 2**63 - 1


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
    box: Corners | None = None
    polygon: tuple[tuple[float, float], ...] | None = None
    reference_mask: tuple[str, ...] | None = None
    reference_weights: tuple[float, ...] | None = None
    sampler: str = "plms"
    eta: float = 0.0
    spacing: str = "leading"
    steps: int = 50
    scale: float = 5.0
    guidance_interval: tuple[int, int] | None = None
    seed: int = 321
    window: Literal["auto", "full"] | Corners = "auto"
    regions: Literal["together", "each"] = "together"
    raw: bool = False
    seam: str = "poisson"
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
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {self.seed}")
        for name in self.inputs:
            # not Path.resolve, to which links that lead back to themselves are no ValueError
            if os.path.realpath(self.path(name)) == os.path.realpath(self.path(self.out)):
                raise ValueError(f"out {self.out} is also an input: it would be overwritten")

    @property
    def inputs(self) -> list[str]:
        """The files it reads."""
        masks = [self.mask] if self.mask else []
        return [self.image, *masks, *self.reference, *(self.reference_mask or ())]

    def path(self, name: str) -> Path:
        return self.folder / name


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


# --- settings to begin with -------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """Settings of `pbe.edit` that go together."""

    sampler: str
    spacing: Literal["leading", "trailing"]
    steps: int
    guidance: float


# For results soon: as good as many steps give, where PLMS, with as few, loses its hold under strong guidance.
# docs/editing.md, "How many steps"
QUICK_SAMPLING = Sampling("dpm_solver", "trailing", steps=20, guidance=Job.scale)
# More guidance takes its colours away from the exemplars' again: docs/demo-model.md
DEMO_SAMPLING = QUICK_SAMPLING._replace(guidance=3.0)


def quick_sampling(checkpoint: str | Path) -> Sampling:
    """QUICK_SAMPLING for the model in a checkpoint, or what suits it better where that is known."""
    from pbe.checkpoints.formats.opening import DEMO_MODEL, find_checkpoint

    return DEMO_SAMPLING if find_checkpoint(checkpoint) == DEMO_MODEL else QUICK_SAMPLING


# --- running a job ----------------------------------------------------------------------------------------


def check_job(job: Job) -> None:
    """ValueError for settings that no model and no photo can make right."""
    from pbe.editing.edit import check_settings

    check_settings(
        steps=job.steps,
        guidance=job.scale,
        guidance_interval=job.guidance_interval,
        sampler=job.sampler,
        eta=job.eta,
        spacing=job.spacing,
        seed=job.seed,
        num_images=1,
        batch_size=1,
        window=job.window,
        regions=job.regions,
        seam=job.seam,
        feather=job.feather,
        margin=job.margin,
        resolution=job.resolution,
    )


class Inputs(NamedTuple):
    """What a job's files hold."""

    picture: Picture
    repaint: np.ndarray  # bool (H, W)
    exemplars: list[Image.Image]


def read_inputs(job: Job) -> Inputs:
    """Check a job's settings and read its pictures; raises as `check_job` and `pbe.images.reading` do."""
    from pbe.images.reading import read_exemplar, read_mask, read_picture

    check_job(job)
    picture = read_picture(job.path(job.image))
    if job.mask is not None:
        repaint = read_mask(job.path(job.mask), picture.size)
    elif job.box is not None:
        repaint = read_mask(job.box, picture.size, name="box")
    else:
        repaint = read_mask(job.polygon, picture.size, name="polygon")
    masks = [job.path(name) for name in job.reference_mask] if job.reference_mask else [None] * len(job.reference)
    exemplars = [
        read_exemplar(job.path(name), mask, name="reference") for name, mask in zip(job.reference, masks, strict=True)
    ]
    return Inputs(picture, repaint, exemplars)


def load_editor(
    checkpoint: Path,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    low_memory: bool = False,
    compile: Compile | None = None,
) -> PaintByExample:
    """`pbe.load_model` for a file that must hold Paint by Example, prepared for editing alone; with `low_memory` each
    network is on the device only while it computes. ValueError if it is another model, or if both `low_memory` and the
    whole network's compilation are asked for."""
    from pbe.acceleration import prepare_for_inference
    from pbe.acceleration.offloading import offload
    from pbe.checkpoints.loading import choose_device, choose_dtype, load_model
    from pbe.models.paint_by_example import PaintByExample

    check_memory(low_memory, compile)
    chosen = choose_device(device)
    home, precision = choose_device("cpu") if low_memory else chosen, choose_dtype(dtype, chosen)
    # on the CPU preparing converts what is mapped, with no copy between; to a device the least is sent
    model = load_model(checkpoint, home, "stored" if home.type == "cpu" else precision)
    if not isinstance(model, PaintByExample):
        raise ValueError(f"{checkpoint} holds {type(model).__name__}, editing needs Paint by Example")
    if low_memory:
        model = offload(model, chosen)
    return prepare_for_inference(model, consume=True, dtype=precision, compile=compile)


SMALL_RESOLUTION = 128


def spare_threads(model: PaintByExample) -> None:
    """Has the process compute with one thread where a CPU runs a model of pictures of at most 128 pixels, unless
    OMP_NUM_THREADS says otherwise.

    So small a network gains a quarter by four threads. On a busy machine it loses twentyfold by them: all wait, in
    each layer, for the one that has no core (docs/editing.md).
    """
    import torch

    small = model.config.resolution <= SMALL_RESOLUTION and model.device.type == "cpu"
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_memory(low_memory: bool, compile: Compile | None) -> None:
    """ValueError for what `load_editor` cannot have both: the whole network's graphs keep their memory."""
    if low_memory and compile == "whole":
        raise ValueError("compile='whole' keeps the memory that low_memory gives back: use compile='regions'")


def run_job(
    model: PaintByExample,
    job: Job,
    inputs: Inputs,
    num_images: int = 1,
    batch_size: int = 4,
    callback: Callback | None = None,
) -> list[Image.Image]:
    """The results for the seeds `job.seed`, `job.seed + 1`, ...; raises as `pbe.edit`, MemoryError on full memory."""
    import torch

    from pbe.editing.edit import edit

    try:
        return edit(
            model,
            inputs.picture.source,
            inputs.repaint,
            inputs.exemplars,
            exemplar_weights=job.reference_weights,
            steps=job.steps,
            guidance=job.scale,
            guidance_interval=job.guidance_interval,
            sampler=job.sampler,
            eta=job.eta,
            spacing=job.spacing,
            seed=job.seed,
            num_images=num_images,
            batch_size=batch_size,
            window=job.window,
            regions=job.regions,
            composite=not job.raw,
            seam=job.seam,
            feather=job.feather,
            margin=job.margin,
            resolution=job.resolution,
            callback=callback,
        )
    except RuntimeError as error:
        # Only CUDA has an error class for it; "can't allocate" is the CPU's, "out of memory" that of MPS.
        if isinstance(error, torch.OutOfMemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            raise MemoryError(
                "the device's memory is full; a smaller batch size, resolution or precision needs less"
            ) from error
        raise
