"""The model in the box: it is found, small, and paints by example."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pbe
from pbe.checkpoints.formats.opening import find_checkpoint
from pbe.cli.checkpoint import main as checkpoint
from pbe.cli.edit import main as inference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLOURS = ("red", "yellow", "pink", "violet", "white")


@pytest.fixture(scope="module")
def model():
    return pbe.load_model("demo", device="cpu")


def paint(model, exemplar, **settings):
    photo, mask = EXAMPLES / "flower.jpg", EXAMPLES / "flower_mask.png"
    settings = {"sampler": "dpm_solver", "spacing": "trailing", "steps": 10, "guidance": 3.0, **settings}
    return [np.asarray(image, float) for image in pbe.edit(model, photo, mask, exemplar, **settings)]


def test_it_is_found_anywhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_bytes(b"a file of one's own")
    path = find_checkpoint("demo")
    assert path.is_file()
    assert path.stat().st_size < 30e6
    assert find_checkpoint("./demo") == Path("demo")
    assert model.config.resolution == 64
    assert pbe.load_model(Path("demo"), device="cpu").config == model.config


def test_it_says_what_it_was_trained_on(capsys):
    assert checkpoint(["inspect", "demo"]) == 0
    printed = capsys.readouterr().out
    assert "averaged copies: no" in printed
    assert "'trained_on': 'manifest" in printed


def test_each_exemplar_s_colour_arrives(model):
    """Of five flowers that differ in colour alone, each result is nearest to its own, where chance is one in five."""
    with Image.open(EXAMPLES / "flower_mask.png") as mask:
        inside = np.asarray(mask) > 0
    shape = np.hypot(*np.mgrid[-1:1:196j, -1:1:196j]) < 0.8  # the flower's disc in its exemplar
    exemplars = {}
    for colour in COLOURS:
        with Image.open(EXAMPLES / f"flower_{colour}.jpg") as exemplar:
            exemplars[colour] = np.asarray(exemplar, float)[shape].mean(axis=0)
    means = np.array(list(exemplars.values()))
    hits = 0
    for colour in COLOURS:
        for result in paint(model, EXAMPLES / f"flower_{colour}.jpg", num_images=2, seed=0):
            nearest = np.abs(means - result[inside].mean(axis=0)).sum(axis=1).argmin()
            hits += COLOURS[nearest] == colour
    assert hits >= 7  # of ten


def test_seeds_differ_and_the_rest_of_the_photo_stays(model):
    a, b = paint(model, EXAMPLES / "flower_red.jpg", num_images=2)
    with Image.open(EXAMPLES / "flower.jpg") as photo, Image.open(EXAMPLES / "flower_mask.png") as mask:
        before, outside = np.asarray(photo, float), np.asarray(mask) == 0
    assert np.abs(a - b)[~outside].mean() > 5
    assert (a[outside] == before[outside]).all()


def test_the_command_takes_it(tmp_path):
    out = tmp_path / "out.png"
    files = ["--image", "flower.jpg", "--mask", "flower_mask.png", "--exemplar", "flower_pink.jpg"]
    files = [str(EXAMPLES / name) if not name.startswith("--") else name for name in files]
    assert inference([*files, "--ckpt", "demo", "--device", "cpu", "--steps", "4", "--out", str(out)]) == 0
    with Image.open(out) as picture, Image.open(EXAMPLES / "flower.jpg") as photo:
        assert picture.size == photo.size
