"""The systems that the paper compares with, by name and under one interface.

system = open_baseline("copy-paste", Weights())
picture = system(Edit.read("photo.png", "mask.png", "exemplar.png", label="cat", seed=42))
"""

from pbe.baselines.blended_diffusion import BlendedDiffusion
from pbe.baselines.copy_paste import CopyPaste
from pbe.baselines.paint_by_example import PaintByExampleSystem
from pbe.baselines.stable_diffusion import StableDiffusionImage, StableDiffusionText
from pbe.baselines.systems import Baseline, Edit, System, Weights, composited

__all__ = ["BASELINES", "Baseline", "Edit", "System", "Weights", "composited", "get_baseline", "open_baseline"]

BLENDED = ("steps", "skipped", "augmentations", "clip_weight", "range_weight")
BASELINES: dict[str, Baseline] = {
    "copy-paste": Baseline(CopyPaste, CopyPaste.load, "cutout"),
    "copy-paste-poisson": Baseline(CopyPaste, CopyPaste.load_poisson, "cutout"),
    "stable-diffusion-text": Baseline(
        StableDiffusionText,
        StableDiffusionText.load,
        "label",
        files=("stable_diffusion", "vocabulary"),
        settings=("steps", "guidance"),
    ),
    "stable-diffusion-image": Baseline(
        StableDiffusionImage,
        StableDiffusionImage.load,
        "exemplar",
        files=("stable_diffusion", "clip", "vocabulary"),
        settings=("steps", "guidance"),
    ),
    "blended-diffusion-text": Baseline(
        BlendedDiffusion, BlendedDiffusion.load_text, "label", files=("adm", "clip", "vocabulary"), settings=BLENDED
    ),
    "blended-diffusion-image": Baseline(
        BlendedDiffusion, BlendedDiffusion.load_image, "exemplar", files=("adm", "clip"), settings=BLENDED
    ),
    "paint-by-example": Baseline(
        PaintByExampleSystem,
        PaintByExampleSystem.load,
        "exemplar",
        files=("paint_by_example",),
        settings=("sampler", "spacing", "steps", "guidance", "guidance_interval", "resolution"),
    ),
}


def get_baseline(name: str) -> Baseline:
    """What is known of the system called `name` before its files are read; ValueError for an unknown name."""
    if name not in BASELINES:
        raise ValueError(f"unknown system {name!r}, choose one of {', '.join(BASELINES)}")
    return BASELINES[name]


def open_baseline(name: str, weights: Weights) -> System:
    """The system called `name`, ready to edit, with its own settings (dataclass fields: `dataclasses.replace`).

    Raises:
        ValueError: for an unknown name, and for a file that the system needs and `weights` lacks.
        FileNotFoundError, CheckpointError: as `load_model` does.
    """
    return get_baseline(name).load(weights)
