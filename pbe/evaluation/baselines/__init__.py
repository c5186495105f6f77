"""The systems that the paper compares with, by name and under one interface.

system = open_baseline("copy-paste", Weights())
picture = system(Edit.read("photo.png", "mask.png", "exemplar.png", label="cat", seed=42))
"""

from collections.abc import Callable

from pbe.evaluation.baselines.blended_diffusion import BlendedDiffusion
from pbe.evaluation.baselines.copy_paste import CopyPaste
from pbe.evaluation.baselines.paint_by_example import PaintByExampleSystem
from pbe.evaluation.baselines.stable_diffusion import StableDiffusionImage, StableDiffusionText
from pbe.evaluation.baselines.systems import Edit, System, Weights, composited

__all__ = ["BASELINES", "Edit", "System", "Weights", "composited", "open_baseline"]

BASELINES: dict[str, Callable[[Weights], System]] = {
    "copy-paste": CopyPaste.load,
    "copy-paste-poisson": CopyPaste.load_poisson,
    "stable-diffusion-text": StableDiffusionText.load,
    "stable-diffusion-image": StableDiffusionImage.load,
    "blended-diffusion-text": BlendedDiffusion.load_text,
    "blended-diffusion-image": BlendedDiffusion.load_image,
    "paint-by-example": PaintByExampleSystem.load,
}


def open_baseline(name: str, weights: Weights) -> System:
    """The system called `name`, ready to edit, with its own settings (dataclass fields: `dataclasses.replace`).

    Raises:
        ValueError: for an unknown name, and for a file that the system needs and `weights` lacks.
        FileNotFoundError, CheckpointError: as `load_model` does.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown system {name!r}, choose one of {', '.join(BASELINES)}")
    return BASELINES[name](weights)
