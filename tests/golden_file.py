"""The original code's outputs on a small configuration, and the inputs and parameters that gave them.

Neither inputs nor parameters are stored: both are drawn from generators seeded by their names.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbe.models.clip import CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig

FOLDER = Path(__file__).parent / "golden"
META = json.loads((FOLDER / "small.json").read_text())
SEED = META["seed"]

CONFIG = PaintByExampleConfig(
    unet=UNetConfig(model_channels=32),
    vae=VAEConfig(channels=32),
    exemplar=ExemplarConfig(vision=CLIPVisionConfig(num_layers=2)),
    resolution=64,
)


def outputs() -> dict[str, Tensor]:
    with np.load(FOLDER / "small.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def noise(name: str, *shape: int, seed: int = SEED) -> Tensor:
    """Standard normal numbers that depend on `name` alone."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) % 2**31)
    return torch.randn(shape, generator=generator)


def parameter(name: str, shape: list[int], seed: int = SEED) -> Tensor:
    """The parameter called `name`: unit gain for weights, small biases."""
    x = noise(name, *shape, seed=seed)
    if len(shape) >= 2:
        return x / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x


def state_dict() -> dict[str, Tensor]:
    return {name: parameter(name, shape) for name, shape in META["parameters"].items()}


def model() -> PaintByExample:
    model = PaintByExample(CONFIG)
    model.load_state_dict(state_dict())
    return model.eval()


def inputs() -> dict[str, Tensor]:
    mask = torch.ones(2, 1, 64, 64)
    mask[:, :, 19:49, 13:34] = 0
    return {
        "x9": noise("x9", 2, 9, 8, 8),
        "context": noise("context", 2, 1, 768),
        "context5": noise("context5", 2, 5, 768),
        "t": torch.tensor([37, 901]),
        "image": noise("image", 2, 3, 64, 64).clamp(-1, 1),
        "mask": mask,
        "z": noise("z", 2, 4, 8, 8),
        "reference": noise("reference", 2, 3, 224, 224),
        "x_T": noise("x_T", 2, 4, 8, 8),
        "x0": noise("x0", 2, 4, 8, 8),
        "train_noise": noise("train_noise", 2, 4, 8, 8),
    }
