"""What all systems of the comparison have in common: they make a picture of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pbe.checkpoints.adapters import AdapterLike
from pbe.checkpoints.loading import load_model
from pbe.checkpoints.recognised import WeightChoice
from pbe.editing.loading import distilled_for
from pbe.editing.settings import SETTINGS, EditSettings
from pbe.images import windows
from pbe.images.reading import MaskLike, PictureLike, over_white, read_exemplar, read_mask, read_picture
from pbe.images.windows import Box

if TYPE_CHECKING:
    from typing_extensions import Self

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Task:
    """One edit that a system is asked for; `Task.read` makes it of pictures of any kind.

    image: (H, W, 3) uint8.
    repaint: (H, W) bool, True where the image is repainted.
    exemplar: RGB, what networks see: cropped to the object and filled with white if it is known where that is.
    cutout: (h, w, 4) uint8, the object's own pixels; alpha is 255 on the object and 0 beside it.
    label: the name of the object's class, for the systems that read text.
    seed: of everything that is drawn.
    """

    image: np.ndarray
    repaint: np.ndarray
    exemplar: Image.Image
    cutout: np.ndarray
    label: str | None = None
    seed: int = 0

    @classmethod
    def read(
        cls,
        image: PictureLike,
        mask: MaskLike,
        exemplar: PictureLike,
        *,
        exemplar_mask: MaskLike | None = None,
        label: str | None = None,
        seed: int = 0,
    ) -> Task:
        """The task of an image, its mask (white = repaint), and an exemplar, maybe with its object's mask (white).

        Raises FileNotFoundError for a missing file, ValueError for what is not a picture or has the wrong size.
        """
        picture, exemplar_picture = read_picture(image), read_picture(exemplar, "exemplar")
        pixels = exemplar_picture.pixels
        if exemplar_mask is not None:
            shown = read_mask(exemplar_mask, exemplar_picture.size, "exemplar_mask")
        elif pixels.shape[2] in (2, 4):
            shown = pixels[..., -1] >= windows.white_level(pixels.dtype) / 2
        else:
            shown = np.ones(exemplar_picture.size, dtype=bool)
        cutout = np.dstack([np.asarray(exemplar_picture.to_rgb8()), np.where(shown, 255, 0).astype(np.uint8)])
        return cls(
            image=np.array(picture.to_rgb8()),
            repaint=read_mask(mask, picture.size),
            exemplar=over_white(read_exemplar(exemplar_picture.source, exemplar_mask)),
            cutout=cutout[windows.mask_bounding_box(shown).slices],
            label=label,
            seed=seed,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        height, width, _ = self.image.shape
        return height, width

    def prompt(self) -> str:
        """The paper's text for systems guided by text; ValueError for a task without a label."""
        if self.label is None:
            raise ValueError("a system guided by text needs the label of the exemplar's class, and this task has none")
        return f"a photo of a {self.label}"

    def network_inputs(self, resolution: int, multiple: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The image (1, 3, H', W') in [-1, 1] and the mask to keep (1, 1, H', W'), 1 = keep, at a network's size.

        The short side becomes `resolution` pixels and both sides multiples of `multiple`.
        """
        whole = Box(0, 0, self.size[1], self.size[0])
        size = windows.model_size(whole, resolution, multiple)
        image = windows.resample(to_tensor(self.image), size)
        return image.to(device), 1 - windows.extract_repaint(self.repaint, whole, size).to(device)


class System(ABC):
    """A frozen dataclass of networks and settings that does tasks."""

    @abstractmethod
    def __call__(self, task: Task) -> Image.Image:
        """The whole frame as the system makes it, of the image's size; `composited` keeps only its masked part."""

    def with_settings(self, **settings: Any) -> Self:
        """The system with other values of some of its settings."""
        return replace(self, **settings)  # type: ignore[type-var]  # a dataclass


def composited(task: Task, picture: Image.Image) -> Image.Image:
    """The image with the masked pixels of a system's picture: the others stay bit for bit."""
    pixels = np.asarray(picture.convert("RGB"))
    if pixels.shape != task.image.shape:
        raise ValueError(f"the picture is {pixels.shape[:2]}, the image is {task.size} (height, width)")
    return Image.fromarray(np.where(task.repaint[..., None], pixels, task.image))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """What a network painted, (1, 3, h, w) in [-1, 1], as a picture of `size` (height, width).

    Raises ValueError for NaN or infinity, which can come of 16 bits.
    """
    if not image.isfinite().all():
        raise ValueError(f"the system's picture is not finite in {image.dtype}: use bfloat16 or float32")
    pixels = (windows.resample(image.float().cpu().clamp(-1, 1), size)[0].permute(1, 2, 0) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


@dataclass(frozen=True)
class WeightFiles:
    """Where the files are that systems need, and where and in what precision their networks run (`load_model`)."""

    paint_by_example: str | Path | None = None
    stable_diffusion: str | Path | None = None
    adm: str | Path | None = None
    clip: str | Path | None = None
    vocabulary: str | Path | None = None
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    adapters: tuple[AdapterLike, ...] = ()  # of Paint by Example
    weights: WeightChoice = "auto"  # its averages or what they average

    def path(self, name: str) -> str | Path:
        """The file called `name`; a ValueError that says what it is if it was not given."""
        path = getattr(self, name)
        if path is None:
            raise ValueError(f"this system needs {FILE_KINDS[name]}: give its path as {name}")
        return path

    def load(self, name: str, kind: type[Network]) -> Network:
        """The network in the file called `name`. Raises as `path` and `load_model` do; ValueError for another kind."""
        adapters, weights = (self.adapters, self.weights) if name == "paint_by_example" else ((), "auto")
        model = load_model(self.path(name), self.device, self.dtype, adapters, weights=weights)
        if not isinstance(model, kind):
            raise ValueError(f"{self.path(name)} holds {type(model).__name__}, not {FILE_KINDS[name]}")
        return model


FILE_KINDS = {
    "paint_by_example": "a Paint by Example checkpoint",
    "stable_diffusion": "a Stable Diffusion v1 checkpoint",
    "adm": "a guided-diffusion checkpoint (256x256_diffusion_uncond.pt or 512x512_diffusion.pt)",
    "clip": "a CLIP checkpoint (ViT-L-14.pt for Stable Diffusion, ViT-B-16.pt for Blended Diffusion)",
    "vocabulary": "CLIP's vocabulary (bpe_simple_vocab_16e6.txt.gz)",
}


@dataclass(frozen=True)
class Baseline:
    """What is known of a system before its files are read.

    load: opens it.
    guide: what it reads beside image and mask: the object's own pixels, the exemplar as networks see it, or the label.
    files: those of `WeightFiles` that it needs.
    settings: those that make its pictures what they are, with their published values.
    """

    load: Callable[[WeightFiles], System]
    guide: Literal["cutout", "exemplar", "label"]
    files: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def choose_settings(self, given: Mapping[str, Any], weights: WeightFiles) -> dict[str, Any]:
        """The published values of the settings, or those that the model in `weights` was distilled for, but for those
        among them that are given and not None, as JSON values.

        Blended Diffusion's skipped steps stay the same share of all. Settings that `EditSettings` has too may be texts
        and raise its ValueErrors.
        """
        published = dict(self.settings)
        chosen = published | {name: given[name] for name in published if given.get(name) is not None}
        shared = {name: value for name, value in published.items() if name in SETTINGS}
        ours = "paint_by_example" in self.files
        distilled = distilled_for(weights.path("paint_by_example"), weights.adapters) if ours else None
        checked = EditSettings.from_texts({name: given.get(name) for name in shared}, distilled, EditSettings(**shared))
        chosen |= {name: checked.to_json().get(name) for name in shared}
        if "skipped" in chosen:
            chosen["skipped"] = published["skipped"] * chosen["steps"] // published["steps"]
        return chosen
