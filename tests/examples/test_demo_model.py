"""The model in the box: it is found, small, and paints by example."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pbe
from pbe.checkpoints.formats.opening import find_checkpoint
from pbe.cli.checkpoint import main as checkpoint
from pbe.cli.edit import main as inference
from pbe.editing.settings import quick_settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLOURS = ("red", "yellow", "pink", "violet", "white")


@pytest.fixture(scope="module")
def model():
    return pbe.load_model("demo", device="cpu")


def paint(model, exemplar, **settings):
    photo, mask = EXAMPLES / "flower.jpg", EXAMPLES / "flower_mask.png"
    settings = {**vars(quick_settings("demo")), **settings}
    return [np.asarray(image, float) for image in pbe.edit(model, photo, mask, exemplar, **settings)]


def test_it_is_found_anywhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_bytes(b"a file of one's own")
    path = find_checkpoint("demo")
    assert path.is_file()
    assert path.stat().st_size < 30e6
    assert find_checkpoint("./demo") == Path("demo")
    assert model.config.resolution == 128
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
        (result,) = paint(model, EXAMPLES / f"flower_{colour}.jpg", steps=5)
        nearest = np.abs(means - result[inside].mean(axis=0)).sum(axis=1).argmin()
        hits += COLOURS[nearest] == colour
    assert hits >= 4  # of five


def test_each_exemplar_s_form_arrives(model):
    """Of three objects, each result's light and dark are most like its own exemplar's; chance is one in three."""
    with Image.open(EXAMPLES / "flower_mask.png") as mask:
        box = mask.getbbox()
    names = ("cat.png", "cup.webp", "helmet.webp")

    def form(picture):
        """The middle of a picture, 16 pixels wide, in grey levels of mean 0 and norm 1."""
        small = np.asarray(picture.convert("L").resize((24, 24), Image.Resampling.BOX), float)[4:-4, 4:-4]
        small = small - small.mean()
        return small / np.linalg.norm(small)

    exemplars = [form(Image.open(EXAMPLES / name)) for name in names]
    for i, name in enumerate(names):
        (result,) = paint(model, EXAMPLES / name, steps=5)
        seen = form(Image.fromarray(result.astype(np.uint8)).crop(box))
        assert np.argmax([(seen * exemplar).sum() for exemplar in exemplars]) == i, name


def test_seeds_differ_and_the_rest_of_the_photo_stays(model):
    a, b = paint(model, EXAMPLES / "flower_red.jpg", num_images=2)
    with Image.open(EXAMPLES / "flower.jpg") as photo, Image.open(EXAMPLES / "flower_mask.png") as mask:
        before, outside = np.asarray(photo, float), np.asarray(mask) == 0
    assert np.abs(a - b)[~outside].mean() > 2
    assert (a[outside] == before[outside]).all()


def test_the_command_takes_it(tmp_path):
    out = tmp_path / "out.png"
    files = ["--image", "flower.jpg", "--mask", "flower_mask.png", "--exemplar", "flower_pink.jpg"]
    files = [str(EXAMPLES / name) if not name.startswith("--") else name for name in files]
    assert inference([*files, "--ckpt", "demo", "--device", "cpu", "--steps", "4", "--out", str(out)]) == 0
    with Image.open(out) as picture, Image.open(EXAMPLES / "flower.jpg") as photo:
        assert picture.size == photo.size
