"""The scripts in examples/ run as they stand, show the library rather than more of themselves, and do what they say."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pbe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ("custom_sampling.py", "custom_training.py", "serve_edits.py")


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """The photo, and where it is repainted."""
    with Image.open(EXAMPLES / "flower.jpg") as photo, Image.open(EXAMPLES / "flower_mask.png") as mask:
        return np.asarray(photo).astype(float), np.asarray(mask) > 0


def run(script: str, out: Path, **options):
    return runpy.run_path(str(EXAMPLES / script))["main"](str(out), **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_tells_how_it_is_run(script):
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"python examples/{script}" in text
    assert f"`{script}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_an_own_sampler_repaints_the_mask_alone(tmp_path, pictures):
    run("custom_sampling.py", tmp_path / "out.png", steps=4)
    photo, repaint = pictures
    difference = np.abs(np.asarray(Image.open(tmp_path / "out.png"), dtype=float) - photo)
    assert difference[~repaint].max() == 0
    assert difference[repaint].mean() > 10


def test_an_own_sampler_is_heun_s_method():
    """On the one sample whose score is known, x_0 = 0, where eps = x_t / sqrt(1 - alpha_bar_t): it arrives there."""
    from pbe.sampling import NoiseSchedule, trailing

    heun = runpy.run_path(str(EXAMPLES / "custom_sampling.py"))["heun"]
    schedule = NoiseSchedule.scaled_linear()
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = (1 - schedule.alpha_bar).sqrt()
    z_0 = heun(lambda x_t, t: x_t / sigma[t].view(-1, 1, 1, 1), x_T, trailing(schedule, 10))
    assert torch.allclose(z_0, x_T * sigma[0] / sigma[999], rtol=1e-6)


def test_a_loop_of_one_s_own_trains_a_model_that_edits(tmp_path):
    losses = run("custom_training.py", tmp_path / "out.ckpt", epochs=2)
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    before, after = (pbe.load_model(name, device="cpu", dtype="float32") for name in ("demo", tmp_path / "out.ckpt"))
    assert not torch.equal(before.unet.out[2].weight, after.unet.out[2].weight)
    assert torch.equal(before.proj_out.weight, after.proj_out.weight)
    (picture,) = pbe.edit(
        after, EXAMPLES / "flower.jpg", EXAMPLES / "flower_mask.png", EXAMPLES / "flower_red.jpg", steps=4
    )
    assert picture.size == (640, 427)


def test_edits_are_served(tmp_path, pictures, capsys):
    run("serve_edits.py", tmp_path / "out.png", steps=4)
    photo, repaint = pictures
    results = np.hsplit(np.asarray(Image.open(tmp_path / "out.png"), dtype=float), 3)
    assert all(np.array_equal(result[~repaint], photo[~repaint]) for result in results)
    assert not np.array_equal(results[0], results[1])
    assert "refused: mask is 640x100" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gallery_is_that_of_the_page(tmp_path):
    gallery = runpy.run_path(str(EXAMPLES / "gallery.py"))
    docs = EXAMPLES.parent / "docs"
    kept = {path.stem: path for path in (docs / "images" / "gallery").iterdir()}
    shown = re.findall(r"!\[.+\]\(images/gallery/(\w+)\.jpg\)", (docs / "editing.md").read_text(encoding="utf-8"))
    assert sorted(kept) == sorted(gallery["STRIPS"]) == sorted(shown)
    gallery["main"](str(tmp_path), "fill_holes")
    with Image.open(tmp_path / "fill_holes.jpg") as made, Image.open(kept["fill_holes"]) as old:
        assert np.abs(np.asarray(made, dtype=float) - np.asarray(old)).mean() < 1
