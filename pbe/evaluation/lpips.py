"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) from files the user names: on AlexNet, or as a loss on a surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn
from torchvision.models import alexnet

from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint, read_state_dict
from pbe.checkpoints.meta_device import build_on_meta
from pbe.evaluation.backbones import load_strictly
from pbe.evaluation.surrogate import load_surrogate

# The metric's own normalisation of [-1, 1], and the layers of `features` after whose ReLU it compares.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LAYERS = (1, 4, 7, 9, 11)


class LPIPS(nn.Module):
    """Σ_l mean over pixels of w_l · (ŷ_l - ŷ0_l)², where ŷ are features of unit length along the channels (eq. 1).

    Each of the `stages` goes on from the features of the one before, the first from (picture - shift) / scale.
    """

    def __init__(
        self, stages: Sequence[nn.Module], weights: Sequence[Tensor], shift: Sequence[float], scale: Sequence[float]
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.weights = nn.ParameterList(weight.flatten() for weight in weights)  # (C_l,), or (1,) for all channels
        self.shift, self.scale = (nn.Parameter(torch.tensor(x)[:, None, None]) for x in (shift, scale))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance (B,) of pictures (B, 3, H, W) in [-1, 1], which may be on another device than the network."""
        device = self.weights[0].device
        x, y = ((picture.to(device, torch.float32) - self.shift) / self.scale for picture in (a, b))
        distance = torch.zeros(len(a), device=device)
        for stage, weight in zip(self.stages, self.weights, strict=True):
            x, y = stage(x), stage(y)
            squared = (_unit(x) - _unit(y)).square()  # (B, C, h, w)
            distance += (squared * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return distance.to(a.device)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def load_lpips(path: str | Path, device: str | torch.device = "cpu") -> LPIPS:
    """LPIPS on torchvision's AlexNet (`alexnet-owt-7be5be79.pth`); its linear weights come with torchmetrics.

    FileNotFoundError, or CheckpointError where the file holds something else.
    """
    network = build_on_meta(lambda weights: alexnet(weights=weights), None)
    load_strictly(network, read_state_dict(path), path)
    shipped = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    linear = read_state_dict(shipped)
    stages = [network.features[first + 1 : last + 1] for first, last in pairwise((-1, *LAYERS))]
    weights = [linear[f"lin{i}.model.1.weight"] for i in range(len(LAYERS))]
    return LPIPS(stages, weights, SHIFT, SCALE).eval().requires_grad_(False).to(device)


def load_perceptual(path: str | Path) -> LPIPS:
    """LPIPS on a surrogate's levels, without learned weights; of a file with AlexNet, `load_lpips`.

    FileNotFoundError, or CheckpointError where the file holds neither.
    """
    entry = open_checkpoint(path).extras.get("pbe")
    if isinstance(entry, dict) and "surrogate" in entry:
        network = load_surrogate(path)
        stages = [network.stem, *network.levels]
        return LPIPS(stages, [torch.ones(1)] * len(stages), (0.0,) * 3, (1.0,) * 3).eval().requires_grad_(False)
    try:
        return load_lpips(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; expected it, or what `pbe evaluate surrogate` writes") from None
