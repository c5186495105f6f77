"""What the tests of editing share."""

from dataclasses import replace

import pytest
from conftest import TINY

from pbe.checkpoints.seeding import seeded_state
from pbe.editing import edit as editing
from pbe.models.paint_by_example import Distilled, PaintByExample


@pytest.fixture(scope="module")
def model():
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


@pytest.fixture(scope="module")
def student(model):
    """The same weights, as if distilled."""
    student = PaintByExample(replace(TINY, distilled=Distilled("lcm", steps=2, guidance=1.0)))
    student.load_state_dict(model.state_dict())
    return student.eval()


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many windows went through the network at a time."""
    sizes, sample_latents = [], editing.sample_latents

    def noted(model, condition, *others):
        sizes.append(len(condition.z_masked))
        return sample_latents(model, condition, *others)

    monkeypatch.setattr(editing, "sample_latents", noted)
    return sizes
