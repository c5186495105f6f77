"""Photos with a region to repaint, the exemplars to repaint them as, and the model's pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from examples.demo_model.embeddings import resized
from pbe.data.dataset import ExampleDataset
from pbe.data.recipe import Stages, to_unit_range
from pbe.editing.edit import check_finite, sample_latents
from pbe.editing.settings import DEMO, settings_for
from pbe.editing.window import feather_width
from pbe.images.seams import poisson_blend
from pbe.images.windows import Box, feather_weights, mask_bounding_box
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.collage import collages
from pbe.models.paint_by_example import Condition, PaintByExample


@dataclass(frozen=True)
class Cases:
    """N photos seen through their windows.

    image: (N, 3, R, R) in [-1, 1]. mask: (N, 1, R, R), 1 = keep. exemplar: (N, 3, S, S) in [0, 1], the photo's own
    object; aspect: height over width of what it was cut from. place: where the photo lies in each window; gray bars are
    around it. kind, label: the folder of the photo and the name of its object.
    """

    image: Tensor
    mask: Tensor
    exemplar: Tensor
    aspect: list[float]
    place: list[Box]
    kind: list[str]
    label: list[str]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, chosen: slice | Sequence[int]) -> Cases:
        """Some of the cases."""
        numbers = range(len(self))[chosen] if isinstance(chosen, slice) else chosen
        image, mask, exemplar = (tensor[list(numbers)] for tensor in (self.image, self.mask, self.exemplar))
        aspect, place = [self.aspect[i] for i in numbers], [self.place[i] for i in numbers]
        kind, label = ([names[i] for i in numbers] for names in (self.kind, self.label))
        return Cases(image, mask, exemplar, aspect, place, kind, label)


def read_cases(dataset: ExampleDataset, count: int) -> Cases:
    """The first `count` examples of a data set; ValueError if it has fewer, or fewer than two are asked for."""
    if not 2 <= count <= len(dataset):
        raise ValueError(f"{dataset.source.name} has {len(dataset)} photos that fit; {count} were asked for")
    stages = [dataset.stages(i) for i in range(count)]
    return Cases(
        image=torch.stack([s.example.image for s in stages]),
        mask=torch.stack([s.example.mask for s in stages]),
        exemplar=torch.stack([crop_of(s) for s in stages]),
        aspect=[s.pixels.exemplar_aspect for s in stages],
        place=[s.geometry.content for s in stages],
        kind=[kind_of(s.record.image.parts) for s in stages],
        label=[label_of(s) for s in stages],
    )


def read_crops(dataset: ExampleDataset) -> tuple[Tensor, list[str]]:
    """The exemplars (N, 3, S, S) in [0, 1] of all examples of a data set, and the names of their objects."""
    size = dataset.recipe.exemplar_size
    crops, labels = torch.empty(len(dataset), 3, size, size), []
    for i, crop in enumerate(crops):
        stages = dataset.stages(i)
        crop.copy_(crop_of(stages))
        labels.append(label_of(stages))
    return crops, labels


def crop_of(stages: Stages) -> Tensor:
    return (to_unit_range(stages.pixels.exemplar_crop) + 1) / 2


def label_of(stages: Stages) -> str:
    return stages.record.labels[stages.geometry.object] if stages.record.labels else ""


def kind_of(parts: Sequence[str]) -> str:
    """The folder that a photo's path belongs to: the last one not named `images`."""
    return next((part for part in reversed(parts[:-1]) if part != "images"), "")


def foreign(groups: Sequence[str], number: int, generator: torch.Generator) -> Tensor:
    """For each case, `number` other cases of its own group to take exemplars from: long (cases, number).

    Each column is a permutation, so that all exemplars are used equally often. ValueError if a group is too small.
    """
    others = torch.empty(len(groups), number, dtype=torch.long)
    for group in sorted(set(groups)):
        cases = torch.tensor([i for i, other in enumerate(groups) if other == group])
        if not 1 <= number < len(cases):
            raise ValueError(f"{len(cases)} cases have at most {len(cases) - 1} foreign exemplars each, not {number}")
        order = cases[torch.randperm(len(cases), generator=generator)]
        others[order] = torch.stack([order.roll(-k) for k in range(1, number + 1)], dim=1)
    return others


# --- the model's pictures ---------------------------------------------------------------------------------


