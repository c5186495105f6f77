"""The systems that the paper compares with, by name and under one interface.

system = open_baseline("copy-paste", WeightFiles())
picture = system(Task.read("photo.png", "mask.png", "exemplar.png", label="cat", seed=42))
"""

from typing import Any

from pbe.baselines.blended_diffusion import BlendedDiffusion
from pbe.baselines.copy_paste import CopyPaste
from pbe.baselines.paint_by_example import PaintByExampleSystem
from pbe.baselines.stable_diffusion import StableDiffusionImage, StableDiffusionText
from pbe.baselines.systems import Baseline, System, Task, WeightFiles, composited
from pbe.editing.settings import SAMPLING, EditSettings

__all__ = ["BASELINES", "Baseline", "System", "Task", "WeightFiles", "composited", "get_baseline", "open_baseline"]


def _published(owner: type, *names: str) -> dict[str, Any]:
    """Settings by name, with the defaults of the dataclass that has them."""
    return {name: getattr(owner, name) for name in names}


DIFFUSION = _published(StableDiffusionText, "steps", "guidance")
BLENDED = _published(BlendedDiffusion, "steps", "skipped", "augmentations", "clip_weight", "range_weight")
EDITING = _published(EditSettings, *SAMPLING)
BASELINES: dict[str, Baseline] = {
    "copy-paste": Baseline(CopyPaste.load, "cutout"),
    "copy-paste-poisson": Baseline(CopyPaste.load_poisson, "cutout"),
    "stable-diffusion-text": Baseline(StableDiffusionText.load, "label", ("stable_diffusion", "vocabulary"), DIFFUSION),
    "stable-diffusion-image": Baseline(
        StableDiffusionImage.load, "exemplar", ("stable_diffusion", "clip", "vocabulary"), DIFFUSION
    ),
    "blended-diffusion-text": Baseline(BlendedDiffusion.load_text, "label", ("adm", "clip", "vocabulary"), BLENDED),
    "blended-diffusion-image": Baseline(BlendedDiffusion.load_image, "exemplar", ("adm", "clip"), BLENDED),
    "paint-by-example": Baseline(PaintByExampleSystem.load, "exemplar", ("paint_by_example",), EDITING),
}


def get_baseline(name: str) -> Baseline:
    """What is known of the system called `name` before its files are read; ValueError for an unknown name."""
    if name not in BASELINES:
        raise ValueError(f"unknown system {name!r}, choose one of {', '.join(BASELINES)}")
    return BASELINES[name]


def open_baseline(name: str, weights: WeightFiles) -> System:
    """The system called `name`, ready for tasks, with its published settings (`System.with_settings`).

    Raises:
        ValueError: for an unknown name, and for a file that the system needs and `weights` lacks.
        FileNotFoundError, CheckpointError: as `load_model` does.
    """
    return get_baseline(name).load(weights)
