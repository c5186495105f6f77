"""A small classifier in place of CLIP, DINO and Inception, where their weights are not at hand.

Its features depend on its own training data: its scores order systems on one test set, and do not compare with
published ones. Every report labels them as a surrogate's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.writing import save_checkpoint
from pbe.data.records import Record, Source
from pbe.evaluation.cocoee import read_rgb, to_tensor
from pbe.images.windows import Box


@dataclass(frozen=True)
class SurrogateConfig:
    """Sizes of `Surrogate`."""

    num_classes: int
    image_size: int = 64
    width: int = 32
    num_levels: int = 3
    num_features: int = 64


class Surrogate(nn.Module):
    """A residual network: a level halves the picture and doubles the channels; its features are a mean over pixels."""

    def __init__(self, config: SurrogateConfig):
        super().__init__()
        self.config = config
        widths = [config.width * 2**i for i in range(config.num_levels)]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.levels = nn.Sequential(
            *(SurrogateLevel(a, b) for a, b in pairwise([widths[0], *widths])),
        )
        self.project = nn.Conv2d(widths[-1], config.num_features, 1)
        self.head = nn.Linear(config.num_features, config.num_classes)

    def features(self, image: Tensor) -> Tensor:
        """(B, num_features) of pictures (B, 3, S, S) in [-1, 1]."""
        return F.relu(self.project(self.levels(self.stem(image)))).mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(image))


class SurrogateLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return y + self.skip(F.avg_pool2d(x, 2))


def surrogate_input(image: Image.Image, size: int) -> Tensor:
    """An RGB image for the network: (3, size, size) in [-1, 1], whatever its aspect."""
    return 2 * to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)) - 1


# --- training ---------------------------------------------------------------------------------------------


def train_surrogate(
    source: Source,
    epochs: int = 20,
    image_size: int = 64,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> tuple[Surrogate, list[str]]:
    """A classifier of the labelled boxes of a source, and the classes' names.

    Each object's box is seen with a random shift, size and flip. `on_epoch` is called with the epoch, the mean loss
    and the share of objects that were recognised. ValueError without labels, with one class alone, without an epoch,
    and for a size that cannot be halved three times.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be 1 or more, got {epochs}")
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size must be a positive multiple of 8, got {image_size}")
    pictures, labels = _labelled_boxes(source, round(image_size * 1.25))
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"{source.name} has only the class {names[0]!r}; a classifier needs two or more")
    targets = torch.tensor([names.index(label) for label in labels])
    generator = torch.Generator().manual_seed(seed)
    model = _drawn(SurrogateConfig(len(names), image_size), generator).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    steps = epochs * -(-len(pictures) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    for epoch in range(epochs):
        losses = right = 0.0
        for chosen in torch.randperm(len(pictures), generator=generator).split(batch_size):
            x = _shifted(pictures[chosen], image_size, generator).to(device)
            y = targets[chosen].to(device)
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item() * len(y)
            right += (logits.argmax(dim=1) == y).sum().item()
        if on_epoch is not None:
            on_epoch(epoch, losses / len(pictures), right / len(pictures))
    return model.eval(), names


@torch.inference_mode()
def count_recognised(model: Surrogate, classes: list[str], source: Source, batch_size: int = 64) -> tuple[int, int]:
    """How many objects of a labelled source the classifier names right, and of how many whose class it knows.

    ValueError for a source without labels, or with none of the classes.
    """
    pictures, labels = _labelled_boxes(source, model.config.image_size)
    known = [i for i, label in enumerate(labels) if label in classes]
    if not known:
        raise ValueError(f"{source.name} has no object of the classes {', '.join(classes)}")
    targets = torch.tensor([classes.index(labels[i]) for i in known])
    device = model.head.weight.device
    batches = pictures[known].split(batch_size)
    found = torch.cat([model(batch.to(device) / 127.5 - 1).argmax(dim=1).cpu() for batch in batches])
    return int((found == targets).sum()), len(known)


def _drawn(config: SurrogateConfig, generator: torch.Generator) -> Surrogate:
    """A network with He et al.'s normal weights, gains of 1 and biases of 0."""
    model = build_on_meta(Surrogate, config)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            state[name] = torch.randn(parameter.shape, generator=generator) * (2 / parameter[0].numel()) ** 0.5
        else:
            state[name] = torch.full(parameter.shape, float(name.endswith("weight")))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_()


def object_box(record: Record, size: tuple[int, int], i: int = 0) -> Box:
    """The whole pixels that box `i` of a record touches in a picture of `size` (height, width)."""
    height, width = size
    corners = record.boxes[i] * np.array([width, height, width, height], dtype=np.float64)
    nearest = np.rint(corners)
    corners = np.where(np.abs(corners - nearest) < 1e-3, nearest, corners)  # boxes are fractions in float32
    (x0, y0), (x1, y1) = np.floor(corners[:2]).astype(int), np.ceil(corners[2:]).astype(int)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return Box(int(x0), int(y0), int(max(x1, x0 + 1)), int(max(y1, y0 + 1)))


def _labelled_boxes(source: Source, side: int) -> tuple[Tensor, list[str]]:
    """Every labelled object as uint8 (N, 3, side, side), and its label."""
    pictures, labels = [], []
    for i in range(len(source)):
        record = source[i]
        if record.labels is None or not all(record.labels):
            raise ValueError(f"{source.name}: {record.image} has no label, and a classifier needs one for each object")
        image = read_rgb(record.image)
        for k, label in enumerate(record.labels):
            crop = image.crop(object_box(record, image.size[::-1], k))
            pictures.append((to_tensor(crop.resize((side, side), Image.Resampling.BICUBIC)) * 255).byte())
            labels.append(label)
    return torch.stack(pictures), labels


def _shifted(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, S, S) as [-1, 1] (B, 3, size, size): a random part of each, flipped half the time."""
    B = len(pictures)
    scale = 0.7 + 0.3 * torch.rand(B, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(B, 2, generator=generator) - 1)
    flip = torch.where(torch.rand(B, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
    grid = F.affine_grid(theta, [B, 3, size, size], align_corners=False)
    return F.grid_sample(pictures.float() / 127.5 - 1, grid, padding_mode="reflection", align_corners=False)


# --- files ------------------------------------------------------------------------------------------------


def save_surrogate(
    model: Surrogate, path: str | Path, classes: list[str], about: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Writes the network with its sizes, its classes and what is to be said `about` its training."""
    entry = {"surrogate": asdict(model.config), "classes": classes, "about": dict(about)}
    save_checkpoint(model.state_dict(), path, entry, overwrite)


def load_surrogate(path: str | Path) -> Surrogate:
    """Reads what `save_surrogate` wrote; FileNotFoundError, or CheckpointError for another file."""
    checkpoint = open_checkpoint(path)
    entry = checkpoint.extras.get("pbe")
    if not (isinstance(entry, dict) and isinstance(entry.get("surrogate"), dict)):
        raise CheckpointError(f"{path} does not hold a surrogate; `pbe evaluate surrogate` trains one")
    try:
        model = build_on_meta(Surrogate, SurrogateConfig(**entry["surrogate"]))
        model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds a surrogate that does not fit together: {error}") from None
    return model.eval()