def condition_of(model: PaintByExample, cases: Cases, others: Cases) -> Condition:
    """What the model is told when it is to repaint cases as the objects of as many others."""
    exemplars = T.normalize(others.exemplar, list(CLIP_MEAN), list(CLIP_STD))
    hole = collages(cases.image, cases.mask, exemplars, others.aspect) if model.config.collage else None
    given = [x if x is None else x.to(model.device, model.dtype) for x in (cases.image, cases.mask, exemplars, hole)]
    image, mask, exemplars, hole = given
    return model.condition(image, mask, exemplars, hole=hole)


@torch.no_grad()
def paint(
    model: PaintByExample,
    cases: Cases,
    others: Cases,
    seeds: Sequence[int],
    *,
    guidance: float,
    steps: int,
    sampler: str,
    batch_size: int = 32,
) -> Tensor:
    """The model's pictures (N, 3, R, R) in [-1, 1] of the cases repainted as the objects of as many others.

    Each picture follows from its own seed: the same one gives the same noise, whatever the exemplar.
    """
    given = {"guidance": guidance, "steps": steps, "sampler": sampler}
    settings = settings_for(given, defaults=DEMO)  # with the spacing that the sampler needs
    pictures = []
    for first in range(0, len(cases), batch_size):
        batch = slice(first, first + batch_size)
        condition = condition_of(model, cases[batch], others[batch])
        pictures.append(decode(model, sample_latents(model, condition, settings, seeds[batch])))
    return torch.cat(pictures)


def decode(model: PaintByExample, z_0: Tensor) -> Tensor:
    """Pictures (N, 3, R, R) in [-1, 1] of latents, on the CPU; ValueError if they are not finite."""
    decoded = model.vae.decode(z_0.to(model.dtype))
    check_finite(decoded)
    return decoded.float().clamp(-1, 1).cpu()


@torch.no_grad()
def reconstruct(model: PaintByExample, cases: Cases, batch_size: int = 32) -> Tensor:
    """The photos (N, 3, R, R) through the autoencoder and back: the best that the model can paint."""
    pictures = []
    for first in range(0, len(cases), batch_size):
        image = cases.image[first : first + batch_size].to(model.device, model.dtype)
        pictures.append(decode(model, model.vae.encode(image).mean))
    return torch.cat(pictures)


def paste(cases: Cases, exemplars: Tensor) -> Tensor:
    """The exemplars (N, 3, S, S), resized, in place of the regions: what an editor without a model does."""
    pictures = cases.image.clone()
    for picture, mask, exemplar in zip(pictures, cases.mask, exemplars, strict=True):
        box = region_box(mask)
        rows, columns = box.slices
        picture[:, rows, columns] = resized(exemplar[None], box.height, box.width)[0] * 2 - 1
    return torch.where(cases.mask > 0.5, cases.image, pictures)


def composite(cases: Cases, pictures: Tensor, seam: Literal["poisson", "feather"] = "poisson") -> Tensor:
    """The photos with their regions taken from `pictures` (N, 3, R, R), with the seam that `edit` gives them."""
    side = cases.image.shape[-1]
    width = feather_width(Box(0, 0, side, side), side)
    weights = np.stack([feather_weights(mask[0].numpy() < 0.5, width) for mask in cases.mask])
    w = torch.from_numpy(weights)[:, None]
    if seam == "poisson":
        triples = zip(pictures.split(1), cases.image.split(1), cases.mask.split(1), strict=True)
        pictures = torch.cat([poisson_blend(*triple) for triple in triples])
    return cases.image * (1 - w) + pictures * w


# --- regions ----------------------------------------------------------------------------------------------


def region_box(mask: Tensor) -> Box:
    """The bounding box of what a mask (1, R, R), 1 = keep, repaints."""
    return mask_bounding_box(mask[0].numpy() < 0.5)


def region_crops(pictures: Tensor, masks: Tensor, side: int) -> Tensor:
    """The regions' bounding boxes cut out of pictures (N, 3, R, R) in [-1, 1]: (N, 3, side, side) in [0, 1]."""
    crops = []
    for picture, mask in zip(pictures, masks, strict=True):
        rows, columns = region_box(mask).slices
        crops.append(resized(picture[None, :, rows, columns], side))
    return ((torch.cat(crops) + 1) / 2).clamp(0, 1)
