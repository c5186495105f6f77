"""What every system of the comparison is: a function from an edit to a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pbe.editing.settings import SETTINGS, EditSettings
from pbe.images import windows
from pbe.images.reading import MaskLike, Picture, PictureLike, read_exemplar, read_mask, read_picture
from pbe.images.windows import Box


@dataclass(frozen=True, eq=False)
class Edit:
    """One task of a benchmark; `Edit.read` makes it of pictures of any kind.

    photo: (H, W, 3) uint8.
    repaint: (H, W) bool, True where the photo is painted anew.
    exemplar: RGB, what networks see: cropped to the object and filled with white if it is known where that is.
    cutout: (h, w, 4) uint8, the object's own pixels; alpha is 255 on the object and 0 beside it.
    label: the name of the object's class, for the systems that read text.
    seed: of everything that is drawn.
    """

    photo: np.ndarray
    repaint: np.ndarray
    exemplar: Image.Image
    cutout: np.ndarray
    label: str | None = None
    seed: int = 0

    @classmethod
    def read(
        cls,
        photo: PictureLike,
        mask: MaskLike,
        exemplar: PictureLike,
        *,
        exemplar_mask: MaskLike | None = None,
        label: str | None = None,
        seed: int = 0,
    ) -> Edit:
        """The edit of a photo, its mask (white = repaint), and an exemplar with maybe its object's mask (white).

        Raises FileNotFoundError for a missing file, ValueError for what is no picture or has the wrong size.
        """
        picture, object_picture = read_picture(photo, "photo"), read_picture(exemplar, "exemplar")
        if exemplar_mask is not None:
            shown = read_mask(exemplar_mask, object_picture.size, "exemplar_mask")
        elif object_picture.pixels.shape[2] in (2, 4):
            shown = object_picture.pixels[..., -1] >= windows.white_level(object_picture.pixels.dtype) / 2
        else:
            shown = np.ones(object_picture.size, dtype=bool)
        box = windows.mask_bounding_box(shown)
        cutout = np.dstack([rgb_of(object_picture), np.where(shown, 255, 0).astype(np.uint8)])[box.slices]
        return cls(
            photo=rgb_of(picture),
            repaint=read_mask(mask, picture.size),
            exemplar=read_exemplar(object_picture.source, exemplar_mask),
            cutout=cutout,
            label=label,
            seed=seed,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the photo."""
        return self.photo.shape[:2]

    def prompt(self) -> str:
        """The paper's text for systems guided by text; ValueError for an edit without a label."""
        if self.label is None:
            raise ValueError("a system guided by text needs the label of the exemplar's class, and this edit has none")
        return f"a photo of a {self.label}"

    def seen_at(self, resolution: int, multiple: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The photo (1, 3, H', W') in [-1, 1] and the mask to keep (1, 1, H', W'), 1 = keep, as a network sees them.

        The short side becomes `resolution` pixels and both sides multiples of `multiple`.
        """
        whole = Box(0, 0, self.size[1], self.size[0])
        size = windows.model_size(whole, resolution, multiple)
        image = windows.resample(to_tensor(self.photo), size)
        return image.to(device), 1 - windows.extract_repaint(self.repaint, whole, size).to(device)


# The whole frame as the system makes it, of the photo's size; `composited` puts only its masked part into the photo.
System = Callable[[Edit], Image.Image]


def composited(edit: Edit, picture: Image.Image) -> Image.Image:
    """The photo with the masked pixels of a system's picture: the others stay bit for bit."""
    pixels = np.asarray(picture.convert("RGB"))
    if pixels.shape != edit.photo.shape:
        raise ValueError(f"the picture is {pixels.shape[:2]}, the photo is {edit.size} (height, width)")
    return Image.fromarray(np.where(edit.repaint[..., None], pixels, edit.photo))


def rgb_of(picture: Picture) -> np.ndarray:
    """The colours of a picture: (H, W, 3) uint8."""
    return np.rint((picture.rgb()[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """What a network painted, (1, 3, h, w) in [-1, 1], as a picture of `size` (height, width).

    Raises ValueError for NaN or infinity, which 16 bits can bring about.
    """
    if not image.isfinite().all():
        raise ValueError(f"the system's picture is not finite in {image.dtype}: use bfloat16 or float32")
    pixels = (windows.resample(image.float().cpu().clamp(-1, 1), size)[0].permute(1, 2, 0) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


@dataclass(frozen=True)
class Weights:
    """Where the files are that systems need, and where and in what precision their networks run (`load_model`)."""

    paint_by_example: str | Path | None = None
    stable_diffusion: str | Path | None = None
    adm: str | Path | None = None
    clip: str | Path | None = None
    vocabulary: str | Path | None = None
    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"

    def path(self, name: str) -> str | Path:
        """The file called `name`; a ValueError that says what it is if it was not given."""
        path = getattr(self, name)
        if path is None:
            raise ValueError(f"this system needs {WEIGHT_FILES[name]}: give its path as {name}")
        return path


WEIGHT_FILES = {
    "paint_by_example": "a Paint by Example checkpoint",
    "stable_diffusion": "a Stable Diffusion v1 checkpoint",
    "adm": "a guided-diffusion checkpoint (256x256_diffusion_uncond.pt or 512x512_diffusion.pt)",
    "clip": "a CLIP checkpoint (ViT-L-14.pt for Stable Diffusion, ViT-B-16.pt for Blended Diffusion)",
    "vocabulary": "CLIP's vocabulary (bpe_simple_vocab_16e6.txt.gz)",
}


Setting = int | float | str | list[int] | None  # JSON values


@dataclass(frozen=True)
class Baseline:
    """What is known of a system before its files are read.

    kind: the dataclass that it is. load: opens it.
    guide: what it reads beside photo and mask: the object's own pixels, the exemplar as networks see it, or the label.
    files: those of `Weights` that it needs.
    settings: the fields of `kind`, with their published values, that make its pictures what they are.
    """

    kind: type
    load: Callable[[Weights], System]
    guide: Literal["cutout", "exemplar", "label"]
    files: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def choose_settings(self, given: Mapping[str, Setting]) -> dict[str, Setting]:
        """The published values of the settings, but for those among them that are given and not None.

        Blended Diffusion's skipped steps stay the same share of all. ValueError for values out of range.
        """
        published = {name: getattr(self.kind, name) for name in self.settings}
        chosen = published | {name: given[name] for name in published if given.get(name) is not None}
        EditSettings(**{name: value for name, value in chosen.items() if name in SETTINGS})  # checks them
        if "skipped" in chosen:
            chosen["skipped"] = published["skipped"] * chosen["steps"] // published["steps"]
        return chosen
