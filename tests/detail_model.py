"""A tiny model with a detail adapter that has learnt something, and its file."""

from functools import cache

import torch
from conftest import TINY

from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_checkpoint
from pbe.models.detail import DetailConfig, is_detail, sizes
from pbe.models.paint_by_example import PaintByExample
from pbe.training.detail import start_detail

CONFIG = DetailConfig(tokens=3, layers=2, width=64)


@cache
def state_of(config):
    return seeded_state(config, 0)


def make_model(config=TINY):
    model = PaintByExample(config)
    model.load_state_dict(state_of(config))  # copies it
    return model.eval()


def with_detail(config=TINY, taught=True):
    model = make_model(config)
    start_detail(model, CONFIG, seed=1)
    if taught:
        teach(model)
    return model


@torch.no_grad()
def teach(model):
    """Keys, values and null tokens are not what they were at the start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("_detail.weight", "null_tokens")):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def own_tensors(model):
    return {name: x for name, x in model.state_dict().items() if is_detail(name)}


def save(path, model=None, **entry):
    save_checkpoint(own_tensors(model or with_detail()), path, {**entry, "detail": sizes(CONFIG)})
    return path
