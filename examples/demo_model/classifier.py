"""A small classifier of the training photos' objects, whose features compare crops.

It is not `pbe.evaluation.surrogate`, which has the last stage's features alone, as CLIP has: here all stages count, and
every figure of docs/demo-model.md and HISTORY.md is measured with this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo_model.embeddings import resized
from pbe.checkpoints.meta_device import build_on_meta

WIDTHS = (24, 48, 96, 128, 192)  # channels of the stages


class CropClassifier(nn.Module):
    """A small convolutional network that tells the classes of crops (N, 3, side, side) in [0, 1] apart.

    As many stages as leave 4 x 4 places: four for 64 pixels, five for 128.
    Its features are the means over the picture of what each stage gives, early ones (colours, textures) beside late
    ones (forms), standardised over the training crops.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, num_classes: int, side: int):
        super().__init__()
        self.side = side
        widths = WIDTHS[: side.bit_length() - 3]
        self.stages = nn.ModuleList(_stage(i, o) for i, o in pairwise((3, *widths)))
        self.head = nn.Linear(widths[-1], num_classes)
        self.register_buffer("feature_mean", torch.zeros(sum(widths)))
        self.register_buffer("feature_std", torch.ones(sum(widths)))

    def forward(self, crops: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(self._means(crops)[-1])

    @torch.no_grad()
    def features(self, crops: Tensor) -> Tensor:
        """Unit vectors (N, D): an `Embedding`."""
        return F.normalize((self.pooled(crops) - self.feature_mean) / self.feature_std, dim=1)

    def pooled(self, crops: Tensor) -> Tensor:
        """The means of all stages (N, D)."""
        return torch.cat([torch.cat(self._means(part), dim=1) for part in crops.split(256)])

    def _means(self, crops: Tensor) -> list[Tensor]:
        x, means = resized(crops, self.side) * 4 - 2, []
        for stage in self.stages:
            x = stage(x)
            means.append(x.mean(dim=(2, 3)))
        return means


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    """Halves the picture."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def train_classifier(
    crops: Tensor, labels: Tensor, num_classes: int, *, epochs: int, side: int = 64, seed: int = 0, batch_size: int = 64
) -> CropClassifier:
    """A classifier trained on crops (N, 3, S, S) in [0, 1], which it sees at `side`, with labels long (N,), then
    frozen: in evaluation mode.

    Batches have `batch_size` crops, or all of them where there are fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    model = initialized(num_classes, side, generator)
    batch_size = min(batch_size, len(crops))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(crops) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(crops), generator=generator)
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(model(moved(crops[batch], generator)), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    standardise(model, crops)
    return model.requires_grad_(False)


def initialized(num_classes: int, side: int, generator: torch.Generator) -> CropClassifier:
    model = build_on_meta(partial(CropClassifier, side=side), num_classes).to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    nn.init.normal_(model.head.weight, std=0.01, generator=generator)
    nn.init.zeros_(model.head.bias)
    nn.init.zeros_(model.feature_mean)
    nn.init.ones_(model.feature_std)
    return model


def moved(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Crops mirrored half the time, scaled by up to a fifth and moved by up to a tenth: their colours stay."""
    n = len(crops)
    flip, scale, *shift = torch.rand(4, n, generator=generator)
    flip, scale = (flip < 0.5).float() * 2 - 1, 0.8 + 0.3 * scale
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip * scale, scale
    theta[:, :, 2] = torch.stack(shift, dim=1) * 0.4 - 0.2
    grid = F.affine_grid(theta, list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def standardise(model: CropClassifier, crops: Tensor) -> None:
    """Sets the mean and spread of the features to those of some crops."""
    features = model.pooled(crops)
    model.feature_mean.copy_(features.mean(dim=0))
    model.feature_std.copy_(features.std(dim=0).clamp(min=1e-6))


def save_classifier(model: CropClassifier, classes: Sequence[str], path: Path) -> None:
    torch.save({"classes": list(classes), "side": model.side, "state_dict": model.state_dict()}, path)


def load_classifier(path: Path) -> tuple[CropClassifier, list[str]]:
    """A classifier that `save_classifier` wrote, frozen, and its classes; ValueError for another kind of file."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.keys() != {"classes", "side", "state_dict"}:
        raise ValueError(f"{path} is not a classifier.pt that `measure` wrote")
    model = build_on_meta(partial(CropClassifier, side=content["side"]), len(content["classes"]))
    model.load_state_dict(content["state_dict"], assign=True)
    return model.eval().requires_grad_(False), content["classes"]
