"""LPIPS on AlexNet (Zhang et al. 2018, arXiv 1801.03924), from torchvision's weights in a file the user names."""

from __future__ import annotations

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn
from torchvision.models import alexnet

from pbe.checkpoints.formats.opening import read_state_dict
from pbe.checkpoints.meta_device import build_on_meta
from pbe.evaluation.backbones import load_strictly

# The metric's own normalisation of [-1, 1], and the layers of `features` after whose ReLU it compares.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LAYERS = (1, 4, 7, 9, 11)


class LPIPS(nn.Module):
    """Σ_l mean over pixels of w_l · (ŷ_l - ŷ0_l)², where ŷ are features of unit length along the channels (eq. 1)."""

    def __init__(self, features: nn.Sequential, weights: list[Tensor]):
        super().__init__()
        self.features = features
        self.weights = nn.ParameterList(weight.flatten() for weight in weights)  # (C_l,)

    @torch.inference_mode()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance (B,) of pictures (B, 3, H, W) in [-1, 1], which may be on another device than the network."""
        device = self.weights[0].device
        shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (SHIFT, SCALE))
        x, y = ((picture.to(device, torch.float32) - shift) / scale for picture in (a, b))
        distance, done = torch.zeros(len(a), device=device), 0
        for layer, weight in zip(LAYERS, self.weights, strict=True):
            x, y = (self.features[done : layer + 1](z) for z in (x, y))
            done = layer + 1
            squared = (_unit(x) - _unit(y)).square()  # (B, C, h, w)
            distance += (squared * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return distance.to(a.device)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def load_lpips(path: str | Path, device: str | torch.device = "cpu") -> LPIPS:
    """LPIPS on torchvision's AlexNet (`alexnet-owt-7be5be79.pth`); its linear weights come with torchmetrics.

    FileNotFoundError, or CheckpointError where the file holds something else.
    """
    network = build_on_meta(lambda weights: alexnet(weights=weights), None)
    load_strictly(network, read_state_dict(path), path)
    shipped = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    linear = read_state_dict(shipped)
    model = LPIPS(network.features, [linear[f"lin{i}.model.1.weight"] for i in range(len(LAYERS))])
    return model.eval().requires_grad_(False).to(device)
